"""Make `model_cards/avg-llava-tiny`: training at all granularities, router training, adaptation, checkpoint folder.

    python examples/train_avg_llava.py --output model_cards/avg-llava-tiny      # from model_cards/base-tiny
    python examples/train_avg_llava.py --evaluate model_cards/avg-llava-tiny    # the numbers of the card

Stages 3 and 4 of AVG-LLaVA (arXiv 2410.02745) are those of `hf_vtc.trainers`; its stages 1 and 2 are the base model.
The tiny base gives 16 tokens per tile, so that granularities are 16, 8, 4, 2 and 1. What is chosen here: step counts,
learning rates, one question per page in stage 4 (a page with questions of all kinds needs the finest granularity of
them), the tolerance within which losses count as equal, since nothing else in RGLF asks for fewer tokens, and a weight
of 1 for the cross-entropy: with the released 0.1 the router does not tell coarse questions from middling ones. A last
round, ours, tunes the language model at the granularities that the router chooses.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from digit_forms import EVALUATED_KINDS, draw_page, evaluation_set, page_rng
from digit_forms.measure import Measurement, as_table, measure
from digit_forms.training import save_rounded, training_arguments
from rich.console import Console
from train_vico import EVALUATION_SEED, PageDataset, build_processor, load, run_stage
from transformers import AutoTokenizer, set_seed

import hf_vtc
from hf_vtc.data import VtcCollator
from hf_vtc.trainers import AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer, VtcTrainer

# pages of the base model's training have seed 0, evaluation has 1234
GRANULARITY_PAGES_SEED = 600
ROUTER_PAGES_SEED = 700
ADAPTATION_PAGES_SEED = 800
SAME_PAGE_SEED = 1235
GRANULARITY_BATCH, ROUTER_BATCH = 16, 48
CE_LOSS_WEIGHT = 1.0
# the abstract: on AI2D, 85.3 % fewer visual tokens; the accuracy of most benchmarks rises
PAPER_FEWER_TOKENS = 0.853


class QuestionDataset(torch.utils.data.Dataset):
    """One question per page; kinds take turns, and topics of a kind are equally likely."""

    def __init__(self, num_pages: int, seed: int):
        self.num_pages = num_pages
        self.seed = seed

    def __len__(self) -> int:
        return self.num_pages

    def __getitem__(self, idx: int) -> dict:
        rng = page_rng(self.seed, "train", idx)
        page = draw_page(rng, "train")
        question = question_of_kind(page, EVALUATED_KINDS[idx % len(EVALUATED_KINDS)], rng)
        messages = [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": question.answer},
        ]
        return {"messages": messages, "images": [page.image]}


def question_of_kind(page, kind: str, rng: np.random.Generator):
    """A question of one kind about a page, its topic first."""
    topics = sorted({question.topic for question in page.questions if question.kind == kind})
    topic = topics[rng.integers(len(topics))]
    choices = [question for question in page.questions if question.topic == topic]
    return choices[rng.integers(len(choices))]


def train_granularities(
    model, processor, folder: Path, steps: int, learning_rate: float, seed: int, console: Console
) -> float:
    """Stage 3, in place, several questions per page; returns seconds per step."""
    trainer = AvgLlavaGranularityTrainer(
        model,
        training_arguments(folder / "granularities", steps, GRANULARITY_BATCH, learning_rate, seed),
        train_dataset=PageDataset(steps * GRANULARITY_BATCH, GRANULARITY_PAGES_SEED + seed, max_questions=4),
        data_collator=VtcCollator(processor),
    )
    return timed_stage(trainer, console, "granularities", steps)


def train_router(
    model, processor, folder: Path, steps: int, learning_rate: float, tolerance: float, seed: int, console: Console
) -> float:
    """Stage 4, in place; returns seconds per step."""
    trainer = AvgLlavaRouterTrainer(
        model,
        training_arguments(folder / "router", steps, ROUTER_BATCH, learning_rate, seed),
        loss_tolerance=tolerance,
        ce_loss_weight=CE_LOSS_WEIGHT,
        train_dataset=QuestionDataset(steps * ROUTER_BATCH, ROUTER_PAGES_SEED + seed),
        data_collator=VtcCollator(processor),
    )
    return timed_stage(trainer, console, "router", steps)


class RoutedTrainer(VtcTrainer):
    """Next-token loss at the granularities that the router chooses from the question alone, as labels tell it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Trainer switches the whole model to training mode; the router's choice shall be that of inference
        self.unwrap(model).model.router.eval()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def adapt_to_router(
    model, processor, folder: Path, steps: int, learning_rate: float, seed: int, console: Console
) -> float:
    """The round after stage 4, in place; tower and router stay as they are. Returns seconds per step."""
    model.requires_grad_(True)
    for frozen in (model.model.vision_tower, model.model.router):
        frozen.requires_grad_(False)
    trainer = RoutedTrainer(
        model,
        training_arguments(folder / "adaptation", steps, ROUTER_BATCH, learning_rate, seed),
        train_dataset=QuestionDataset(steps * ROUTER_BATCH, ADAPTATION_PAGES_SEED + seed),
        data_collator=VtcCollator(processor),
    )
    return timed_stage(trainer, console, "adaptation", steps)


