"""What compression costs: accuracy per kind of question at full length, at the method's choice, and at two baselines
that spend as many visual tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

from .dataset import EvaluationItem, score
from .questions import EVALUATED_KINDS

MAX_ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Measurement:
    """Accuracy by kind (and `"all"`) with `mean_tokens` visual tokens per image."""

    name: str
    accuracy: dict[str, float]
    mean_tokens: float

    @classmethod
    def of(cls, name: str, items: Sequence[EvaluationItem], result: tuple[list[str], list[int]]) -> "Measurement":
        """From what `answer` gives for `items`."""
        answers, counts = result
        return cls(name, score(items, answers), float(np.mean(counts)))


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[EvaluationItem],
    images: Sequence[Image.Image] | None = None,
    decisions: Sequence[torch.Tensor] | None = None,
    budget: str | float | int | None = None,
    batch_size: int = 100,
    **image_options: int,
) -> tuple[list[str], list[int]]:
    """Greedy answers, one question per image, and the visual tokens that each image kept.

    Args:
        images (*optional*): in place of those of `items`.
        decisions (*optional*): per image `(tiles,)`, True = compress, in place of the router's.
        budget (*optional*): `vtc_budget`.
        image_options: passed to the image processor, such as `max_tiles`.
    """
    images = [item.image for item in items] if images is None else images
    answers, counts = [], []
    for start in range(0, len(items), batch_size):
        batch = slice(start, start + batch_size)
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
            for item in items[batch]
        ]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(
            text=prompts,
            images=[[image] for image in images[batch]],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **image_options,
        )
        inputs["image_features"] = model.model.encode(inputs.pop("pixel_values"))
        override = {"vtc_budget": budget} if decisions is None else {"router_decisions": torch.cat(decisions[batch])}
        counts += model.count_visual_tokens(**inputs, **override).tolist()
        out = model.generate(**inputs, **override, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers, counts


def measure(
    model: PreTrainedModel, processor: ProcessorMixin, items: Sequence[EvaluationItem], seed: int = 0
) -> list[Measurement]:
    """Four rows: `full`, `auto`, and at the mean token count of `auto`, image by image, the baselines `random tiles`
    (as many tiles compressed, chosen at random) and `smaller image` (fewer tiles, none compressed)."""

    rng = np.random.default_rng(seed)
    full = answer(model, processor, items, budget="full")
    auto = answer(model, processor, items, budget="auto")
    config = model.config
    saved = config.image_seq_length - config.compressed_seq_length
    decisions = []
    for reserved, kept in zip(full[1], auto[1], strict=True):
        compress = torch.zeros(reserved // config.image_seq_length, dtype=torch.bool)
        compress[rng.permutation(len(compress))[: (reserved - kept) // saved]] = True
        decisions.append(compress)
    randomly = answer(model, processor, items, decisions=decisions)
    smaller = _smaller_images(model, processor, items, auto[1], rng)
    results = {"full": full, "auto": auto, "random tiles": randomly, "smaller image": smaller}
    return [Measurement.of(name, items, result) for name, result in results.items()]


def _smaller_images(model, processor, items, allowed: Sequence[int], rng) -> tuple[list[str], list[int]]:
    """Answers from images cut into fewer tiles, so that each image's expected token count is `allowed`."""
    options = list(range(1, processor.image_processor.max_tiles + 1))
    chosen = []
    for item, count in zip(items, allowed, strict=True):
        width, height = item.image.size
        reserved = {max_tiles: processor.reserved_tokens(height, width, max_tiles=max_tiles) for max_tiles in options}
        below = max((n for n in reserved.values() if n <= count), default=min(reserved.values()))
        above = min((n for n in reserved.values() if n > count), default=below)
        share = 0.0 if above == below else (count - below) / (above - below)
        wanted = above if rng.random() < share else below
        chosen.append(next(max_tiles for max_tiles in options if reserved[max_tiles] == wanted))
    answers, counts = [""] * len(items), [0] * len(items)
    for max_tiles in sorted(set(chosen)):
        members = [idx for idx, option in enumerate(chosen) if option == max_tiles]
        found = answer(model, processor, [items[idx] for idx in members], budget="full", max_tiles=max_tiles)
        for idx, text, count in zip(members, *found, strict=True):
            answers[idx], counts[idx] = text, count
    return answers, counts


def as_table(rows: Sequence[Measurement], num_questions: int) -> Table:
    """The measurements as a table; the last column compares with `full`."""
    table = Table(title=f"{num_questions} held-out questions, one per page, greedy")
    for column in ("", *EVALUATED_KINDS, "all", "visual tokens", "fewer", "of full accuracy"):
        table.add_column(column, justify="left" if column == "" else "right")
    full = rows[0]
    for row in rows:
        accuracies = [f"{row.accuracy[kind]:.2%}" for kind in (*EVALUATED_KINDS, "all")]
        fewer = 1 - row.mean_tokens / full.mean_tokens
        share = row.accuracy["all"] / max(full.accuracy["all"], 1e-9)
        table.add_row(row.name, *accuracies, f"{row.mean_tokens:.1f}", f"{fewer:.1%}", f"{share:.2%}")
    return table
