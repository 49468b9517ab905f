"""Train the base of the ledger models: a stock InternVL that reads pages of an account book.

    PYTHONPATH=examples python -m ledger.base --output outputs/ledger/base

Three phases, all plain `transformers.Trainer`: the tower alone on what each patch shows, through linear heads that are
thrown away; the projector, to name what a token shows in the words of the language model; then the language model on
questions, about pages of tables, of boxes, and whole ones. Tower and projector stay as they are from then on: trained
further they would pack a tile into few tokens, and nothing would be left to choose.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digit_forms.text import TOKENS_PER_TILE
from digit_forms.training import training_arguments
from rich.console import Console
from torch import nn
from train_base import OPTIMIZER, HeldOutCheck, PageCollator, collate_tiles
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    set_seed,
)

from .dataset import KINDS, PATCH_LABELS, PagePool
from .pages import COLOURS, FIELD_SIZE, GRIDS, MAX_TILES, PAPERS
from .questions import CELLS, EVALUATED_KINDS, Question
from .sizes import SIZES, TOKEN_SIDE, Size
from .text import build_tokenizer

TOWER_BATCH = 96
# as all tiny models, and a log that shows a run that does not learn
_OPTIMIZER = OPTIMIZER | {"logging_steps": 25}


@dataclass(frozen=True)
class Lesson:
    """What the language model learns on for a share of its steps: `grids`, `num_tables` and `num_boxes` of its pages,
    as in `draw_page`, and the kinds of question that it is asked."""

    share: float
    grids: Sequence[tuple[int, int]]
    num_tables: int | None
    num_boxes: int | None
    kinds: Sequence[str]


# a page that is one table, then two, boxes alone, then all. What else can be asked drowns a look-up that is not known
# yet: digits are then answered by how often they stand on the page
LESSONS = (
    Lesson(0.1, ((1, 1),), 1, 0, ("dense",)),
    Lesson(0.15, ((1, 2), (2, 1)), 2, 0, ("dense",)),
    Lesson(0.1, GRIDS, 0, MAX_TILES, ("sparse",)),
    Lesson(0.65, GRIDS, None, None, EVALUATED_KINDS),
)
# the words by which visual tokens name what they show: as questions and answers write them
NAMES = {
    "cell": [f" {colour}{cell}" for colour in COLOURS for cell in CELLS],
    "digit": list("0123456789"),
    "colour": [f" {colour}" for colour in COLOURS],
    "paper": list(PAPERS),
    "kind": ["no", "Table", "Box", "Photograph"],
}
# shares of tiles of each kind on which the tower learns
TILE_SHARES = {"table": 0.45, "box": 0.4, "photo": 0.05, "empty": 0.1}


def build_base(size: Size, tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
    """The untrained base model."""
    config = InternVLConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": size.tower_width,
            "num_hidden_layers": size.tower_layers,
            "num_attention_heads": size.tower_width // 16,
            "intermediate_size": 4 * size.tower_width,
            "image_size": [FIELD_SIZE, FIELD_SIZE],
            "patch_size": [size.patch_size, size.patch_size],
            "attention_bias": True,
            "norm_type": "layer_norm",
            # with a norm at the end, see below
            "use_mean_pooling": False,
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.05,
        },
        text_config={
            "model_type": "qwen3",
            "vocab_size": len(tokenizer),
            "hidden_size": size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.width // 32,
            "num_key_value_heads": max(size.width // 96, 1),
            "head_dim": 32,
            "intermediate_size": size.feed_forward,
            "max_position_embeddings": tokenizer.model_max_length,
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=size.patch_size / TOKEN_SIDE,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    # the tower's norm stays as it is, so that what patches show keeps one scale before and behind the projector's
    model.model.vision_tower.layernorm.requires_grad_(False)
    model.model.multi_modal_projector.layer_norm.requires_grad_(False)
    # transformers starts absolute positions at zero, where all patches look alike to the first layers
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.2)
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class TileDataset(torch.utils.data.Dataset):
    """Single tiles of a pool with their patch labels, kinds in the shares of `TILE_SHARES`."""

    def __init__(self, pool: PagePool, num_examples: int, seed: int) -> None:
        places: dict[str, list[tuple[int, int]]] = {kind: [] for kind in TILE_SHARES}
        for page, fields in enumerate(pool.fields):
            for tile, field in enumerate(fields):
                places[field.kind].append((page, tile))
        rng = np.random.default_rng(seed)
        kinds = rng.choice(list(TILE_SHARES), num_examples, p=list(TILE_SHARES.values()))
        self.index = [places[kind][rng.integers(len(places[kind]))] for kind in kinds]
        self.pool = pool

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        page, tile = self.index[i]
        return self.pool.tiles[page][tile], {name: self.pool.labels[page][name][tile] for name in PATCH_LABELS}


class TowerReader(nn.Module):
    """The vision tower with linear heads that say for every patch what it shows (see `patch_labels`)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in PATCH_LABELS.items()})

    def read(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `(B, patches, classes)` of every label."""
        patches = self.tower(pixel_values).last_hidden_state[:, 1:]
        return {name: head(patches) for name, head in self.heads.items()}

    def forward(self, pixel_values: torch.Tensor, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Labels are `(B, patches)`; returns `loss`: digits fully, the others a quarter each."""
        loss = 0
        for name, logits in self.read(pixel_values).items():
            weight = 1.0 if name == "digit" else 0.25
            loss = loss + weight * nn.functional.cross_entropy(logits.flatten(0, 1), labels[name].flatten())
        return {"loss": loss}


@torch.no_grad()
def patch_accuracy(reader: TowerReader, pool: PagePool, num_tiles: int = 256) -> dict[str, float]:
    """Share of the patches of `pool` named right by label; for digits, of the patches that hold one."""
    reader.eval()
    dataset = TileDataset(pool, num_tiles, 0)
    batch = collate_tiles([dataset[i] for i in range(num_tiles)])
    device, accuracy = reader.tower.device, {}
    for name, logits in reader.read(batch["pixel_values"].to(device)).items():
        labels = batch[name].to(device)
        concerned = labels > 0 if name == "digit" else labels >= 0
        accuracy[name] = round((logits.argmax(-1) == labels)[concerned].float().mean().item(), 4)
    reader.train()
    return accuracy


def run_trainer(trainer: Trainer) -> None:
    trainer.pop_callback(PrinterCallback)
    trainer.train()


def train_tower(model: nn.Module, pool: PagePool, folder: Path, size: Size, seed: int, console: Console) -> None:
    """Phase 1: teach the vision tower of `model`, in place, what is written in each patch."""
    reader, held_out = TowerReader(model.model.vision_tower), PagePool(100, "test", seed + 1, size.patch_size)
    args = training_arguments(
        folder, size.tower_steps, TOWER_BATCH, 2e-3, seed, save_strategy="no", bf16=size.bf16, **_OPTIMIZER
    )
    check = HeldOutCheck(console, max(size.tower_steps // 3, 1), lambda: patch_accuracy(reader, held_out))
    data = TileDataset(pool, size.tower_steps * TOWER_BATCH, seed)
    run_trainer(Trainer(model=reader, args=args, train_dataset=data, data_collator=collate_tiles, callbacks=[check]))


class ConnectorReader(nn.Module):
    """Projected visual tokens name what they show (see `words_of`) as the language model names words.

    The logit of a word is the product of token and embedding. What a question asks for and what a visual token shows
    are then the same vectors when the language model begins to learn, which shortens its way to looking things up.
    """

    def __init__(self, model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.model, self.side = model, FIELD_SIZE // TOKEN_SIDE
        self.words = {
            name: torch.tensor(tokenizer(words, add_special_tokens=False).input_ids).squeeze(1)
            for name, words in NAMES.items()
        }

    def forward(self, pixel_values: torch.Tensor, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Labels of patches are `(B, patches)`."""
        tokens = self.model.get_image_features(pixel_values=pixel_values)
        # transformers 4 returns the tokens themselves
        return {"loss": self.naming_loss(getattr(tokens, "pooler_output", tokens), labels)}

    def naming_loss(self, tokens: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of all names; paper and kind, which no question looks for in one token, count a quarter.

        A token has the labels of the first patch that it covers.
        """
        side = int(labels["row"].shape[1] ** 0.5)
        step = side // self.side
        shown = {name: each.unflatten(1, (side, side))[:, ::step, ::step].flatten() for name, each in labels.items()}
        colour, cell = shown["colour"] - 1, 4 * shown["row"] + shown["column"]
        targets = {
            # a table is asked for by colour and cell, a box by its colour; -1 is none
            "cell": torch.where(shown["kind"] == KINDS.index("table"), len(CELLS) * colour + cell, -1),
            "digit": shown["digit"] - 1,
            "colour": torch.where(shown["kind"] == KINDS.index("box"), colour, -1),
            "paper": shown["paper"],
            "kind": shown["kind"],
        }
        embeddings, loss = self.model.get_input_embeddings().weight, 0
        for name, target in targets.items():
            logits = tokens.flatten(0, -2) @ embeddings[self.words[name].to(tokens.device)].T
            weight = 0.25 if name in ("paper", "kind") else 1.0
            loss = loss + weight * nn.functional.cross_entropy(logits, target, ignore_index=-1)
        return loss


def train_connector(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    size: Size,
    seed: int,
    console: Console,
) -> None:
    """Phase 2: teach projector and word embeddings, in place, to name what a visual token shows."""
    model.requires_grad_(False)
    for part in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        part.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    args = training_arguments(
        folder, size.connector_steps, TOWER_BATCH, 3e-3, seed, save_strategy="no", bf16=size.bf16, **_OPTIMIZER
    )
    pool = PagePool(math.ceil(size.pages / 8), "train", seed + 100, size.patch_size, size.workers)
    data, check = TileDataset(pool, size.connector_steps * TOWER_BATCH, seed), HeldOutCheck(console, 10**9, dict)
    reader = ConnectorReader(model, tokenizer)
    run_trainer(Trainer(model=reader, args=args, train_dataset=data, data_collator=collate_tiles, callbacks=[check]))
    model.requires_grad_(True)


class LedgerCollator(PageCollator):
    """Pages as sequences of many questions of some kinds: all coarse and sparse ones, and every digit of one table.

    Many digits of one table matter more than many pages: looking one up out of sixteen starts from a gradient that
    only hundreds of such questions in a step lift out of the noise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pool: PagePool, seed: int, kinds: Sequence[str]) -> None:
        super().__init__(tokenizer, pool, seed, isolated_share=1.0)
        self.kinds = kinds

    def __call__(self, pages: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = super().__call__(pages)
        if "coarse" not in self.kinds:
            # the end of an answer, which needs no look-up, is left to whole pages
            batch["labels"][batch["labels"] == self.tokenizer.eos_token_id] = -100
        return batch

    def choose(self, questions: list[Question]) -> list[Question]:
        chosen = [question for question in questions if question.kind in self.kinds and question.kind != "dense"]
        tables = sorted({question.tile for question in questions if question.kind == "dense"})
        if tables:
            tile = tables[self.rng.integers(len(tables))]
            chosen += [question for question in questions if question.kind == "dense" and question.tile == tile]
        return [chosen[i] for i in self.rng.permutation(len(chosen))]


def train_language(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    size: Size,
    seed: int,
    console: Console,
) -> None:
    """Phase 3: train the language model, in place, to answer; tower and projector stay as they are."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    model.config.text_config.use_cache = False
    for place, lesson in enumerate(LESSONS):
        steps = math.ceil(lesson.share * size.steps)
        pages = min(steps * size.batch, math.ceil(lesson.share * size.pages))
        pool = PagePool(
            pages,
            "train",
            seed + place + 1,
            size.patch_size,
            size.workers,
            lesson.grids,
            lesson.num_tables,
            lesson.num_boxes,
        )
        args = training_arguments(
            folder,
            steps,
            size.batch,
            size.learning_rate,
            seed,
            save_strategy="no",
            bf16=size.bf16,
            # only the last lesson ends
            lr_scheduler_type="cosine" if place == len(LESSONS) - 1 else "constant_with_warmup",
            **_OPTIMIZER,
        )
        console.print(f"lesson {place + 1}: {len(pool)} pages")
        run_trainer(
            Trainer(
                model=model,
                args=args,
                train_dataset=range(len(pool)),
                data_collator=LedgerCollator(tokenizer, pool, seed, lesson.kinds),
                callbacks=[HeldOutCheck(console, 10**9, dict)],
            )
        )
    model.config.text_config.use_cache = True
    model.requires_grad_(True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--start", type=Path, help="go on from the weights of an earlier run")
    parser.add_argument("--tower", type=Path, help="start phase 2 from the tower that an earlier run saved here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    console, size, start = Console(width=119), SIZES[args.size], time.time()
    set_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_base(size, tokenizer)
    if args.start is not None:
        model.load_state_dict(InternVLForConditionalGeneration.from_pretrained(args.start).state_dict())
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    if args.tower is None:
        pool = PagePool(size.pages, "train", args.seed, size.patch_size, size.workers)
        console.print(f"drew {len(pool)} pages in {time.time() - start:.0f} s")
        train_tower(model, pool, args.output / "tower", size, args.seed, console)
        model.model.vision_tower.save_pretrained(args.output / "tower")
    else:
        tower = type(model.model.vision_tower).from_pretrained(args.tower)
        model.model.vision_tower.load_state_dict(tower.state_dict())
    train_connector(model, tokenizer, args.output / "connector", size, args.seed, console)
    train_language(model, tokenizer, args.output / "checkpoints", size, args.seed, console)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    console.print(f"saved to {args.output} after {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
