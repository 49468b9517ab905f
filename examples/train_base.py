"""Train the shared tiny base: a stock InternVL of 1.1 M parameters that reads forms filled in by hand.

    python examples/train_base.py --output base
    python examples/train_base.py --evaluate model_cards/base-tiny

The output is an ordinary transformers folder (`InternVLForConditionalGeneration`, tokenizer) in float32, from which
the compressed models are built. Two phases, both plain `transformers.Trainer`:

1. tower: the vision tower alone, supervised patch by patch through linear heads that are thrown away. Real
   vision-language models start from a pretrained tower too; without it the language loss needs many times the steps
   to discover that digits differ.
2. language: projector and language model on pages with about a dozen questions each, the tower frozen.

About 40 minutes on 2 CPU cores. Ends with the accuracy on held-out questions, one question per page.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from digit_forms import (
    FIELD_SIZE,
    PATCH_LABELS,
    PATCH_SIZE,
    TOKENS_PER_TILE,
    EvaluationItem,
    PagePool,
    Question,
    build_tokenizer,
    evaluation_set,
    format_prompt,
    score,
    tile_page,
)
from digit_forms.training import training_arguments
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
# share of batches whose questions do not see each other: evaluation asks one question, people ask several
ISOLATED_SHARE = 0.75
MAX_QUESTIONS = 12
MAX_ANSWER_TOKENS = 12
# of both phases, beside what all trainings share
OPTIMIZER = {"weight_decay": 0.05, "adam_beta2": 0.98, "logging_steps": 100, "remove_unused_columns": False}


def build_base(tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
    """The untrained base model: widths chosen so that with ViCO's additions it fits 4 MB in bfloat16."""
    config = InternVLConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": 80,
            "num_hidden_layers": 5,
            "num_attention_heads": 5,
            "intermediate_size": 320,
            "image_size": [FIELD_SIZE, FIELD_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "attention_bias": True,
            "norm_type": "layer_norm",
            "use_mean_pooling": True,
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.05,
        },
        text_config={
            "model_type": "qwen3",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 256,
            "max_position_embeddings": tokenizer.model_max_length,
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    # transformers starts absolute positions at zero, where all patches look alike to the first layers
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.2)
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def to_pixel_values(tiles: np.ndarray) -> torch.Tensor:
    """uint8 tiles `(T, 32, 32, 3)` to normalised float32 `(T, 3, 32, 32)`."""
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


class TileDataset(torch.utils.data.Dataset):
    """Single tiles of a pool with their patch labels, in the shares numbers 60 %, thumbnails 25 %, the rest 15 %."""

    def __init__(self, pool: PagePool, num_examples: int, seed: int) -> None:
        numbers, thumbnails, rest = [], [], []
        for page, labels in enumerate(pool.labels):
            for tile, has_digit in enumerate(labels["digit"].any((1, 2))):
                is_thumbnail = tile == len(labels["digit"]) - 1
                (thumbnails if is_thumbnail else numbers if has_digit else rest).append((page, tile))
        rng = np.random.default_rng(seed)
        groups = [np.array(numbers), np.array(thumbnails), np.array(rest)]
        kinds = rng.choice(3, num_examples, p=(0.6, 0.25, 0.15))
        self.index = np.stack([groups[kind][rng.integers(len(groups[kind]))] for kind in kinds])
        self.pool = pool

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        page, tile = self.index[i]
        return self.pool.tiles[page][tile], {name: self.pool.labels[page][name][tile] for name in PATCH_LABELS}


def collate_tiles(examples: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]) -> dict[str, torch.Tensor]:
    """Batch of [`TileDataset`] examples as inputs of [`TowerReader`]: each label is `(B, patches)`."""
    batch = {"pixel_values": to_pixel_values(np.stack([tile for tile, _ in examples]))}
    for name in examples[0][1]:
        batch[name] = torch.from_numpy(np.stack([labels[name] for _, labels in examples])).long().flatten(1)
    return batch


