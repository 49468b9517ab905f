"""`hf-vtc eval`: what it reads, prints and writes, and how it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_vtc_cli.app import app

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
CHECKPOINT = str(ROOT / "model_cards" / "vico-tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Held-out records as LLaVA writes them, images in a folder beside."""
    from digit_forms import evaluation_set

    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    records = []
    for idx, item in enumerate(evaluation_set(6, seed=4321)):
        item.image.save(folder / "images" / f"{idx}.png")
        turns = [{"from": "human", "value": f"<image>\n{item.question}"}, {"from": "gpt", "value": item.answer}]
        records.append({"id": f"p{idx}", "image": f"{idx}.png", "conversations": turns, "kind": item.kind})
    (folder / "held_out.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def run(data, *arguments, checkpoint=CHECKPOINT):
    given = ["eval", checkpoint, "--data", str(data / "held_out.json"), "--image-folder", str(data / "images")]
    return CliRunner().invoke(app, [*given, *arguments])


@pytest.mark.window
def test_eval_prints_a_table_and_one_sentence(data, tmp_path):
    asked = ["--budgets", "full,auto,50%", "--metric", "anls", "--baselines", "random, smaller", "--seeds", "2"]
    found = run(data, *asked, "--save", str(tmp_path / "report"))
    assert found.exit_code == 0, found.output
    for text in ("vico-tiny: 6 questions, metric anls", "smaller", "No budget is shown", "report.json"):
        assert text in " ".join(found.stdout.split())
    content = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["point"] for row in content["rows"]][:2] == ["full", "auto"] and content["metric"] == "anls"
    assert (tmp_path / "report" / "tokens.png").is_file() and (tmp_path / "report" / "report.md").is_file()
    # what is answered is not asked again, and what is wanted of it may change
    before = (tmp_path / "report" / "samples.jsonl").read_bytes()
    again = run(data, *asked, "--save", str(tmp_path / "report"), "--keep", "0.2", "--json")
    printed = json.loads(again.stdout)
    assert printed["relative"] and printed["tolerance"] == 0.8 and printed["recommendation"]["point"] == "0.5"
    assert (tmp_path / "report" / "samples.jsonl").read_bytes() == before


@pytest.mark.window
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "full,7"], "`--budgets` has 7, which is too small for .* give `--clip`"),
        (["--budgets", "half"], "`--budgets`: each must be .*'half'"),
        (["--metric", "rouge"], "`--metric` must be auto, one of exact"),
        (["--baselines", "random,larger"], "`--baselines` must be of .*'larger'"),
        (["--keep", "0.9", "--tolerance", "0.1"], "Give `--keep` or `--tolerance`"),
        (["--confidence", "95"], "`--confidence` must lie between"),
        (["--turns", "some"], "`--turns` must be one of"),
        (["--train-image-folder", "x"], "`--train-data` are, which is not given"),
        (["--dtype", "half"], "`--dtype` must be one of"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(data, arguments, message):
    found = run(data, *arguments)
    assert found.exit_code == 2 and found.stdout == ""
    assert re.search(message, " ".join(found.stderr.split())), found.stderr


def test_a_page_of_the_training_data_is_refused_by_name(data):
    trained = ["--train-data", str(data / "held_out.json"), "--train-image-folder", str(data / "images")]
    found = run(data, *trained)
    assert found.exit_code == 2
    assert "6 of 6 questions show images of the training data" in found.stderr and "id 'p0'" in found.stderr


def test_bad_records_are_named_or_left_out(data, tmp_path):
    records = json.loads((data / "held_out.json").read_text(encoding="utf-8"))
    records[2]["image"] = "lost.png"
    (tmp_path / "held_out.json").write_text(json.dumps(records), encoding="utf-8")
    given = ["--data", str(tmp_path / "held_out.json"), "--image-folder", str(data / "images")]
    refused = CliRunner().invoke(app, ["eval", CHECKPOINT, *given])
    assert refused.exit_code == 2 and "id 'p2'" in refused.stderr and "`--skip-bad`" in refused.stderr
    found = CliRunner().invoke(
        app, ["eval", CHECKPOINT, *given, "--skip-bad", "--budgets", "full", "--baselines", "none", "--json"]
    )
    assert json.loads(found.stdout)["num_questions"] == 5


def test_a_folder_of_another_run_is_refused(data, tmp_path):
    asked = ["--budgets", "full", "--baselines", "none", "--save", str(tmp_path)]
    assert run(data, *asked).exit_code == 0
    found = run(data, *asked, "--batch-size", "2")
    assert found.exit_code == 2 and "`--save`" in found.stderr and "`--batch-size` changed" in found.stderr
