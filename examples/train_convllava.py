"""Make `model_cards/convllava-tiny`: a ConvNeXt of five stages learns to see, then ConvLLaVA's three stages.

    python examples/train_convllava.py --output model_cards/convllava-tiny      # from model_cards/base-tiny
    python examples/train_convllava.py --evaluate model_cards/convllava-tiny    # the numbers of the card

Pages are enlarged four times, to a short side of 256 pixels: a field of a form becomes 128 x 128 pixels, four visual
tokens of stride 64. A page costs 24 or 32 tokens; a tower of stride 16 would give 16 times as many.

1. tower: ConvLLaVA starts from a ConvNeXt that CLIP trained. Here dense heads, which are thrown away, say for each
   small patch of the third stage's map and for each field of the last one what it shows.
2. the three stages of `hf_vtc.trainers.ConvllavaTrainer` with the language model of the shared base: the last stage of
   the tower and the projector; the last three, projector and language model; projector and language model. What trains
   is the paper's (arXiv 2405.15738, table 15); steps and learning rates fit a model of 1.7 M parameters.

About an hour on 2 CPU cores.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from digit_forms import (
    BOX_COLOURS,
    FIELD_SIZE,
    PATCH_LABELS,
    PATCH_SIZE,
    PagePool,
    evaluation_set,
    score,
)
from digit_forms.measure import Measurement, as_table, measure
from digit_forms.training import training_arguments
from rich.console import Console
from torch import nn
from train_base import HeldOutCheck
from train_base import answer_all as answer_by_base
from train_vico import EVALUATION_SEED, PageDataset, load, run_stage
from transformers import (
    AutoTokenizer,
    InternVLForConditionalGeneration,
    PrinterCallback,
    Trainer,
    set_seed,
)

from hf_vtc.data import VtcCollator
from hf_vtc.models.configuration_convllava import ConvllavaConfig
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.modeling_convllava import ConvllavaForConditionalGeneration, ConvNextTower
from hf_vtc.models.processing_vtc import VtcProcessor
from hf_vtc.trainers import ConvllavaTrainer

BASE = Path(__file__).resolve().parents[1] / "model_cards" / "base-tiny"
TOWER_PAGES_SEED = 0
# of stages 1, 2 and 3; evaluation has 1234
STAGE_PAGES_SEEDS = {1: 600, 2: 700, 3: 800}

WIDTHS, DEPTHS = [16, 32, 64, 128, 192], [1, 1, 3, 3, 1]
TOKEN_STRIDE = 64
ZOOM = 4
# every form is two fields wide or high
SHORT_SIDE = 2 * FIELD_SIZE * ZOOM
TOKENS_PER_FIELD_SIDE = FIELD_SIZE * ZOOM // TOKEN_STRIDE
# the stage of the tower in whose map a patch of `PATCH_LABELS` is one pixel
PATCH_STAGE = 2
PATCH_HEADS = ("digit", "place", "box_colour", "page_colour")
FIELD_HEADS = {"first": 11, "second": 11, "box_colour": 1 + len(BOX_COLOURS), "page_colour": 5, "row": 4, "column": 4}
BATCH_SIZE = 16
LEARNING_RATES = {1: 2e-3, 2: 1e-3, 3: 5e-4}
PAPER_FEWER_TOKENS = 16


def build_model(base: InternVLForConditionalGeneration) -> ConvllavaForConditionalGeneration:
    """An untrained tower and projector before the language model of the base."""
    vision = {
        "hidden_sizes": WIDTHS,
        "depths": DEPTHS,
        "image_size": SHORT_SIDE,
        "patch_size": TOKEN_STRIDE // 2 ** (len(DEPTHS) - 1),
        # trained from scratch, so blocks may matter from the start
        "layer_scale_init_value": 0.5,
    }
    config = ConvllavaConfig(
        vision,
        base.config.text_config.to_dict(),
        image_token_id=base.config.image_token_id,
        tie_word_embeddings=base.config.tie_word_embeddings,
    )
    model = ConvllavaForConditionalGeneration(config)
    for module in model.model.vision_tower.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # the spread of the language model's weights is too small for so narrow convolutions
            module.reset_parameters()
    model.model.language_model.load_state_dict(base.model.language_model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    model.generation_config = base.generation_config
    return model


def build_processor(tokenizer) -> VtcProcessor:
    """The processor that enlarges pages and keeps their aspect ratio."""
    image_processor = VtcImageProcessor(tiling="keep_aspect", size=SHORT_SIDE, token_stride=TOKEN_STRIDE)
    return VtcProcessor(
        image_processor, tokenizer, image_seq_length=(SHORT_SIDE // TOKEN_STRIDE) ** 2, count_rule="stride"
    )


class PageLabels:
    """Pages of a pool with what their patches and fields show.

    Args:
        pool (`PagePool`): its tiles are put together to pages again; thumbnails are left out.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, idx: int) -> dict:
        labels = {name: values[:-1] for name, values in self.pool.labels[idx].items()}
        # row and column of every field are those of the thumbnail's patches
        rows, columns = (int(self.pool.labels[idx][name][-1].max()) + 1 for name in ("row", "column"))
        tiles = self.pool.tiles[idx][:-1].reshape(rows, columns, FIELD_SIZE, FIELD_SIZE, 3)
        page = tiles.swapaxes(1, 2).reshape(rows * FIELD_SIZE, columns * FIELD_SIZE, 3)
        return {"page": page, "grid": (rows, columns), "patches": labels, "fields": field_labels(labels, columns)}


