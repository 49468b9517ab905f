"""One stage of a fit: from one model folder to the next, resumed where an earlier run was ended."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Subset
from transformers import (
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..data import VtcCollator, load_records
from ..evaluation.questions import FIELDS
from ..files import read_json
from ..hub.source import load_model, load_processor
from ..trainers.checkpoints import complete_checkpoints
from .folder import empty_folder, wait_for, write_whole
from .recipe import Recipe, RunOptions, build_trainer, prepare_model, process_state, training_arguments
from .split import Split

Report = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """What one stage does.

    Args:
        name (`str`): of its recipe.
        recipe (`dict`): the recipe with everything that replaces its values.
        start (`Path`): folder of the model that it starts from.
        reference (`Path`, *optional*): folder of the frozen model that it compares with.
        folder (`Path`): of the stage; `model` in it is its result, and there when the stage is done.
        lora (`bool`): whether it trains adapters, which are folded in at its end.
    """

    name: str
    recipe: Recipe
    start: Path
    reference: Path | None
    folder: Path
    lora: bool

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def log(self) -> Path:
        """What the trainer logged, beside the model."""
        return self.folder / "log.json"


@dataclass(frozen=True)
class Data:
    """Where the records are; see `load_records`."""

    source: str
    image_folder: Path
    split: Split

    def training_records(self, takes_videos: bool) -> Subset:
        """What is not kept aside. The images were decoded when the data was split, so that headers do here."""
        checked = {"on_error": "skip", "check_images": "header", "ignore_fields": FIELDS}
        records = load_records(self.source, self.image_folder, takes_videos=takes_videos, **checked)
        return Subset(records, self.split.training_indices(records))


def run_stage(stage: Stage, data: Data, run: RunOptions, report: Report) -> None:
    """Train one stage, in every process of the run, and leave its model in its folder.

    Args:
        stage ([`Stage`]): what to do.
        data ([`Data`]): what to train on.
        run ([`RunOptions`]): its `output` is the folder of the stage.
        report (`Callable[[str], None]`): told what goes on, by the main process.
    """
    state, saving = process_state(), stage.folder / "saving"
    if state.is_main_process:
        empty_folder(saving)
    # before any model, which DeepSpeed would load in parts
    arguments = training_arguments(stage.recipe, run, state.num_processes)
    set_seed(run.seed)
    collator = VtcCollator(load_processor(stage.start), max_length=stage.recipe.get("max_length"))
    model = _load(stage.start, torch.bfloat16 if stage.lora and arguments.bf16 else torch.float32)
    uses_cache = [(config, config.use_cache) for config in _configs_with_cache(model)]
    trainer = build_trainer(
        stage.recipe,
        model,
        arguments,
        _load(stage.reference, torch.bfloat16 if arguments.bf16 else torch.float32),
        lora=stage.lora,
        train_dataset=data.training_records(collator.takes_videos),
        data_collator=collator,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_ReportingCallback(stage.name, report))
    checkpoint = _checkpoint_under_way(stage.folder)
    if checkpoint is not None:
        report(f"{stage.name}: goes on from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # which the trainer turns off
    for config, value in uses_cache:
        config.use_cache = value
    trainer.save_model(str(saving))
    state.wait_for_everyone()
    history = trainer.state.log_history
    del trainer, model
    release_memory()
    if not state.is_main_process:
        wait_for(stage.model)
        return
    if stage.lora:
        _fold_in(stage, saving)
    collator.processor.save_pretrained(saving, save_code=False)
    write_whole(stage.log, json.dumps(history, indent=1) + "\n")
    os.rename(saving, stage.model)
    # as large as the model and its optimizer, and of no use any more
    for checkpoint in stage.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def release_memory() -> None:
    """Give the memory of what was deleted back, also that of the accelerator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _ReportingCallback(TrainerCallback):
    """Says what the trainer logs, a line each time."""

    def __init__(self, name: str, report: Report):
        self.name, self.report = name, report

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "epoch")
            self.report(f"{self.name} {state.global_step}/{state.max_steps}: {shown}")


def _checkpoint_under_way(folder: Path) -> Path | None:
    """The last whole checkpoint that has a step before it, None for none.

    From that of the last step transformers would take one step more, if it is not the last of an epoch.
    """
    for checkpoint in reversed(complete_checkpoints(folder)):
        state = read_json(checkpoint / "trainer_state.json")
        if state["global_step"] < state["max_steps"]:
            return checkpoint
    return None


def _configs_with_cache(model: PreTrainedModel) -> list[PretrainedConfig]:
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    return [config for config in configs.values() if "use_cache" in vars(config)]


def _load(folder: Path | None, dtype: torch.dtype) -> PreTrainedModel | None:
    """A model that the main process has looked at, in parts where DeepSpeed wants it so; None for none."""
    if folder is None:
        return None
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=False)


def _fold_in(stage: Stage, saving: Path) -> None:
    """Put the model in place of the adapter that was written, which needs this process alone."""
    unset_hf_deepspeed_config()
    base = load_model(stage.start, torch.float32)
    prepare_model(stage.recipe, base)
    merged = PeftModel.from_pretrained(base, str(saving)).merge_and_unload()
    empty_folder(saving)
    merged.save_pretrained(saving, save_code=False)
