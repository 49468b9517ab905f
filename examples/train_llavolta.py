"""Make `model_cards/llavolta-tiny`: staged training, uncompressed training beside it, and what both cost and can do.

    python examples/train_llavolta.py --output model_cards/llavolta-tiny       # from model_cards/base-tiny
    python examples/train_llavolta.py --evaluate model_cards/llavolta-tiny --uncompressed outputs/llavolta-tiny/single

LLaVolta (arXiv 2406.20092) tunes a model in stages from heavy compression to none; the result is an ordinary model. It
is compared with as many steps on the same pages without compression. The scheme is the paper's best, "four, deeper
then wider", whose layers 2 and 16 of 32 become layers 1 and 2 of four here. Unlike the paper's, the checkpoint
compresses when it answers, lightly, so that there is something to see; `vtc_budget="full"` switches that off.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from digit_forms import evaluation_set
from digit_forms.measure import Measurement, as_table, measure
from digit_forms.training import comparison_parser, run_comparison, save_rounded, training_arguments
from rich.console import Console
from train_vico import EVALUATION_SEED, PageDataset, build_processor, load, run_stage
from transformers import AutoTokenizer, set_seed

import hf_vtc
from hf_vtc.data import VtcCollator
from hf_vtc.trainers import LlavoltaTrainer, Stage

# pages of the base model's training have seed 0, those of the other methods 100 to 500, evaluation has 1234
TUNING_PAGES_SEED = 600
BATCH_SIZE = 16
LEARNING_RATE = 6e-4
QUESTIONS_PER_PAGE = 2
STAGED = (Stage(1, 8, 0.25), Stage(2, 8, 0.25), Stage(2, 2, 0.25), Stage(0, 1, 0.25))
SINGLE = (Stage(0, 1, 1.0),)
PAPER_ACCURACY = (61.8, 61.9)
PAPER_TIME_SAVED = 0.16


def pages(steps: int, seed: int) -> PageDataset:
    return PageDataset(steps * BATCH_SIZE, TUNING_PAGES_SEED + seed, max_questions=QUESTIONS_PER_PAGE)


def train(args: argparse.Namespace, output: Path, staged: bool, console: Console) -> None:
    """Tune the shared base, and write the folder with the rounded weights; language model and connector learn."""
    set_seed(args.seed)
    model = hf_vtc.convert.from_base(args.base, "llavolta", dtype=torch.float32, compress_stride=1)
    processor = build_processor(AutoTokenizer.from_pretrained(args.base))
    work = args.work / ("staged_training" if staged else "single_training")
    trainer = LlavoltaTrainer(
        model,
        training_arguments(work, args.steps, BATCH_SIZE, LEARNING_RATE, args.seed),
        stages=STAGED if staged else SINGLE,
        train_dataset=pages(args.steps, args.seed),
        data_collator=VtcCollator(processor),
    )
    start = time.perf_counter()
    run_stage(trainer, console, "staged" if staged else "uncompressed")
    console.print(f"{(time.perf_counter() - start) / args.steps:.3f} s per step of {BATCH_SIZE} pages")
    model.config.set_compression(*(args.inference if staged else SINGLE[0][:2]))
    save_rounded(model, processor, output, console)


def seconds_per_step(model, processor, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward at every stage and without compression, in turns on the same pages.

    Turns, because two trainings one after the other do not meet the same machine.
    """
    model.train().requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    settings = {str(stage[:2]): stage[:2] for stage in (*STAGED, *SINGLE)}
    times = {name: [] for name in settings}
    dataset, collator = pages(rounds + 1, seed=1), VtcCollator(processor)
    # the first round warms up
    for round_idx in range(rounds + 1):
        batch = collator([dataset[round_idx * BATCH_SIZE + idx] for idx in range(BATCH_SIZE)])
        for name, setting in settings.items():
            model.config.set_compression(*setting)
            start = time.perf_counter()
            model(**batch, use_cache=False).loss.backward()
            times[name].append(time.perf_counter() - start)
            model.zero_grad()
    model.eval()
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def evaluate(args: argparse.Namespace, staged: str, uncompressed: str, console: Console) -> dict:
    """Measure, print the table and the paper's claims beside it, and return both."""
    (model, processor), (plain, plain_processor) = load(staged), load(uncompressed)
    items = evaluation_set(args.questions, EVALUATION_SEED)
    inference = (model.config.compress_layer_idx, model.config.compress_stride)
    # without the training: what pooling costs a model that has never seen it
    plain.config.set_compression(2, 8)
    report = measure(plain, plain_processor, items)
    lines = {"uncompressed training": report.row("full")}
    pooled = {"uncompressed, answers at layer 2, stride 8": report.row("auto")}
    for layer_idx, stride in (inference, (2, 8), (1, 8)):
        model.config.set_compression(layer_idx, stride)
        report = measure(model, processor, items)
        lines.setdefault("staged training", report.row("full"))
        lines[f"staged, answers at layer {layer_idx}, stride {stride}"] = report.row("auto")
    rows = [Measurement.of(name, row) for name, row in (lines | pooled).items()]
    console.print(as_table(rows, args.questions))

    seconds = seconds_per_step(model, processor, args.rounds)
    step = sum(stage.share * seconds[str(stage[:2])] for stage in STAGED)
    saved = 1 - step / seconds[str(SINGLE[0][:2])]
    single, ours = (rows[idx].accuracy["all"] for idx in (0, 1))
    before, after = PAPER_ACCURACY
    console.print(f"accuracy: paper {before} -> {after} (mean of 13 benchmarks), here {single:.2%} -> {ours:.2%}")
    console.print(f"training time saved: paper {PAPER_TIME_SAVED:.0%}, here {saved:.1%} (seconds per step {seconds})")
    return {"rows": [vars(each) for each in rows], "seconds": seconds, "time_saved": saved}


def main() -> None:
    parser = comparison_parser(__doc__, "llavolta-tiny")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--inference", type=int, nargs=2, default=(2, 2), metavar=("LAYER", "STRIDE"), help="of the shipped model"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed steps per setting")
    run_comparison(parser, train, evaluate, uncompressed="single")


if __name__ == "__main__":
    main()
