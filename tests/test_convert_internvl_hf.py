"""InternVL without Flash as a base, from transformers and from official folders: equal models by every door."""

import re
from pathlib import Path

import pytest
import torch
from internvl_checkpoints import (
    IMAGE_TOKEN_ID,
    assert_same_weights,
    official_config,
    official_state,
    prompt,
    stock_model,
    write_checkpoint,
)
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

from hf_vtc.convert import convert, from_base, internvl_hf, load_official
from hf_vtc.methods import RECORDS


@pytest.fixture
def flash_folder(tmp_path: Path) -> Path:
    config = official_config()
    return write_checkpoint(tmp_path / "flash", config, official_state(config))


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    config = official_config(flash=False)
    return write_checkpoint(tmp_path / "base", config, official_state(config, flash=False))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # the names of files written by 4.52 and later, the names in memory, and those between
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
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


@pytest.mark.parametrize(
    "method", sorted(each.name for each in RECORDS.values() if each.base and "internvl" in each.base.kinds)
)
def test_a_projector_norm_that_has_no_place_is_refused(tmp_path, method):
    # without a pixel shuffle the projectors here begin with no norm, as LLaVA's; stock InternVL has one at any ratio
    config = stock_model().config
    config.downsample_ratio, config.image_seq_length = 1.0, 64
    base = InternVLForConditionalGeneration(config)
    fields = {"num_semantic_tokens": 8} if method == "vistog" else {}
    message = r"layer_norm.*has no place.*Convert a base whose `downsample_ratio` is below 1"
    # its config refuses the ratio by itself
    message = "ViCO has two connectors" if method == "vico" else message
    with pytest.raises(ValueError, match=message):
        from_base(base, method, **fields)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "base", tmp_path / "converted", method, **fields)
    assert not (tmp_path / "converted").exists()
