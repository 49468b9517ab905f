"""Train one stage of a paper at full size: what its recipe says, on your data, on one device or many.

    hf-vtc convert llava-v1.5-7b my-avg --method avg_llava
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_stage.py \\
        examples/recipes/avg_llava_stage3.yaml --model my-avg --data mine.json --image-folder imgs --output my-avg-3

A recipe is a YAML file in `examples/recipes`; each value says where it comes from. `--set training.learning_rate=1e-5`
replaces one for this run. The batch of a recipe is that of one optimizer step over all processes: the number of
accumulated forward passes follows from it. A run that was interrupted goes on with `--resume`. `--report-to
tensorboard` draws the loss and what the trainer of the stage measures: visual tokens kept, entropy and decisions of a
router. Needs transformers 5, whose `warmup_steps` below 1 is a share of all steps.
"""

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch import nn
from transformers import AutoProcessor, PreTrainedModel, TrainingArguments, set_seed

import hf_vtc.trainers
from hf_vtc import AutoModelForVision2Seq
from hf_vtc.data import VtcCollator, load_records
from hf_vtc.methods import record_named, record_of
from hf_vtc.trainers import VtcTrainer
from hf_vtc.trainers.convllava import add_stage
from hf_vtc.trainers.schedule import Stage

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
    "data": True,
}
# decided by the command line or by the recipe's `batch_size`
_NOT_IN_RECIPES = {"output_dir", "gradient_accumulation_steps", "resume_from_checkpoint", "report_to"}


def read_recipe(file: Path, overrides: list[str]) -> dict[str, Any]:
    """A recipe with `section.name=value` or `section=value` replaced.

    Raises:
        ValueError: a section is missing or unknown, or an override is not of this form.
    """
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    for override in overrides:
        place, separator, value = override.partition("=")
        section, _, name = place.partition(".")
        if not separator or section not in SECTIONS:
            raise ValueError(
                f"`--set` must be section.name=value with a section of {list(SECTIONS)}, got {override!r}."
            )
        if name:
            recipe.setdefault(section, {})[name] = yaml.safe_load(value)
        else:
            recipe[section] = yaml.safe_load(value)
    unknown = sorted(recipe.keys() - SECTIONS.keys())
    missing = [section for section, needed in SECTIONS.items() if needed and section not in recipe]
    if unknown or missing:
        raise ValueError(
            f"{file} has unknown sections {unknown} and lacks {missing}. Sections: {', '.join(SECTIONS)}."
        )
    return recipe


def trainer_class(recipe: dict[str, Any]) -> type[VtcTrainer]:
    """The trainer of a recipe.

    Raises:
        ValueError: there is no such trainer, or it does not know an option.
    """
    names = [name for name in hf_vtc.trainers.__all__ if name.endswith("Trainer")]
    if recipe["trainer"] not in names:
        raise ValueError(f"`trainer` must be one of {', '.join(names)}, got {recipe['trainer']!r}.")
    trainer = getattr(hf_vtc.trainers, recipe["trainer"])
    known = _options_of(trainer)
    unknown = sorted(recipe.get("options", {}).keys() - known)
    if unknown:
        raise ValueError(f"{trainer.__name__} has no options {unknown}. It has {', '.join(sorted(known)) or 'none'}.")
    return trainer


def training_arguments(recipe: dict[str, Any], args: argparse.Namespace, num_processes: int) -> TrainingArguments:
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
    return TrainingArguments(
        output_dir=str(args.output),
        gradient_accumulation_steps=recipe["batch_size"] // per_pass,
        report_to=args.report_to,
        seed=args.seed,
        dataloader_num_workers=args.workers,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        ddp_find_unused_parameters=False,
        **fields,
    )


def build_trainer(
    recipe: dict[str, Any],
    model: PreTrainedModel,
    arguments: TrainingArguments,
    reference: PreTrainedModel | None,
    **kwargs,
) -> VtcTrainer:
    """The trainer of a recipe with its model prepared.

    Raises:
        ValueError: the model is of another method, or a part to train does not exist.
    """
    trainer = trainer_class(recipe)
    record = record_named(recipe["method"])
    if record_of(model.config) is not record:
        raise ValueError(f"The recipe is for {record.model_type!r}, but the model is {model.config.model_type!r}.")
    if "add_stage" in recipe:
        add_stage(model, **recipe["add_stage"])
    options = dict(recipe.get("options", {}))
    if "stages" in options:
        options["stages"] = [Stage(*stage) for stage in options["stages"]]
    if reference is not None:
        if "reference_model" not in _options_of(trainer):
            raise ValueError(f"{trainer.__name__} compares with no reference model. Leave `--reference` out.")
        options["reference_model"] = reference
    built = trainer(model, arguments, **options, **kwargs)
    if "train_only" in recipe:
        _freeze_others(model, recipe["train_only"])
    return built


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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, such as examples/recipes/avg_llava_stage3.yaml")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id: what the stage starts from")
    parser.add_argument("--reference", help="frozen model to compare with (ViCO's router stage): its base")
    parser.add_argument("--data", required=True, help=".json, .jsonl or .parquet file, or a folder of them")
    parser.add_argument("--image-folder", help="where paths of images start; default: the folder of the data")
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what to do with bad records")
    parser.add_argument(
        "--check-images", choices=["pixels", "header"], default="pixels", help="header: decode none before training"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and the result")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", dest="overrides")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ... or none")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> VtcTrainer:
    args = parse_arguments(arguments)
    recipe = read_recipe(args.recipe, args.overrides)
    training = training_arguments(recipe, args, PartialState().num_processes)
    trainer_class(recipe)
    set_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model)
    collator = VtcCollator(processor, max_length=recipe.get("max_length"))
    checked = {"on_error": args.on_error, "check_images": args.check_images, "collator": collator}
    records = load_records(args.data, args.image_folder, **checked)
    # the optimizer's steps are smaller than bfloat16 can hold; autocast computes in it
    model = AutoModelForVision2Seq.from_pretrained(args.model, dtype=torch.float32)
    reference = None
    if args.reference:
        reference = AutoModelForVision2Seq.from_pretrained(
            args.reference, dtype=torch.bfloat16 if training.bf16 else torch.float32
        )
    trainer = build_trainer(recipe, model, training, reference, train_dataset=records, data_collator=collator)
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output)
    return trainer


if __name__ == "__main__":
    main()
