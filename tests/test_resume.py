"""Runs that SIGKILL ended: they go on from the last whole checkpoint as if nothing had happened, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_model
from resume_worker import FILES, MOMENTS, STEPS, trainer_of
from safetensors import SafetensorError
from safetensors.torch import load_file
from trainer_helpers import arguments, changed, collate, make_records, snapshot
from transformers.trainer_utils import get_last_checkpoint

from hf_vtc.trainers import LlavoltaTrainer
from hf_vtc.trainers.checkpoints import COMPLETE, complete_checkpoints

TESTS = Path(__file__).resolve().parent
RUNS = [(name, moment) for name, moments in MOMENTS.items() for moment in moments]


def names_of(checkpoints: list[Path]) -> list[str]:
    return [path.name for path in checkpoints]


def history(trainer) -> list[dict]:
    """What every step logged, schedule included; not how long it took."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folders that runs left when they were killed, one for each trainer and moment."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    run = subprocess.run(
        [sys.executable, str(TESTS / "resume_worker.py"), str(folder)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    """The same runs, left alone."""
    runs = {}
    for name in MOMENTS:
        runs[name] = trainer_of(name, tiny_model(name), tmp_path_factory.mktemp(name), save_strategy="no")
        runs[name].train()
    return runs


def assert_is_cut(file: Path) -> None:
    read, error = {
        ".json": (lambda path: json.loads(path.read_text()), ValueError),
        ".safetensors": (load_file, SafetensorError),
        ".pt": (torch.load, Exception),
        ".pth": (torch.load, Exception),
    }[file.suffix]
    with pytest.raises(error):
        read(file)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "moment"), RUNS)
def test_a_killed_run_resumes_bit_for_bit(killed, uninterrupted, name, moment):
    folder, straight = killed / f"{name}-{moment}", uninterrupted[name]
    expected = {
        # the checkpoint of step 4 is whole when the step after it dies, and when the one before is being deleted
        "step": ["checkpoint-2", "checkpoint-4"],
        "rotation": ["checkpoint-4"],
    }.get(moment, ["checkpoint-2"])
    assert names_of(complete_checkpoints(folder)) == expected
    # by itself transformers would take this one, whatever is in it
    assert Path(get_last_checkpoint(folder)).name == "checkpoint-4"
    if moment in FILES:
        assert_is_cut(folder / "checkpoint-4" / moment)
    resumed = trainer_of(name, tiny_model(name), folder)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(straight)
    assert [entry["step"] for entry in history(resumed)] == list(range(1, STEPS + 1))
    assert len({entry["learning_rate"] for entry in history(resumed)}) > STEPS // 2
    assert changed(resumed.model, snapshot(straight.model)) == set()
    if name == "llavolta":
        own = resumed.model.config
        assert (own.compress_layer_idx, own.compress_stride) == (0, 1)
    # what was damaged has been written anew
    assert names_of(complete_checkpoints(folder))[-1] == f"checkpoint-{STEPS}"
    assert (folder / "checkpoint-4" / COMPLETE).is_file()


def small_trainer(folder: Path, **options) -> LlavoltaTrainer:
    model = tiny_model("llavolta")
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **options}
    records = make_records(model)
    return LlavoltaTrainer(
        model,
        arguments(folder, **fields),
        scheme="two",
        train_dataset=records,
        eval_dataset=records,
        data_collator=collate,
    )


def test_train_refuses_checkpoints_that_are_not_whole(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=2)
    trainer.train()
    last = tmp_path / "checkpoint-2"
    (last / COMPLETE).unlink()
    assert names_of(complete_checkpoints(tmp_path)) == ["checkpoint-1"]
    with pytest.raises(ValueError, match="written to its end, but 'complete' is not among the files of"):
        small_trainer(tmp_path).train(resume_from_checkpoint=str(last))
    (tmp_path / "checkpoint-1" / COMPLETE).unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is complete"):
        small_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_train_without_a_checkpoint_starts_anew(tmp_path):
    for given in (None, False):
        trainer = small_trainer(tmp_path / str(given), max_steps=1)
        trainer.train(resume_from_checkpoint=given)
        assert trainer.state.global_step == 1


def test_complete_checkpoints_go_by_step_and_not_by_name(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":
            (tmp_path / name / COMPLETE).touch()
    assert names_of(complete_checkpoints(tmp_path)) == ["checkpoint-9", "checkpoint-10"]
    assert complete_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_older_checkpoints_go(tmp_path, limit, kept):
    small_trainer(tmp_path, max_steps=4, save_total_limit=limit).train()
    expected = [f"checkpoint-{step}" for step in kept]
    assert names_of(complete_checkpoints(tmp_path)) == expected
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == expected


def test_the_best_checkpoint_stays(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    trainer = small_trainer(tmp_path, max_steps=4, save_total_limit=2, **options)
    losses = (2.0, 1.0, 3.0, 4.0)
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": losses[trainer.state.global_step - 1]}
    trainer.train()
    assert names_of(complete_checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-4"]
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"


def test_a_run_into_a_used_folder_takes_the_mark_away_first(tmp_path, monkeypatch):
    small_trainer(tmp_path, max_steps=1).train()
    assert names_of(complete_checkpoints(tmp_path)) == ["checkpoint-1"]
    trainer = small_trainer(tmp_path, max_steps=1)

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    assert complete_checkpoints(tmp_path) == []
