"""Checkpoints that count only when they were written to their end."""

import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

# written into a checkpoint when all else is there
COMPLETE = "complete"


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints in a folder that were written to their end, in the order of their steps."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if step and (path / COMPLETE).is_file():
            found[int(step[1])] = path
    return [found[step] for step in sorted(found)]


class CheckpointTrainer(Trainer):
    """A `Trainer` that resumes from a complete checkpoint only. Abstract."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, which resumes from a complete checkpoint only; `True` is the last one of `output_dir`.

        Raises:
            ValueError: there is none, or the given one was not written to its end.
        """
        if isinstance(resume_from_checkpoint, bool):
            found = complete_checkpoints(self.args.output_dir) if resume_from_checkpoint else []
            if resume_from_checkpoint and not found:
                raise ValueError(
                    f"`resume_from_checkpoint` is True, but no checkpoint in {self.args.output_dir} is complete. "
                    "Start without it."
                )
            resume_from_checkpoint = str(found[-1]) if found else None
        elif resume_from_checkpoint is not None and not (Path(resume_from_checkpoint) / COMPLETE).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be a checkpoint that was written to its end, but {COMPLETE!r} is not "
                f"among the files of {resume_from_checkpoint}. Take an earlier one, or if you know that another "
                "trainer wrote it to its end, put an empty file of this name into it."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, which under FSDP writes the model even where checkpoints are sharded."""
        if not self.is_fsdp_enabled or _internal_call:
            return super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin
        of_checkpoints = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir)
        finally:
            plugin.set_state_dict_type(of_checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of all processes, marked when it is whole; only then older ones go."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # of an earlier run into the same folder
            (checkpoint / COMPLETE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (checkpoint / COMPLETE).touch()
            self._remove_old_checkpoints(folder, checkpoint)

    def _remove_old_checkpoints(self, folder: Path, newest: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
        others = [path for path in complete_checkpoints(folder) if path.resolve() not in kept]
        for path in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
            # first, so that what is left of a deletion that was interrupted does not count
            (path / COMPLETE).unlink()
            shutil.rmtree(path, ignore_errors=True)