class TowerReader(nn.Module):
    """The vision tower with linear heads that say for every patch what it shows (see `patch_labels`)."""

    def __init__(self, tower: PreTrainedModel) -> None:
        super().__init__()
        self.tower = tower
        self.norm = nn.LayerNorm(tower.config.hidden_size)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(tower.config.hidden_size, count) for name, count in PATCH_LABELS.items()}
        )

    def forward(self, pixel_values: torch.Tensor, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Labels are `(B, 64)`; returns `loss`: digits fully, the others a quarter each."""
        patches = self.norm(self.tower(pixel_values).last_hidden_state[:, 1:])  # (B, 64, C)
        logits = {name: self.heads[name](patches) for name in labels}
        losses = {}
        for name, values in labels.items():
            # most patches hold no digit
            weights = torch.ones(PATCH_LABELS[name], device=values.device)
            weights[0] = 0.2 if name in ("digit", "place") else 1.0
            losses[name] = nn.functional.cross_entropy(logits[name].flatten(0, 1), values.flatten(), weight=weights)
        others = sum(loss for name, loss in losses.items() if name != "digit")
        return {"loss": losses["digit"] + 0.25 * others}


@torch.no_grad()
def patch_accuracy(reader: TowerReader, pool: PagePool, seed: int = 0, num_tiles: int = 1024) -> dict[str, float]:
    """Share of the patches of `pool` named right, for each kind of label; for digits, of the patches that hold one."""
    reader.eval()
    dataset = TileDataset(pool, num_tiles, seed)
    batch = collate_tiles([dataset[i] for i in range(num_tiles)])
    batch = {name: values.to(reader.norm.weight.device) for name, values in batch.items()}
    patches = reader.norm(reader.tower(batch["pixel_values"]).last_hidden_state[:, 1:])
    accuracy = {}
    for name, head in reader.heads.items():
        concerned = batch[name] > 0 if name in ("digit", "place") else batch[name] >= 0
        right = head(patches).argmax(-1) == batch[name]
        accuracy[name] = round(right[concerned].float().mean().item(), 4)
    reader.train()
    return accuracy


class PageCollator:
    """Turn pages into padded sequences with several questions each.

    In a share of the batches, by default three of four, the questions of a page do not see each other (block-wise
    attention, positions restart after the image), so that each is trained as the first turn that evaluation asks. In
    the others they form one dialogue. Loss falls on the answers and on `<|im_end|>`; the transcription comes last.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pool: PagePool,
        seed: int,
        isolated_share: float = ISOLATED_SHARE,
    ) -> None:
        self.tokenizer = tokenizer
        self.isolated_share = isolated_share
        self.pool = pool
        self.rng = np.random.default_rng(seed)
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the few hundred texts of the data set are tokenized once."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def choose(self, questions: list[Question]) -> list[Question]:
        """At most `MAX_QUESTIONS` questions in random order, then the transcription."""
        *others, transcription = questions
        order = self.rng.permutation(len(others))[:MAX_QUESTIONS]
        return [others[i] for i in order] + [transcription]

    def sequence(self, page: int, isolated: bool) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, labels, segments (0 = seen by all that follow) and positions of one page."""
        question = "?"
        prompt = format_prompt(question, len(self.pool.tiles[page]))
        ids = list(self.encode(prompt[: prompt.index("</img>") + len("</img>")]))
        labels, segments, positions = [-100] * len(ids), [0] * len(ids), list(range(len(ids)))
        prefix = len(ids)
        questions = self.choose(self.pool.questions[page])
        if not isolated:
            questions = questions[-int(self.rng.integers(1, len(questions) + 1)) :]
        for turn, question in enumerate(questions):
            opening = "\n" if isolated or turn == 0 else "<|im_start|>user\n"
            asked = self.encode(f"{opening}{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answered = self.encode(f"{question.answer}<|im_end|>")
            closing = self.encode("\n")
            start = prefix if isolated else len(ids)
            length = len(asked) + len(answered) + len(closing)
            ids += asked + answered + closing
            labels += [-100] * len(asked) + answered + [-100] * len(closing)
            segments += [turn + 1 if isolated else 0] * length
            positions += range(start, start + length)
        return ids, labels, segments, positions

    def __call__(self, pages: Sequence[int]) -> dict[str, torch.Tensor]:
        isolated = bool(self.rng.random() < self.isolated_share)
        rows = [self.sequence(page, isolated) for page in pages]
        length = max(len(ids) for ids, *_ in rows)
        fillers = (self.tokenizer.pad_token_id, -100, -1, 0)
        columns = [
            torch.tensor([part + [filler] * (length - len(part)) for part in parts])
            for parts, filler in zip(zip(*rows, strict=True), fillers, strict=True)
        ]
        input_ids, labels, segments, positions = columns
        # a token sees itself, the image, and what came before it in its own question
        same = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
        mask = same & torch.ones(length, length, dtype=torch.bool).tril()
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": mask[:, None],
            "position_ids": positions,
            "pixel_values": to_pixel_values(np.concatenate([self.pool.tiles[page] for page in pages])),
        }


@torch.no_grad()
def answer_all(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[EvaluationItem],
    batch_size: int = 100,
) -> list[str]:
    """Greedy answers of an uncompressed model, one question per image."""
    answers = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        tiles = [tile_page(item.image) for item in batch]
        prompts = [format_prompt(item.question, len(cut)) for item, cut in zip(batch, tiles, strict=True)]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False).to(model.device)
        generated = model.generate(
            **inputs,
            pixel_values=to_pixel_values(np.concatenate(tiles)).to(model.device),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
        )
        answers += tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def evaluate(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    num_questions: int,
    seed: int = 1234,
    console: Console | None = None,
) -> dict[str, float]:
    """Accuracy on held-out questions, by kind and over all; printed as a table if a console is given."""
    training = model.training
    model.eval()
    items = evaluation_set(num_questions, seed)
    accuracy = score(items, answer_all(model, tokenizer, items))
    model.train(training)
    if console is not None:
        table = Table("kind", "questions", "accuracy", title="held-out questions, all visual tokens, greedy")
        for kind, value in accuracy.items():
            count = sum(item.kind == kind or kind == "all" for item in items)
            table.add_row(kind, str(count), f"{value:.2%}")
        console.print(table)
    return accuracy


class HeldOutCheck(TrainerCallback):
    """Every `every` steps, call `measure` and print what it returns."""

    def __init__(self, console: Console, every: int, measure) -> None:
        self.console, self.every, self.measure = console, every, measure
        self.start = time.time()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            minutes = (time.time() - self.start) / 60
            self.console.print(f"step {state.global_step}: loss {float(logs['loss']):.4f}, {minutes:.1f} min")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self.console.print(f"step {state.global_step}: held out {self.measure()}")


def train_tower(
    model: InternVLForConditionalGeneration, pool: PagePool, folder: Path, steps: int, seed: int, console: Console
) -> None:
    """Phase 1: teach the vision tower of `model`, in place, what is written in each patch."""
    batch_size = 128
    reader = TowerReader(model.model.vision_tower)
    held_out = PagePool(400, "test", seed=seed + 1)
    warmup = min(200, steps // 10)
    args = training_arguments(
        folder, steps, batch_size, 2e-3, seed, warmup_steps=warmup, save_strategy="no", **OPTIMIZER
    )
    check = HeldOutCheck(console, 250, lambda: patch_accuracy(reader, held_out))
    trainer = Trainer(
        model=reader,
        args=args,
        train_dataset=TileDataset(pool, steps * batch_size, seed),
        data_collator=collate_tiles,
        callbacks=[check],
    )
    trainer.pop_callback(PrinterCallback)
    trainer.train()


def train_language(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: PagePool,
    folder: Path,
    steps: int,
    seed: int,
    console: Console,
) -> None:
    """Phase 2: train projector and language model, in place, to answer; the tower stays as it is."""
    batch_size = 8
    model.model.vision_tower.requires_grad_(False)
    warmup = min(200, steps // 10)
    args = training_arguments(
        folder, steps, batch_size, 2e-3, seed, warmup_steps=warmup, save_steps=500, save_only_model=True, **OPTIMIZER
    )

    def measure() -> dict[str, float]:
        model.config.text_config.use_cache = True
        accuracy = evaluate(model, tokenizer, 300, seed=seed + 1)
        model.config.text_config.use_cache = False
        return {kind: round(value, 3) for kind, value in accuracy.items()}

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=range(len(pool)),
        data_collator=PageCollator(tokenizer, pool, seed),
        callbacks=[HeldOutCheck(console, 250, measure)],
    )
    trainer.pop_callback(PrinterCallback)
    model.config.text_config.use_cache = False
    trainer.train()
    model.config.text_config.use_cache = True
    model.model.vision_tower.requires_grad_(True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the trained model")
    parser.add_argument("--evaluate", metavar="FOLDER", help="only measure a finished model")
    parser.add_argument("--pages", type=int, default=16000, help="training pages, drawn once")
    parser.add_argument("--tower-steps", type=int, default=2000, help="steps of phase 1, 128 tiles each")
    parser.add_argument("--steps", type=int, default=2500, help="steps of phase 2, 8 pages each")
    parser.add_argument("--tower", type=Path, help="start phase 2 from the tower that an earlier run saved here")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the final evaluation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output is None and args.evaluate is None:
        parser.error("--output is needed, or --evaluate")
    return args


def main() -> None:
    args = parse_arguments()
    console = Console(width=119)
    if args.evaluate:
        model = InternVLForConditionalGeneration.from_pretrained(args.evaluate, dtype=torch.float32)
        evaluate(model, AutoTokenizer.from_pretrained(args.evaluate), args.questions, console=console)
        return
    set_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_base(tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    start = time.time()
    pool = PagePool(args.pages, "train", args.seed)
    console.print(f"drew {len(pool)} pages in {time.time() - start:.0f} s")

    tower_folder = args.output / "tower"
    if args.tower is None:
        train_tower(model, pool, tower_folder, args.tower_steps, args.seed, console)
        model.model.vision_tower.save_pretrained(tower_folder)
    else:
        tower = type(model.model.vision_tower).from_pretrained(args.tower)
        model.model.vision_tower.load_state_dict(tower.state_dict())
    train_language(model, tokenizer, pool, args.output / "checkpoints", args.steps, args.seed, console)

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    accuracy = evaluate(model, tokenizer, args.questions, console=console)
    report = {"seed": args.seed, "steps": args.steps, "questions": args.questions, "accuracy": accuracy}
    (args.output / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"saved to {args.output} after {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
