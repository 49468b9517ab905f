"""Parity with the original LLaVolta code on a tiny checkpoint in the official layout."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vtc.convert import load_official
from hf_vtc.convert.llava_official import rename
from hf_vtc.trainers.schedule import released_stage

# the full data, of which the repository holds a selection, can be named instead
FOLDER = Path(os.environ.get("HF_VTC_GOLDEN_LLAVOLTA", Path(__file__).parent / "golden" / "llavolta"))
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
TENSORS = load_file(FOLDER / "golden.safetensors")
STRIDE = GOLDEN.get("logits_position_stride", 1)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SETS = [name for name in ("single", "batch", "multi") if f"{name}.input_ids" in TENSORS]
SENTINEL = -200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint's folder, with zeros for what the selection leaves out because no output depends on it."""
    if "omitted" not in GOLDEN:
        return FOLDER
    folder = tmp_path_factory.mktemp("golden") / "llavolta"
    shutil.copytree(FOLDER, folder)
    tensors = load_file(FOLDER / "model.safetensors")
    for name, omitted in GOLDEN["omitted"].items():
        whole = torch.zeros(omitted["shape"])
        if "rows" in omitted:
            whole[omitted["rows"]] = tensors[name]
        tensors[name] = whole
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    """The checkpoint, with a token that no prompt uses as placeholder: the vocabulary stays as it is."""
    ids = [tensor for name, tensor in TENSORS.items() if name.endswith(("input_ids", "sequences"))]
    used = {int(token) for tensor in ids for token in tensor.flatten()}
    vocab_size = json.loads((FOLDER / "config.json").read_text())["vocab_size"]
    unused = max(set(range(vocab_size)) - used)
    return load_official(checkpoint, "llavolta", image_token_id=unused)


@pytest.fixture(params=GOLDEN["cases"])
def case(request, model):
    """Name of a case; the model is set to it."""
    return set_case(model, request.param)


def set_case(model, name):
    fields = GOLDEN["cases"][name]
    stride = 1 if fields["grouping"] == "none" else fields["stride"]
    model.config.set_compression(min(fields["layer_K"], model.config.text_config.num_hidden_layers), stride)
    return name


def expanded(model, name):
    """Inputs of a set, each image as the placeholders that it needs."""
    ids, labels = TENSORS[f"{name}.input_ids"], TENSORS.get(f"{name}.labels", TENSORS[f"{name}.input_ids"])
    mask = TENSORS.get(f"{name}.attention_mask", torch.ones_like(ids))
    rows = []
    for row, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        pieces = []
        for token, label in zip(row[row_mask.bool()].tolist(), row_labels[row_mask.bool()].tolist(), strict=True):
            image = token == SENTINEL
            count = GOLDEN["num_visual_tokens"] if image else 1
            pieces += [(model.config.image_token_id if image else token, -100 if image else label)] * count
        rows.append(pieces)
    length = max(map(len, rows))
    padded = torch.tensor([row + [(0, -100)] * (length - len(row)) for row in rows])
    return {
        "input_ids": padded[..., 0],
        "labels": padded[..., 1],
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": TENSORS[f"{name}.pixel_values"],
    }


def recorded(*suffixes):
    """(case, set) pairs of which every one of these tensors is there."""
    return [
        (case, name)
        for case in GOLDEN["cases"]
        for name in SETS
        if all(f"{case}.{name}.{suffix}" in TENSORS for suffix in suffixes)
    ]


@pytest.mark.parametrize(("case", "name"), recorded("logits_v8"), indirect=["case"])
def test_logits_match_the_original(model, case, name):
    inputs = expanded(model, name)
    inputs.pop("labels")
    with torch.no_grad():
        out = model(**inputs)
    valid = TENSORS[f"{case}.{name}.valid_len_after"]
    assert torch.equal(out.kept_mask.sum(1), valid)
    # with -1 the sequence is short before the first layer already
    before = out.kept_mask if GOLDEN["cases"][case]["layer_K"] == -1 else inputs["attention_mask"]
    assert torch.equal(before.sum(1), TENSORS[f"{case}.{name}.valid_len_before"])
    expected = TENSORS[f"{case}.{name}.logits_v8"]
    for row, count in enumerate(valid.tolist()):
        kept = out.logits[row, out.kept_mask[row]][::STRIDE, ::8]
        torch.testing.assert_close(kept, expected[row, : len(range(0, count, STRIDE))], **CLOSE)


@pytest.mark.parametrize(("case", "name"), recorded("loss"), indirect=["case"])
def test_loss_matches_the_original(model, case, name):
    with torch.no_grad():
        loss = model(**expanded(model, name)).loss
    torch.testing.assert_close(loss[None], TENSORS[f"{case}.{name}.loss"], **CLOSE)


class LayerInputs:
    """Records what reaches each decoder layer: states, positions and the length of its cache afterwards."""

    def __init__(self, model):
        self.layers = model.get_decoder().layers
        self.states, self.positions = {}, {}

    def __enter__(self):
        def hook(module, args, kwargs, idx):
            self.states[idx], self.positions[idx] = args[0], kwargs["position_ids"]

        self.handles = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, idx=idx: hook(module, args, kwargs, idx), with_kwargs=True
            )
            for idx, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(("case", "name"), recorded("compressed_position_ids"), indirect=["case"])
