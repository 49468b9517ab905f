"""`hf-vtc eval --tasks` without lmms-eval: what it reads of the files of a run, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_vtc.evaluation import tasks
from hf_vtc.evaluation.points import Point
from hf_vtc.evaluation.summary import Settings
from hf_vtc.evaluation.tasks import TasksRequest, evaluate_tasks, read_point, score_key_of
from hf_vtc_cli.app import app

CHECKPOINT = Path(__file__).parent.parent / "model_cards" / "vico-tiny"


def write_run(folder, scores, tokens=64, key="acc", **config):
    """Files as lmms-eval 0.7.3 and our model of it leave them: samples in any order."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"metric_list": [{"metric": key}], **config}
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "1_results.json").write_text(json.dumps({"configs": {"forms": own}}))
    samples = [
        {"doc_id": idx, "target": f"t{idx}", "filtered_resps": f"a{idx}", "input": f"q{idx}?", key: score}
        for idx, score in enumerate(scores)
    ]
    (folder / "model" / "1_samples_forms.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples[::-1]))
    costs = {"tokens": tokens, "reserved": 128, "num_images": 1, "truncated": False, "text_tokens": 20}
    lines = [{"task": "forms", "doc_id": idx, **costs} for idx in range(len(scores))]
    (folder / "tokens").mkdir(exist_ok=True)
    for rank in range(2):
        text = "".join(json.dumps(line) + "\n" for line in lines[rank::2])
        (folder / "tokens" / f"{rank}.jsonl").write_text(text)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(tasks, "_version_of_lmms", lambda: "0.7.3")


def test_runs_of_two_points_become_a_report(installed, tmp_path, monkeypatch):
    given = {"full": [1, 1, 1, 0], "auto": [1, 0, 1, 1]}

    def run(command, stdout, stderr):
        (place,) = (Path(each) for before, each in zip(command, command[1:]) if before == "--output_path")
        write_run(place, given[place.name], tokens=128 if place.name == "full" else 50)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(tasks.subprocess, "run", run)
    report = evaluate_tasks(TasksRequest(str(CHECKPOINT), ["forms"]), Settings(), output=tmp_path)
    full, auto = report.rows
    assert (full.score, auto.score, auto.tokens, auto.share) == (0.75, 0.75, 50, 50 / 128)
    assert (auto.difference.counts.lost, auto.difference.counts.gained) == (1, 1)
    assert auto.kinds["forms"].num == 4 and "No budget is shown" in report.recommendation.sentence
    assert "there are no baselines" in str(report) and report.facts["versions"]["lmms_eval"] == "0.7.3"
    # scores between wrong and right make a metric graded, at whichever point they are
    given["auto"] = [1, 0.5, 1, 1]
    graded = evaluate_tasks(TasksRequest(str(CHECKPOINT), ["forms"]), Settings(), output=tmp_path / "graded")
    assert graded.row("auto").difference.counts is None and graded.row("auto").score == 0.875


def test_the_command_says_all_that_decides():
    request = TasksRequest("my-vico", ["a", "b"], [0.5, "full", 0.5], "own", limit=7, batch_size=4, device="cuda:1")
    assert request.points == [Point("full", budget="full"), Point("0.5", budget=0.5)]
    command = " ".join(request.command(request.points[1], Path("out")))
    assert "-m lmms_eval --model hf_vtc --tasks a,b" in command
    assert "--model_args pretrained=my-vico,vtc_budget=0.5,dtype=auto,token_log=out/tokens " in command
    assert command.endswith("--include_path own --limit 7 --device cuda:1") and "--batch_size 4" in command
    with pytest.raises(ValueError, match="takes a comma for the end of a name"):
        request.command(request.points[1], Path("a,b"))
    with pytest.raises(ValueError, match="vtc_budget"):
        TasksRequest("my-vico", ["a"], ["half"]).points  # noqa: B018


def test_the_score_is_what_the_task_says():
    lines = [{"anls": 0.5, "votes": 3, "whole": {"score": 1, "answer": "a"}, "list": [1]}]
    assert score_key_of("t", {"metric_list": [{"metric": "votes"}, {"metric": "anls"}]}, lines) == "anls"
    assert score_key_of("t", {"metric_list": [{"metric": "anls"}], "score_key": "whole"}, lines) == "whole"
    assert score_key_of("t", {"metric_list": []}, lines, "anls") == "anls"
    with pytest.raises(ValueError, match="Task t has no score from 0 to 1 .* under list: .* have anls, list, votes"):
        score_key_of("t", {"metric_list": [{"metric": "list"}]}, lines)


def test_what_does_not_belong_together_is_refused(installed, tmp_path, monkeypatch):
    write_run(tmp_path / "lmms" / "full", [1, 1])
    write_run(tmp_path / "lmms" / "auto", [1, 1, 0])
    with pytest.raises(ValueError, match="other questions at auto"):
        evaluate_tasks(TasksRequest(str(CHECKPOINT), ["forms"]), Settings(), output=tmp_path)
    (tmp_path / "lmms" / "auto" / "tokens" / "1.jsonl").unlink()
    with pytest.raises(ValueError, match="Task forms, document 1 was not asked in this run"):
        read_point(tmp_path / "lmms" / "auto", "auto")
    (tmp_path / "lmms" / "auto" / "model" / "1_samples_forms.jsonl").unlink()
    with pytest.raises(ValueError, match="Task forms has written no samples"):
        read_point(tmp_path / "lmms" / "auto", "auto")


def test_a_run_that_fails_says_why(installed, tmp_path, monkeypatch):
    def run(command, stdout, stderr):
        stdout.write("loading\nKeyError: no such task\n\n")
        return type("Done", (), {"returncode": 1})

    monkeypatch.setattr(tasks.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"failed at full: KeyError: no such task .*log\.txt"):
        evaluate_tasks(TasksRequest(str(CHECKPOINT), ["forms"]), Settings(), output=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "a", "--data", "x.json"], "Give `--data`, records of your own, or `--tasks`"),
        ([], "Give `--data`, records of your own, or `--tasks`"),
        (["--tasks", "a", "--baselines", "random"], "`--baselines` cannot go with `--tasks`"),
        (["--tasks", "a", "--time", "--turns", "all"], "`--time`, `--turns` cannot go with `--tasks`"),
        (["--data", "x.json", "--include-path", "d"], "`--include-path` says where `--tasks` are"),
    ],
)
def test_the_command_refuses_by_name(arguments, message):
    found = CliRunner().invoke(app, ["eval", str(CHECKPOINT), *arguments])
    assert found.exit_code == 2 and message in " ".join(found.stderr.split()), found.stderr


def test_without_lmms_eval_the_install_line_is_named(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    found = CliRunner().invoke(app, ["eval", str(CHECKPOINT), "--tasks", "ocrbench"])
    assert found.exit_code == 2 and "pip install 'hf-vtc[lmms]'" in found.stderr