def timed_stage(trainer, console: Console, stage: str, steps: int) -> float:
    start = time.perf_counter()
    run_stage(trainer, console, stage)
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def choices_on_same_pages(model, processor, num_pages: int) -> tuple[np.ndarray, np.ndarray]:
    """Granularity indices that the router chooses for a coarse and for a fine question about each of some pages."""
    chosen = {"coarse": [], "fine": []}
    for idx in range(num_pages):
        rng = page_rng(SAME_PAGE_SEED, "test", idx)
        page = draw_page(rng, "test")
        for kind, indices in chosen.items():
            chat = [{"type": "image"}, {"type": "text", "text": question_of_kind(page, kind, rng).text}]
            prompt = processor.apply_chat_template([{"role": "user", "content": chat}], add_generation_prompt=True)
            inputs = processor(text=[prompt], images=[[page.image]], return_tensors="pt")
            indices.append(int(model(**inputs, logits_to_keep=1).router_decisions))
    return np.array(chosen["coarse"]), np.array(chosen["fine"])


def evaluate(model, processor, num_questions: int, console: Console) -> dict:
    """Measure, print the table and the paper's claims beside it, and return all numbers."""
    items = evaluation_set(num_questions, EVALUATION_SEED)
    scales = model.config.vis_token_granularity
    report = measure(model, processor, items, baselines=("random", "fixed"))
    auto = [answer for (point, _), answer in report.answers.items() if point == "auto"]
    # tokens per tile that each image got, which no two granularities share
    chosen = np.array([scales.index(answer.tokens * scales[-1] // answer.reserved) for answer in auto])
    # the finest granularity is full length
    points = {"full": "full", "auto": "auto", "random beside auto": "random choice"}
    points |= {f"{scale} per tile": f"{scale} per tile" for scale in scales[:-1]}
    rows = [Measurement.of(name, report.row(point)) for point, name in points.items()]
    console.print(as_table(rows, num_questions))
    console.print(report.recommendation.sentence)

    fewer = {kind: 1 - report.row("auto").kinds[kind].share for kind in EVALUATED_KINDS}
    coarse, fine = choices_on_same_pages(model, processor, min(num_questions, 300))
    shares = {str(scale): float(np.mean(chosen == idx)) for idx, scale in enumerate(scales)}
    console.print(f"accuracy of auto: full {rows[0].accuracy['all']:.2%}, here {rows[1].accuracy['all']:.2%}")
    overall = 1 - rows[1].mean_tokens / rows[0].mean_tokens
    console.print(f"fewer visual tokens: goal 50 % overall, here {overall:.1%}")
    console.print(f"fewer on coarse questions: paper (AI2D) {PAPER_FEWER_TOKENS:.1%}, here {fewer['coarse']:.1%}")
    console.print(f"fewer on middling and fine questions: {fewer['middling']:.1%}, {fewer['fine']:.1%}")
    console.print(
        f"same page, coarse and fine question: {np.mean(fine > coarse):.1%} finer for the fine one, "
        f"{np.mean(fine < coarse):.1%} coarser; share of images at each granularity: {shares}"
    )
    return {
        "rows": [vars(each) for each in rows],
        "fewer_tokens": {"all": overall, **fewer},
        "same_page": {"finer": float(np.mean(fine > coarse)), "coarser": float(np.mean(fine < coarse))},
        "chosen": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="checkpoint folder to write")
    parser.add_argument("--base", type=Path, default=Path("model_cards/base-tiny"), help="folder of train_base.py")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/avg-llava-tiny"), help="trainer checkpoints and log"
    )
    parser.add_argument("--granularity-steps", type=int, default=1800, help="of stage 3")
    parser.add_argument("--router-steps", type=int, default=700, help="of stage 4")
    parser.add_argument("--adaptation-steps", type=int, default=200, help="of the last round")
    parser.add_argument("--learning-rates", type=float, nargs=3, default=(5e-4, 4e-3, 2e-4), help="of the rounds")
    parser.add_argument("--tolerance", type=float, default=0.0003, help="nats per token within which losses are equal")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage-3", type=Path, help="folder after stage 3, to train the router only")
    parser.add_argument("--evaluate", metavar="FOLDER", help="only measure a finished checkpoint")
    args = parser.parse_args()
    console = Console()
    if args.evaluate:
        console.print_json(json.dumps(evaluate(*load(args.evaluate), args.questions, console)))
        return
    if args.output is None:
        parser.error("--output is needed, or --evaluate")

    args.work.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    processor = build_processor(AutoTokenizer.from_pretrained(args.base))
    shared = (args.seed, console)
    if args.stage_3 is None:
        model = hf_vtc.convert.from_base(args.base, "avg_llava", dtype=torch.float32)
        seconds = train_granularities(
            model, processor, args.work, args.granularity_steps, args.learning_rates[0], *shared
        )
        console.print(f"stage 3: {seconds:.2f} s per step of {GRANULARITY_BATCH} pages")
        model.save_pretrained(args.work / "after_stage_3", save_code=False)
        processor.save_pretrained(args.work / "after_stage_3", save_code=False)
    else:
        model, _ = load(str(args.stage_3))
    seconds = train_router(
        model, processor, args.work, args.router_steps, args.learning_rates[1], args.tolerance, *shared
    )
    console.print(f"stage 4: {seconds:.2f} s per step of {ROUTER_BATCH} pages")
    model.save_pretrained(args.work / "after_stage_4", save_code=False)
    processor.save_pretrained(args.work / "after_stage_4", save_code=False)
    seconds = adapt_to_router(model, processor, args.work, args.adaptation_steps, args.learning_rates[2], *shared)
    console.print(f"adaptation: {seconds:.2f} s per step of {ROUTER_BATCH} pages")
    save_rounded(model, processor, args.output, console)
    # what is shipped is what is measured: the rounded weights
    console.print_json(json.dumps(evaluate(*load(str(args.output)), args.questions, console)))


if __name__ == "__main__":
    main()
