"""Recipes: stages of the papers as YAML files that say where each value is from, and the trainers that they become."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import PartialState
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from .. import trainers
from ..lora import default_lora_config
from ..methods import record_named, record_of
from ..trainers import VtcTrainer
from ..trainers.convllava import add_stage
from ..trainers.schedule import Stage

Recipe = dict[str, Any]

RECIPES = Path(__file__).parent / "recipes"
# section of a recipe -> whether it must be there
SECTIONS = {
    "method": True,
    "trainer": True,
    "options": False,
    "batch_size": True,
    "training": True,
    "max_length": False,
    "train_only": False,
    "add_stage": False,
    # fields of the model's config that hold from this stage on
    "config": False,
    # "first": a frozen copy of what training began with is the trainer's `reference_model`; "earlier": the same, and
    # this stage cannot be the first
    "reference": False,
    # how the stage trains adapters, where it can
    "lora": False,
    "data": True,
}
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_REFERENCES = (None, "first", "earlier")
# decided by the command line or by the recipe's `batch_size`
_NOT_IN_RECIPES = {"output_dir", "gradient_accumulation_steps", "resume_from_checkpoint", "report_to"}


@dataclass(frozen=True)
class RunOptions:
    """What a run decides, whatever the recipe.

    Args:
        output (`Path`): folder for checkpoints.
        seed (`int`): of everything that is drawn.
        workers (`int`): processes that read images.
        logging_steps, save_steps (`int`): optimizer steps between two lines of the log, and two checkpoints.
        report_to (`str`): such as `"tensorboard"`, or `"none"`.
    """

    output: Path
    seed: int = 42
    workers: int = 4
    logging_steps: int = 10
    save_steps: int = 500
    report_to: str = "none"


def process_state() -> PartialState:
    """This process among those of its run; by itself accelerate looks for others on a CPU only if it is told to."""
    return PartialState(cpu=not torch.cuda.is_available())


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe: one of the package by its name, or any YAML file by its path.

    Raises:
        ValueError: there is no such recipe.
    """
    packaged = RECIPES / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        return Path(name)
    if Path(name).name == str(name) and packaged.is_file():
        return packaged
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    raise ValueError(f"A recipe must be a YAML file, or one of {names}, got {str(name)!r}.")


