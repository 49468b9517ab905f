"""Make `model_cards/llavolta-tiny`: staged training, uncompressed training beside it, and what both cost and can do.

    python examples/train_llavolta.py --output model_cards/llavolta-tiny       # from model_cards/base-tiny
    python examples/train_llavolta.py --evaluate model_cards/llavolta-tiny --uncompressed outputs/llavolta-tiny/single

LLaVolta (arXiv 2406.20092) tunes a model in stages from heavy compression to none; the result is an ordinary model. It
is compared with as many steps on the same pages without compression. The scheme is the paper's best, "four, deeper
then wider", whose layers 2 and 16 of 32 become layers 1 and 2 of four here. Unlike the paper's, the checkpoint
compresses when it answers, lightly, so that there is something to see; `vtc_budget="full"` switches that off.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from digit_forms import evaluation_set, score
from digit_forms.measure import Measurement, answer, as_table
from digit_forms.training import training_arguments
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


def train(base: Path, output: Path, work: Path, stages, inference: tuple[int, int], steps: int, seed: int, console):
    """Tune the shared base, and write the folder with the rounded weights; language model and connector learn."""
    set_seed(seed)
    model = hf_vtc.convert.from_base(base, "llavolta", dtype=torch.float32, compress_stride=1)
    processor = build_processor(AutoTokenizer.from_pretrained(base))
    trainer = LlavoltaTrainer(
        model,
        training_arguments(work, steps, BATCH_SIZE, LEARNING_RATE, seed),
        stages=stages,
        train_dataset=pages(steps, seed),
        data_collator=VtcCollator(processor),
    )
    start = time.perf_counter()
    run_stage(trainer, console, "staged" if len(stages) > 1 else "uncompressed")
    console.print(f"{(time.perf_counter() - start) / steps:.3f} s per step of {BATCH_SIZE} pages")
    model.config.set_compression(*inference)
    model.requires_grad_(True).to(torch.bfloat16).save_pretrained(output, save_code=False)
    processor.save_pretrained(output, save_code=False)
    console.print(f"wrote {output}")


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


def evaluate(staged: str, uncompressed: str, num_questions: int, rounds: int, console: Console) -> dict:
    """Measure, print the table and the paper's claims beside it, and return both."""
    (model, processor), (plain, plain_processor) = load(staged), load(uncompressed)
    items = evaluation_set(num_questions, EVALUATION_SEED)

    def row(name: str, result: tuple[list[str], list[int]]) -> Measurement:
        return Measurement(name, score(items, result[0]), float(np.mean(result[1])))

    inference = (model.config.compress_layer_idx, model.config.compress_stride)
    rows = [
        row("uncompressed training", answer(plain, plain_processor, items, budget="full")),
        row("staged training", answer(model, processor, items, budget="full")),
    ]
    for layer_idx, stride in (inference, (2, 8), (1, 8)):
        model.config.set_compression(layer_idx, stride)
        name = f"staged, answers at layer {layer_idx}, stride {stride}"
        rows.append(row(name, answer(model, processor, items, budget="auto")))
    # without the training: what pooling costs a model that has never seen it
    plain.config.set_compression(2, 8)
    rows.append(row("uncompressed, answers at layer 2, stride 8", answer(plain, plain_processor, items)))
    console.print(as_table(rows, num_questions))

    seconds = seconds_per_step(model, processor, rounds)
    step = sum(stage.share * seconds[str(stage[:2])] for stage in STAGED)
    saved = 1 - step / seconds[str(SINGLE[0][:2])]
    single, ours = (rows[idx].accuracy["all"] for idx in (0, 1))
    before, after = PAPER_ACCURACY
    console.print(f"accuracy: paper {before} -> {after} (mean of 13 benchmarks), here {single:.2%} -> {ours:.2%}")
    console.print(f"training time saved: paper {PAPER_TIME_SAVED:.0%}, here {saved:.1%} (seconds per step {seconds})")
    return {"rows": [vars(each) for each in rows], "seconds": seconds, "time_saved": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="checkpoint folder to write")
    parser.add_argument("--base", type=Path, default=Path("model_cards/base-tiny"), help="folder of train_base.py")
    parser.add_argument("--work", type=Path, default=Path("outputs/llavolta-tiny"), help="trainer checkpoints and log")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--inference", type=int, nargs=2, default=(2, 2), metavar=("LAYER", "STRIDE"), help="of the shipped model"
    )
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the evaluation")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps per setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uncompressed", type=Path, help="finished model to compare with; trained if not given")
    parser.add_argument("--evaluate", metavar="FOLDER", help="only measure a finished checkpoint")
    args = parser.parse_args()
    console = Console()
    if args.evaluate is None and args.output is None:
        parser.error("--output is needed, or --evaluate")
    if args.evaluate is not None and args.uncompressed is None:
        parser.error("--evaluate needs --uncompressed, the model to compare with")

    if args.evaluate is None:
        args.work.mkdir(parents=True, exist_ok=True)
        inference, shared = tuple(args.inference), (args.steps, args.seed, console)
        train(args.base, args.output, args.work / "staged_training", STAGED, inference, *shared)
        if args.uncompressed is None:
            args.uncompressed = args.work / "single"
            train(args.base, args.uncompressed, args.work / "single_training", SINGLE, SINGLE[0][:2], *shared)
    # what is shipped is what is measured: the rounded weights
    measured = evaluate(
        str(args.evaluate or args.output), str(args.uncompressed), args.questions, args.rounds, console
    )
    console.print_json(json.dumps(measured))


if __name__ == "__main__":
    main()
