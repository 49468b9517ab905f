"""From a base and your records to a fitted, measured model: conversion, the stages of a method, evaluation, card.

    hf-vtc fit llava-v1.5-7b --method avg_llava --data mine.json --image-folder imgs --output my-avg
    accelerate launch --num_processes 8 -m hf_vtc.fit llava-v1.5-7b --method avg_llava --data mine.json --output my-avg

A run that was ended goes on where it was when the same command is given again: every part appears in the output
folder under its name when it is done, and the checkpoints of the stage under way lie there too.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..convert import convert
from ..data import VtcCollator, load_records
from ..evaluation.questions import FIELDS
from ..files import read_json
from ..hub import export
from ..hub.card import complete_card
from ..hub.source import load_model, load_processor
from ..models.prompt_vtc import Budget
from .card import score_text, sections_of
from .folder import REPORT, FitFolder, wait_for
from .measure import Measured, check_budgets, is_measured, measure, progress_bars
from .recipe import process_state
from .request import FitRequest, Plan, plan
from .split import Split, split_records, write_held_out
from .stage import Data, Report, Stage, release_memory, run_stage

__all__ = ["FitRequest", "Measured", "fit", "plan", "score_text"]


def fit(request: FitRequest, report: Report = lambda line: None) -> Measured | None:
    """Make a model of a method from a base, on your records, and measure it on those that were kept aside.

    Every process of a distributed run calls it. The main process converts, splits and evaluates while the others
    wait; all of them train.

    Args:
        request ([`FitRequest`]): what to do.
        report (`Callable[[str], None]`): told what goes on, line by line, in the main process.

    Returns:
        What was measured before and after; None where nothing was kept aside, and in all but the main process.

    Raises:
        ValueError, FileNotFoundError: see `plan`; or the output holds a fit with other settings.
        FileExistsError: the output holds something else.
        RecordError: a record cannot be used.
        RuntimeError: another run works in the output.
    """
    state = process_state()
    planned = plan(request, state.num_processes)
    folder = FitFolder(Path(request.output).absolute())
    if not state.is_main_process:
        with progress_bars(False):
            _Run(planned, folder, lambda line: None).train()
        return None
    run = _Run(planned, folder, report)
    with run.folder.alone(), progress_bars(False):
        if run.folder.adopt(planned.settings()):
            report(f"{request.output}: goes on with what is there")
        run.convert()
        run.split()
        run.measure_before()
        run.train()
        run.finish()
    return run.measured()


class _Run:
    """The parts of a fit; each looks in the folder whether it is done."""

    def __init__(self, planned: Plan, folder: FitFolder, report: Report):
        self.plan, self.request, self.folder, self.report = planned, planned.request, folder, report
        self.start = planned.source if planned.is_converted else folder.start

    @property
    def image_folder(self) -> Path:
        """Where paths of images start, as `load_records` has it."""
        data = Path(self.request.data)
        return Path(self.request.image_folder or (data if data.is_dir() else data.parent))

    def convert(self) -> None:
        if self.start.exists():
            return
        self.report(f"converting {self.request.model} to {self.plan.record.name}")
        # parts that the base lacks are drawn
        set_seed(self.request.seed)
        drawn = self.folder.drawn
        # of a run that was killed here
        shutil.rmtree(drawn, ignore_errors=True)
        done = convert(
            self.plan.source,
            drawn,
            self.plan.record.name,
            vision_tower=self.request.vision_tower,
            save_code=False,
            **self.plan.config,
        )
        for note in done.notes:
            self.report(f"note: {note}")
        self._warm_start(drawn, done.fresh_keys)
        os.rename(drawn, self.start)

    def _warm_start(self, folder: Path, fresh_keys: Sequence[str]) -> None:
        """Give parts that the base lacks better values than drawn ones, where the method knows any."""
        base = self.plan.record.base
        starts = {
            module: start
            for module, start in (base.warm_starts if base else {}).items()
            if any(name.startswith(f"{module}.") for name in fresh_keys)
        }
        if not starts:
            return
        model = load_model(folder)
        for module, start in starts.items():
            self.report(f"{module} starts from what the base has: {start.__name__}")
            start(model)
        # of the conversion, which may have cut them into other files
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(folder, save_code=False)
        release_memory()

    def split(self) -> None:
        """Look at every record, and keep some aside."""
        if self.folder.split.is_file():
            return
        self.report(f"checking {self.request.data}")
        collator = VtcCollator(load_processor(self.start), max_length=self.plan.max_length())
        records = load_records(
            self.request.data,
            self.image_folder,
            on_error=self.request.on_error,
            collator=collator,
            ignore_fields=FIELDS,
        )
        split = split_records(records, self.request.held_out, self.request.seed)
        write_held_out(records, split, self.folder.held_out)
        split.save(self.folder.split)
        self.report(
            f"{split.num_training:,} records train; {len(split.held_out):,} are kept aside with their "
            f"{len(split.images):,} pictures; {len(split.left_out):,} cannot be used"
        )

    def measure_before(self) -> None:
        """What training starts from, with all visual tokens: its compression has learned nothing yet."""
        if self._split().held_out and not is_measured(self.folder.before):
            check_budgets(self.start, self.folder.held_out, self.image_folder, self.request.budgets)
            self._measure(self.start, self.request.model, "auto", ("full",), self.folder.before)

    def train(self) -> None:
        """All stages, in every process."""
        if not process_state().is_main_process:
            self._wait_for_main()
        model = self.start
        for idx, (name, recipe) in enumerate(self.plan.recipes.items(), start=1):
            reference = (self.plan.reference or self.start) if recipe.get("reference") else None
            lora = self.request.lora and "lora" in recipe
            stage = Stage(name, recipe, model, reference, self.folder.stage(idx, name), lora)
            model = stage.model
            if stage.model.exists():
                continue
            self.report(f"stage {idx} of {len(self.plan.recipes)}: {name}")
            data = Data(self.request.data, self.image_folder, self._split())
            run_stage(stage, data, dataclasses.replace(self.plan.run, output=stage.folder), self.report)

    def finish(self) -> None:
        """Evaluation, card, and the result where users look for it."""
        if self.folder.is_finished:
            return
        # under ZeRO-3 models would come in parts, and this process is alone here
        unset_hf_deepspeed_config()
        stage = self.folder.stage(len(self.plan.recipes), list(self.plan.recipes)[-1])
        split, dtype = self._split(), self.request.dtype or _dtype_of(self.start)
        if split.held_out and not is_measured(self.folder.after):
            self._measure(stage / "model", str(self.request.output), dtype, self.request.budgets, self.folder.after)
        if not self.folder.result.exists():
            self.report(f"writing {self.request.output}")
            self._export(stage / "model", dtype, split)
        self.folder.publish()

    def measured(self) -> Measured | None:
        if not self._split().held_out:
            return None
        return Measured.load(self.folder.before, self.folder.after)

    def _split(self) -> Split:
        return Split.load(self.folder.split)

    def _wait_for_main(self) -> None:
        wait_for(self.folder.split)
        if self._split().held_out:
            wait_for(self.folder.before / REPORT)

    def _measure(self, model: Path, name: str, dtype: str, budgets: Sequence[Budget] | None, folder: Path) -> None:
        self.report(f"asking {name} about what is kept aside")
        request = self.request
        measure(
            model,
            name,
            dtype,
            self.folder.held_out,
            self.image_folder,
            budgets,
            request.metric,
            request.tolerance,
            request.relative,
            request.seed,
            folder,
        )

    def _export(self, last: Path, dtype: str, split: Split) -> None:
        """Write the result as a whole, with its code and a card that says what was done and measured."""
        request, (model, processor) = self.request, (load_model(last, dtype), load_processor(last))
        card = complete_card(
            None,
            model,
            processor,
            Path(request.output).absolute().name,
            request.base_model or (None if Path(request.model).exists() else request.model),
            request.license,
            sections=sections_of(self.plan, self.folder, split, self.measured()),
        )
        # the code is that of this package; `hf-vtc push` proves that it works without it
        export(model, processor, self.folder.result, card=card, check=False)


def _dtype_of(folder: Path) -> str:
    """What weights are stored in, as a config says it."""
    config = read_json(folder / "config.json")
    return config.get("dtype") or config.get("torch_dtype") or "float32"
