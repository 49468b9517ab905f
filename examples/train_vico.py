"""Make `model_cards/vico-tiny`: base model, consistency training, router training, evaluation, checkpoint folder.

    python examples/train_vico.py --output model_cards/vico-tiny                # everything
    python examples/train_vico.py --base base --output model_cards/vico-tiny    # from a base of train_base.py
    python examples/train_vico.py --evaluate model_cards/vico-tiny              # the numbers of the card

The two stages of ViCO (arXiv 2510.12793; InternVL3.5, arXiv 2508.18265) are those of `hf_vtc.trainers`. What the
papers leave open is chosen here: step counts and learning rates; one tile compressed at a time per loss ratio; the
percentile, which in the long run is the share of tiles that the router learns to compress. A short third round, ours,
gets the language model used to the tiles that the router chooses.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from digit_forms import (
    EVALUATED_KINDS,
    FIELD_SIZE,
    MAX_TILES,
    TOKENS_PER_TILE,
    draw_page,
    evaluation_set,
    page_rng,
)
from digit_forms.measure import Measurement, as_table, measure
from digit_forms.training import training_arguments
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

import hf_vtc
from hf_vtc.data import VtcCollator
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import VtcProcessor
from hf_vtc.trainers import VicoConsistencyTrainer, VicoRouterTrainer

# pages of the base model's training have seed 0, evaluation has 1234
CONSISTENCY_PAGES_SEED = 100
ROUTER_PAGES_SEED = 200
CALIBRATION_PAGES_SEED = 300
ADAPTATION_PAGES_SEED = 400
EVALUATION_SEED = 1234
BATCH_SIZE = 16


class PageDataset(torch.utils.data.Dataset):
    """Pages, each one conversation: questions of the evaluated kinds and descriptions of fields, in random order."""

    def __init__(self, num_pages: int, seed: int, max_questions: int):
        self.num_pages = num_pages
        self.seed = seed
        self.max_questions = max_questions

    def __len__(self) -> int:
        return self.num_pages

    def __getitem__(self, idx: int) -> dict:
        rng = page_rng(self.seed, "train", idx)
        page = draw_page(rng, "train")
        # descriptions say what is where, which moves when tiles shrink
        questions = [item for item in page.questions if item.kind in EVALUATED_KINDS or item.topic == "describe_field"]
        messages = []
        for choice in rng.permutation(len(questions))[: self.max_questions]:
            messages.append({"role": "user", "content": questions[choice].text})
            messages.append({"role": "assistant", "content": questions[choice].answer})
        return {"messages": messages, "images": [page.image]}


class ProgressLog(TrainerCallback):
    """Prints what the trainer logs, one line each time."""

    def __init__(self, console: Console, stage: str):
        self.console, self.stage = console, stage

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        shown = {name: round(float(value), 4) for name, value in logs.items() if isinstance(value, int | float)}
        self.console.print(f"{self.stage} {state.global_step}/{state.max_steps}: {shown}")


def build_processor(tokenizer) -> VtcProcessor:
    """The processor that cuts forms into their fields, thumbnail last."""
    image_processor = VtcImageProcessor(tiling="dynamic", size=FIELD_SIZE, max_tiles=MAX_TILES)
    return VtcProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)


def run_stage(trainer, console: Console, stage: str) -> None:
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(ProgressLog(console, stage))
    trainer.train()
    # which the trainer turns off
    trainer.model.config.use_cache = True
    trainer.model.eval()


def train_consistency(model, reference, processor, folder: Path, steps: int, seed: int, console: Console) -> None:
    """Stage 1, in place.

    Rates differ from page to page, so that almost fully compressed pages occur too: with an even chance for every tile
    the page's colour is lost as soon as no blank tile is left at full length. Tower and compressed connector learn
    more slowly than the rest. With one rate for all they come to read numbers from four tokens as well as from
    sixteen, and then nothing is left for a router to choose.
    """
    learning_rate = 8e-4
    slow = [*model.model.compressed_projector.parameters(), *model.model.vision_tower.parameters()]
    others = {id(parameter) for parameter in [*slow, *model.model.router.parameters()]}
    fast = [parameter for parameter in model.parameters() if id(parameter) not in others]
    optimizer = torch.optim.AdamW(
        [{"params": slow, "lr": learning_rate / 3}, {"params": fast, "lr": learning_rate}], weight_decay=0.01
    )
    trainer = VicoConsistencyTrainer(
        model,
        training_arguments(folder, steps, BATCH_SIZE, learning_rate, seed),
        reference_model=reference,
        compress_probability=(0.2, 1.0),
        train_dataset=PageDataset(steps * BATCH_SIZE, CONSISTENCY_PAGES_SEED + seed, max_questions=10),
        data_collator=VtcCollator(processor),
        optimizers=(optimizer, None),
    )
    run_stage(trainer, console, "consistency")


def adapt_to_router(model, reference, processor, folder: Path, steps: int, seed: int, console: Console) -> None:
    """Consistency training after stage 2, in place, with the tiles compressed that the router chooses (ours).

    Random choice hardly ever draws such pages. Tower and router, and with them the choice, stay as they are.
    """
    learning_rate = 5e-4
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("model.vision_tower.", "model.router."))
    ]
    trainer = VicoConsistencyTrainer(
        model,
        training_arguments(folder, steps, BATCH_SIZE, learning_rate, seed),
        reference_model=reference,
        compress_probability="auto",
        train_dataset=PageDataset(steps * BATCH_SIZE, ADAPTATION_PAGES_SEED + seed, max_questions=10),
        data_collator=VtcCollator(processor),
        optimizers=(torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01), None),
    )
    run_stage(trainer, console, "adaptation")


def train_router(model, reference, processor, folder: Path, steps: int, percentile: float, seed, console) -> None:
    """Stage 2, in place."""
    trainer = VicoRouterTrainer(
        model,
        training_arguments(folder / "router", steps, BATCH_SIZE, 1e-3, seed),
        reference_model=reference,
        probe="one_tile",
        percentile=percentile,
        train_dataset=PageDataset(steps * BATCH_SIZE, ROUTER_PAGES_SEED + seed, max_questions=12),
        data_collator=VtcCollator(processor),
    )
    run_stage(trainer, console, "router")


@torch.no_grad()
def calibrate(model, processor, saving: float) -> float:
    """The absolute threshold at which training pages lose `saving` of their visual tokens.

    The papers publish no thresholds. With the percentile of stage 2 most tiles are labelled "compress", so that all
    probabilities lie above one half: what the router has learned is their order.
    """
    pages = PageDataset(400, CALIBRATION_PAGES_SEED, max_questions=1)
    images = [pages[idx]["images"][0] for idx in range(len(pages))]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    p_compress = model.eval().model.router(model.model.encode(pixel_values)).softmax(-1)[:, 0]
    per_tile = 1 - model.config.compressed_seq_length / model.config.image_seq_length
    return round(float(torch.quantile(p_compress, 1 - saving / per_tile)), 4)


def evaluate(model, processor, num_questions: int, console: Console) -> list:
    """Measure, print, and return the four rows of the card; two stand beside `auto` and spend as many tokens."""
    items = evaluation_set(num_questions, EVALUATION_SEED)
    report = measure(model.eval(), processor, items, baselines=("random", "smaller"))
    points = {"random beside auto": "random tiles", "smaller beside auto": "smaller image"}
    rows = [Measurement.of(points.get(row.point, row.point), row) for row in report.rows]
    console.print(as_table(rows, num_questions))
    console.print(report.recommendation.sentence)
    return rows


def load(folder: str):
    """Model and processor of a checkpoint folder, in float32."""
    from transformers import AutoProcessor

    model = hf_vtc.AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="checkpoint folder to write")
    parser.add_argument("--base", type=Path, help="folder of train_base.py; trained first if not given")
    parser.add_argument("--work", type=Path, default=Path("outputs/vico-tiny"), help="trainer checkpoints and log")
    parser.add_argument("--consistency-steps", type=int, default=600)
    parser.add_argument("--router-steps", type=int, default=130)
    parser.add_argument("--adaptation-steps", type=int, default=300)
    parser.add_argument("--percentile", type=float, default=75.0, help="of past loss ratios, the router's threshold")
    parser.add_argument("--saving", type=float, default=0.51, help="share of visual tokens that `auto` shall save")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", metavar="FOLDER", help="only measure a finished checkpoint")
    args = parser.parse_args()
    console = Console()
    if args.evaluate:
        rows = evaluate(*load(args.evaluate), args.questions, console)
        console.print_json(json.dumps([vars(row) for row in rows]))
        return
    if args.output is None:
        parser.error("--output is needed, or --evaluate")

    args.work.mkdir(parents=True, exist_ok=True)
    if args.base is None:
        args.base = args.work / "base"
        script = Path(__file__).with_name("train_base.py")
        subprocess.run([sys.executable, script, "--output", args.base, "--seed", str(args.seed)], check=True)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    processor = build_processor(tokenizer)
    reference = hf_vtc.convert.from_base(args.base, "vico", dtype=torch.float32)
    model = hf_vtc.convert.from_base(args.base, "vico", dtype=torch.float32, flash_mode=True)
    train_consistency(
        model, reference, processor, args.work / "consistency", args.consistency_steps, args.seed, console
    )
    model.save_pretrained(args.work / "after_consistency", save_code=False)
    train_router(model, reference, processor, args.work, args.router_steps, args.percentile, args.seed, console)
    # the threshold belongs to the rounded weights, which are the ones that are shipped
    model.to(torch.bfloat16)
    model.config.flash_absolute_threshold = calibrate(model.float(), processor, args.saving)
    adapt_to_router(model, reference, processor, args.work / "adaptation", args.adaptation_steps, args.seed, console)
    model.requires_grad_(True).to(torch.bfloat16).save_pretrained(args.output, save_code=False)
    processor.save_pretrained(args.output, save_code=False)
    console.print(f"wrote {args.output}")
    # what is shipped is what is measured: the rounded weights
    evaluate(*load(str(args.output)), args.questions, console)


if __name__ == "__main__":
    main()