def test_positions_and_cache_lengths_match_the_original(model, case, name):
    inputs = expanded(model, name)
    inputs.pop("labels")
    layer_idx = GOLDEN["cases"][case]["layer_K"]
    with torch.no_grad(), LayerInputs(model) as seen:
        out = model(**inputs, use_cache=True)
    valid, expected = TENSORS[f"{case}.{name}.valid_len_after"], TENSORS[f"{case}.{name}.compressed_position_ids"]
    positions = seen.positions[max(layer_idx, 0)].expand(len(valid), -1)
    # ours are padded on the left where rows got shorter
    for row, count in enumerate(valid.tolist()):
        ours = positions[row, -count:] if positions.shape[1] == int(valid.max()) else positions[row, :count]
        assert torch.equal(ours, expected[row, :count])
    lengths = [out.past_key_values.get_seq_length(idx) for idx in range(len(seen.layers))]
    assert lengths == TENSORS[f"{case}.{name}.cache_len_per_layer"].tolist()


@pytest.mark.parametrize(("case", "name"), recorded("compressed_hidden"), indirect=["case"])
def test_the_layer_behind_the_compressor_sees_what_it_saw(model, case, name):
    inputs = expanded(model, name)
    inputs.pop("labels")
    with torch.no_grad(), LayerInputs(model) as seen:
        out = model(**inputs)
    expected = TENSORS[f"{case}.{name}.compressed_hidden"]
    torch.testing.assert_close(seen.states[GOLDEN["cases"][case]["layer_K"]], expected, **CLOSE)
    assert out.image_hidden_states.shape[0] == int(out.num_visual_tokens.sum())
    if model.config.compress_stride == 1:
        # nothing happens there, so the visual tokens are those that the decoder got
        return
    image = (inputs["input_ids"] == model.config.image_token_id)[out.kept_mask]
    torch.testing.assert_close(out.image_hidden_states, expected[0, image], **CLOSE)


@pytest.mark.parametrize(("case", "name"), recorded("hidden_states.0"), indirect=["case"])
def test_hidden_states_match_the_original(model, case, name):
    inputs = expanded(model, name)
    inputs.pop("labels")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    for idx, ours in enumerate(states):
        torch.testing.assert_close(ours, TENSORS[f"{case}.{name}.hidden_states.{idx}"], **CLOSE)


@pytest.mark.parametrize("name", [name for name in SETS if f"{name}.image_features" in TENSORS])
def test_image_features_match_the_original(model, name):
    with torch.no_grad():
        features = model.get_image_features(TENSORS[f"{name}.pixel_values"]).pooler_output
    torch.testing.assert_close(torch.cat(features), TENSORS[f"{name}.image_features"].flatten(0, 1), **CLOSE)


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN["cases"] if f"generate.{case}.sequences" in TENSORS], indirect=True
)
def test_generate_matches_the_original(model, case):
    inputs = expanded(model, "generate")
    inputs.pop("labels")
    # the first column is a token that the original's host library puts before an empty prompt
    expected = TENSORS[f"generate.{case}.sequences"][:, 1:]
    num_new = expected.shape[1]
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=num_new, min_new_tokens=num_new, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], expected)
    if f"generate.{case}.scores" in TENSORS:
        ours, theirs = torch.stack(out.logits, 1), TENSORS[f"generate.{case}.scores"]
        # scores have the end token suppressed
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], **CLOSE)


def gradient_cases():
    return sorted({name.partition(".grad.")[0] for name in TENSORS if ".grad." in name})


@pytest.mark.parametrize("prefix", gradient_cases())
@pytest.mark.parametrize("checkpointed", (False, True))
def test_gradients_match_the_original(model, prefix, checkpointed):
    case, name = prefix.split(".")
    set_case(model, case)
    model.zero_grad()
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        model(**expanded(model, name)).loss.backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    parameters = dict(model.named_parameters())
    for key in (key for key in TENSORS if key.startswith(f"{prefix}.grad.")):
        (ours,) = rename(key.removeprefix(f"{prefix}.grad.")).names
        torch.testing.assert_close(parameters[ours].grad, TENSORS[key], **CLOSE)


@pytest.mark.parametrize("trace", GOLDEN["schedule_trace"], ids=lambda trace: str(trace["pivots"]))
def test_the_released_schedule_matches_the_original(trace):
    stages = list(zip(trace["layers"], trace["strides"], strict=True))
    expected = trace["layer_and_stride_used_by_forward_0_1_2"]
    ours = [list(stages[released_stage(step, trace["pivots"], trace["strides"])]) for step in range(len(expected))]
    assert ours == expected


def test_the_placeholder_lies_beyond_the_vocabulary_where_nobody_names_one(checkpoint):
    plain = json.loads((FOLDER / "config.json").read_text())["vocab_size"]
    model = load_official(checkpoint, "llavolta")
    assert model.config.image_token_id == plain
    assert model.lm_head.weight.shape[0] == plain
    set_case(model, "none")
    inputs = expanded(model, SETS[0])
    inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = TENSORS[f"none.{SETS[0]}.logits_v8"]
    counts = inputs["attention_mask"].sum(1).tolist()
    for row, count in enumerate(counts):
        ours = logits[row, :count:STRIDE, :plain:8]
        torch.testing.assert_close(ours, expected[row, : len(ours)], **CLOSE)
    # it has no logit, so that it takes no share of the softmax
    assert logits.shape[-1] == plain
