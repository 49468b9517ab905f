"""Parity with the original InternVL3.5-Flash code on a tiny checkpoint in the official layout."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vtc.convert import load_official
from hf_vtc.models.modeling_vico import route_tiles
from hf_vtc.models.ops_vtc import pixel_unshuffle

# the full data, of which the repository holds a selection, can be named instead
FOLDER = Path(os.environ.get("HF_VTC_GOLDEN_VICO", Path(__file__).parent / "golden" / "vico"))
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
TENSORS = load_file(FOLDER / "golden.safetensors")
STRIDE = GOLDEN.get("logits_position_stride", 1)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return load_official(FOLDER / "checkpoint", image_token_id=GOLDEN["image_context_token_id"])


@pytest.fixture
def case(request, model):
    """Inputs of a case, with the thresholds that it was recorded at."""
    name, fields = request.param, GOLDEN["cases"][request.param]
    model.config.flash_relative_threshold = fields["flash_relative_threshold"]
    model.config.flash_absolute_threshold = fields["flash_absolute_threshold"]
    source = fields.get("same_inputs_as", name)
    inputs = {key: TENSORS[f"{source}.{key}"] for key in ("input_ids", "pixel_values")}
    inputs["num_tiles"] = torch.tensor(GOLDEN["cases"][source]["tiles_per_image"])
    if fields["forced"] is not None:
        inputs["router_decisions"] = torch.tensor(fields["forced"])
    return name, fields, source, inputs


def cases(condition=lambda name, fields: True):
    names = [name for name, fields in GOLDEN["cases"].items() if condition(name, fields)]
    return pytest.mark.parametrize("case", names, indirect=True)


@cases()
def test_forward_matches_the_original(model, case):
    name, fields, source, inputs = case
    with torch.no_grad():
        out = model(**inputs)
    assert out.router_decisions.tolist() == fields["compress_decision"]
    assert torch.equal(out.router_decisions, TENSORS[f"{name}.compress_decision"].bool())
    assert inputs["input_ids"].shape[1] == fields["len_before"]
    assert int(out.kept_mask.sum()) == fields["len_after"]
    assert torch.equal(inputs["input_ids"][out.kept_mask][None], TENSORS[f"{name}.compressed_input_ids"])
    kept_logits = out.logits[out.kept_mask][None, ::STRIDE, ::8]
    torch.testing.assert_close(kept_logits, TENSORS[f"{name}.logits_v8"], **CLOSE)
    if fields["forced"] is None:
        torch.testing.assert_close(out.router_logits, TENSORS[f"{source}.router_logits"], **CLOSE)

    full, saved = model.config.image_seq_length, model.config.image_seq_length - model.config.compressed_seq_length
    per_tile = full - saved * out.router_decisions.long()
    assert out.num_visual_tokens.tolist() == [int(part.sum()) for part in per_tile.split(inputs["num_tiles"].tolist())]


@cases()
def test_generate_matches_the_original(model, case):
    name, _, _, inputs = case
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], TENSORS[f"{name}.generated_ids"])


@cases(lambda name, fields: f"{name}.visual_tokens_64" in TENSORS)
def test_connectors_and_router_match_the_original(model, case):
    _, _, source, inputs = case
    with torch.no_grad():
        features = model.model.encode(inputs["pixel_values"])
        torch.testing.assert_close(
            model.model.multi_modal_projector(features), TENSORS[f"{source}.visual_tokens_256"], **CLOSE
        )
        torch.testing.assert_close(
            model.model.compressed_projector(features), TENSORS[f"{source}.visual_tokens_64"], **CLOSE
        )
        torch.testing.assert_close(model.model.router(features), TENSORS[f"{source}.router_logits"], **CLOSE)


def test_pooling_matches_the_original(model):
    with torch.no_grad():
        pooled = model.model.router.pool(model.model.encode(TENSORS["mixed.pixel_values"]))
    torch.testing.assert_close(pooled, TENSORS["mixed.router_pooled"], **CLOSE)


def test_flash_off_is_the_base_model(model):
    inputs = {key: TENSORS[f"mixed.{key}"] for key in ("input_ids", "pixel_values")}
    with torch.no_grad():
        full = model(**inputs, vtc_budget="full").logits
        torch.testing.assert_close(full[:, ::STRIDE, ::8], TENSORS["flash_off.logits_v8"], **CLOSE)
        model.config.flash_mode = False
        assert torch.equal(model(**inputs).logits, full)
        model.config.flash_mode = True


def test_text_only(model):
    with torch.no_grad():
        logits = model(input_ids=TENSORS["text_only.input_ids"]).logits
    torch.testing.assert_close(logits, TENSORS["text_only.logits"], **CLOSE)


@pytest.mark.parametrize("version", ("v1", "v2"))
@pytest.mark.parametrize("factor, ratio", ((2, "half"), (4, "quarter")))
def test_pixel_unshuffle(version, factor, ratio):
    grid = TENSORS["pixel_shuffle.input"]
    expected = TENSORS[f"pixel_shuffle.{version}.{ratio}"]
    assert torch.equal(pixel_unshuffle(grid.flatten(1, 2), factor, version).reshape(expected.shape), expected)


@cases(lambda name, fields: fields["forced"] is None)
def test_route_tiles(case):
    _, fields, source, inputs = case
    decisions = route_tiles(
        TENSORS[f"{source}.router_probs"][:, 0],
        [int(inputs["num_tiles"].sum())],
        fields["flash_relative_threshold"],
        fields["flash_absolute_threshold"],
    )
    assert decisions.tolist() == fields["compress_decision"]
