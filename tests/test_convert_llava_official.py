"""The official layout of LLaVA: towers of their own, repositories of the Hub, a placeholder beyond the vocabulary."""

import json
import re
import shutil
from fnmatch import fnmatch

import pytest
import torch
from llava_checkpoints import (
    IMAGE_TOKEN_ID,
    PINPOINTS,
    next_prompt,
    official_config,
    official_state,
    prompt,
    stock_model,
    write_official,
)
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from hf_vtc.convert import convert, from_base, llava_official, load_official


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
@pytest.mark.parametrize("method", ("llavolta", "avg_llava"))
@pytest.mark.parametrize("tied", (False, True))
def test_a_placeholder_beyond_the_vocabulary_has_no_row(tmp_path, tied, method):
    """The original has none either: logits, losses and tokens are what they are with an id of the vocabulary."""
    base = stock_model(tied=tied)
    folder = write_official(tmp_path / "llava", base, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = load_official(folder, method)
    torch.manual_seed(0)
    # what generation's own lookups see in its place is token 0
    other = load_official(folder, method, image_token_id=0)
    assert model.config.image_token_id == 64 and model.config.text_config.vocab_size == 64
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (64, 48)
    stock = prompt()
    theirs, ours = (
        {**stock, "input_ids": stock["input_ids"].masked_fill(stock["input_ids"] == IMAGE_TOKEN_ID, token_id)}
        for token_id in (0, 64)
    )
    with torch.no_grad():
        assert torch.equal(model(**ours, vtc_budget="full").logits, base(**stock).logits)
        assert torch.equal(model(**ours, vtc_budget=0.5).logits, other(**theirs, vtc_budget=0.5).logits)
        labelled = [each(**inputs, labels=inputs["input_ids"]) for each, inputs in ((model, ours), (other, theirs))]
    assert labelled[0].loss == labelled[1].loss
    length = theirs["input_ids"].shape[1]
    for options in (
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 3},
    ):
        options |= {"max_new_tokens": 6, "do_sample": False}
        out, expected = model.generate(**ours, **options), other.generate(**theirs, **options)
        assert torch.equal(out[:, :length], ours["input_ids"])
        assert torch.equal(out[:, length:], expected[:, length:]), options
    embeds = model.get_input_embeddings()(theirs["input_ids"])
    with pytest.raises(ValueError, match=r"id 64\) lies beyond the vocabulary.*Pass `input_ids`"):
        model(inputs_embeds=embeds, pixel_values=ours["pixel_values"])


def test_conversion_adds_no_row_for_the_placeholder(tmp_path):
    folder = write_official(tmp_path / "llava", stock_model())
    report = convert(folder, tmp_path / "dst", "llavolta")
    assert report.fresh_keys == [] and report.missing_keys == []
    written = load_file(tmp_path / "dst" / "model.safetensors")
    assert written["lm_head.weight"].shape == written["model.language_model.embed_tokens.weight"].shape == (64, 48)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["image_token_id"] == config["text_config"]["vocab_size"] == 64
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    with torch.no_grad():
        ids = prompt()["input_ids"]
        inputs = {**prompt(), "input_ids": ids.masked_fill(ids == IMAGE_TOKEN_ID, 64)}
        assert model(**inputs).logits.shape == (*ids.shape, 64)


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
