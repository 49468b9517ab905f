"""Checkpoints of LLaVA's shape: names of both layouts, towers of their own, vocabularies that grow, equal models."""

import json
import re
import shutil
import struct
from fnmatch import fnmatch

import pytest
import torch
from factories import tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from hf_vtc.convert import convert, from_base, llava_hf, llava_official, load_official
from hf_vtc.convert.assets import load_tokenizer
from hf_vtc.convert.plan import Renamed, with_rows_for
from hf_vtc.models.processing_vtc import chat_template_for

IMAGE_TOKEN_ID = 60
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def stock_model(kind="llava", tower="clip", text_type="llama", tied=False, dtype=torch.float32, **fields):
    """An uncompressed model of transformers with weights that matter."""
    vision = CLIPVisionConfig(**VISION) if tower == "clip" else SiglipVisionConfig(**VISION, vision_use_head=False)
    common = {
        "vision_config": vision,
        "text_config": {"model_type": text_type, **TEXT, "tie_word_embeddings": tied},
        "image_token_index": IMAGE_TOKEN_ID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "tie_word_embeddings": tied,
        **fields,
    }
    if kind == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**common, image_seq_length=16))
    else:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS))
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
    return model


def prompt(dtype=torch.float32):
    """Two images, with text around them."""
    ids = [1, 2, *[IMAGE_TOKEN_ID] * 16, 3, *[IMAGE_TOKEN_ID] * 16, 4, 5]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(2, 3, 32, 32).to(dtype)}


def next_prompt(model):
    """Two images of other shapes for LLaVA-NeXT: the wide one on a canvas of 1 x 3 tiles, the other on 2 x 2."""
    sizes, tiles = torch.tensor([[40, 100], [50, 41]]), torch.tensor([4, 5])
    pixels = torch.randn(9, 3, 32, 32)
    padded = torch.zeros(2, 5, 3, 32, 32)
    padded[0, :4], padded[1] = pixels[:4], pixels[4:]
    with torch.no_grad():
        features = model.get_image_features(padded, sizes, vision_feature_layer=model.config.vision_feature_layer)
    features = features if isinstance(features, (list, tuple)) else features.pooler_output
    counts = [len(image) for image in features]
    ids = [1, *[IMAGE_TOKEN_ID] * counts[0], 3, *[IMAGE_TOKEN_ID] * counts[1], 4]
    ids = torch.tensor([ids])
    theirs = {"input_ids": ids, "pixel_values": padded, "image_sizes": sizes}
    return theirs, {"input_ids": ids, "pixel_values": pixels, "num_tiles": tiles, "image_sizes": sizes}


# bases of transformers


@pytest.mark.window
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_from_base_equals_llava_bit_for_bit(tmp_path, tied, dtype):
    stock_model(tied=tied, dtype=dtype).save_pretrained(tmp_path / "hf")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta", compress_layer_idx=1, compress_stride=4)
    assert not report.fresh_keys and not report.unused_keys and not report.missing_keys
    inputs = prompt(dtype)
    for model in (
        from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4),
        from_base(tmp_path / "hf", "llavolta", compress_layer_idx=1, compress_stride=4),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "dst", dtype="auto"),
    ):
        assert model.dtype == dtype and not model.training
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert (model.config.compress_layer_idx, model.config.compress_stride) == (1, 4)
        with torch.no_grad():
            assert torch.equal(model(**inputs, vtc_budget="full").logits, base(**inputs).logits)
            assert model(**inputs).num_visual_tokens.tolist() == [4, 4]


@pytest.mark.window
@pytest.mark.parametrize("tower", ("clip", "siglip"))
@pytest.mark.parametrize("text_type", ("llama", "mistral", "qwen2", "qwen3"))
def test_towers_and_decoders(tower, text_type):
    base = stock_model(tower=tower, text_type=text_type)
    inputs = prompt()
    with torch.no_grad():
        model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4)
        assert torch.equal(model(**inputs, vtc_budget="full").logits, base(**inputs).logits)