def field_labels(patches: dict[str, np.ndarray], columns: int) -> dict[str, np.ndarray]:
    """What each field shows, `(num_fields,)` int64 for each of `FIELD_HEADS`, from the labels of its patches.

    `first` and `second` are 0 for no such digit, else 1 + digit.
    """
    digit, place = patches["digit"], patches["place"]
    fields = {
        "first": np.where(np.isin(place, (1, 2)), digit, 0).max((1, 2)),
        "second": np.where(place == 3, digit, 0).max((1, 2)),
        "box_colour": patches["box_colour"][:, 0, 0],
        "page_colour": patches["page_colour"][:, 0, 0],
        "row": np.arange(len(digit)) // columns,
        "column": np.arange(len(digit)) % columns,
    }
    return {name: values.astype(np.int64) for name, values in fields.items()}


class PageCollator:
    """Batches of [`PageLabels`]: pixels grouped by the size of the page, and labels of all pages in that order."""

    def __init__(self, image_processor: VtcImageProcessor) -> None:
        self.image_processor = image_processor

    def __call__(self, examples: Sequence[dict]) -> dict:
        pixel_batches, ordered = [], []
        for grid in sorted({example["grid"] for example in examples}):
            members = [example for example in examples if example["grid"] == grid]
            pages = [example["page"] for example in members]
            pixel_batches.append(self.image_processor(pages, return_tensors="pt")["pixel_values"])
            ordered += members
        patches = {name: torch.cat([_as_map(each, name) for each in ordered]) for name in PATCH_HEADS}
        fields = {
            name: torch.cat([torch.from_numpy(each["fields"][name]) for each in ordered]) for name in FIELD_HEADS
        }
        return {"pixel_batches": pixel_batches, "patches": patches, "fields": fields}


def _as_map(example: dict, name: str) -> torch.Tensor:
    """Labels of a page's patches in the order of a map of the page, `(rows * 8 * columns * 8,)`."""
    rows, columns = example["grid"]
    side = FIELD_SIZE // PATCH_SIZE
    labels = torch.from_numpy(example["patches"][name]).long().view(rows, columns, side, side)
    return labels.transpose(1, 2).flatten()


