"""Make `model_cards/vistog-tiny`: two stages of VisToG, the uncompressed model beside it, and what both can do.

    python examples/train_vistog.py --output model_cards/vistog-tiny              # from model_cards/base-tiny
    python examples/train_vistog.py --evaluate model_cards/vistog-tiny --uncompressed outputs/vistog-tiny/uncompressed

VisToG (arXiv 2411.17773) compares with a model that gives every patch to the language model. The tiny base folds four
patches into one token, so that model has to be made as well: it gets a plain projector, the same stages and pages and
as many steps, without grouping. No recipe of the paper is public: all numbers below are chosen here.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from digit_forms import FIELD_SIZE, MAX_TILES, evaluation_set, score
from digit_forms.measure import MAX_ANSWER_TOKENS, Measurement, answer, as_table
from digit_forms.training import training_arguments
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
BATCH_SIZE = 16
PAPER_KEPT = 0.981
PAPER_TIME_SAVED = 0.27


def build_processor(tokenizer, image_seq_length: int) -> VtcProcessor:
    """The processor that cuts forms into their fields, thumbnail last."""
    image_processor = VtcImageProcessor(tiling="dynamic", size=FIELD_SIZE, max_tiles=MAX_TILES)
    return VtcProcessor(image_processor, tokenizer, image_seq_length=image_seq_length)


def train_stage(
    model, processor, folder: Path, stage: int, grouping: bool, steps: int, seed: int, console: Console
) -> float:
    """One stage, in place; returns seconds per step. New parts learn faster than the language model."""
    learning_rate = 2e-3 if stage == 1 else 1e-3
    base = model.model
    new = [base.semantic_tokens, base.grouping, base.multi_modal_projector]
    groups = [{"params": [each for part in new for each in part.parameters()], "lr": learning_rate}]
    if stage == 2:
        groups.append({"params": list(base.language_model.parameters()), "lr": learning_rate / 2})
    pages_seed = (ALIGNMENT_PAGES_SEED if stage == 1 else TUNING_PAGES_SEED) + seed
    trainer = VistogTrainer(
        model,
        training_arguments(folder / f"stage_{stage}", steps, BATCH_SIZE, learning_rate, seed),
        stage=stage,
        grouping=grouping,
        train_dataset=PageDataset(steps * BATCH_SIZE, pages_seed, max_questions=8),
        data_collator=VtcCollator(processor),
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.01), None),
    )
    start = time.perf_counter()
    run_stage(trainer, console, f"{'VisToG' if grouping else 'uncompressed'}, stage {stage}")
    return (time.perf_counter() - start) / steps


def train(
    base: Path, output: Path, work: Path, grouping: bool, num_groups: int, steps: tuple[int, int], seed, console
):
    """Both stages from the shared base, and the folder with the rounded weights."""
    set_seed(seed)
    model = hf_vtc.convert.from_base(base, "vistog", dtype=torch.float32, num_semantic_tokens=num_groups)
    processor = build_processor(AutoTokenizer.from_pretrained(base), model.config.image_seq_length)
    for stage, stage_steps in enumerate(steps, start=1):
        seconds = train_stage(model, processor, work, stage, grouping, stage_steps, seed, console)
        console.print(f"stage {stage}: {seconds:.2f} s per step of {BATCH_SIZE} pages")
    model.requires_grad_(True).to(torch.bfloat16).save_pretrained(output, save_code=False)
    processor.save_pretrained(output, save_code=False)
    console.print(f"wrote {output}")


def random_groups(model, counts: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Patches of each image shared out by lot, `(tiles, N)` per image: what the semantic tokens alone would carry."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    return [
        torch.randint(
            config.num_semantic_tokens,
            (count // config.num_semantic_tokens, config.image_seq_length),
            generator=generator,
        )
        for count in counts
    ]


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


def evaluate(vistog: str, uncompressed: str, num_questions: int, console: Console) -> dict:
    """Measure, print the table and the paper's claims beside it, and return both."""
    (model, processor), (plain, plain_processor) = load(vistog), load(uncompressed)
    items = evaluation_set(num_questions, EVALUATION_SEED)

    def row(name: str, result: tuple[list[str], list[int]]) -> Measurement:
        return Measurement(name, score(items, result[0]), float(np.mean(result[1])))

    grouped = answer(model, processor, items, budget="auto")
    rows = [
        row("uncompressed", answer(plain, plain_processor, items, budget="full")),
        row("VisToG", grouped),
        row("random groups", answer(model, processor, items, decisions=random_groups(model, grouped[1]))),
        # one view of the whole page has about as many patches as VisToG has tokens
        row("smaller image", answer(plain, plain_processor, items, budget="full", max_tiles=1)),
    ]
    console.print(as_table(rows, num_questions))
    runs = {"uncompressed": (plain, plain_processor, "full"), "VisToG": (model, processor, "auto")}
    seconds = seconds_to_answer(runs, items[:: max(len(items) // 48, 1)][:48])
    kept = rows[1].accuracy["all"] / max(rows[0].accuracy["all"], 1e-9)
    saved = 1 - seconds["VisToG"] / seconds["uncompressed"]
    console.print(f"accuracy kept: paper {PAPER_KEPT:.1%}, here {kept:.2%}")
    console.print(f"time to answer saved: paper more than {PAPER_TIME_SAVED:.0%}, here {saved:.1%} ({seconds} s)")
    return {"rows": [vars(each) for each in rows], "seconds": seconds, "kept": kept, "time_saved": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="checkpoint folder to write")
    parser.add_argument("--base", type=Path, default=Path("model_cards/base-tiny"), help="folder of train_base.py")
    parser.add_argument("--work", type=Path, default=Path("outputs/vistog-tiny"), help="trainer checkpoints and log")
    parser.add_argument("--groups", type=int, default=8, help="semantic tokens per tile of 64 patches")
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 800), help="of stage 1 and stage 2")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the evaluation")
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
        shared = (args.groups, tuple(args.steps), args.seed, console)
        train(args.base, args.output, args.work / "vistog_training", True, *shared)
        if args.uncompressed is None:
            args.uncompressed = args.work / "uncompressed"
            train(args.base, args.uncompressed, args.work / "uncompressed_training", False, *shared)
    # what is shipped is what is measured: the rounded weights
    measured = evaluate(str(args.evaluate or args.output), str(args.uncompressed), args.questions, console)
    console.print_json(json.dumps(measured))


if __name__ == "__main__":
    main()