@pytest.mark.window
@pytest.mark.parametrize("layer", (-1, -2, 2))
@pytest.mark.parametrize("tower", ("clip", "siglip"))
@pytest.mark.parametrize("kind", ("llava", "llava_next"))
def test_towers_are_read_as_transformers_reads_them(kind, tower, layer):
    """The output of an encoder layer, without the norm behind the last one."""
    base = stock_model(kind, tower, vision_feature_layer=layer)
    theirs, ours = next_prompt(base) if kind == "llava_next" else (prompt(),) * 2
    model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4)
    with torch.no_grad():
        assert torch.equal(model(**ours, vtc_budget="full").logits, base(**theirs).logits)


@pytest.mark.window
def test_from_base_equals_llava_next_bit_for_bit(tmp_path):
    base = stock_model("llava_next")
    base.save_pretrained(tmp_path / "hf")
    theirs, ours = next_prompt(base)
    for model in (
        from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4),
        from_base(tmp_path / "hf", "llavolta", compress_layer_idx=1, compress_stride=4),
    ):
        with torch.no_grad():
            expected = base(**theirs).logits
            assert torch.equal(model(**ours, vtc_budget="full").logits, expected)
            full = model.count_visual_tokens(**ours, vtc_budget="full")
            assert model.count_visual_tokens(**ours).tolist() == (full // 4).tolist()
            assert not torch.allclose(model(**ours).logits, expected, atol=1e-3)


def test_llava_next_needs_what_the_processor_says():
    base = stock_model("llava_next")
    model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4)
    _, ours = next_prompt(base)
    with pytest.raises(ValueError, match="image_sizes"):
        model(**{name: value for name, value in ours.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match="2 x 2 tiles"):
        # of another shape than its tiles
        model(**{**ours, "image_sizes": torch.tensor([[50, 41], [50, 41]])})


def test_text_batches_of_llava_next_reach_the_newline():
    base = stock_model("llava_next")
    model = from_base(base, "llavolta", compress_layer_idx=1, compress_stride=4).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.image_newline.grad is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
            "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
        ),
        ("model.vision_tower.embeddings.class_embedding", "model.vision_tower.embeddings.class_embedding"),
        ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
        ("image_newline", "model.image_newline"),
        ("model.image_newline", "model.image_newline"),
    ],
)
def test_names_of_transformers(name, expected):
    assert llava_hf.rename(name).names == (expected,)
    assert llava_hf.rename("model.qformer.weight") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"vision_feature_layer": [-2, -1]}, "must be one layer"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    ),
    ids=str,
)
def test_settings_of_transformers_without_a_counterpart(fields, message):
    base = stock_model()
    for name, value in fields.items():
        setattr(base.config, name, value)
    with pytest.raises(ValueError, match=message):
        from_base(base, "llavolta")


