"""`examples/finetune_lora.py` on the sample set, from the command line to a merged checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_model, tiny_processor
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc.data import VtcCollator, load_records

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAMPLES = EXAMPLES / "finetune_data" / "records.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("vico").save_pretrained(folder, save_code=False)
    tiny_processor("vico").save_pretrained(folder, save_code=False)
    return folder


@pytest.fixture
def finetune(monkeypatch):
    """The script's module, on the CPU as in a process of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import finetune_lora

    return finetune_lora


def run(finetune, checkpoint, output, *options):
    arguments = ["--model", str(checkpoint), "--data", str(SAMPLES), "--output", str(output), "--workers", "0"]
    # several steps of the schedule, none of which depends on the speed of this machine
    arguments += ["--logging-steps", "1", "--rank", "4", "--learning-rate", "1e-2", *options]
    finetune.main(arguments)


def losses(folder):
    """Loss of each step, from the last checkpoint in a folder."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}, history


def test_the_sample_set_has_ten_records_of_several_kinds():
    records = load_records(SAMPLES, check_images="pixels")
    assert len(records) == 10
    items = [records[idx] for idx in range(10)]
    assert {len(item["images"]) for item in items} == {0, 1, 2}
    assert {len(item["messages"]) for item in items} == {2, 3, 4}
    assert any(item["messages"][0]["role"] == "system" for item in items)
    assert sum(file.stat().st_size for file in SAMPLES.parent.rglob("*") if file.is_file()) < 64_000


def test_finetune_lora_writes_adapter_processor_and_merged_model(finetune, checkpoint, tmp_path):
    run(finetune, checkpoint, tmp_path, "--epochs", "2", "--merge", "--eval-data", str(SAMPLES))
    by_step, history = losses(tmp_path)
    assert sorted(by_step) == [1, 2, 3, 4, 5, 6] and by_step[6] < by_step[1]
    kept = [entry for entry in history if "visual_tokens" in entry]
    assert kept and all(0 < entry["kept_share"] <= 1 and entry["visual_tokens"] > 0 for entry in kept)
    assert any("eval_loss" in entry for entry in history)

    processor = AutoProcessor.from_pretrained(tmp_path)
    batch = VtcCollator(processor)(load_records(SAMPLES))
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (adapted(**batch).logits - merged(**batch).logits).abs().max() < 1e-5
    assert any("compressed_projector" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_finetune_lora_resumes(finetune, checkpoint, tmp_path):
    """A run that lost everything after its first checkpoint ends where the uninterrupted one does, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--epochs", "2", "--save-steps", "3", "--dropout", "0.1")
    run(finetune, checkpoint, whole, *options)
    shutil.copytree(whole / "checkpoint-3", cut / "checkpoint-3")
    run(finetune, checkpoint, cut, *options, "--resume")
    assert losses(cut)[0] == losses(whole)[0]
    expected = load_file(whole / "adapter_model.safetensors")
    resumed = load_file(cut / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_finetune_lora_goes_on_from_an_adapter_and_leaves_the_compressor(finetune, checkpoint, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(finetune, checkpoint, first, "--epochs", "1", "--freeze-compressor")
    before = load_file(first / "adapter_model.safetensors")
    assert before and all(".lora_" in name for name in before)
    run(finetune, checkpoint, second, "--epochs", "1", "--adapter", str(first))
    after = load_file(second / "adapter_model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert losses(second)[0][1] < losses(first)[0][1]


def test_finetune_lora_has_a_learning_rate_for_the_compressor(finetune, checkpoint, tmp_path):
    run(finetune, checkpoint, tmp_path, "--epochs", "1", "--compressor-learning-rate", "0")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    base = tiny_model("vico").state_dict()
    whole = {name: tensor for name, tensor in saved.items() if ".lora_" not in name}
    assert whole and all(
        torch.equal(tensor, base[name.removeprefix("base_model.model.")]) for name, tensor in whole.items()
    )
    assert any("lora_B" in name and tensor.any() for name, tensor in saved.items())


def test_finetune_lora_runs_as_a_command(checkpoint, tmp_path):
    bad = json.loads(SAMPLES.read_text())[:2] + [{"image": "../x.png", "conversations": []}]
    data = tmp_path / "mine.json"
    data.write_text(json.dumps(bad))
    command = [sys.executable, EXAMPLES / "finetune_lora.py", "--model", checkpoint, "--data", data]
    command += ["--image-folder", SAMPLES.parent, "--output", tmp_path / "out", "--workers", "0"]
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1", "PATH": ""}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode != 0
    reason = "mine.json, line 1 (record 2): `conversations` must be a list"
    assert f"1 of 3 records cannot be used:\n  {reason}" in failed.stderr
    done = subprocess.run([*command, "--on-error", "skip"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 of 3 records cannot be used" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
