"""Runs that SIGKILL ends, in the middle of training or while a checkpoint is written; run by `test_resume.py`.

    python resume_worker.py folder

Every run has a process of its own, forked before anything has trained, and kills itself at one named moment. It leaves
`folder/<trainer>-<moment>` behind as it was at that moment.
"""

import copy
import functools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from trainer_helpers import arguments, collate, make_records
from transformers import TrainerCallback

import hf_vtc.trainers.checkpoints
from hf_vtc.trainers import LlavoltaTrainer, Stage, VicoRouterTrainer, VistogTrainer

TILES = ((1,), (2, 1), (), (3,), (2,), (1, 1))
STEPS, SAVE_STEPS = 7, 2
STAGES = (Stage(1, 8, 0.25), Stage(2, 4, 0.25), Stage(1, 2, 0.25), Stage(0, 1, 0.25))
TRAINERS = {
    # a schedule of its own, a window that travels with the checkpoint, and noise from the default generator
    "llavolta": (LlavoltaTrainer, {"stages": STAGES}),
    "vico": (VicoRouterTrainer, {"ratio_loss": "cross_entropy", "window_length": 9}),
    "vistog": (VistogTrainer, {"stage": 2}),
}
# file of the checkpoint of step 4 that is cut in half
FILES = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def trainer_of(name: str, model: torch.nn.Module, folder: Path, **options):
    trainer_class, own = TRAINERS[name]
    fields = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        **options,
    }
    records = make_records(model, TILES)
    return trainer_class(
        copy.deepcopy(model), arguments(folder, **fields), train_dataset=records, data_collator=collate, **own
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    """Dies in the middle of a step, before the optimizer's part of it."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_half_way(writer: Callable, file: Path) -> Callable:
    """A function that writes files, which dies when half of `file` is there."""

    @functools.wraps(writer)
    def write(*args, **kwargs):
        result = writer(*args, **kwargs)
        if file.exists():
            os.truncate(file, file.stat().st_size // 2)
            die()
        return result

    return write


def die_in_file(trainer, file: Path) -> None:
    """Die as soon as a part of a checkpoint has written `file`, of which half remains."""
    for name in ("save_model", "_save_scaler", "_save_rng_state", "_save_optimizer_and_scheduler"):
        setattr(trainer, name, die_half_way(getattr(trainer, name), file))
    if file.name == "trainer_state.json":
        state_class = type(trainer.state)
        state_class.save_to_json = die_half_way(state_class.save_to_json, file)


def before_the_mark(path: Path) -> Callable:
    touch = Path.touch

    def die_first(self: Path, *args, **kwargs) -> None:
        if self.parent == path:
            die()
        touch(self, *args, **kwargs)

    return die_first


def half_a_deletion(path: str | Path, *args, **kwargs) -> None:
    for file in sorted(Path(path).iterdir())[::2]:
        file.unlink()
    die()


def run(name: str, model: torch.nn.Module, moment: str, folder: Path) -> None:
    """Train until the moment comes: `step`, `mark`, `rotation`, or the name of a file."""
    options = {"save_total_limit": 1} if moment == "rotation" else {}
    trainer = trainer_of(name, model, folder, **options)
    checkpoint = folder / "checkpoint-4"
    if moment == "step":
        trainer.add_callback(DieAt(4))
    elif moment == "mark":
        Path.touch = before_the_mark(checkpoint)
    elif moment == "rotation":
        hf_vtc.trainers.checkpoints.shutil.rmtree = shutil.rmtree = half_a_deletion
    else:
        die_in_file(trainer, checkpoint / moment)
    trainer.train()


MOMENTS = {
    "llavolta": ("step", "mark", "rotation", *FILES),
    "vico": ("step", "model.safetensors"),
    "vistog": ("step", "optimizer.pt"),
}


def main(folder: Path) -> None:
    from factories import tiny_model

    torch.set_num_threads(1)
    for name, moments in MOMENTS.items():
        model = tiny_model(name)
        for moment in moments:
            child = os.fork()
            if child == 0:
                run(name, model, moment, folder / f"{name}-{moment}")
                os._exit(1)
            _, status = os.waitpid(child, 0)
            if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                sys.exit(f"{name}, {moment}: the run was to die, but ended with status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
