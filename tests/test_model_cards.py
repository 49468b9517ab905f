"""The shipped checkpoints: small, plain safetensors, and as good as their cards say on a small held-out sample."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

import hf_vtc

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))


@pytest.mark.window
@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_folders_hold_weights_config_and_card_only(folder):
    weights = list(folder.glob("*.safetensors"))
    assert [path.name for path in weights] == ["model.safetensors"] and weights[0].stat().st_size <= 4_000_000
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\n")
    assert not [*folder.glob("*.py"), *folder.glob("*.bin")]
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.window
def test_vico_tiny_answers_held_out_questions():
    from digit_forms import evaluation_set
    from digit_forms.measure import measure

    folder = ROOT / "model_cards" / "vico-tiny"
    model = hf_vtc.AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    # a seed that neither training nor the card uses
    items = evaluation_set(90, seed=4321)
    report = measure(model, processor, items)
    assert report.row("full").score > 0.9 and report.row("auto").score > 0.9
    assert report.row("auto").share < 0.5
    assert report.row("auto").tokens_p10 < report.row("auto").tokens_p90


@pytest.mark.parametrize("name", ["avg-llava-ledger", "vico-ledger"])
def test_ledger_models_choose_by_what_is_shown_and_asked(name):
    pytest.importorskip("sklearn", reason="ledger reads handwriting and photographs from scikit-learn")
    pytest.importorskip("matplotlib", reason="ledger reads fonts and a photograph from matplotlib")
    from ledger.dataset import evaluation_set, records_of
    from ledger.stages import load

    model, processor = load(ROOT / "model_cards" / name)
    # a seed that neither training nor gates nor the card use
    records = records_of(evaluation_set(120, seed=77))
    report = hf_vtc.evaluate(
        model, processor, records, budgets=("auto",), baselines=("random",), metric="exact", max_new_tokens=6, seeds=1
    )
    full, auto, lot = (report.row(point) for point in ("full", "auto", "random beside auto"))
    assert full.score >= 0.97
    assert auto.score > lot.score + 0.03
    assert auto.tokens < 0.6 * full.tokens and lot.tokens == pytest.approx(auto.tokens, rel=0.1)
