"""A fit that SIGKILL ends between and inside of its parts, again and again; run by `test_fit_resume.py`.

    python fit_worker.py model records.json folder

Every attempt at `folder/out` has a process of its own, forked before anything has trained, goes on where the last one
was killed and kills itself at the next named moment. `folder/<moment>` is a copy of what was there then.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fit_samples import small_request
from transformers import TrainerCallback

import hf_vtc.fit
import hf_vtc.fit.folder
import hf_vtc.fit.split
import hf_vtc.fit.stage
from hf_vtc.evaluation import EvalReport
from hf_vtc.trainers import VicoConsistencyTrainer, VicoRouterTrainer

METHOD = "vico"


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(owner: Any, name: str, call: int = 1) -> None:
    """Replace a function by one that dies when it is called for the so manieth time."""
    function, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return die() if len(calls) == call else function(*args, **kwargs)

    setattr(owner, name, counted)


class DieAtStep(TrainerCallback):
    """Dies in the middle of the third step, behind the checkpoint of the second."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            die()


def dying_in(trainer: type) -> None:
    train = trainer.train

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(DieAtStep())
        return train(self, *args, **kwargs)

    trainer.train = watched


def dying_while_publishing() -> None:
    """Die when three files of the result have moved."""
    publish = hf_vtc.fit.folder.FitFolder.publish

    def watched(self: Any) -> None:
        dying_at(hf_vtc.fit.folder.os, "replace", call=4)
        publish(self)

    hf_vtc.fit.folder.FitFolder.publish = watched


# moment, in the order in which they come -> what is done to the package so that a fit dies there
MOMENTS: dict[str, Callable[[], None]] = {
    "converting": lambda: dying_at(hf_vtc.fit, "convert"),
    "starting": lambda: dying_at(hf_vtc.fit._Run, "_warm_start"),
    "splitting": lambda: dying_at(hf_vtc.fit.split.Split, "save"),
    "before": lambda: dying_at(EvalReport, "save"),
    "first_stage": lambda: dying_in(VicoConsistencyTrainer),
    "first_saved": lambda: dying_at(hf_vtc.fit.stage, "write_whole"),
    "between_stages": lambda: dying_at(hf_vtc.fit, "run_stage", call=2),
    "second_stage": lambda: dying_in(VicoRouterTrainer),
    "after": lambda: dying_at(EvalReport, "save"),
    "card": lambda: dying_at(hf_vtc.fit, "export"),
    "publishing": dying_while_publishing,
}


def main(model: Path, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    for moment, prepare in MOMENTS.items():
        child = os.fork()
        if child == 0:
            prepare()
            hf_vtc.fit.fit(small_request(model, data, folder / "out", METHOD))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"{moment}: the fit was to die, but ended with status {status}")
        shutil.copytree(folder / "out", folder / moment)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
