"""hf_vtc.convert: names and shapes of every layout, equal models by every door, failures that leave nothing behind."""

import json
import re
from pathlib import Path

import pytest
import torch
from factories import tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

import hf_vtc
from hf_vtc import convert as conversion
from hf_vtc.convert import convert, from_base, internvl_hf, internvl_official, load_official, shards
from hf_vtc.models.configuration_vico import VicoConfig
from hf_vtc.models.configuration_vtc import with_both_ropes
from hf_vtc.models.modeling_vico import VicoForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden" / "vico"
IMAGE_TOKEN_ID = 60

VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 2,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "layer_norm_eps": 1e-6,
    "drop_path_rate": 0.1,
    "use_flash_attn": True,
}
TEXT = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "max_length": 20,
}
FLASH = {"flash_mode": True, "flash_relative_threshold": 0.3, "flash_absolute_threshold": 0.2}


def official_config(flash: bool = True, vision: dict | None = None, text: dict | None = None, **fields) -> dict:
    """Content of an official `config.json`."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 16,
        "ps_version": "v2",
        "select_layer": -1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "use_thumbnail": True,
        "dynamic_image_size": True,
        "torch_dtype": "float32",
        "vision_config": {**VISION, **(vision or {})},
        "llm_config": {**TEXT, **(text or {})},
        **(FLASH if flash else {}),
        **fields,
    }


def official_shapes(config: dict, flash: bool = True) -> dict[str, tuple[int, ...]]:
    """Official names and shapes, written down from the table of published keys, not from our map."""
    vision, text = config["vision_config"], config["llm_config"]
    width, dim, hidden = vision["hidden_size"], text["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, patches + 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, vision["patch_size"], vision["patch_size"]),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    with_bias = vision["norm_type"] == "layer_norm"
    for layer in range(vision["num_hidden_layers"]):
        base = f"vision_model.encoder.layers.{layer}"
        for layer_norm in ("norm1", "norm2"):
            shapes[f"{base}.{layer_norm}.weight"] = (width,)
            if with_bias:
                shapes[f"{base}.{layer_norm}.bias"] = (width,)
        shapes |= {f"{base}.ls1": (width,), f"{base}.ls2": (width,), f"{base}.attn.qkv.weight": (3 * width, width)}
        if vision["qkv_bias"]:
            shapes[f"{base}.attn.qkv.bias"] = (3 * width,)
        if vision["qk_normalization"]:
            shapes |= {f"{base}.attn.q_norm.weight": (width,), f"{base}.attn.k_norm.weight": (width,)}
        shapes |= linear(f"{base}.attn.proj", width, width)
        shapes |= linear(f"{base}.mlp.fc1", width, hidden) | linear(f"{base}.mlp.fc2", hidden, width)
    shapes |= {f"language_model.{name}": shape for name, shape in decoder_shapes(text).items()}
    shapes |= norm("mlp1.0", 4 * width) | linear("mlp1.1", 4 * width, dim) | linear("mlp1.3", dim, dim)
    return shapes | (flash_shapes(width, dim) if flash else {})


def flash_shapes(width: int, dim: int) -> dict[str, tuple[int, ...]]:
    shapes = norm("mlp2.0", 16 * width) | linear("mlp2.1", 16 * width, 2 * dim)
    shapes |= linear("mlp2.4", 2 * dim, 2 * dim) | linear("mlp2.7", 2 * dim, dim)
    shapes["pooling_before_gating.query_token"] = (1, width)
    for index in range(1, 5):
        pool, block = f"pooling_before_gating.attn{index}", f"gating.block{index}"
        shapes |= {f"{pool}.in_proj_weight": (3 * width, width), f"{pool}.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{pool}.out_proj", width, width) | norm(f"pooling_before_gating.norm{index}", width)
        shapes |= linear(f"{block}.0", width, 4 * width) | linear(f"{block}.3", 4 * width, width)
        shapes |= norm(f"{block}.5", width)
    return shapes | norm("gating.gate.0", width) | linear("gating.gate.1", width, 2)


def decoder_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    """Names of Qwen3 and Qwen3-MoE files, which hold one tensor per expert."""
    dim, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    head_dim, vocab = text["head_dim"], text["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,), "lm_head.weight": (vocab, dim)}
    for layer in range(text["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        shapes |= {
            f"{base}.input_layernorm.weight": (dim,),
            f"{base}.post_attention_layernorm.weight": (dim,),
            f"{base}.self_attn.q_proj.weight": (heads * head_dim, dim),
            f"{base}.self_attn.k_proj.weight": (kv_heads * head_dim, dim),
            f"{base}.self_attn.v_proj.weight": (kv_heads * head_dim, dim),
            f"{base}.self_attn.o_proj.weight": (dim, heads * head_dim),
            f"{base}.self_attn.q_norm.weight": (head_dim,),
            f"{base}.self_attn.k_norm.weight": (head_dim,),
        }
        mlps, inner = [f"{base}.mlp"], text["intermediate_size"]
        if "num_experts" in text:
            shapes[f"{base}.mlp.gate.weight"] = (text["num_experts"], dim)
            mlps = [f"{base}.mlp.experts.{expert}" for expert in range(text["num_experts"])]
            inner = text["moe_intermediate_size"]
        for mlp in mlps:
            shapes |= {f"{mlp}.gate_proj.weight": (inner, dim), f"{mlp}.up_proj.weight": (inner, dim)}
            shapes[f"{mlp}.down_proj.weight"] = (dim, inner)
    return shapes


def linear(name: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def official_state(config: dict, flash: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        name: (0.3 * torch.randn(shape) + (name.endswith("norm.weight"))).to(dtype)
        for name, shape in official_shapes(config, flash).items()
    }


def write_checkpoint(folder: Path, config: dict, state: dict[str, torch.Tensor], num_shards: int = 1) -> Path:
    """A checkpoint folder as published: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(state)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names[shard::num_shards], file_name)
        save_file({name: state[name] for name in names[shard::num_shards]}, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def flash_folder(tmp_path: Path) -> Path:
    config = official_config()
    return write_checkpoint(tmp_path / "flash", config, official_state(config))


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    config = official_config(flash=False)
    return write_checkpoint(tmp_path / "base", config, official_state(config, flash=False))


def stock_model(tied: bool = False, dtype: torch.dtype = torch.float32, **text) -> InternVLForConditionalGeneration:
    """The uncompressed model of transformers."""
    fields = {name: TEXT[name] for name in list(TEXT)[1:11]} | {"tie_word_embeddings": tied} | text
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [16, 16],
            "patch_size": [2, 2],
            "attention_bias": True,
        },
        text_config=fields,
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=16,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
    return model


