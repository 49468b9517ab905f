"""Pages in bulk: a pool for training, a balanced evaluation set, records and files."""

import concurrent.futures
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from digit_forms.dataset import page_rng
from digit_forms.digits import check_split
from PIL import Image

from .pages import COLOURS, FIELD_SIZE, GRIDS, PAPERS, Page, draw_page
from .questions import EVALUATED_KINDS

KINDS = ("empty", "table", "box", "photo")
# what `patch_labels` says of a patch, and the number of classes
PATCH_LABELS = {
    "digit": 11,
    "kind": len(KINDS),
    "colour": 1 + len(COLOURS),
    "paper": len(PAPERS),
    "row": 4,
    "column": 4,
}


class EvaluationItem(NamedTuple):
    """One question about one page that occurs in no other item; `fields`: kinds of the page's fields, row by row."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    fields: tuple[str, ...]


def tile_page(page: Page) -> np.ndarray:
    """The fields of a page as uint8 `(num_tiles, 48, 48, 3)`: what the model's processor cuts."""
    pixels = np.asarray(page.image).reshape(page.rows, FIELD_SIZE, page.columns, FIELD_SIZE, 3)
    return pixels.swapaxes(1, 2).reshape(-1, FIELD_SIZE, FIELD_SIZE, 3)


def patch_labels(page: Page, patch_size: int) -> dict[str, np.ndarray]:
    """What each patch of each tile shows, int8 `(num_tiles, side, side)` by the keys of `PATCH_LABELS`.

    `digit`: 0 = none, 1 + digit; `colour`: 0 = none, 1 + index in `COLOURS`; `row`, `column`: the quarter of the tile.
    """
    side = FIELD_SIZE // patch_size
    labels = {name: np.zeros((len(page.fields), side, side), np.int8) for name in PATCH_LABELS}
    labels["paper"][:] = list(PAPERS).index(page.paper)
    labels["row"][:] = (np.arange(side) * 4 // side)[:, None]
    labels["column"][:] = np.arange(side) * 4 // side
    for tile, each in enumerate(page.fields):
        labels["kind"][tile] = KINDS.index(each.kind)
        if each.colour:
            labels["colour"][tile] = 1 + list(COLOURS).index(each.colour)
        for digit, area in zip(each.text, each.areas, strict=True):
            # a patch belongs to a digit if about half of it, each way, lies in the digit's rectangle; the narrowest
            # have one column
            x0, y0, x1, y1 = (round(edge / patch_size) for edge in area)
            labels["digit"][tile, y0:y1, x0 : max(x1, x0 + 1)] = 1 + int(digit)
    return labels


class PagePool:
    """Pages drawn once and kept as uint8 tiles: page `i` depends on `seed`, `split` and `i` only.

    Attributes: `tiles[i]` uint8 `(num_tiles, 48, 48, 3)`, `questions[i]`, `labels[i]` (see `patch_labels`) and
    `fields[i]`. `grids`, `num_tables` and `num_boxes` are those of `draw_page`; with `workers` above 1 so many
    processes draw.
    """

    def __init__(
        self,
        num_pages: int,
        split: str,
        seed: int = 0,
        patch_size: int = 12,
        workers: int = 0,
        grids: Sequence[tuple[int, int]] = GRIDS,
        num_tables: int | None = None,
        num_boxes: int | None = None,
    ) -> None:
        draw = functools.partial(_drawn, split, seed, patch_size, (num_tables, grids, num_boxes))
        if workers > 1:
            with concurrent.futures.ProcessPoolExecutor(workers) as processes:
                drawn = list(processes.map(draw, range(num_pages), chunksize=64))
        else:
            drawn = list(map(draw, range(num_pages)))
        self.tiles, self.questions, self.labels, self.fields = ([each[part] for each in drawn] for part in range(4))

    def __len__(self) -> int:
        return len(self.tiles)


def _drawn(split: str, seed: int, patch_size: int, drawing: tuple, index: int) -> tuple:
    page = draw_page(page_rng(seed, split, index), split, *drawing)
    return tile_page(page), page.questions, patch_labels(page, patch_size), page.fields


def evaluation_set(num_questions: int = 3000, seed: int = 1234, split: str = "test") -> list[EvaluationItem]:
    """Questions to measure a model by: one per page, one third of each kind.

    Dense questions need a table. The others are asked of pages that have one less often, so that of all pages a third
    has no table, a third one and a third two, as in training.
    """
    check_split(split)
    items = []
    for index in range(num_questions):
        rng, kind = page_rng(seed, split, index), EVALUATED_KINDS[index % len(EVALUATED_KINDS)]
        num_tables = int(rng.choice((1, 2) if kind == "dense" else (0, 0, 1, 2)))
        page = draw_page(rng, split, num_tables)
        topics = sorted({question.topic for question in page.questions if question.kind == kind})
        topic = topics[rng.integers(len(topics))]
        choices = [question for question in page.questions if question.topic == topic]
        question = choices[rng.integers(len(choices))]
        fields = tuple(each.kind for each in page.fields)
        items.append(EvaluationItem(page.image, question.text, question.answer, kind, fields))
    return items


def records_of(items: list[EvaluationItem]) -> list[dict[str, Any]]:
    """One record of `hf_vtc.evaluate` for each question."""
    return [
        {
            "id": f"page {idx}",
            "images": [item.image],
            "messages": [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}],
            "kind": item.kind,
        }
        for idx, item in enumerate(items)
    ]


def write_dataset(folder: str | Path, num_questions: int, split: str = "test", seed: int = 1234) -> Path:
    """Write an evaluation set as `<split>/00000.png` and so on and a LLaVA file `<split>.json`, which is returned."""
    folder, records = Path(folder), []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for index, item in enumerate(evaluation_set(num_questions, seed, split)):
        name = f"{split}/{index:05d}.png"
        item.image.save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{item.question}"}, {"from": "gpt", "value": item.answer}]
        records.append({"id": f"{split}-{index:05d}", "image": name, "kind": item.kind, "conversations": turns})
    path = folder / f"{split}.json"
    path.write_text(json.dumps(records, indent=1) + "\n")
    return path
