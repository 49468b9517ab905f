"""`hf_vtc.fit`: every method from a base to a measured model, on records of which some are kept aside."""

import json
from pathlib import Path

import factories
import pytest
import torch
from fit_samples import NUM_PICTURES, differing, small_request, weights_of, write_model, write_records
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_vtc.fit
from hf_vtc.data import VtcCollator
from hf_vtc.fit import fit, plan
from hf_vtc.fit.folder import FitFolder
from hf_vtc.fit.split import Split, image_digest
from hf_vtc.methods import RECORDS, record_named
from hf_vtc.methods.vico import start_as_means

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "model_cards" / "base-tiny"
# what a fit starts from: the shipped base, or for a method that has none a tiny model of its own
FROM_BASE = sorted(record.name for record in RECORDS.values() if record.base is not None and record.base.kinds)
CONFIG = {"vistog": {"num_semantic_tokens": 8}}
OVERRIDES = {
    "vico": ("vico_router.options.probe=one_tile",),
    # a newest stage that compresses shows that compression learned
    "llavolta": ("options.scheme=null", "options.stages=[[2, 8, 1.0]]"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture
def seen(monkeypatch):
    """Digests of the images that training was given."""
    digests, call = set(), VtcCollator.__call__

    def noting(self, records):
        digests.update(image_digest(image) for record in records for image in record["images"])
        return call(self, records)

    monkeypatch.setattr(VtcCollator, "__call__", noting)
    return digests


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.window
def test_fit_of_every_method(method, data, seen, tmp_path):
    if record_named(method).is_training_free:
        with pytest.raises(ValueError, match=f"{method} is training-free, so that there is nothing to fit"):
            fit(small_request(BASE, data, tmp_path / "out", method))
        return
    start, config = (BASE, CONFIG.get(method, {})) if method in FROM_BASE else (None, {})
    start = start or write_model(method, tmp_path / "start")
    lines, output = [], tmp_path / "out"
    request = small_request(start, data, output, method, config=config, overrides=OVERRIDES.get(method, ()))
    measured = fit(request, lines.append)

    assert any("converting" in line for line in lines) == (method in FROM_BASE)
    recipes = next(record.recipes for record in RECORDS.values() if record.name == method)
    for idx, name in enumerate(recipes, start=1):
        log = json.loads((output / "fit" / "stages" / f"{idx}_{name}" / "log.json").read_text())
        assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
        assert any(line.startswith(f"{name} 3/3: loss") for line in lines)
    # one record in ten, with all that shows its image
    split = Split.load(output / "fit" / "split.json")
    assert split.num_training + len(split.held_out) == NUM_PICTURES + 1 and len(split.images) == 1
    assert seen and not seen & set(split.images)
    assert measured.after["num_questions"] == measured.before["num_questions"] == len(split.held_out)
    assert [row["point"] for row in measured.before["rows"]] == ["full"]

    model = AutoModelForImageTextToText.from_pretrained(output, dtype="auto")
    assert type(model).__name__ == next(r.head.__name__ for r in RECORDS.values() if r.name == method)
    assert model.dtype == (torch.bfloat16 if method in FROM_BASE else torch.float32)
    assert differing(weights_of(output), weights_of(output / "fit" / "stages" / f"{idx}_{name}" / "model")) == (
        set(weights_of(output)) if method in FROM_BASE else set()
    )
    AutoProcessor.from_pretrained(output)
    card = ModelCard.load(output / "README.md")
    assert all(f"| {name} |" in card.text for name in recipes) and "## Measured" in card.text
    assert measured.after["recommendation"]["sentence"] in card.text
    # for those who load it without the package
    assert (output / f"modeling_{method}.py").is_file()


@pytest.mark.window
def test_fit_that_is_done_does_nothing(data, tmp_path, seen):
    start = write_model("llavolta", tmp_path / "start")
    request = small_request(start, data, tmp_path / "out", "llavolta")
    first = fit(request)
    before = times_of(tmp_path / "out")
    seen.clear()
    lines = []
    again = fit(request, lines.append)
    assert again == first and not seen and lines == [f"{tmp_path / 'out'}: goes on with what is there"]
    assert {
        path: path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()
    } == before


def test_vico_routes_after_a_fit_and_not_before(data, tmp_path):
    fit(small_request(BASE, data, tmp_path / "out", "vico", held_out=0))
    assert not json.loads((tmp_path / "out" / "fit" / "stages" / "0_start" / "config.json").read_text())["flash_mode"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["flash_mode"]


def test_a_base_gets_a_compressed_connector_of_means(data, tmp_path):
    fit(small_request(BASE, data, tmp_path / "out", "vico", held_out=0, overrides=OVERRIDES["vico"]))
    start = tmp_path / "out" / "fit" / "stages" / "0_start"
    model = AutoModelForImageTextToText.from_pretrained(start)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_as_means(model)
    assert differing(before, model.state_dict()) == set()
    assert weights_of(start)["model.compressed_projector.linear_1.weight"].dtype == torch.bfloat16
    assert sorted(file.name for file in start.glob("*.safetensors*")) == ["model.safetensors"]
    assert not (start.parent / "0_drawn").exists()


@torch.no_grad()
def test_means_are_those_of_the_upper_and_the_lower_half():
    """Of a token's four blocks two and two are alike, and all have the same mean and spread, as one LayerNorm sees."""
    model = factories.tiny_model("vico").eval()
    full, compressed = model.model.multi_modal_projector, model.model.compressed_projector
    for parameter in full.parameters():
        parameter.normal_()
    start_as_means(model)
    width, side = model.config.vision_config.hidden_size, model.config.patches_per_side
    upper = torch.randn(3, (side // 4) ** 2, 4 * width)
    lower = upper[..., torch.randperm(4 * width)]

    def features(top, bottom):
        """`(T, N, C)` of tiles whose tokens have such blocks, `(T, n, 4 C)`, in their two rows."""
        rows = [each.unflatten(-1, (2, 1, 2, width)).expand(-1, -1, 2, 2, 2, width) for each in (top, bottom)]
        blocks = torch.stack(rows, dim=2).unflatten(1, (side // 4, side // 4))  # (T, s, s, 2, 2, 2, 2, C)
        return blocks.permute(0, 1, 3, 4, 2, 5, 6, 7).reshape(len(top), side * side, width)

    def tokens_of_blocks(states):
        return full(features(states, states)).unflatten(1, (side // 2, side // 2))[:, ::2, ::2].flatten(1, 2)

    expected = (tokens_of_blocks(upper) + tokens_of_blocks(lower)) / 2
    torch.testing.assert_close(compressed(features(upper, lower)), expected, rtol=1e-4, atol=1e-4)


def test_a_connector_that_the_source_has_is_kept(data, tmp_path, monkeypatch):
    planned = plan(small_request(BASE, data, tmp_path / "out", "vico"), 1)
    run = hf_vtc.fit._Run(planned, FitFolder(tmp_path / "out"), lambda line: None)
    monkeypatch.setattr(hf_vtc.fit, "load_model", lambda folder: pytest.fail("was loaded to be changed"))
    run._warm_start(tmp_path, ["model.router.query_token"])


def test_fit_without_records_kept_aside_measures_nothing(data, tmp_path, seen):
    start = write_model("llavolta", tmp_path / "start")
    assert fit(small_request(start, data, tmp_path / "out", "llavolta", held_out=0)) is None
    assert not (tmp_path / "out" / "fit" / "after").exists()
    assert "no record was kept aside" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "fit" / "held_out.jsonl").read_text() == ""
    split = Split.load(tmp_path / "out" / "fit" / "split.json")
    assert split.num_training == NUM_PICTURES + 1 and split.held_out == []


@pytest.mark.parametrize("method", ["vico", "llavolta"])
def test_lora_trains_less_and_leaves_an_ordinary_model(method, data, tmp_path):
    start = write_model(method, tmp_path / "start")
    fit(small_request(start, data, tmp_path / "out", method, lora=True, overrides=("lora.lora_dropout=0.0",)))
    before, after = weights_of(start), weights_of(tmp_path / "out")
    assert set(before) == set(after)
    changed = differing(before, after)
    assert any(".q_proj." in name for name in changed) and any("projector" in name for name in changed)
    # adapters reach linear layers of the decoder, and nothing else of it or of the tower
    decoder = {name for name in changed if ".language_model." in name}
    assert all("_proj." in name for name in decoder) and not any("vision_tower" in name for name in changed)
    assert any("router" in name for name in changed) == (method == "vico")
    assert ", those with a language model by LoRA" in (tmp_path / "out" / "README.md").read_text()


def test_records_that_are_skipped_are_named_and_train_nowhere(data, tmp_path, seen):
    records = json.loads(data.read_text())
    records[3]["image"] = "missing.png"
    (data.parent / "bad.json").write_text(json.dumps(records))
    start = write_model("llavolta", tmp_path / "start")
    bad = data.parent / "bad.json"
    with pytest.raises(ValueError, match=r"bad.json, line \d+ \(record 3, id 'r3'\): .*missing.png"):
        fit(small_request(start, bad, tmp_path / "out", "llavolta"))
    assert not (tmp_path / "out" / "fit" / "split.json").exists()
    # the same command goes on when the data is mended
    assert FitFolder(tmp_path / "out").adopt({})
    lines = []
    fit(small_request(start, bad, tmp_path / "other", "llavolta", on_error="skip"), lines.append)
    split = Split.load(tmp_path / "other" / "fit" / "split.json")
    assert len(split.left_out) == 1 and "id 'r3'" in split.left_out[0]
    assert split.num_training + len(split.held_out) == NUM_PICTURES
    assert any("1 cannot be used" in line for line in lines)