def prompt(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two images of two tiles and one, with text around them."""
    ids = [1, 2, *[IMAGE_TOKEN_ID] * 32, 3, *[IMAGE_TOKEN_ID] * 16, 4, 5]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(3, 3, 16, 16).to(dtype)}


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def files_of(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# names


@pytest.mark.parametrize("qk_normalization", [False, True])
@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_every_official_name_has_its_place(norm_type, qk_normalization):
    # the four combinations cover the 300M tower (layer norm, biases) and the 6B tower (RMS norm, normed q and k)
    vision = {"norm_type": norm_type, "qk_normalization": qk_normalization, "qkv_bias": norm_type == "layer_norm"}
    config = official_config(vision=vision)
    new = [name for old in official_shapes(config) for name in internvl_official.rename(old).names]
    model = VicoForConditionalGeneration(
        VicoConfig(
            internvl_official.vision_config(config["vision_config"], 16),
            internvl_official.text_config(config["llm_config"], False),
            image_token_id=IMAGE_TOKEN_ID,
        )
    )
    assert sorted(new) == sorted(model.state_dict())


def test_every_name_of_the_golden_checkpoint_has_its_place():
    golden = json.loads((GOLDEN / "golden.json").read_text())
    stored = {name: tuple(shape) for name, (_, shape) in golden["checkpoint_keys"].items()}
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    assert stored == official_shapes(config)
    assert None not in [internvl_official.rename(name) for name in stored]


@pytest.mark.parametrize(
    "name",
    [
        "mlp1.2.weight",
        "mlp3.0.weight",
        "mlp2.3.weight",
        "gating.block5.0.weight",
        "gating.block1.1.weight",
        "pooling_before_gating.attn5.in_proj_weight",
        "vision_model.encoder.layers.0.attn.unknown.weight",
        "vision_model.post_layernorm.weight",
        "language_model.transformer.wte.weight",
        "lm_head.weight",
    ],
)
def test_unknown_official_names_have_no_place(name):
    assert internvl_official.rename(name) is None


def test_fused_rows_are_split_in_the_order_query_key_value():
    renamed = internvl_official.rename("vision_model.encoder.layers.7.attn.qkv.weight")
    parts = dict(zip(renamed.names, renamed.transform(torch.arange(6)[:, None].expand(6, 2))))
    base = "model.vision_tower.encoder.layer.7.attention"
    assert {name: part[:, 0].tolist() for name, part in parts.items()} == {
        f"{base}.q_proj.weight": [0, 1],
        f"{base}.k_proj.weight": [2, 3],
        f"{base}.v_proj.weight": [4, 5],
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # the names of files written by 4.52 and later, the names in memory, and those between
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.embeddings.cls_token", "model.vision_tower.embeddings.cls_token"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("model.multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("model.vision_tower.embeddings.cls_token", "model.vision_tower.embeddings.cls_token"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_transformers(name, expected):
    assert internvl_hf.rename(name).names == (expected,)
    assert internvl_hf.rename("model.qformer.weight") is None


@pytest.mark.window
def test_every_name_that_transformers_saves_has_its_place(tmp_path):
    model = stock_model()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    new = [name for old in saved for name in internvl_hf.rename(old).names]
    assert sorted(new) == sorted(model.state_dict())


# official checkpoints


def test_load_official_matches_the_original_implementation():
    golden = json.loads((GOLDEN / "golden.json").read_text())
    tensors = load_file(GOLDEN / "golden.safetensors")
    model = load_official(GOLDEN / "checkpoint", image_token_id=golden["image_context_token_id"])
    assert not model.training
    with torch.no_grad():
        outputs = model(input_ids=tensors["mixed.input_ids"], pixel_values=tensors["mixed.pixel_values"])
    assert outputs.router_decisions.int().tolist() == tensors["mixed.compress_decision"].int().tolist()
    expected = tensors["mixed.logits_v8"].flatten(0, -2)
    ours = outputs.logits[outputs.kept_mask][:: golden["logits_position_stride"], ::8]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.window
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_convert_equals_load_official(tmp_path, num_shards, max_shard_size):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config), num_shards)
    report = convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, max_shard_size=max_shard_size)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    official = load_official(source, image_token_id=IMAGE_TOKEN_ID)
    assert_same_weights(loaded, official)
    assert (report.missing_keys, report.unused_keys, report.fresh_keys) == ([], [], [])
    assert report.num_copied == len(official_shapes(config))
    weights = list((tmp_path / "dst").glob("*.safetensors"))
    assert report.num_bytes == sum(tensor.nbytes for file in weights for tensor in load_file(file).values())
    # a shard of the source never shares a file with another one
    assert len(weights) > num_shards if max_shard_size == "20KB" else len(weights) == num_shards
    # readable by whoever may read the other files
    assert len({file.stat().st_mode for file in (tmp_path / "dst").iterdir()}) == 1
    inputs = prompt()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, official(**inputs).logits)


def test_convert_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config), num_shards=4)
    opened, written = [], []

    def opening(file, framework):
        opened.append(file.name)
        return safe_open(file, framework)

    def saving(tensors, file, metadata):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, file, metadata=metadata)

    safe_open, save = shards.safe_open, shards.save_file
    monkeypatch.setattr(shards, "safe_open", opening)
    monkeypatch.setattr(shards, "save_file", saving)
    convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, max_shard_size="50KB")
    # once for the headers of all shards, once for their tensors
    assert opened == 2 * sorted(set(opened)) and len(set(opened)) == 4
    largest = max(torch.Size(shape).numel() * 4 for shape in official_shapes(config).values())
    assert len(written) > 4 and max(written) <= max(50_000, largest)


@pytest.mark.window
def test_settings_of_the_official_config_are_carried_over(tmp_path):
    config = official_config(ps_version="v1", text={"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    source = write_checkpoint(tmp_path / "src", config, official_state(config))
    new = load_official(source, image_token_id=IMAGE_TOKEN_ID).config
    assert (new.flash_mode, new.flash_relative_threshold, new.flash_absolute_threshold) == (True, 0.3, 0.2)
    assert (new.ps_version, new.image_token_id, new.image_seq_length) == ("v1", IMAGE_TOKEN_ID, 16)
    assert new.vision_config.attention_bias and not new.vision_config.use_qk_norm
    assert new.text_config._attn_implementation != "flash_attention_2"

    convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    text = with_both_ropes(VicoConfig.from_pretrained(tmp_path / "dst").text_config.to_dict())
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 5e5
    assert text["rope_scaling"]["factor"] == text["rope_parameters"]["factor"] == 2.0
    assert text["rope_parameters"]["rope_type"] == "dynamic"


def test_both_spellings_of_rotary_settings():
    assert with_both_ropes({"rope_theta": 7.0}) == {
        "rope_theta": 7.0,
        "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"},
    }
    new = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0}}
    assert with_both_ropes(new) == {
        **new,
        "rope_theta": 7.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    assert with_both_ropes({"hidden_size": 8}) == {"hidden_size": 8}


def test_an_unset_ps_version_is_the_official_default(tmp_path):
    config = official_config()
    del config["ps_version"]
    source = write_checkpoint(tmp_path / "src", config, official_state(config))
    assert load_official(source, image_token_id=IMAGE_TOKEN_ID).config.ps_version == "v1"


def test_flash_weights_without_flash_fields(tmp_path):
    config = official_config(flash=False)
    source = write_checkpoint(tmp_path / "src", config, official_state(config))
    report = convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    new = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert new["flash_mode"] is True
    default = VicoConfig()
    assert new["flash_absolute_threshold"] == default.flash_absolute_threshold
    assert sum("flash_" in note for note in report.notes) == 3


@pytest.mark.parametrize("text", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}])
def test_decoders(tmp_path, text):
    if text:
        text |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1}
    config = official_config(text=text)
    state = official_state(config)
    source = write_checkpoint(tmp_path / "src", config, state)
    convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    written = load_file(tmp_path / "dst" / "model.safetensors")
    for name, tensor in state.items():
        if name.startswith("language_model.model."):
            new = name.replace("language_model.model.", "model.language_model.")
            assert torch.equal(written[new], tensor), name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert_same_weights(loaded, load_official(source, image_token_id=IMAGE_TOKEN_ID))
    base = "model.layers.0.mlp" + (".experts" if text else "")
    assert any(name.startswith(f"language_model.{base}") for name in state)


@pytest.mark.parametrize(
    ("architecture", "model_type"), [("Qwen2ForCausalLM", "qwen2"), ("LlamaForCausalLM", "llama")]
)
def test_other_decoder_architectures(architecture, model_type):
    fields = {**TEXT, "architectures": [architecture], "model_type": "something"}
    assert internvl_official.text_config(fields, True).model_type == model_type
    assert internvl_official.text_config(fields, True).tie_word_embeddings is True


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", None])
def test_unknown_decoder(architecture):
    fields = {**TEXT, "architectures": [architecture] if architecture else None, "model_type": "internlm2"}
    with pytest.raises(ValueError, match="must be one of Qwen2ForCausalLM.*internlm2"):
        internvl_official.text_config(fields, False)


@pytest.mark.parametrize("has_head", [False, True])
def test_tied_embeddings(tmp_path, has_head):
    config = official_config(text={"tie_word_embeddings": True})
    state = official_state(config)
    head = state.pop("language_model.lm_head.weight")
    if has_head:
        state["language_model.lm_head.weight"] = head.copy_(state["language_model.model.embed_tokens.weight"])
    source = write_checkpoint(tmp_path / "src", config, state)
    report = convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert "lm_head.weight" not in load_file(tmp_path / "dst" / "model.safetensors")
    assert report.unused_keys == (["language_model.lm_head.weight"] if has_head else [])
    for model in (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "dst"),
        load_official(source, image_token_id=IMAGE_TOKEN_ID),
    ):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert torch.equal(model.lm_head.weight, state["language_model.model.embed_tokens.weight"])


def test_a_head_of_its_own_survives_a_wrong_flag(tmp_path):
    config = official_config(text={"tie_word_embeddings": True})
    state = official_state(config)
    source = write_checkpoint(tmp_path / "src", config, state)
    model = load_official(source, image_token_id=IMAGE_TOKEN_ID)
    assert torch.equal(model.lm_head.weight, state["language_model.lm_head.weight"])
    assert model.config.tie_word_embeddings is False


def test_dtype(tmp_path, flash_folder):
    assert load_official(flash_folder, image_token_id=IMAGE_TOKEN_ID).dtype == torch.float32
    halved = load_official(flash_folder, image_token_id=IMAGE_TOKEN_ID, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    report = convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, dtype="bfloat16")
    assert report.dtype == torch.bfloat16
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, halved)
    with pytest.raises(ValueError, match="`dtype` must be a floating dtype"):
        convert(flash_folder, tmp_path / "other", image_token_id=IMAGE_TOKEN_ID, dtype="int8")


def test_the_stored_dtype_is_kept(tmp_path):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config, dtype=torch.bfloat16))
    assert load_official(source, image_token_id=IMAGE_TOKEN_ID).dtype == torch.bfloat16
    assert convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID).dtype == torch.bfloat16
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_unused_tensors_are_reported(tmp_path):
    config = official_config()
    state = official_state(config) | {"language_model.model.rotary_emb.inv_freq": torch.ones(2)}
    state["vision_model.head.weight"] = torch.ones(2)
    source = write_checkpoint(tmp_path / "src", config, state)
    report = convert(source, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert sorted(report.unused_keys) == ["language_model.model.rotary_emb.inv_freq", "vision_model.head.weight"]
    assert "vision_model.head.weight" in report.summary()


def test_dead_weights_are_copied_and_may_be_missing(tmp_path):
    config = official_config()
    state = official_state(config)
    complete = load_official(
        write_checkpoint(tmp_path / "a", config, state), image_token_id=IMAGE_TOKEN_ID
    ).state_dict()
    assert torch.equal(complete["model.router.norm4.bias"], state["pooling_before_gating.norm4.bias"])
    del state["pooling_before_gating.norm4.bias"], state["pooling_before_gating.attn3.in_proj_weight"]
    report = convert(write_checkpoint(tmp_path / "b", config, state), tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert sorted(report.missing_keys) == [
        "model.router.attn3.k_proj.weight",
        "model.router.attn3.q_proj.weight",
        "model.router.attn3.v_proj.weight",
        "model.router.norm4.bias",
    ]
    assert report.fresh_keys == report.missing_keys
    AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")


# base checkpoints


def test_a_base_checkpoint_gets_fresh_parts(tmp_path, base_folder):
    torch.manual_seed(7)
    report = convert(base_folder, tmp_path / "dst", "vico", image_token_id=IMAGE_TOKEN_ID)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert loaded.config.flash_mode is False
    assert any("freshly initialised" in note for note in report.notes)
    fresh = {name for name in loaded.state_dict() if re.match(r"model\.(router|compressed_projector)\.", name)}
    assert set(report.fresh_keys) == fresh and report.missing_keys == []
    assert report.num_fresh_parameters == sum(loaded.state_dict()[name].numel() for name in fresh)
    assert loaded.model.router.query_token.abs().sum() > 0
    assert torch.equal(loaded.model.router.norm1.weight, torch.ones(32))

    torch.manual_seed(7)
    assert_same_weights(load_official(base_folder, "vico", image_token_id=IMAGE_TOKEN_ID), loaded)
    torch.manual_seed(7)
    assert_same_weights(from_base(base_folder, "vico", image_token_id=IMAGE_TOKEN_ID), loaded)
    other = from_base(base_folder, "vico", image_token_id=IMAGE_TOKEN_ID)
    assert not torch.equal(other.model.router.gate.weight, loaded.model.router.gate.weight)


@pytest.mark.window
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_from_base_equals_the_base_bit_for_bit(tmp_path, tied, dtype):
    # casting rounds the rotary frequencies too, loading does not
    cast = stock_model(tied, dtype)
    cast.save_pretrained(tmp_path / "hf")
    loaded = InternVLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    convert(tmp_path / "hf", tmp_path / "dst", "vico")
    inputs = prompt(dtype)
    for base, model in (
        (cast, from_base(cast, "vico")),
        (loaded, from_base(loaded, "vico")),
        (loaded, from_base(tmp_path / "hf", "vico")),
        (loaded, AutoModelForImageTextToText.from_pretrained(tmp_path / "dst", dtype="auto")),
    ):
        assert model.dtype == dtype and not model.training
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        with torch.no_grad():
            expected = base(**inputs).logits
            assert torch.equal(model(**inputs, vtc_budget="full").logits, expected)
            # routing is off until the router has been trained
            assert torch.equal(model(**inputs).logits, expected)


def test_from_base_keeps_the_attention_of_the_base():
    base = stock_model()
    base.set_attn_implementation("eager")
    model = from_base(base, "vico")
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.window
def test_from_base_of_a_mixture_of_experts():
    base = stock_model(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    )
    inputs = prompt()
    with torch.no_grad():
        assert torch.equal(from_base(base, "vico")(**inputs, vtc_budget="full").logits, base(**inputs).logits)


def test_from_base_shares_nothing_with_the_base():
    base = stock_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = from_base(base, "vico")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert model.config.text_config is not base.config.text_config


def test_from_base_takes_config_fields():
    model = from_base(stock_model(), "vico", flash_mode=True, flash_absolute_threshold=0.25, routing_rule="absolute")
    config = model.config
    assert (config.flash_mode, config.flash_absolute_threshold, config.routing_rule) == (True, 0.25, "absolute")
    with pytest.raises(ValueError, match="Unknown config fields: flash_treshold"):
        from_base(stock_model(), "vico", flash_treshold=0.25)


def test_from_base_refuses_what_is_no_base(flash_folder):
    with pytest.raises(ValueError, match="compressed already"):
        from_base(flash_folder, "vico", image_token_id=IMAGE_TOKEN_ID)
    model = load_official(flash_folder, image_token_id=IMAGE_TOKEN_ID)
    with pytest.raises(ValueError, match="InternVLForConditionalGeneration, .*, got VicoFor"):
        from_base(model, "vico")
    with pytest.raises(ValueError, match="`method` must be one of .*vico.* for InternVLFor.*, got 'vcio'"):
        from_base(stock_model(), "vcio")


# tokenizer, processor, generation settings


def with_tokenizer(folder: Path, text: dict | None = None) -> int:
    """Add a tokenizer to a checkpoint whose vocabulary is large enough; returns the placeholder's id."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = official_config(text={"vocab_size": len(tokenizer)} | (text or {}))
    write_checkpoint(folder, config, official_state(config))
    return tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


@pytest.mark.window
def test_tokenizer_and_processor_are_written(tmp_path):
    from PIL import Image

    token_id = with_tokenizer(tmp_path / "src")
    (tmp_path / "src" / "generation_config.json").write_text('{"max_new_tokens": 5, "do_sample": false}')
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report.has_processor
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert model.config.image_token_id == processor.image_token_id == token_id
    assert processor.image_seq_length == model.config.image_seq_length == 16
    images = processor.image_processor
    assert (images.tiling, images.size["height"]) == ("dynamic", 16)
    assert (images.min_tiles, images.max_tiles, images.use_thumbnail) == (1, 6, True)
    assert model.generation_config.max_new_tokens == 5
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    inputs = processor(images=Image.new("RGB", (40, 16)), text="<IMG_CONTEXT> what?", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    loaded = load_official(tmp_path / "src")
    assert loaded.config.image_token_id == token_id
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.window
@pytest.mark.parametrize("written_by", ["nobody", "4", "5"])
def test_generic_tokenizers_of_every_version(tmp_path, written_by):
    token_id = with_tokenizer(tmp_path / "src")
    file = tmp_path / "src" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    extra = config.pop("additional_special_tokens", None) or config.pop("extra_special_tokens")
    if written_by == "nobody":
        file.unlink()
    elif written_by == "4":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": extra}
        file.write_text(json.dumps(config))
    else:
        config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": extra}
        file.write_text(json.dumps(config))
    convert(tmp_path / "src", tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert processor.image_token_id == token_id
    ids = processor.tokenizer("a<img><IMG_CONTEXT>b")["input_ids"]
    assert len(ids) == 4 and ids[2] == token_id


def test_processor_of_a_model_of_transformers(tmp_path):
    tokenizer = tiny_tokenizer()
    base = stock_model(vocab_size=len(tokenizer))
    base.config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    base.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"min_patches": 2, "max_patches": 5}')
    assert convert(tmp_path / "hf", tmp_path / "dst", "vico").has_processor
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert (processor.image_processor.min_tiles, processor.image_processor.max_tiles) == (2, 5)
    assert processor.image_token_id == base.config.image_token_id


def test_without_a_tokenizer_the_model_alone_is_written(tmp_path, flash_folder):
    report = convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert not report.has_processor
    assert any("no tokenizer" in note for note in report.notes)
    assert not (tmp_path / "dst" / "processor_config.json").exists()


def test_the_placeholder_must_be_known(tmp_path, flash_folder):
    with pytest.raises(ValueError, match="placeholder is unknown.*there is no tokenizer.*give `image_token_id`"):
        load_official(flash_folder)
    token_id = with_tokenizer(tmp_path / "src")
    with pytest.raises(ValueError, match=f"not clear: `image_token_id` says 3, .* says {token_id}"):
        load_official(tmp_path / "src", image_token_id=3)


def test_the_code_travels_on_request(tmp_path, flash_folder):
    convert(flash_folder, tmp_path / "with", image_token_id=IMAGE_TOKEN_ID)
    convert(flash_folder, tmp_path / "without", image_token_id=IMAGE_TOKEN_ID, save_code=False)
    assert "modeling_vico.py" in files_of(tmp_path / "with")
    assert files_of(tmp_path / "without") == {"config.json", "generation_config.json", "model.safetensors"}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    assert ["auto_map" in config for config in configs] == [True, False]


# failures


def spoil_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def spoil_truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 64)


def spoil_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (folder / "model-00002-of-00003.safetensors").write_bytes(pointer)


def change_index(folder: Path, old: str, new: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(old, new))


def spoil_path_upwards(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.rename(folder.parent / file.name)
    change_index(folder, file.name, f"../{file.name}")


def spoil_absolute_path(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.rename(folder.parent / file.name)
    change_index(folder, file.name, str(folder.parent / file.name))


def spoil_index_of_other_names(folder: Path) -> None:
    change_index(folder, "mlp1.1.weight", "mlp1.1.weights")


def spoil_index_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')


def spoil_lost_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def spoil_no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def spoil_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["intermediate_size"] = 80
    (folder / "config.json").write_text(json.dumps(config))


def spoil_missing_tensor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def spoil_config_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


FAILURES = [
    (spoil_missing_shard, FileNotFoundError, "lists 3 shards, of which 1 are missing: model-00002"),
    (spoil_truncated, ValueError, "truncated or corrupt.*Download it again"),
    (spoil_header, ValueError, "truncated or corrupt.*Download it again"),
    (spoil_pointer, ValueError, "Git LFS pointer"),
    (spoil_path_upwards, ValueError, r"must name files of that folder, got '\.\./model"),
    (spoil_absolute_path, ValueError, "must name files of that folder, got '/"),
    (spoil_index_of_other_names, ValueError, r"its shards do not hold: mlp1\.1\.weights"),
    (spoil_index_json, ValueError, "not valid JSON"),
    (spoil_lost_index, FileNotFoundError, r"3 \.safetensors files but no `model\.safetensors\.index\.json`"),
    (spoil_no_weights, FileNotFoundError, "has no weights"),
    (spoil_shape, ValueError, r"gate_proj\.weight \[96, 48\] gives .* the config asks for \[80, 48\]"),
    (spoil_missing_tensor, ValueError, r"lacks 11 tensors .*model\.language_model\.layers\.2\.mlp\.gate_proj\.weight"),
    (spoil_config_json, ValueError, "not valid JSON"),
    (spoil_no_config, FileNotFoundError, "has no config.json"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), FAILURES, ids=[failure[0].__name__ for failure in FAILURES])
def test_spoilt_checkpoints_are_refused_and_leave_nothing(tmp_path, spoil, error, message):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config), num_shards=3)
    spoil(source)
    before = files_of(tmp_path)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "new" / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert files_of(tmp_path) == before
    with pytest.raises(error, match=message):
        load_official(source, image_token_id=IMAGE_TOKEN_ID)


@pytest.mark.parametrize("lost", ["mlp2.4.bias", "gating.gate.1.weight", "mlp1.0.weight"])
def test_needed_tensors_are_listed(tmp_path, lost):
    config = official_config()
    state = official_state(config)
    del state[lost]
    source = write_checkpoint(tmp_path / "src", config, state)
    with pytest.raises(ValueError, match=re.escape(internvl_official.rename(lost).names[0])):
        load_official(source, image_token_id=IMAGE_TOKEN_ID)


def test_a_config_that_promises_flash_needs_its_weights(tmp_path):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config, official_state(config, flash=False))
    with pytest.raises(ValueError, match=r"must have: .*model\.router\.query_token"):
        load_official(source, image_token_id=IMAGE_TOKEN_ID)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("place", ["ShardWriter.add", "ShardWriter.close", "write_json"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, flash_folder, interruption, place):
    count = 0

    def interrupt(*args, **kwargs):
        nonlocal count
        count += 1
        if count == (40 if place == "ShardWriter.add" else 1):
            raise interruption
        return original(*args, **kwargs)

    if place == "write_json":
        original = conversion.write_json
        monkeypatch.setattr(conversion, "write_json", interrupt)
    else:
        original = getattr(shards.ShardWriter, place.partition(".")[2])
        monkeypatch.setattr(shards.ShardWriter, place.partition(".")[2], interrupt)
    expected = interruption if isinstance(interruption, type) else type(interruption)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    before = files_of(tmp_path)
    for destination in (tmp_path / "old", tmp_path / "new"):
        count = 0
        with pytest.raises(expected):
            convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID, overwrite=True, max_shard_size="100KB")
        assert files_of(tmp_path) == before
        assert files_of(tmp_path / "old") == {"config.json"}


