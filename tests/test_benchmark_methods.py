"""`examples/benchmark_methods.py` and `benchmark_scale.py`: figures by hand, and every part at a tiny size."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

import benchmark_methods  # noqa: E402
import benchmark_scale  # noqa: E402
from benchmark_parts import conv_tower, first_token, rounds, router_step, training, writing  # noqa: E402
from benchmark_parts.cases import METHODS, ON_GRIDS, build, prompts, shape_of  # noqa: E402
from benchmark_parts.first_token import DifferentOutputs, released_products, require_equal  # noqa: E402
from benchmark_parts.rounds import Limits, Ratio, Rounds, Spread, peak_bytes, take_turns  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

CPU = torch.device("cpu")
# no time, so that the fewest rounds are all
SHORT = Limits(CPU, 0.0, of_process=True)


def test_spread_and_ratio_by_hand():
    spread = Spread.of([5.0, 1, 2, 3, 4])
    assert (spread.median, spread.p10, spread.p90) == (3, pytest.approx(1.4), pytest.approx(4.6))
    steady = Rounds({"a": [1.0, 1, 1, 1], "b": [2.0, 2, 2, 2]}).ratio("a", "b")
    assert (steady.median, steady.repeat, steady.is_steady) == (0.5, 0, True)
    # quartiles 0.9 and 1.1 around 1, of four values
    noisy = Ratio.of([0.85, 0.9166666, 1.0833333, 1.15])
    assert noisy.repeat == pytest.approx(1.96 * 2**0.5 * 1.2533 / 1.349 * 0.2 / 2, rel=1e-3) and not noisy.is_steady


def test_repeat_bounds_the_distance_of_two_runs():
    generator = torch.Generator().manual_seed(0)
    runs = [Ratio.of((1 + 0.1 * torch.randn(40, generator=generator)).tolist()) for _ in range(400)]
    apart = [abs(one.median - other.median) / one.median > one.repeat for one, other in zip(runs[::2], runs[1::2])]
    assert sum(apart) / len(apart) < 0.1


def test_turns_go_on_until_steady_and_turn_around(monkeypatch):
    order, now = [], iter(range(10**6))
    monkeypatch.setattr(rounds.time, "process_time", lambda: float(next(now)))
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    taken = take_turns(variants, [("a", "b")], Limits(CPU, 60.0, of_process=True))
    # once each for warming up; every call takes one tick, so that the fewest rounds do
    assert "".join(order) == "abc" + "abc" + "cba" + "abc" + "cba" + "abc"
    assert taken.seconds == {name: [1.0] * rounds.FEWEST_ROUNDS for name in "abc"}


def test_peak_counts_what_is_held_at_once():
    def work():
        first = torch.empty(1000, 1000)
        del first
        return torch.empty(500, 1000).add_(torch.empty(250, 1000).sum())

    assert peak_bytes(work, CPU) == pytest.approx(4 * 10**6, abs=1000)


def test_equal_outputs_are_required():
    values = torch.tensor([1.0, -2.0])
    assert require_equal("x", values * 1.001, values, 1e-2) == pytest.approx(1e-3, rel=1e-2)
    for other in (values * 1.1, values * float("nan")):
        with pytest.raises(DifferentOutputs, match="x: apart by"):
            require_equal("x", other, values, 1e-2)


@pytest.mark.parametrize("method", [*METHODS, *ON_GRIDS])
def test_first_token_rows(method):
    rows = first_token.measure(method, "tiny", 2, torch.float32, ["auto", 0.5, 0.25], SHORT)
    full, *others = rows
    assert full["budget"] == "full" and full["kept"] == full["reserved"]
    measured = [row for row in others if "left_out" not in row]
    # ConvLLaVA's tower has compressed before anything is reserved
    fewer = method != "convllava"
    assert all((row["kept"] < row["reserved"]) == fewer and row["eta"]["median"] > 0 for row in measured)
    left_out = {row["budget"]: row["left_out"] for row in others if "left_out" in row}
    if method == "convllava":
        assert left_out[0.5].startswith("refused")
    elif method == "vistog":
        assert left_out == {0.5: "as auto", 0.25: "as auto"}
    else:
        # half of the tiles may be those that a router of random weights compresses by itself
        assert len(measured) + len(left_out) == 3 and len(measured) >= 2
    text = writing.table(rows)
    assert text.count(f"| {method} |") == 1 + len(measured)


@pytest.mark.parametrize("case", ["avg_llava", "avg_llava on qwen3_vl"])
@torch.no_grad()
def test_released_products_are_those_of_the_router(case):
    """Of the layer as it is built, row by row, without anything shared."""
    shape = shape_of(case, "tiny")
    model = build(case, shape, torch.float32, CPU)
    inputs = prompts(model, shape, 2)
    run, router = released_products(model, inputs), model.model.router
    width, num_texts = model.config.text_config.hidden_size, model.config.filtered_text_num
    if case == "avg_llava":
        length = sum(model.config.vis_token_granularity) + num_texts
        states = torch.randn(len(inputs["pixel_values"]), length, width)
        members = torch.repeat_interleave(inputs["num_tiles"])
    else:
        # 4 x 6 tokens and their means over the windows of the granularities
        length = 24 + 12 + 6 + 4 + 2 + num_texts
        states, members = torch.randn(2 * length, width), [length, length]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as expected:
        router.linear_2(router.act(router.linear_1(router.merger(states, members))))
    with FlopCounterMode(display=False) as counted:
        run()
    assert counted.get_total_flops() == expected.get_total_flops()


# each trains for twenty seconds: one is enough for every day
@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method == "llavolta" else pytest.mark.slow) for method in METHODS]
)
def test_training_rows(method):
    rows = training.measure(method, "tiny", 1, 512, False, ["full", "auto"], SHORT)
    assert [row["budget"] for row in rows] == ["full", "auto", "auto"]
    assert all(min(row["oracle_bytes"], row["bytes"], row["plain_bytes"]) > 0 for row in rows)
    # of a batch of one image; every second tile, or the mean over all granularities, where the trainer compresses so
    assert rows[0]["kept"] == rows[0]["reserved"] and rows[-1]["kept"] <= rows[-1]["reserved"]
    assert writing.table(rows).count(f"| {method} |") == 3
    assert ["by_products" in row for row in rows] == [False, True, False]
    assert rows[1]["by_products"] >= 1


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method == "vistog" else pytest.mark.slow) for method in METHODS]
)
@pytest.mark.parametrize("lora", (False, True), ids=("full", "lora"))
def test_oracle_steps_multiply_as_much_as_ours(method, lora):
    """To the last product: nothing is left out that the objective demands, and ours runs nothing in vain."""
    for kind in training.steps_of(method, lora, ["full", "auto", 0.5]):
        made = training.Prepared(kind, method, shape_of(method, "tiny", 512), 1, CPU)
        for budget in made.kept:
            oracle, ours = (rounds.multiplied(made.variants[name]) for name in (f"oracle {budget}", str(budget)))
            # of VisToG autograd makes gradients of the image's keys, which nobody reads; at "full" its tokens, and of
            # ViCO's connectors the one that no tile needs, take part so that every process has the same gradients;
            # ViCO's router attends anew, and the text filter of AVG-LLaVA's is no part of the products as released
            allowed = {"vistog": 0.01, "vico": 0.02, "avg_llava": 2e-4}.get(method, 0.0)
            assert oracle <= ours <= (1 + allowed) * oracle, (kind.name, budget)


def test_training_rows_under_lora():
    rows = training.measure("llavolta", "tiny", 1, 512, True, ["full", 0.5], SHORT)
    assert [(row["step"], row["budget"]) for row in rows] == [("next token, LoRA", "full"), ("next token, LoRA", 0.5)]


def test_router_step_and_tower_rows():
    (row,) = router_step.measure("tiny", 1, [2], SHORT)
    assert row["apart"] <= 1e-5 and 0 < row["tower_share"] < 1
    rows = {row["tower"]: row for row in conv_tower.measure("tiny", 1, SHORT)}
    assert list(rows) == ["stock", "ours", "channels-last", "folded", "both"]
    # no block holds what a step of it has read
    assert rows["ours"]["bytes"] <= 1.02 * rows["stock"]["bytes"]


def _row(repeat):
    ratio = {"median": 1.0, "p10": 1.0, "p90": 1.0, "repeat": repeat}
    spread = {"median": 1.0, "p10": 1.0, "p90": 1.0}
    return {
        **{"part": "router step", "method": "avg_llava", "batch": 1, "layers": 2, "tower_share": 0.3},
        **{"seconds": spread, "straightforward_seconds": spread, "over_straightforward": ratio},
        "by_products": 1.0,
        **{"bytes": 2**20, "straightforward_bytes": 2**20},
    }


@pytest.mark.parametrize(("repeat", "status"), [(0.01, 0), (0.2, benchmark_methods.TOO_NOISY)])
def test_a_noisy_machine_is_said(monkeypatch, tmp_path, capsys, repeat, status):
    monkeypatch.setattr(sys, "argv", ["benchmark_methods.py", "--output", str(tmp_path / "found.json")])
    monkeypatch.setattr(benchmark_methods, "groups", lambda arguments: iter([("one", [_row(repeat)])]))
    assert benchmark_methods.main() == status
    written = capsys.readouterr()
    assert ("machine too noisy" in written.err) == (status != 0) == ("1.00 ~" in written.out)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"][0]["layers"] == 2 and found["environment"]["commit"]
    assert str(ROOT) not in (tmp_path / "found.md").read_text()


def test_different_outputs_are_not_reported(monkeypatch, tmp_path, capsys):
    def differ(arguments):
        raise DifferentOutputs("0.5 and its oracle: apart")
        yield

    monkeypatch.setattr(sys, "argv", ["benchmark_methods.py", "--output", str(tmp_path / "found.json")])
    monkeypatch.setattr(benchmark_methods, "groups", differ)
    assert benchmark_methods.main() == benchmark_methods.OUTPUTS_DIFFER
    assert "apart" in capsys.readouterr().err and not (tmp_path / "found.json").exists()


@pytest.mark.slow
def test_scale_draws_and_writes(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, `pip install hf_vtc[viz]`")
    monkeypatch.setattr(benchmark_scale, "AXES", {"tiles": (1, 3), "images": (1, 2), "vocabulary": (256,)})
    options = ["--size", "tiny", "--axes", "tiles", "images", "vocabulary", "--methods", "llavolta"]
    command = ["benchmark_scale.py", *options, "--most-seconds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_scale.main()
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("tiles", 1),
        ("tiles", 3),
        ("images", 1),
        ("images", 2),
        ("vocabulary", 256),
    ]
    # half of the tiles compressed, half of the tokens
    assert rows[1]["kept"] > rows[0]["kept"] and rows[3]["kept"] == 2 * rows[2]["kept"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "images.png",
        "scale.json",
        "scale.md",
        "tiles.png",
        "vocabulary.png",
    ]
