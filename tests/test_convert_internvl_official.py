"""The official layout of InternVL3, 3.5 and 3.5-Flash: every name, every setting, the original numbers."""

import json
import re
from pathlib import Path

import pytest
import torch
from internvl_checkpoints import (
    IMAGE_TOKEN_ID,
    TEXT,
    VISION,
    assert_same_weights,
    official_config,
    official_shapes,
    official_state,
    write_checkpoint,
)
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from hf_vtc.convert import convert, internvl_official, load_official
from hf_vtc.models.configuration_vico import VicoConfig
from hf_vtc.models.configuration_vtc import with_both_ropes
from hf_vtc.models.modeling_vico import VicoForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden" / "vico"


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