def test_the_processor_of_llava(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    base = stock_model()
    base.resize_token_embeddings(len(tokenizer))
    base.config.image_token_index = base.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    base.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    (tmp_path / "hf" / "chat_template.json").write_text('{"chat_template": "Q{{ messages[0].role }}"}')
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta", compress_layer_idx=1, compress_stride=4)
    assert report.has_processor and any("padded to squares" in note for note in report.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert processor.image_processor.tiling == "pad" and processor.image_processor.image_mean == [0.5] * 3
    assert processor.image_seq_length == 16 and processor.image_token == "<image>"
    assert processor.chat_template == "Q{{ messages[0].role }}"


# official layouts


def official_config(**fields):
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_act": "silu",
        **TEXT,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "temperature": 0.9,
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        **fields,
    }


def official_state(base):
    """The weights of a stock model under their official names."""
    state = {}
    for name, tensor in base.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("vision_tower.vision_model.", "vision_tower.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        state[name.replace("multi_modal_projector.linear_2", "mm_projector.2")] = tensor.clone()
    return state


def write_official(folder, base, tower="inside", **fields):
    """An official folder whose tower is part of it, or lies in another one, with its second half or alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(official_config(**fields)))
    state = official_state(base)
    tower_folder = folder / "tower" if tower == "inside" else folder.parent / "tower"
    tower_folder.mkdir()
    config = base.config.vision_config.to_dict()
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0], "size": {"shortest_edge": 32}}
    (tower_folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if tower != "inside":
        prefix = "model.vision_tower.vision_tower."
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        if tower == "whole CLIP":
            config = {"model_type": "clip", "vision_config": config}
            own["logit_scale"] = torch.ones(())
        save_file(own, tower_folder / "model.safetensors", metadata={"format": "pt"})
    (tower_folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.window
@pytest.mark.parametrize("tower", ("inside", "beside", "whole CLIP"))
def test_official_llava_equals_the_stock_model(tmp_path, tower):
    base = stock_model()
    folder = write_official(tmp_path / "llava", base, tower)
    inputs = prompt()
    report = convert(folder, tmp_path / "dst", "llavolta", image_token_id=IMAGE_TOKEN_ID)
    assert report.missing_keys == [] and report.unused_keys == (
        ["model.vision_tower.vision_tower.logit_scale"] if tower == "whole CLIP" else []
    )
    for model in (
        load_official(folder, "llavolta", image_token_id=IMAGE_TOKEN_ID),
        from_base(folder, "llavolta", image_token_id=IMAGE_TOKEN_ID),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "dst"),
    ):
        with torch.no_grad():
            assert torch.equal(model(**inputs, vtc_budget="full").logits, base(**inputs).logits)


def test_a_tower_elsewhere_is_found_when_it_is_named(tmp_path):
    folder = write_official(tmp_path / "llava", stock_model(), "beside", mm_vision_tower="/somewhere/else/clip")
    with pytest.raises(FileNotFoundError, match="names the vision tower '/somewhere/else/clip'.*vision_tower"):
        load_official(folder, "llavolta")
    model = load_official(folder, "llavolta", vision_tower=tmp_path / "tower")
    assert model.config.vision_config.hidden_size == 32
    # a config must not make us read outside of its folder
    (folder / "config.json").write_text(json.dumps(official_config(mm_vision_tower="../../../tower/..")))
    with pytest.raises(FileNotFoundError, match="neither inside of the folder nor beside it"):
        load_official(folder, "llavolta")


def test_a_tower_that_nobody_has_is_asked_for(tmp_path):
    """By the name of the argument, here and on the command line; without a network, the Hub delivers nothing."""
    folder = write_official(tmp_path / "llava", stock_model(), "beside", mm_vision_tower="nobody/has-this-tower")
    with pytest.raises(
        FileNotFoundError, match="'nobody/has-this-tower', which is needed.*`vision_tower`.*--vision-tower"
    ):
        convert(folder, tmp_path / "dst", "llavolta", image_token_id=IMAGE_TOKEN_ID)
    assert not (tmp_path / "dst").exists()


def test_a_tower_that_is_not_needed_is_refused(tmp_path):
    base = stock_model()
    base.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="`vision_tower` is of no use"):
        convert(tmp_path / "hf", tmp_path / "dst", "llavolta", vision_tower=tmp_path / "hf")
    for source in (base, tmp_path / "hf"):
        with pytest.raises(ValueError, match="`vision_tower` is of no use"):
            from_base(source, "llavolta", vision_tower=tmp_path / "hf")


class FakeHub:
    """Stands in for downloads: gives the files of a folder that the patterns name, and counts what it sent."""

    def __init__(self, monkeypatch, folder, repositories):
        self.folder, self.repositories, self.sent = folder, repositories, []
        monkeypatch.setattr("hf_vtc.convert.folders.snapshot_download", self.download)

    def download(self, repository, allow_patterns):
        target = self.folder / repository.replace("/", "--")
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.repositories[repository].iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                if not (target / file.name).exists():
                    self.sent.append(f"{repository}/{file.name}")
                    shutil.copy(file, target / file.name)
        return str(target)


def as_pickle(folder):
    """The weights of a folder as published ConvLLaVA repositories have them, beside files of no use."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    for name in ("optimizer.bin", "mm_projector.bin", "training_args.bin"):
        (folder / name).write_bytes(b"nobody should ask for this")


@pytest.mark.window
@pytest.mark.parametrize("kinds", ({"bin"}, {"safetensors"}, {"bin", "safetensors"}), ids=sorted)
def test_repositories_of_the_hub_are_read_with_the_weights_that_they_have(tmp_path, monkeypatch, kinds):
    base = stock_model()
    folder = write_official(tmp_path / "llava", base, "beside", mm_vision_tower="owner/tower")
    for each in (folder, tmp_path / "tower"):
        as_pickle(each)
        if "safetensors" not in kinds:
            (each / "model.safetensors").unlink()
        if "bin" not in kinds:
            (each / "pytorch_model.bin").unlink()
    repositories = {"owner/llava": folder, "owner/tower": tmp_path / "tower"}
    hub = FakeHub(monkeypatch, tmp_path / "cache", repositories)
    convert("owner/llava", tmp_path / "dst", "llavolta", image_token_id=IMAGE_TOKEN_ID)
    inputs = prompt()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    with torch.no_grad():
        assert torch.equal(model(**inputs, vtc_budget="full").logits, base(**inputs).logits)
    weights = "model.safetensors" if "safetensors" in kinds else "pytorch_model.bin"
    sent = [name for name in hub.sent if not name.endswith(".json")]
    assert sorted(sent) == [f"owner/llava/{weights}", f"owner/tower/{weights}"]


def test_weights_of_a_tower_that_the_checkpoint_has_are_not_fetched(tmp_path, monkeypatch):
    folder = write_official(tmp_path / "llava", stock_model(), mm_vision_tower="owner/tower")
    tower = (folder / "tower").rename(tmp_path / "elsewhere")
    (tower / "model.safetensors").write_bytes(b"nobody should ask for this")
    hub = FakeHub(monkeypatch, tmp_path / "cache", {"owner/llava": folder, "owner/tower": tower})
    load_official("owner/llava", "llavolta", image_token_id=IMAGE_TOKEN_ID)
    assert "owner/tower/config.json" in hub.sent and "owner/tower/model.safetensors" not in hub.sent


def test_known_towers_need_no_folder():
    config = llava_official.tower_config(llava_official.KNOWN_TOWERS["openai/clip-vit-large-patch14-336"])
    assert (config.hidden_size, config.num_hidden_layers, config.image_size, config.patch_size) == (1024, 24, 336, 14)
    assert (config.num_attention_heads, config.hidden_act) == (16, "quick_gelu")
    stored = {"model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight": None}
    fields = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    assert llava_official.tower_name(fields, stored) is None
    assert llava_official.tower_name(fields, {}) == "openai/clip-vit-large-patch14-336"


@pytest.mark.window
@pytest.mark.parametrize("tied", (False, True))
def test_a_vocabulary_without_placeholder_grows(tmp_path, tied):
    base = stock_model(tied=tied)
    folder = write_official(tmp_path / "llava", base, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = load_official(folder, "llavolta")
    assert model.config.image_token_id == 64 and model.config.text_config.vocab_size == 65
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings[64], base.get_input_embeddings().weight.mean(0))
    assert (model.lm_head.weight is embeddings) == tied
    inputs = prompt()
    with torch.no_grad():
        expected = base(**inputs).logits
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN_ID, 64)
        logits = model(**inputs, vtc_budget="full").logits
    torch.testing.assert_close(logits[..., :64], expected)
    # the new token gets at most an even share, and never wins
    assert float(logits.softmax(-1)[..., 64].max()) <= 1 / 65
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_rows_are_added_to_vocabularies_only():
    from transformers import LlamaConfig

    text = LlamaConfig(**TEXT)
    renamed = with_rows_for(lambda name: Renamed((name,)), text, 66)
    assert text.vocab_size == 67
    rows = torch.tensor([[1.0, 3.0], [2.0, 5.0]])
    (grown,) = renamed("lm_head.weight").transform(rows)
    assert grown.tolist() == [[1.0, 3.0], [2.0, 5.0], [1.5, 4.0], [1.5, 4.0], [1.5, 4.0]]
    (same,) = renamed("model.multi_modal_projector.linear_1.weight").transform(rows)
    assert same is rows
    plain = with_rows_for(llava_official.rename, text, 66)
    assert plain is llava_official.rename


def write_sentencepiece(folder, words):
    """`tokenizer.model` of Llama's kind, byte by byte, so that no library is needed to make it; returns its size."""

    def number(value):
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + number(rest) if rest else bytes([low])

    def part(idx, content):
        return number(idx << 3 | 2) + number(len(content)) + content

    def setting(idx, value):
        return number(idx << 3) + number(value)

    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    content = b"".join(
        part(1, part(1, word.encode()) + number(2 << 3 | 5) + struct.pack("<f", score) + setting(3, kind))
        for word, score, kind in pieces
    )
    # byte-pair encoding with bytes to fall back on; a space before the text, spaces kept
    content += part(2, setting(3, 2) + setting(4, len(pieces)) + setting(35, 1))
    content += part(3, part(1, b"identity") + setting(3, 1) + setting(4, 0) + setting(5, 1))
    (folder / "tokenizer.model").write_bytes(content)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(pieces)


SENTENCEPIECE_WORDS = ["\u2581", *"abehlnot", "\u2581t", "he", "\u2581the"]
needs_sentencepiece = pytest.mark.skipif(
    not (is_sentencepiece_available() and is_protobuf_available()),
    reason="a tokenizer.model is read by sentencepiece and protobuf, which hf_vtc does not need otherwise",
)


@pytest.mark.window
@needs_sentencepiece
def test_a_sentencepiece_tokenizer_is_converted(tmp_path):
    base = stock_model()
    folder = write_official(tmp_path / "llava", base, vocab_size=len(SENTENCEPIECE_WORDS) + 259)
    base.resize_token_embeddings(write_sentencepiece(folder, SENTENCEPIECE_WORDS))
    save_file(official_state(base), folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "dst", "llavolta")
    # 4.57 copies it; nobody needs it any more
    (tmp_path / "dst" / "tokenizer.model").unlink(missing_ok=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    tokenizer, model = processor.tokenizer, AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert processor.image_token_id == model.config.image_token_id == len(SENTENCEPIECE_WORDS) + 259
    ids = tokenizer("the hello<image>")["input_ids"]
    pieces = ["<s>", "\u2581the", "\u2581", "he", "l", "l", "o", "<image>"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the hello"


@pytest.mark.window
@pytest.mark.parametrize("absent", (["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"]), ids=" ".join)
def test_a_sentencepiece_tokenizer_that_cannot_be_read_names_the_remedy(tmp_path, monkeypatch, absent):
    folder = write_official(tmp_path / "llava", stock_model())
    write_sentencepiece(folder, SENTENCEPIECE_WORDS)
    for name in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(f"hf_vtc.convert.assets.is_{name}_available", lambda name=name: name not in absent)
    with pytest.raises(ImportError, match=f"`pip install {' '.join(absent)}`.*image_token_id"):
        convert(folder, tmp_path / "dst", "llavolta")
    # with the other file nothing more is needed
    tiny_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder) is not None


@pytest.mark.window
def test_the_tokenizer_of_an_official_folder_gets_the_placeholder(tmp_path):
    tokenizer = tiny_tokenizer()
    base = stock_model()
    base.resize_token_embeddings(len(tokenizer))
    folder = write_official(tmp_path / "llava", base, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    report = convert(folder, tmp_path / "dst", "llavolta", compress_layer_idx=1, compress_stride=4)
    assert report.has_processor and any("chat template" in note for note in report.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert processor.image_token_id == model.config.image_token_id == len(tokenizer)
    assert processor.image_processor.image_mean == [0.1, 0.2, 0.3]
    from PIL import Image

    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (50, 30))}, {"type": "text", "text": "hi"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 16
    with torch.no_grad():
        assert model(**inputs).num_visual_tokens.tolist() == [4]
    with pytest.raises(ValueError, match="not clear"):
        load_official(folder, "llavolta", image_token_id=5)


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    folder = write_official(tmp_path / "llava", stock_model())
    with pytest.raises(ValueError, match="next free one, 64, got 1000"):
        load_official(folder, "llavolta", image_token_id=1000)


@pytest.mark.window
def test_official_llava_next(tmp_path):
    base = stock_model("llava_next")
    pinpoints = str([[width, height] for height, width in PINPOINTS])
    fields = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
    folder = write_official(tmp_path / "llava", base, image_grid_pinpoints=pinpoints, **fields)
    model = load_official(folder, "llavolta", image_token_id=IMAGE_TOKEN_ID)
    assert model.config.image_grid_pinpoints == PINPOINTS and model.config.unpad_rule == "token_grid"
    theirs, ours = next_prompt(base)
    with torch.no_grad():
        # the two rules of unpadding agree on these sizes
        assert torch.equal(model(**ours, vtc_budget="full").logits, base(**theirs).logits)


@pytest.mark.parametrize(
    ("fields", "expected"),
    (
        ({}, (2, 8)),
        ({"grouping": "none", "layer": 2, "stride": 8}, (2, 1)),
        ({"grouping": "avgpool1d", "layer": 1, "stride": 4}, (1, 4)),
        ({"grouping": "avgpool1d", "layer": 33, "stride": 4}, (3, 4)),
        ({"grouping": "avgpool1d"}, (2, 8)),
    ),
    ids=str,
)
def test_settings_of_llavolta_are_carried_over(tmp_path, fields, expected):
    model = load_official(write_official(tmp_path / "llava", stock_model(), **fields), "llavolta")
    assert (model.config.compress_layer_idx, model.config.compress_stride) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "square"}, "'pad' or 'anyres'"),
        ({"mm_patch_merge_type": "spatial"}, "'flat' or 'spatial_unpad'"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
    ),
    ids=str,
)
def test_official_settings_without_a_counterpart(tmp_path, fields, message):
    folder = write_official(tmp_path / "llava", stock_model(), **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_official(folder, "llavolta")


def test_other_towers_are_refused(tmp_path):
    folder = write_official(tmp_path / "llava", stock_model())
    (folder / "tower" / "config.json").write_text('{"model_type": "convnext"}')
    with pytest.raises(ValueError, match="got `model_type` 'convnext'"):
        load_official(folder, "llavolta")


def test_several_methods_need_a_choice(tmp_path):
    folder = write_official(tmp_path / "llava", stock_model())
    with pytest.raises(ValueError, match="`method` must be one of .*llavolta"):
        load_official(folder, "vico")


def test_every_official_name_has_its_place(tmp_path):
    base = stock_model("llava_next")
    ours = from_base(base, "llavolta", compress_layer_idx=1).state_dict().keys()
    new = [name for old in official_state(base) for name in llava_official.rename(old).names]
    assert set(new) == set(ours) and len(new) == len(ours)
    for name in ("model.mm_projector.1.weight", "model.router.voter", "vision_tower.weight", "lm_heads.weight"):
        assert llava_official.rename(name) is None


# chat templates


def rendered(decoder_type, messages, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_for(decoder_type, "<image>")
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And?"},
]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_vicuna_template():
    text = rendered("llama", CHAT, add_generation_prompt=True)
    assert text == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: This.<|im_end|>USER: And? ASSISTANT:"
    own = rendered("llama", [{"role": "system", "content": "Be brief."}, *CHAT[:1]], add_generation_prompt=True)
    assert own == "Be brief. USER: <image>\nWhat? ASSISTANT:"


def test_mistral_template():
    text = rendered("mistral", CHAT, add_generation_prompt=True)
    assert text == "[INST] <image>\nWhat? [/INST] This.<|im_end|>[INST] And? [/INST]"


def test_other_decoders_get_chatml():
    assert rendered("qwen2", CHAT[:1]) == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"


def test_templates_mark_what_is_trained():
    tokenizer = tiny_tokenizer()
    for decoder_type in ("llama", "mistral"):
        tokenizer.chat_template = chat_template_for(decoder_type, "<image>")
        encoded = tokenizer.apply_chat_template(
            CHAT[:2], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"]) if mask]
        assert tokenizer.decode(marked) == " This.<|im_end|>"
