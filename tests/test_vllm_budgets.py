"""What an engine is told of a request, from sizes and arguments alone; needs no vllm."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import CONTRACTED, METHODS, budgets_of, tiny_config, tiny_model, tiny_processor
from PIL import Image

from hf_vtc.vllm import window
from hf_vtc.vllm.budgets import AUTO, FULL, budget_of_code, image_arguments, planned, refuse_unserved_base

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(40, 70), (32, 96), (90, 33)]


def pair_of(method):
    fields = {"compress_layer_idx": -1} if method == "llavolta" else {}
    model, processor = tiny_model(method, **fields), tiny_processor(method)
    processor.model_config, processor.return_layout = model.config, True
    return model, processor


def inputs_of(processor, sizes=SIZES):
    images = [Image.effect_noise((width, height), 60).convert("RGB") for height, width in sizes]
    text = " and ".join([processor.image_token] * len(sizes))
    return processor(text=[text], images=[images], return_tensors="pt")


@pytest.mark.parametrize("method", METHODS)
def test_an_image_gets_the_placeholders_that_the_model_fills(method):
    model, processor = pair_of(method)
    inputs = inputs_of(processor)
    sizes = inputs["image_sizes"].tolist()
    budgets = ["full", 1.0, *budgets_of(model.config)]
    for budget in [*budgets, [budgets[-1], "full", 1.0]]:
        plan = planned(processor, sizes, budget, {})
        assert plan.num_placeholders == model.count_visual_tokens(**inputs, vtc_budget=budget).tolist()
        images = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
        told = [budget_of_code(code) for code in plan.codes]
        if not model.model.budgets_settle and budget not in ("full", 1.0):
            # as many, but which ones the question tells, that an engine does not give
            with pytest.raises(ValueError, match="needs the question"):
                model.get_image_features(**images, vtc_budget=told)
            continue
        expected = model.get_image_features(**images, vtc_budget=budget).pooler_output
        found = model.get_image_features(**images, vtc_budget=told).pooler_output
        assert [len(tokens) for tokens in found] == plan.num_placeholders
        assert all(torch.equal(*tokens) for tokens in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_decides_where_sizes_tell_and_else_is_refused_with_its_reason(method):
    model, processor = pair_of(method)
    inputs = inputs_of(processor)
    sizes = inputs["image_sizes"].tolist()
    if method not in ("vico", "avg_llava"):
        for budget in (None, "auto"):
            plan = planned(processor, sizes, budget, {})
            assert plan.codes == [AUTO] * 3
            assert plan.num_placeholders == model.count_visual_tokens(**inputs).tolist()
        return
    for budget in (None, "auto", ["full", "auto", 0.5]):
        with pytest.raises(ValueError, match=f"cannot be served for vtc_{method}: the reason. Give a number"):
            planned(processor, sizes, budget, {}, "the reason.")
    switch = {"vico": "flash_mode", "avg_llava": "router_select"}[method]
    setattr(processor.model_config, switch, False)
    assert planned(processor, sizes, None, {}, "the reason.").num_placeholders == processor.written_tokens(sizes)


def test_the_stride_of_a_model_is_not_that_of_a_budget_with_as_many_tokens():
    # of 16 tokens, windows of 6 and of 8 leave two, but not the same two
    model, processor = pair_of("llavolta")
    model.config.set_compression(-1, 8)
    inputs = inputs_of(processor, [(32, 32)])
    plan = planned(processor, inputs["image_sizes"].tolist(), "auto", {})
    assert plan == ([model.config.image_seq_length // 8], [AUTO])


def test_words_and_numbers_are_told_apart():
    model, processor = pair_of("vistog")
    sizes = inputs_of(processor)["image_sizes"].tolist()
    groups = model.config.num_semantic_tokens
    plan = planned(processor, sizes, ["full", "auto", groups * 9], {})
    assert plan.codes[:2] == [FULL, AUTO] and plan.codes[2] == plan.num_placeholders[2] > 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, {})),
        ({"vtc_budget": 0.5, "max_tiles": 2}, (0.5, {"max_tiles": 2})),
        ({"images_kwargs": {"vtc_budget": 7}}, (7, {})),
        # vLLM adds it for a text of its own
        ({"truncation": False, "vtc_budget": "full"}, ("full", {})),
    ],
)
def test_arguments_of_a_request_are_sorted(given, expected):
    assert image_arguments(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0.5}, r"no argument `budget` \(did you mean `vtc_budget`\?\)"),
        ({"padding": True}, "no argument `padding`"),
        ({"text_kwargs": {"max_length": 5}}, "no argument `max_length`"),
        ({"images_kwargs": 5}, "`images_kwargs` must be a dictionary of arguments, got 5"),
        ({"vtc_budget": [0.5, 0.25]}, r"must be one budget for all images of a request, got \[0.5, 0.25\]"),
    ],
)
def test_arguments_that_an_engine_cannot_honour_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        image_arguments(given)


@pytest.mark.parametrize("name", [name for name in CONTRACTED if " on " in name])
def test_bases_that_an_engine_cannot_serve_are_refused_by_name(name):
    base = name.partition(" on ")[2]
    if base == "llava_next":
        refuse_unserved_base(tiny_config(name))
        return
    with pytest.raises(ValueError, match=f"vLLM does not serve vtc_.* on {base}: .*Use `generate` or `hf-vtc serve`"):
        refuse_unserved_base(tiny_config(name))


def test_the_plugin_asks_for_the_base_before_it_prepares_or_builds_anything():
    base, processing = (
        (ROOT / "hf_vtc" / "vllm" / name).read_text(encoding="utf-8") for name in ("base.py", "processing.py")
    )
    assert base.index("refuse_unserved_base(config)") < base.index("self.vision = ")
    # every step of the other side begins with the processor
    given = processing.partition("def get_hf_processor")[2].partition("return processor")[0]
    assert "refuse_unserved_base(processor.model_config)" in given


def test_versions_of_vllm_that_were_not_proven_are_named():
    major, minor = window.release_of(window.NEWEST_PROVEN)
    assert window.note_on_unproven(f"{window.OLDEST_PROVEN}.0") is None
    assert window.note_on_unproven(f"{window.NEWEST_PROVEN}.1") is None
    for version in (f"{major}.{minor + 1}.0", "0.1.0"):
        assert f"{version} is not among" in window.note_on_unproven(version)


def test_nothing_but_the_plugin_imports_vllm():
    script = "import sys, hf_vtc, hf_vtc.vllm, hf_vtc.vllm.budgets, hf_vtc_cli; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_extra_asks_for_the_proven_window():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    major, minor = window.release_of(window.NEWEST_PROVEN)
    assert f"vllm>={window.OLDEST_PROVEN},<{major}.{minor + 1}" in text
    assert "hf_vtc = hf_vtc.vllm:register" in text
