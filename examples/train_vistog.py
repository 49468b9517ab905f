"""Make `model_cards/vistog-tiny`: the stages of VisToG, the uncompressed model beside it, and what both can do.

    python examples/train_vistog.py --output model_cards/vistog-tiny              # from model_cards/base-tiny
    python examples/train_vistog.py --evaluate model_cards/vistog-tiny --uncompressed outputs/vistog-tiny/uncompressed

VisToG (arXiv 2411.17773) compares with a model that gives every patch to the language model. The tiny base folds four
patches into one token, so that model has to be made as well: it gets a plain projector, the same stages and pages and
as many steps, without grouping. No recipe of the paper is public: all numbers below are chosen here, and a last round
is ours, like stage 2 without the Gumbel noise: it teaches the assignments that inference will make.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from digit_forms import FIELD_SIZE, MAX_TILES, evaluation_set
from digit_forms.measure import MAX_ANSWER_TOKENS, Measurement, as_table, measure
from digit_forms.training import comparison_parser, run_comparison, save_rounded, training_arguments
from rich.console import Console
from train_vico import EVALUATION_SEED, PageDataset, load, run_stage
from transformers import AutoTokenizer, set_seed

import hf_vtc
from hf_vtc.data import VtcCollator
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import VtcProcessor
from hf_vtc.trainers import VistogTrainer

# pages of the base model's training have seed 0, evaluation has 1234
ALIGNMENT_PAGES_SEED = 400
TUNING_PAGES_SEED = 500
NOISELESS_PAGES_SEED = 600
BATCH_SIZE = 16
PAPER_KEPT = 0.981
PAPER_TIME_SAVED = 0.27


def build_processor(tokenizer, image_seq_length: int) -> VtcProcessor:
    """The processor that cuts forms into their fields, thumbnail last."""
    image_processor = VtcImageProcessor(tiling="dynamic", size=FIELD_SIZE, max_tiles=MAX_TILES)
    return VtcProcessor(image_processor, tokenizer, image_seq_length=image_seq_length)


class Round(NamedTuple):
    """Part of the training; `learning_rate` is that of the new parts, the language model gets half of it."""

    stage: int
    noisy: bool
    learning_rate: float
    pages_seed: int


ROUNDS = (
    Round(1, True, 2e-3, ALIGNMENT_PAGES_SEED),
    Round(2, True, 1e-3, TUNING_PAGES_SEED),
    Round(2, False, 5e-4, NOISELESS_PAGES_SEED),
)


def train_round(
    model, processor, folder: Path, idx: int, grouping: bool, steps: int, seed: int, console: Console
) -> None:
    """One of `ROUNDS`, in place. New parts learn faster than the language model."""
    stage, noisy, learning_rate, pages_seed = ROUNDS[idx]
    base = model.model
    base.grouping.assign.noise.p = float(noisy)
    new = [base.semantic_tokens, base.grouping, base.multi_modal_projector]
    groups = [{"params": [each for part in new for each in part.parameters()], "lr": learning_rate}]
    if stage == 2:
        groups.append({"params": list(base.language_model.parameters()), "lr": learning_rate / 2})
    trainer = VistogTrainer(
        model,
        training_arguments(folder / f"round_{idx + 1}", steps, BATCH_SIZE, learning_rate, seed),
        stage=stage,
        grouping=grouping,
        train_dataset=PageDataset(steps * BATCH_SIZE, pages_seed + seed, max_questions=8),
        data_collator=VtcCollator(processor),
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.01), None),
    )
    start = time.perf_counter()
    run_stage(trainer, console, f"{'VisToG' if grouping else 'uncompressed'}, round {idx + 1}")
    console.print(f"round {idx + 1}: {(time.perf_counter() - start) / steps:.2f} s per step of {BATCH_SIZE} pages")


def train(args: argparse.Namespace, output: Path, grouping: bool, console: Console) -> None:
    """All rounds from the shared base, and the folder with the rounded weights."""
    set_seed(args.seed)
    model = hf_vtc.convert.from_base(args.base, "vistog", dtype=torch.float32, num_semantic_tokens=args.groups)
    processor = build_processor(AutoTokenizer.from_pretrained(args.base), model.config.image_seq_length)
    work = args.work / ("vistog_training" if grouping else "uncompressed_training")
    for idx, steps in enumerate(args.steps):
        train_round(model, processor, work, idx, grouping, steps, args.seed, console)
    save_rounded(model, processor, output, console)


@torch.no_grad()
def seconds_to_answer(runs: dict[str, tuple], items, rounds: int = 5) -> dict[str, float]:
    """Median seconds to answer all of `items`, tower included, one after the other in each round.

    Args:
        runs: name -> (model, processor, budget).
        items: questions with their pages, asked in one batch.
    """
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}] for item in items
    ]
    inputs = {}
    for name, (_, processor, _) in runs.items():
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs[name] = processor(text=prompts, images=[[item.image] for item in items], return_tensors="pt")
    times = {name: [] for name in runs}
    # the first round warms up
    for _ in range(rounds + 1):
        for name, (model, _, budget) in runs.items():
            start = time.perf_counter()
            model.generate(**inputs[name], vtc_budget=budget, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def evaluate(args: argparse.Namespace, vistog: str, uncompressed: str, console: Console) -> dict:
    """Measure, print the table and the paper's claims beside it, and return both."""
    (model, processor), (plain, plain_processor) = load(vistog), load(uncompressed)
    items = evaluation_set(args.questions, EVALUATION_SEED)
    report = measure(model, processor, items, baselines=("random", "pool"))
    lines = {
        "uncompressed": measure(plain, plain_processor, items, budgets=["full"]).row("full"),
        "VisToG": report.row("auto"),
        # of the same sizes
        "random groups": report.row("random beside auto"),
        "equal cells of a grid": report.row("pool beside auto"),
        # one view of the whole page has about as many patches as VisToG has tokens
        "smaller image": measure(plain, plain_processor, items, budgets=["full"], max_tiles=1).row("full"),
    }
    rows = [Measurement.of(name, row) for name, row in lines.items()]
    console.print(as_table(rows, args.questions))
    runs = {"uncompressed": (plain, plain_processor, "full"), "VisToG": (model, processor, "auto")}
    seconds = seconds_to_answer(runs, items[:: max(len(items) // 48, 1)][:48])
    kept = rows[1].accuracy["all"] / max(rows[0].accuracy["all"], 1e-9)
    saved = 1 - seconds["VisToG"] / seconds["uncompressed"]
    console.print(f"accuracy kept: paper {PAPER_KEPT:.1%}, here {kept:.2%}")
    console.print(f"time to answer saved: paper more than {PAPER_TIME_SAVED:.0%}, here {saved:.1%} ({seconds} s)")
    return {"rows": [vars(each) for each in rows], "seconds": seconds, "kept": kept, "time_saved": saved}


def main() -> None:
    parser = comparison_parser(__doc__, "vistog-tiny")
    parser.add_argument("--groups", type=int, default=8, help="semantic tokens per tile of 64 patches")
    parser.add_argument("--steps", type=int, nargs=3, default=(150, 500, 150), help="of the three rounds")
    run_comparison(parser, train, evaluate, uncompressed="uncompressed")


if __name__ == "__main__":
    main()