def read_recipe(file: Path, overrides: Sequence[str] = (), preset: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe with the values of a preset, and then with `section.name=value` or `section=value` replaced.

    Raises:
        ValueError: a section is missing or unknown, or an override is not of this form.
    """
    recipe = _mapping_in(file)
    for section, value in (preset or {}).items():
        both = isinstance(value, Mapping) and isinstance(recipe.get(section), Mapping)
        recipe[section] = {**recipe[section], **value} if both else value
    for override in overrides:
        section, name, value = parse_override(override)
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    unknown = sorted(recipe.keys() - SECTIONS.keys())
    missing = [section for section, needed in SECTIONS.items() if needed and section not in recipe]
    if unknown or missing:
        raise ValueError(
            f"{file} has unknown sections {unknown} and lacks {missing}. Sections: {', '.join(SECTIONS)}."
        )
    if recipe.get("reference") not in _REFERENCES:
        raise ValueError(f"`reference` of {file} must be 'first' or 'earlier', got {recipe['reference']!r}.")
    return recipe


def parse_override(override: str) -> tuple[str, str, Any]:
    """(section, name, value) of `section.name=value`, where the name may be empty.

    Raises:
        ValueError: it is not of this form.
    """
    place, separator, text = override.partition("=")
    section, _, name = place.partition(".")
    try:
        # which YAML takes for text without a point: 1e-5
        value = float(text) if _NUMBER.fullmatch(text) else yaml.safe_load(text)
    except yaml.YAMLError:
        separator = ""
    if not separator or section not in SECTIONS:
        raise ValueError(f"`--set` must be section.name=value with a section of {list(SECTIONS)}, got {override!r}.")
    return section, name, value


def trainer_class(recipe: Recipe) -> type[VtcTrainer]:
    """The trainer of a recipe.

    Raises:
        ValueError: there is no such trainer, or it does not know an option.
    """
    names = [name for name in trainers.__all__ if name.endswith("Trainer")]
    if recipe["trainer"] not in names:
        raise ValueError(f"`trainer` must be one of {', '.join(names)}, got {recipe['trainer']!r}.")
    trainer = getattr(trainers, recipe["trainer"])
    known = _options_of(trainer)
    unknown = sorted(recipe.get("options", {}).keys() - known)
    if unknown:
        raise ValueError(f"{trainer.__name__} has no options {unknown}. It has {', '.join(sorted(known)) or 'none'}.")
    return trainer


def training_arguments(recipe: Recipe, run: RunOptions, num_processes: int) -> TrainingArguments:
    """`TrainingArguments` of a recipe for this machine.

    Raises:
        ValueError: a field is unknown, or the batch cannot be divided among the processes.
    """
    fields = recipe["training"]
    unknown = sorted(fields.keys() - (inspect.signature(TrainingArguments).parameters.keys() - _NOT_IN_RECIPES))
    if unknown:
        raise ValueError(
            f"`training` of the recipe has {unknown}, which `TrainingArguments` does not take from there."
        )
    for name, value in fields.items():
        default = TrainingArguments.__dataclass_fields__[name].default
        if isinstance(default, (int, float)) and not isinstance(value, (int, float)):
            raise ValueError(f"training.{name} must be a number such as {default}, got {value!r}.")
    per_pass = fields.get("per_device_train_batch_size", 8) * num_processes
    if recipe["batch_size"] % per_pass:
        raise ValueError(
            f"`batch_size` must be a multiple of {per_pass}, the samples of one forward pass of {num_processes} "
            f"processes, got {recipe['batch_size']}. Set training.per_device_train_batch_size so that it is."
        )
    if not torch.cuda.is_available():
        # a trial on a CPU
        fields = {**fields, "bf16": False, "tf32": None, "use_cpu": True}
    if fields.get("gradient_checkpointing"):
        # the other way needs inputs that require gradients, which a frozen tower has not
        fields = {**fields, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    else:
        # its name is deprecated, which would be warned of for nothing
        fields = {name: value for name, value in fields.items() if name != "gradient_checkpointing"}
    if 0 < fields.get("warmup_steps", 0) < 1 and Version(transformers.__version__) < Version("5"):
        # a share of all steps, which has a name of its own there
        fields = {**fields, "warmup_steps": 0, "warmup_ratio": fields["warmup_steps"]}
    return TrainingArguments(
        output_dir=str(run.output),
        gradient_accumulation_steps=recipe["batch_size"] // per_pass,
        report_to=run.report_to,
        seed=run.seed,
        dataloader_num_workers=run.workers,
        logging_steps=run.logging_steps,
        save_steps=run.save_steps,
        save_total_limit=2,
        ddp_find_unused_parameters=False,
        **fields,
    )


def with_lora(recipe: Recipe) -> Recipe:
    """The recipe as it trains adapters: at their learning rate.

    Raises:
        ValueError: the recipe does not say at which.
    """
    lora = dict(recipe["lora"])
    if "learning_rate" not in lora:
        raise ValueError("`lora` of a recipe must have a `learning_rate`: the language model's own is far lower.")
    return {**recipe, "training": {**recipe["training"], "learning_rate": lora.pop("learning_rate")}, "lora": lora}


def prepare_model(recipe: Recipe, model: PreTrainedModel) -> None:
    """Give a model the parts and the fields of its config that a recipe adds, in place.

    Raises:
        ValueError: there is no such field.
    """
    if "add_stage" in recipe:
        add_stage(model, **recipe["add_stage"])
    known = inspect.signature(type(model.config).__init__).parameters
    for name, value in recipe.get("config", {}).items():
        if name not in known:
            raise ValueError(f"`config` names {name!r}, which is no field of {type(model.config).__name__}.")
        setattr(model.config, name, value)


def build_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    reference: PreTrainedModel | None,
    lora: bool = False,
    **kwargs: Any,
) -> VtcTrainer:
    """The trainer of a recipe with its model prepared.

    Args:
        recipe (`dict`): of `read_recipe`, or of `with_lora` for adapters.
        model ([`PreTrainedModel`]): what the stage starts from.
        arguments (`TrainingArguments`): of `training_arguments`.
        reference ([`PreTrainedModel`], *optional*): the frozen model to compare with.
        lora (`bool`): whether adapters train in place of the language model.
        kwargs: data and collator of the trainer.

    Raises:
        ValueError: the model is of another method, a part to train or a field of the config does not exist.
    """
    trainer = trainer_class(recipe)
    record = record_named(recipe["method"])
    if record_of(model.config) is not record:
        raise ValueError(f"The recipe is for {record.model_type!r}, but the model is {model.config.model_type!r}.")
    prepare_model(recipe, model)
    options = dict(recipe.get("options", {}))
    if "stages" in options:
        options["stages"] = [Stage(*stage) for stage in options["stages"]]
    if reference is not None:
        if "reference_model" not in _options_of(trainer):
            raise ValueError(f"{trainer.__name__} compares with no reference model. Leave `--reference` out.")
        options["reference_model"] = reference
    if lora:
        model = get_peft_model(model, default_lora_config(model, **recipe["lora"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                # steps of the optimizer are smaller than bfloat16 can hold
                parameter.data = parameter.data.float()
    built = trainer(model, arguments, **options, **kwargs)
    if "train_only" in recipe:
        _freeze_others(model, recipe["train_only"])
    return built


def _mapping_in(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML ({' '.join(str(error).split())}). Repair it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold sections with a name each, got {type(content).__name__}.")
    return content


def _options_of(trainer: type[VtcTrainer]) -> set[str]:
    parameters = inspect.signature(trainer.__init__).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _freeze_others(model: nn.Module, parts: list[str]) -> None:
    """Train those parameters only that have one of `parts` in their dotted name."""
    found = set()
    for name, parameter in model.named_parameters():
        here = set(parts) & set(name.split("."))
        found |= here
        parameter.requires_grad_(parameter.requires_grad and bool(here))
    if found != set(parts):
        raise ValueError(f"`train_only` names {sorted(set(parts) - found)}, which the model does not have.")
