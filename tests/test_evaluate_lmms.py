"""Our checkpoints in lmms-eval, offline, on a local task: the same answers as `evaluate` gives."""

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor
from typer.testing import CliRunner

import hf_vtc
from hf_vtc_cli.app import app

ROOT = Path(__file__).parent.parent
NUM_QUESTIONS = 20

lmms_eval = pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is missing: `pip install 'hf-vtc[lmms]'`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in, with questions, and with the entry points of setup.cfg as an install would have them."""
    place = tmp_path_factory.mktemp("lmms")
    script = ROOT / "examples" / "lmms_eval" / "draw_pages.py"
    subprocess.run(
        [sys.executable, script, "--questions", str(NUM_QUESTIONS), "--seed", "4321"], cwd=place, check=True
    )
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    info = place / "installed" / "hf_vtc_entry-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-vtc-entry\nVersion: 1.0\n")
    points = config["options.entry_points"]["lmms_eval.models"].strip()
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\n{points}\n")
    return place


def run(folder, *arguments, processes=1):
    """One run of lmms-eval, as on a command line."""
    paths = [str(ROOT), str(folder / "installed"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["HF_HOME"] = str(folder / "cache")
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "hf_vtc", "--device", "cpu"]
    command += ["--include_path", str(ROOT / "examples" / "lmms_eval"), "--tasks", "digit_forms", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def accuracy(folder, budget, name, processes=1):
    checkpoint = ROOT / "model_cards" / "vico-tiny"
    model_args = f"pretrained={checkpoint},vtc_budget={budget},dtype=float32"
    output = ["--model_args", model_args, "--batch_size", "8", "--output_path", name, "--log_samples"]
    found = run(folder, *output, processes=processes)
    assert found.returncode == 0, found.stderr[-3000:]
    (results,) = (folder / name).rglob("*results.json")
    (samples,) = (folder / name).rglob("*samples_digit_forms.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == NUM_QUESTIONS
    return json.loads(results.read_text(encoding="utf-8"))["results"]["digit_forms"]["exact,none"], lines


@pytest.mark.parametrize(("budget", "processes"), [("auto", 1), ("0.25", 2)])
def test_lmms_eval_gives_the_accuracy_of_evaluate(folder, budget, processes):
    checkpoint = ROOT / "model_cards" / "vico-tiny"
    model = hf_vtc.AutoModelForVision2Seq.from_pretrained(checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(checkpoint)
    data = folder / "outputs" / "digit_forms" / "held_out.json"
    report = hf_vtc.evaluate(
        model,
        processor,
        data,
        budgets=[budget if budget == "auto" else float(budget)],
        baselines=(),
        max_new_tokens=16,
    )
    theirs, lines = accuracy(folder, budget, f"out_{processes}", processes)
    assert theirs == report.row(budget).score
    answers = {f"page-{line['doc_id']:05d}": line["filtered_resps"] for line in lines}
    assert answers == {key: report.answers[budget, key].answer for key in answers}


def test_eval_of_tasks_is_eval_of_the_same_questions(folder, monkeypatch):
    """`hf-vtc eval --tasks` against `hf-vtc eval --data`: questions, answers, tokens and table."""
    monkeypatch.chdir(folder)
    paths = [str(ROOT), str(folder / "installed"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["eval", str(ROOT / "model_cards" / "vico-tiny"), "--budgets", "auto,0.5", "--batch-size", "8", "--json"]
    asked = [*given, "--tasks", "digit_forms", "--include-path", str(ROOT / "examples" / "lmms_eval")]
    asked += ["--device", "cpu", "--save", "report"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    theirs = json.loads(found.stdout)
    data = ["--data", "outputs/digit_forms/held_out.json", "--baselines", "none", "--max-new-tokens", "16"]
    ours = json.loads(CliRunner().invoke(app, [*given, *data, "--save", "ours"]).stdout)
    assert theirs["checkpoint"] == ours["checkpoint"] and theirs["metric"] == ours["metric"] == "exact"
    for own, other in zip(ours["rows"], theirs["rows"], strict=True):
        for name in ("point", "num", "score", "tokens", "share", "interval", "truncated", "costs", "difference"):
            assert own[name] == other[name], name
    sentences = [each["recommendation"]["sentence"] for each in (ours, theirs)]
    assert sentences[1] == re.sub(r", answers [\d.]+ times as fast", "", sentences[0])
    samples = {}
    for place in ("ours", "report"):
        for line in map(json.loads, (folder / place / "samples.jsonl").read_text(encoding="utf-8").splitlines()):
            number = int(re.search(r"\d+$", line.pop("key"))[0])
            samples.setdefault((line["point"], number), []).append(line)
    assert len(samples) == 3 * NUM_QUESTIONS and all(one == other for one, other in samples.values())
    # what is done is not run again, and a run of other settings is refused
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("was run again"))
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 0 and json.loads(again.stdout) == theirs
    refused = CliRunner().invoke(app, [*asked, "--limit", "5"])
    assert refused.exit_code == 2 and "`--limit` changed" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gen_kwargs", "vtc_budget=0.5"], "`vtc_budget` belongs into `--model_args`"),
        (["--gen_kwargs", "best_of=3"], "hf_vtc does not know best_of"),
        (["--model_args", "budget=0.5"], "got budget"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(folder, arguments, message):
    checkpoint = ROOT / "model_cards" / "vico-tiny"
    model_args = f"pretrained={checkpoint}"
    if arguments[0] == "--model_args":
        arguments = ["--model_args", f"{model_args},{arguments[1]}"]
    else:
        arguments = ["--model_args", model_args, *arguments]
    found = run(folder, *arguments)
    assert message in found.stderr + found.stdout


def test_stop_strings_and_sampling_are_honoured():
    from hf_vtc.evaluation.lmms import generation_arguments

    arguments, stops = generation_arguments({"until": "\n", "max_new_tokens": 5, "temperature": 0, "top_p": None})
    assert arguments == {"max_new_tokens": 5, "do_sample": False, "num_beams": 1} and stops == ["\n"]
    arguments, _ = generation_arguments({"temperature": 0.7, "top_p": 0.9, "do_sample": True})
    assert arguments["do_sample"] and arguments["temperature"] == 0.7 and arguments["top_p"] == 0.9
