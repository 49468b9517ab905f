"""`accelerate launch -m hf_vtc.fit`: two processes fit as one does, and one of them looks after the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fit_samples import weights_of, write_model, write_records

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
def test_two_processes_fit_as_one(tmp_path):
    data, start = write_records(tmp_path / "data"), write_model("llavolta", tmp_path / "start")
    outputs = {}
    for num_processes in (1, 2):
        outputs[num_processes] = tmp_path / f"by_{num_processes}"
        launcher = ["torch.distributed.run", "--nproc_per_node", str(num_processes), "-m", "hf_vtc.fit"]
        options = ["--data", data, "--output", outputs[num_processes], "--workers", "0", "--logging-steps", "1"]
        for value in (
            "batch_size=4",
            f"training.per_device_train_batch_size={4 // num_processes}",
            "training.max_steps=3",
            "training.learning_rate=0.001",
            "options.scheme=two",
        ):
            options += ["--set", value]
        result = subprocess.run(
            [sys.executable, "-m", *map(str, [*launcher, start, *options, "--budgets", "full"])],
            env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        # said once, whatever the number of processes
        assert result.stdout.count("stage 1 of 1: llavolta_finetune") == 1
        assert result.stdout.count("is ready: hf-vtc run") == 1
    one, two = (weights_of(output) for output in outputs.values())
    before = weights_of(start)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(one[name], before[name]) for name in one)
    for name in ("split.json", "held_out.jsonl"):
        assert (outputs[1] / "fit" / name).read_bytes() == (outputs[2] / "fit" / name).read_bytes()
    assert "2 processes" in (outputs[2] / "README.md").read_text()
