"""What all trainings of the tiny models share: settings, the folder that is shipped, a model to compare with."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments


def training_arguments(
    folder: Path, steps: int, batch_size: int, learning_rate: float, seed: int, **overrides: Any
) -> TrainingArguments:
    """Arguments of a quiet run of `steps` optimizer steps on one device, checkpoints in `folder`; `overrides` win."""
    fields = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": max(steps // 20, 1),
        "save_steps": max(steps // 3, 1),
        "save_total_limit": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        **{**fields, **overrides},
    )


def save_rounded(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, console: Console) -> None:
    """Write what is shipped: weights rounded to bfloat16 and the processor, without code."""
    model.requires_grad_(True).to(torch.bfloat16).save_pretrained(folder, save_code=False)
    processor.save_pretrained(folder, save_code=False)
    console.print(f"wrote {folder}")


def comparison_parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options of a script that trains a model and an uncompressed one beside it, and measures both.

    Args:
        description (`str`): docstring of the script.
        name (`str`): of the checkpoint, such as `"vistog-tiny"`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="checkpoint folder to write")
    parser.add_argument("--base", type=Path, default=Path("model_cards/base-tiny"), help="folder of train_base.py")
    parser.add_argument("--work", type=Path, default=Path("outputs") / name, help="trainer checkpoints and log")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uncompressed", type=Path, help="finished model to compare with; trained if not given")
    parser.add_argument("--evaluate", metavar="FOLDER", help="only measure a finished checkpoint")
    return parser


def run_comparison(
    parser: argparse.ArgumentParser,
    train: Callable[[argparse.Namespace, Path, bool, Console], None],
    evaluate: Callable[[argparse.Namespace, str, str, Console], dict[str, Any]],
    uncompressed: str,
) -> None:
    """Train both models, unless they are there, and print what was measured.

    Args:
        parser (`argparse.ArgumentParser`): from `comparison_parser`.
        train (`Callable`): given arguments, folder to write, whether it compresses, and console.
        evaluate (`Callable`): given arguments, the folders of both models, and console; returns what is printed.
        uncompressed (`str`): name of the other model's folder under `--work`.
    """
    args, console = parser.parse_args(), Console()
    if args.evaluate is None and args.output is None:
        parser.error("--output is needed, or --evaluate")
    if args.evaluate is not None and args.uncompressed is None:
        parser.error("--evaluate needs --uncompressed, the model to compare with")
    if args.evaluate is None:
        args.work.mkdir(parents=True, exist_ok=True)
        train(args, args.output, True, console)
        if args.uncompressed is None:
            args.uncompressed = args.work / uncompressed
            train(args, args.uncompressed, False, console)
    # what is shipped is what is measured: the rounded weights
    measured = evaluate(args, str(args.evaluate or args.output), str(args.uncompressed), console)
    console.print_json(json.dumps(measured))
