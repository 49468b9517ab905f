"""Train one stage of a paper at full size: what its recipe says, on your data, on one device or many.

    hf-vtc convert llava-v1.5-7b my-avg --method avg_llava
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_stage.py \\
        avg_llava_stage3 --model my-avg --data mine.json --image-folder imgs --output my-avg-3

`hf-vtc fit` runs all stages of a method, with conversion before and evaluation around them; this is one stage alone.
A recipe is a YAML file of `hf_vtc/fit/recipes`, by its name, or one of your own; each value says where it comes from.
`--set training.learning_rate=1e-5` replaces one for this run. The batch of a recipe is that of one optimizer step over
all processes: the number of accumulated forward passes follows from it. A run that was interrupted goes on with
`--resume`. `--report-to tensorboard` draws the loss and what the trainer of the stage measures: visual tokens kept,
entropy and decisions of a router.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoProcessor, set_seed

from hf_vtc import AutoModelForVision2Seq
from hf_vtc.data import VtcCollator, load_records
from hf_vtc.fit.recipe import (
    RunOptions,
    build_trainer,
    process_state,
    read_recipe,
    recipe_file,
    trainer_class,
    training_arguments,
)
from hf_vtc.trainers import VtcTrainer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a recipe such as avg_llava_stage3, or a YAML file")
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
    recipe = read_recipe(recipe_file(args.recipe), args.overrides)
    run = RunOptions(args.output, args.seed, args.workers, args.logging_steps, args.save_steps, args.report_to)
    training = training_arguments(recipe, run, process_state().num_processes)
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