def test_an_existing_destination(tmp_path, flash_folder):
    destination = tmp_path / "dst"
    destination.mkdir()
    (destination / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="pass `overwrite=True`"):
        convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID)
    with pytest.raises(FileExistsError, match="no model folder and is left alone"):
        convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID, overwrite=True)
    assert files_of(destination) == {"notes.txt"}
    (destination / "config.json").write_text("{}")
    convert(flash_folder, destination, image_token_id=IMAGE_TOKEN_ID, overwrite=True)
    assert "notes.txt" not in files_of(destination)
    assert files_of(tmp_path) == {"flash", "dst"}
    AutoModelForImageTextToText.from_pretrained(destination)


def test_a_source_is_not_overwritten_by_itself(flash_folder):
    before = files_of(flash_folder)
    with pytest.raises(ValueError, match="`src` and `dst` are both"):
        convert(flash_folder, flash_folder, image_token_id=IMAGE_TOKEN_ID, overwrite=True)
    assert files_of(flash_folder) == before


def test_unknown_layouts(tmp_path, flash_folder):
    source = write_checkpoint(tmp_path / "src", {"model_type": "llava", "architectures": ["X"]}, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown layout: `model_type` 'llava'.*internvl_chat.*internvl"):
        load_official(source, image_token_id=1)
    convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    with pytest.raises(ValueError, match="a model of hf_vtc already"):
        load_official(tmp_path / "dst")
    with pytest.raises(ValueError, match="`method` must be one of vico"):
        load_official(flash_folder, method="avg_llava")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_official(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no folder here, and the Hub did not deliver it"):
        load_official("nobody/nothing")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_pickled_checkpoints(tmp_path, flash_folder, num_shards):
    state = load_file(flash_folder / "model.safetensors")
    names = list(state)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text((flash_folder / "config.json").read_text())
    if num_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        weight_map = {}
        for shard in range(num_shards):
            own = {name: state[name] for name in names[shard::num_shards]}
            torch.save(own, folder / f"part{shard}.bin")
            weight_map |= dict.fromkeys(own, f"part{shard}.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert_same_weights(loaded, load_official(flash_folder, image_token_id=IMAGE_TOKEN_ID))


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("content", ["code", "truncated", "list"])
def test_unsafe_or_broken_pickles_are_refused(tmp_path, flash_folder, content):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text((flash_folder / "config.json").read_text())
    file = folder / "pytorch_model.bin"
    torch.save([torch.ones(1)] if content == "list" else {"a": Evil(tmp_path / "ran")}, file)
    if content == "truncated":
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        ValueError, match="dict of tensors" if content == "list" else "cannot be read as plain tensors"
    ):
        convert(folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert files_of(tmp_path) == {"flash", "bin"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"force_image_size": 32}, r"`force_image_size` \(32\) must equal"),
        ({"vision_config": {**VISION, "architectures": ["CLIPVisionModel"]}}, "must be an InternVisionModel"),
        ({"llm_config": None}, "needs `llm_config`"),
        ({"flash_relative_threshold": 3.0}, "is a quantile"),
    ],
)
def test_settings_without_a_counterpart(tmp_path, fields, message):
    config = official_config()
    source = write_checkpoint(tmp_path / "src", config | fields, official_state(config))
    with pytest.raises(ValueError, match=message):
        load_official(source, image_token_id=IMAGE_TOKEN_ID)


@pytest.mark.parametrize("size", ["2 potatoes", "GB", 0, "-1MB"])
def test_shard_sizes(tmp_path, flash_folder, size):
    with pytest.raises(ValueError, match="`max_shard_size` must be"):
        convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID, max_shard_size=size)
    assert not (tmp_path / "dst").exists()


def test_the_package_offers_convert():
    assert hf_vtc.convert is conversion
