"""The ledger's gates and claims on made-up scores, and a dry run of all its commands."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import InternVLForConditionalGeneration

import hf_vtc

pytest.importorskip("sklearn", reason="ledger reads handwriting and photographs from scikit-learn")
pytest.importorskip("matplotlib", reason="ledger reads fonts and a photograph from matplotlib")
pytest.importorskip("scipy", reason="intervals by resampling need scipy")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from ledger import PagePool, base, evaluation_set, gates, measure, readout, recipe  # noqa: E402
from ledger.dataset import KINDS  # noqa: E402
from ledger.sizes import SIZES  # noqa: E402
from ledger.stages import build_processor, load  # noqa: E402
from ledger.text import build_tokenizer  # noqa: E402
from train_base import collate_tiles  # noqa: E402

VICO = SimpleNamespace(model_type="vtc_vico", image_seq_length=16, compressed_seq_length=4)
AVG = SimpleNamespace(model_type="vtc_avg_llava", image_seq_length=16, vis_token_granularity=[1, 2, 4, 8, 16])


def test_choices_of_vico_spend_as_many_tokens_by_lot():
    items = evaluation_set(30, seed=9)
    choices = gates.choices_of(VICO, items)
    for item, decisions, tokens in zip(items, choices["oracle"].decisions, choices["oracle"].tokens, strict=True):
        assert decisions.tolist() == [kind != "table" for kind in item.fields]
        assert tokens == pytest.approx((16 * item.fields.count("table") + 4 * (6 - item.fields.count("table"))) / 6)
    lots = [name for name in choices if name.startswith("lot")]
    assert len(lots) == 3
    for name in lots:
        assert choices[name].tokens == choices["oracle"].tokens
        assert any((a != b).any() for a, b in zip(choices[name].decisions, choices["oracle"].decisions, strict=True))


def test_choices_of_avg_llava_give_dense_questions_the_finest():
    items = evaluation_set(30, seed=9)
    choices = gates.choices_of(AVG, items)
    assert [each.item() for each in choices["oracle"].decisions] == [
        4 if item.kind == "dense" else 2 for item in items
    ]
    assert np.mean(choices["lot #1"].tokens) == np.mean(choices["oracle"].tokens) == pytest.approx(8)


def made_up(compressed: float, lot: float) -> tuple[dict, dict]:
    """Choices of 1,000 questions of which the oracle has all right, at 8 of 16 tokens; others the shares given."""
    num = 1000

    def right(share: float) -> np.ndarray:
        return (np.arange(num) < share * num).astype(float)

    tokens = {"full": 16.0, "compressed": 4.0, "oracle": 8.0, "lot #1": 8.0}
    scores = {"full": right(1), "compressed": right(compressed), "oracle": right(1), "lot #1": right(lot)}
    return {name: gates.Choice([], [each] * num) for name, each in tokens.items()}, scores


def test_oracle_gaps_by_hand():
    gaps = gates.oracle_gaps(*made_up(compressed=0.7, lot=0.8))
    assert gaps["compressed"].value == pytest.approx(0.3) and gaps["lot"].value == pytest.approx(0.2)
    # a third of the pages at full length, two thirds compressed: 1/3 + 2/3 x 0.7
    assert gaps["line"].value == pytest.approx(0.2)
    assert all(0 < gap.lower < gap.value for gap in gaps.values())


def test_oracle_gaps_of_nothing_to_choose_do_not_pass():
    gaps = gates.oracle_gaps(*made_up(compressed=0.99, lot=1.0))
    assert not any(gap.value >= gates.GAP for gap in gaps.values())


def test_is_beaten_by_needs_intervals_apart():
    num = 300
    kinds = np.array(["coarse", "sparse", "dense"] * (num // 3))
    auto, near, far = (np.zeros(num) for _ in range(3))
    auto[:285], near[:282], far[:200] = 1, 1, 1
    scores = {"auto": auto, "near": near, "far": far}
    rivals = measure.rivals_of(scores, dict.fromkeys(scores, 40.0), kinds)
    assert rivals["far"].is_beaten_by(rivals["auto"]) and not rivals["near"].is_beaten_by(rivals["auto"])
    assert rivals["far"].gap.value == pytest.approx(85 / 300)
    assert (rivals["far"].gap.counts.lost, rivals["far"].gap.counts.gained) == (0, 85)
    # the same scores of other questions: the difference stays, its interval widens
    shuffled = {**scores, "far": np.roll(far, 150)}
    other = measure.rivals_of(shuffled, dict.fromkeys(scores, 40.0), kinds)["far"].gap
    assert other.value == pytest.approx(85 / 300) and other.interval.low < rivals["far"].gap.interval.low


def test_add_line_mixes_the_nearest_fixed_points():
    scores = {"full": np.array([1.0, 1.0]), "auto": np.ones(2), "4 per tile": np.array([0.0, 1.0])}
    scores["1 per tile"] = np.zeros(2)
    tokens = {"full": 96.0, "auto": 42.0, "4 per tile": 24.0, "1 per tile": 6.0}
    measure.add_line(scores, tokens)
    assert scores["line"].tolist() == pytest.approx([0.25, 1.0]) and tokens["line"] == 42.0
    measure.add_line(scores, tokens := {**tokens, "auto": 96.0})
    assert scores["line"].tolist() == [1.0, 1.0] and tokens["line"] == 96.0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What the recipe makes in a dry run."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe.main(["--size", "dry", "--output", str(folder), "--questions", "12", "--no-gates"])
    return folder


@pytest.mark.parametrize("method", ["vico", "avg"])
def test_recipe_makes_models_and_figures(made, method):
    found = json.loads((made / f"{method}.json").read_text())
    assert found["questions"] == 12 and {"auto", "full", "4 per tile", "line"} <= set(found["lines"])
    assert "random beside auto" in found["lines"]
    model, _ = load(made / method)
    assert model.config.image_seq_length == 16
    assert not any(path.suffix == ".py" for path in (made / method).iterdir())


@torch.no_grad()
def test_avg_llava_at_full_length_is_its_base(made):
    folder = made / "base"
    stock = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    converted = hf_vtc.convert.from_base(folder, "avg_llava", dtype=torch.float32).eval()
    item = evaluation_set(1, seed=9)[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
    processor = build_processor(folder)
    inputs = processor(
        images=[item.image], text=processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt"
    )
    expected = stock(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"]
    ).logits
    found = converted(**inputs, vtc_budget="full").logits
    assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()


def test_require_gates_refuses_a_model_that_reads_nothing(made):
    model, processor = load(made / "vico-work" / "after_consistency")
    with pytest.raises(RuntimeError, match="1 full length.*would learn to choose"):
        gates.require_gates(model, processor, 12, Console(quiet=True), made / "gates.json")
    written = json.loads((made / "gates.json").read_text())
    assert not written["passed"]["1 full length"] and written["bits"]["table"][2] > 5


def test_scores_of_take_the_decisions_that_are_given(made, monkeypatch):
    model, processor = load(made / "vico-work" / "after_consistency")
    items = evaluation_set(6, seed=9)
    choices = {name: each for name, each in gates.choices_of(VICO, items).items() if name in ("full", "oracle")}
    choose, taken = model.model.choose, []

    def noting(scores, layout):
        choice = choose(scores, layout)
        taken.append(choice.decisions)
        return choice

    monkeypatch.setattr(model.model, "choose", noting)
    scores = gates.scores_of(model, processor, items, choices)
    assert {name: values.shape for name, values in scores.items()} == {"full": (6,), "oracle": (6,)}
    assert any(torch.equal(each, torch.cat(choices["oracle"].decisions)) for each in taken)


def test_readout_finds_what_means_keep_and_not_what_they_mix():
    tiles, fields = readout.tiles_of(PagePool(60, "train", 3), "table")
    # features that name their own digit: a token of one digit tells it, one of four tells which four, in no order
    digits = np.array([[int(digit) for digit in field.text] for field in fields])
    maps = torch.eye(10)[torch.from_numpy(digits)].reshape(len(tiles), 4, 4, 10).permute(0, 3, 1, 2)
    alone = readout.examples_of(maps, fields, 16)
    assert list(alone) == [0] and len(alone[0][0]) == 16 * len(tiles)
    assert [int(np.argmax(vector)) for vector in alone[0][0]] == [int(digit) for digit in alone[0][1]]
    mixed = readout.examples_of(maps, fields, 4)
    assert sorted(mixed) == [0, 1, 4, 5]
    first = torch.from_numpy(mixed[0][0][0])
    assert first.tolist() == pytest.approx(maps[0, :, :2, :2].mean((1, 2)).tolist())


def test_connector_reader_learns_the_words_of_what_a_token_shows():
    tokenizer = build_tokenizer()
    # as wide as the vocabulary, so that words can be orthogonal
    width = 64 * -(-len(tokenizer) // 64)
    model = base.build_base(replace(SIZES["dry"], width=width), tokenizer)
    model.get_input_embeddings().weight.data = 5 * torch.eye(len(tokenizer), width)
    reader = base.ConnectorReader(model, tokenizer)
    assert reader.words["digit"].tolist() == [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    dataset = base.TileDataset(PagePool(12, "train", 3, patch_size=6), 16, 0)
    labels = {name: each for name, each in collate_tiles([dataset[i] for i in range(16)]).items() if each.dim() == 2}
    # patches of 6 pixels, four of which are a token
    assert labels["digit"].shape == (16, 64)
    of = {name: each.unflatten(1, (8, 8))[:, ::2, ::2].flatten(1) for name, each in labels.items()}

    def vectors(name: str, index: torch.Tensor) -> torch.Tensor:
        words = model.get_input_embeddings().weight[reader.words[name]][index.clamp(min=0)]
        return words * (index >= 0)[..., None]

    colour, none = of["colour"] - 1, torch.full_like(of["kind"], -1)
    is_table, is_box = (of["kind"] == KINDS.index(kind) for kind in ("table", "box"))
    shown = vectors("cell", torch.where(is_table, 16 * colour + 4 * of["row"] + of["column"], none))
    shown = shown + vectors("colour", torch.where(is_box, colour, none)) + vectors("digit", of["digit"] - 1)
    shown = shown + vectors("paper", of["paper"]) + vectors("kind", of["kind"])
    assert reader.naming_loss(shown, labels).item() < 1e-6
    assert reader.naming_loss(shown.roll(1, dims=1), labels).item() > 5
