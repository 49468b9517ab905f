"""What `bench` measures, and the oracle that it measures against."""

import json

import pytest
import torch
from factories import CONTRACTED, METHODS, budgets_of, image_for_estimate, random_batch, tiny_model

from hf_vtc import bench, estimate
from hf_vtc.report import measured


@pytest.fixture(scope="module", params=METHODS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def batch(model):
    return random_batch(model.config, torch.Generator().manual_seed(1), num_rows=3)


@pytest.mark.parametrize("budget", ("auto", "full", None))
@torch.no_grad()
def test_oracle_computes_what_the_model_computes(model, batch, budget):
    budget = budgets_of(model.config)[0] if budget is None else budget
    oracle = measured.Oracle(model, batch, budget)
    ours = model.generate(**batch, vtc_budget=budget, max_new_tokens=1, do_sample=False, min_new_tokens=1)[:, -1:]
    assert torch.equal(oracle.forward(), ours)
    if oracle.replay is None:
        assert torch.equal(oracle.generate(), ours)
    else:
        assert model.config.model_type == "vtc_llavolta" and budget != "full"
    assert oracle.num_kept == model.count_visual_tokens(**batch, vtc_budget=budget).tolist()


@pytest.mark.parametrize("case", CONTRACTED)
@torch.no_grad()
def test_oracle_has_the_logits_of_the_model(case):
    """On every base: a decoder whose positions have several axes is given them, whatever its token would be."""
    model = tiny_model(case)
    batch = random_batch(model.config, torch.Generator().manual_seed(1), num_rows=3)
    for budget in ("full", "auto", budgets_of(model.config)[0]):
        expected = model(**batch, vtc_budget=budget, logits_to_keep=1).logits[:, -1]
        found = measured.Oracle(model, batch, budget).logits()[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_oracle_skips_what_chooses_and_needless_connectors(model, batch):
    called = []
    parts = {name: module for name, module in model.model.named_children() if name != "language_model"}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    oracle = measured.Oracle(model, batch, "full")
    for runs in range(1, 3):
        called.clear()
        (oracle.forward, oracle.generate)[runs - 1]()
        # the tower of some methods is run layer by layer
        assert [name for name in called if name != "vision_tower"] == ["multi_modal_projector"]


@pytest.mark.parametrize("entry", ("generate", "forward", None))
def test_bench_reports(model, batch, entry):
    budget, inside = budgets_of(model.config)[0], model.config.model_type == "vtc_llavolta"
    if inside and entry == "generate":
        with pytest.raises(ValueError, match="`entry='generate'` has no oracle"):
            bench(model, batch, budget, entry=entry)
        return
    result = bench(model, batch, budget, repeats=3, warmup=1, entry=entry)
    assert all(len(timing.seconds) == 3 for timing in (result.full, result.measured, result.oracle))
    assert result.num_kept == model.count_visual_tokens(**batch, vtc_budget=budget).tolist()
    assert result.num_reserved == model.count_visual_tokens(**batch, vtc_budget="full").tolist()
    real = int(batch["attention_mask"].sum())
    assert result.num_text_tokens == real - sum(result.num_reserved)
    assert (result.ideal_speedup > 1) == (sum(result.num_kept) < sum(result.num_reserved))
    used = json.loads(json.dumps(result.to_dict()))["environment"]["entry"]
    assert used == (entry or ("forward" if inside else "generate"))
    assert "eta = oracle / measured" in str(result)


def test_bench_ideal_is_the_estimate(model):
    batch = random_batch(model.config, torch.Generator().manual_seed(2), num_rows=1, images_per_row=[1])
    budget = budgets_of(model.config)[0]
    result = bench(model, batch, budget, repeats=1, warmup=0)
    image = image_for_estimate(model.config, batch)
    expected = estimate(model, **image, num_text_tokens=result.num_text_tokens, vtc_budget=budget)
    assert result.ideal_speedup == pytest.approx(expected.ttft_speedup)


def test_bench_figures_by_hand(model, batch):
    result = bench(model, batch, "full", repeats=1, warmup=0)
    result.full.seconds, result.measured.seconds, result.oracle.seconds = [9.0, 10, 30], [5.0, 6, 5], [4.0, 4, 8]
    assert (result.eta, result.speedup, result.oracle_speedup) == (4 / 5, 2, 2.5)
    assert result.paired_eta == 4 / 5
    assert result.phi == pytest.approx(5 / 6)
    assert result.full.p90 == 30
    # where the oracle gains nothing there is no share of it
    result.oracle.seconds = [10.0, 10, 10]
    assert result.phi is None and "not defined" in str(result)


def test_rounds_rotate():
    order = []
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = measured.in_turns(variants, torch.device("cpu"), repeats=2, warmup=1)
    assert "".join(order) == "abcbcacab"
    assert all(len(values) == 2 for values in seconds.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"repeats": 0}, "`repeats` must be at least 1"),
        ({"entry": "both"}, "`entry` must be"),
        ({"vtc_budget": 0.001}, "smallest admissible count"),
    ],
)
def test_bench_refuses(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        bench(model, batch, **change)


def test_bench_refuses_training_mode(model, batch):
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            bench(model, batch)
    finally:
        model.eval()


def test_bench_needs_an_image(model, batch):
    with pytest.raises(ValueError, match="`pixel_values`"):
        bench(model, {"input_ids": batch["input_ids"]})