class TowerReader(nn.Module):
    """The tower with heads for the patches of an inner map and for the fields of the last one."""

    def __init__(self, tower: ConvNextTower) -> None:
        super().__init__()
        self.tower = tower
        width, last = WIDTHS[PATCH_STAGE], WIDTHS[-1] * TOKENS_PER_FIELD_SIDE**2
        self.patch_norm, self.field_norm = nn.LayerNorm(width), nn.LayerNorm(last)
        self.patch_heads = nn.ModuleDict({name: nn.Linear(width, PATCH_LABELS[name]) for name in PATCH_HEADS})
        self.field_heads = nn.ModuleDict({name: nn.Linear(last, count) for name, count in FIELD_HEADS.items()})

    def logits(self, pixel_batches: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """For patches `(num_patches, classes)` and fields `(num_fields, classes)` of all pages, in their order."""
        maps = tuple(self.tower.embeddings(pixel_values) for pixel_values in pixel_batches)
        for stage_idx, stage in enumerate(self.tower.encoder.stages):
            maps = stage(*maps)
            if stage_idx == PATCH_STAGE:
                patches = self.patch_norm(torch.cat([each.flatten(2).transpose(1, 2).flatten(0, 1) for each in maps]))
        side = TOKENS_PER_FIELD_SIDE
        # (B, C, rows * side, columns * side) to the tokens of each field beside each other
        fields = [nn.functional.pixel_unshuffle(each, side).flatten(2).transpose(1, 2).flatten(0, 1) for each in maps]
        fields = self.field_norm(torch.cat(fields))
        return (
            {name: head(patches) for name, head in self.patch_heads.items()},
            {name: head(fields) for name, head in self.field_heads.items()},
        )

    def forward(
        self, pixel_batches: list[torch.Tensor], patches: dict[str, torch.Tensor], fields: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns `loss`: digits fully, the others a quarter each."""
        by_patch, by_field = self.logits(pixel_batches)
        losses = [_weighted(by_patch[name], labels, name) for name, labels in patches.items()]
        losses += [_weighted(by_field[name], labels, name) for name, labels in fields.items()]
        return {"loss": sum(losses)}


def _weighted(logits: torch.Tensor, labels: torch.Tensor, name: str) -> torch.Tensor:
    # most patches and fields hold no digit
    rare = name in ("digit", "place", "first", "second")
    weights = torch.ones(logits.shape[-1], device=logits.device)
    weights[0] = 0.2 if rare else 1.0
    share = 1.0 if name in ("digit", "first", "second") else 0.25
    return share * nn.functional.cross_entropy(logits, labels, weight=weights)


@torch.no_grad()
def field_accuracy(
    reader: TowerReader, examples: PageLabels, collate: PageCollator, num_pages: int
) -> dict[str, float]:
    """Share of the fields named right, for each head; for digits, of the fields that hold one."""
    reader.eval()
    right = {name: [] for name in FIELD_HEADS}
    for start in range(0, num_pages, 50):
        batch = collate([examples[idx] for idx in range(start, min(start + 50, num_pages))])
        _, by_field = reader.logits(batch["pixel_batches"])
        for name, labels in batch["fields"].items():
            concerned = labels > 0 if name in ("first", "second") else labels >= 0
            right[name].append((by_field[name].argmax(-1) == labels)[concerned])
    reader.train()
    return {name: round(torch.cat(values).float().mean().item(), 4) for name, values in right.items()}


def train_tower(model, image_processor, pool: PagePool, folder: Path, steps: int, seed: int, console: Console) -> None:
    """Phase 1, in place."""
    batch_size = 32
    reader, collate = TowerReader(model.model.vision_tower), PageCollator(image_processor)
    held_out = PageLabels(PagePool(200, "test", seed=seed + 1))
    args = training_arguments(
        folder,
        steps,
        batch_size,
        3e-3,
        seed,
        weight_decay=0.05,
        adam_beta2=0.98,
        warmup_steps=min(200, steps // 10),
        logging_steps=max(steps // 40, 1),
        save_strategy="no",
        remove_unused_columns=False,
    )
    every = max(steps // 8, 1)
    check = HeldOutCheck(console, every, lambda: field_accuracy(reader, held_out, collate, len(held_out)))
    trainer = Trainer(
        model=reader, args=args, train_dataset=PageLabels(pool), data_collator=collate, callbacks=[check]
    )
    trainer.pop_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    console.print(f"tower: {(time.perf_counter() - start) / steps:.2f} s per step of {batch_size} pages")


def train_stage(model, processor, folder: Path, stage: int, steps: int, seed: int, console: Console) -> None:
    """One of the paper's three stages, in place."""
    trainer = ConvllavaTrainer(
        model,
        training_arguments(folder / f"stage_{stage}", steps, BATCH_SIZE, LEARNING_RATES[stage], seed),
        stage=stage,
        train_dataset=PageDataset(steps * BATCH_SIZE, STAGE_PAGES_SEEDS[stage] + seed, max_questions=8),
        data_collator=VtcCollator(processor),
    )
    start = time.perf_counter()
    run_stage(trainer, console, f"stage {stage}")
    console.print(f"stage {stage}: {(time.perf_counter() - start) / steps:.2f} s per step of {BATCH_SIZE} pages")


def evaluate(folder: str | Path, base_folder: str | Path, num_questions: int, console: Console) -> dict:
    """Measure, print the table and the paper's claim beside it, and return both."""
    model, processor = load(str(folder))
    items = evaluation_set(num_questions, EVALUATION_SEED)
    base = InternVLForConditionalGeneration.from_pretrained(base_folder, dtype=torch.float32).eval()
    base_answers = answer_by_base(base, AutoTokenizer.from_pretrained(base_folder), items)
    # crops of one field each, and the thumbnail
    fields = [item.image.width * item.image.height // FIELD_SIZE**2 for item in items]
    base_tokens = base.config.image_seq_length * (float(np.mean(fields)) + 1)

    rows = [Measurement("ViT base", score(items, base_answers), base_tokens)]
    for name, size in (("ConvLLaVA", SHORT_SIDE), ("half the resolution", SHORT_SIDE // 2)):
        report = measure(model, processor, items, budgets=["full"], size={"height": size, "width": size})
        rows.append(Measurement.of(name, report.row("full")))
    console.print(as_table(rows, num_questions))
    stride_16 = float(np.mean(fields)) * (FIELD_SIZE * ZOOM // 16) ** 2
    facts = {
        "questions": num_questions,
        "rows": [vars(row) for row in rows],
        "claim_fewer_tokens": PAPER_FEWER_TOKENS,
        "fewer_tokens": stride_16 / rows[1].mean_tokens,
        "tokens_of_stride_16": stride_16,
        "keeps_accuracy": rows[1].accuracy["all"] >= rows[0].accuracy["all"],
    }
    console.print(
        f"paper: {PAPER_FEWER_TOKENS} times fewer tokens than a stride of 16 at the same resolution; 576 tokens read "
        "better than the 576 of LLaVA-1.5's ViT (arXiv 2405.15738, table 5: TextVQA 65.8 against 45.5)\n"
        f"here:  {rows[1].mean_tokens:.1f} tokens against {stride_16:.1f}, {facts['fewer_tokens']:.1f} times fewer; "
        f"accuracy {rows[1].accuracy['all']:.2%} against {rows[0].accuracy['all']:.2%} of the ViT base with "
        f"{base_tokens:.1f} tokens: {'kept' if facts['keeps_accuracy'] else 'NOT kept'}"
    )
    return facts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="checkpoint folder to write")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of train_base.py")
    parser.add_argument("--work", type=Path, default=Path("outputs/convllava-tiny"), help="trainer checkpoints")
    parser.add_argument("--pages", type=int, default=16000, help="pages of phase 1, drawn once")
    parser.add_argument("--tower-steps", type=int, default=2000, help="steps of phase 1, 32 pages each")
    parser.add_argument("--tower", type=Path, help="skip phase 1: the tower.pt that an earlier run left in --work")
    parser.add_argument("--steps", type=int, nargs=3, default=(200, 1000, 500), help="of stages 1, 2 and 3")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", metavar="FOLDER", help="only measure a finished checkpoint")
    arguments = parser.parse_args()
    if arguments.output is None and arguments.evaluate is None:
        parser.error("--output is needed, or --evaluate")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=119)
    if arguments.evaluate:
        facts = evaluate(arguments.evaluate, arguments.base, arguments.questions, console)
        console.print_json(json.dumps(facts))
        return
    start, seed = time.time(), arguments.seed
    set_seed(seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = InternVLForConditionalGeneration.from_pretrained(arguments.base, dtype=torch.float32)
    model, processor = build_model(base), build_processor(AutoTokenizer.from_pretrained(arguments.base))
    tower = model.model.vision_tower
    console.print(
        f"{model.num_parameters():,} parameters, {sum(p.numel() for p in tower.parameters()):,} in the tower"
    )
    tower_file = arguments.work / "tower.pt"
    if arguments.tower is None:
        pool = PagePool(arguments.pages, "train", TOWER_PAGES_SEED + seed)
        console.print(f"drew {len(pool)} pages in {time.time() - start:.0f} s")
        train_tower(model, processor.image_processor, pool, arguments.work, arguments.tower_steps, seed, console)
        torch.save(tower.state_dict(), tower_file)
    else:
        tower.load_state_dict(torch.load(arguments.tower, weights_only=True))
    for stage, steps in enumerate(arguments.steps, start=1):
        train_stage(model, processor, arguments.work, stage, steps, seed, console)
    model.requires_grad_(True).to(torch.bfloat16).save_pretrained(arguments.output, save_code=False)
    processor.save_pretrained(arguments.output, save_code=False)
    console.print(f"wrote {arguments.output} after {(time.time() - start) / 60:.1f} min")
    # what is shipped is what is measured: the rounded weights
    evaluate(arguments.output, arguments.base, arguments.questions, console)


if __name__ == "__main__":
    main()
