"""Pages in bulk: a pool for training, a balanced evaluation set, and LLaVA files for everybody else's loader."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .digits import check_split
from .pages import BOX_COLOURS, FIELD_SIZE, PAGE_COLOURS, PATCH_SIZE, Page, draw_page, tile_page
from .questions import EVALUATED_KINDS


class EvaluationItem(NamedTuple):
    """One question about one page that occurs in no other item."""

    image: Image.Image
    question: str
    answer: str
    kind: str


# what `patch_labels` says of a patch, and the number of classes
PATCH_LABELS = {"digit": 11, "place": 4, "box_colour": 1 + len(BOX_COLOURS), "page_colour": 5, "row": 4, "column": 4}
# label of a patch that the question does not concern, as in torch's cross-entropy
IGNORED = -100


def patch_labels(page: Page) -> dict[str, np.ndarray]:
    """What each patch of each tile of a page shows, thumbnail included.

    Returns:
        One int8 array `(num_tiles, 8, 8)` for each key of `PATCH_LABELS`:

        - `digit`: 0 = none, 1 + digit. Always none in the thumbnail, whose digits cannot be read.
        - `place`: 0 = no digit, 1 = the only digit of its number, 2 = the first of two, 3 = the second.
        - `box_colour`: 0 = the field is no box, 1 + index in `BOX_COLOURS`.
        - `page_colour`: index in `PAGE_COLOURS`.
        - `row`, `column`: of the field under the patch, in the thumbnail only; -100 in the crops, which cannot know.
    """
    side = FIELD_SIZE // PATCH_SIZE
    num_fields = page.rows * page.columns
    labels = {name: np.zeros((num_fields + 1, side, side), np.int8) for name in PATCH_LABELS}
    labels["page_colour"][:] = list(PAGE_COLOURS).index(page.colour)
    # a thumbnail patch shows the field under its centre
    centres = (np.arange(side) + 0.5) / side
    rows, columns = (centres * page.rows).astype(np.int8), (centres * page.columns).astype(np.int8)
    for name, values in (("row", rows[:, None]), ("column", columns[None, :])):
        labels[name][:num_fields] = IGNORED
        labels[name][-1] = values
    for box in page.boxes:
        tile = box.row * page.columns + box.column
        colour = 1 + list(BOX_COLOURS).index(box.colour)
        labels["box_colour"][tile] = colour
        labels["box_colour"][-1][np.ix_(rows == box.row, columns == box.column)] = colour
        field_left, field_top, _, _ = page.field_rectangle(box.row, box.column)
        places = (1,) if len(box.number) == 1 else (2, 3)
        for digit, place, (left, top, right, bottom) in zip(box.number, places, box.digit_areas, strict=True):
            # a patch belongs to a digit if about half of it, each way, lies in the digit's rectangle
            x0, x1 = round((left - field_left) / PATCH_SIZE), round((right - field_left) / PATCH_SIZE)
            y0, y1 = round((top - field_top) / PATCH_SIZE), round((bottom - field_top) / PATCH_SIZE)
            labels["digit"][tile, y0:y1, x0:x1] = 1 + int(digit)
            labels["place"][tile, y0:y1, x0:x1] = place
    return labels


class PagePool:
    """Pages drawn once and kept as uint8 tiles, so that a training loop never waits for drawing.

    Args:
        num_pages (`int`): pages to draw. A thousand take about 2 seconds and 24 MB.
        split (`str`): `"train"` or `"test"`.
        seed (`int`): page `i` depends on `seed`, `split` and `i` only, so a larger pool begins with the smaller one.

    Attributes: `tiles[i]` uint8 `(num_tiles, 32, 32, 3)`, `questions[i]` (list of [`Question`], transcription last)
    and `labels[i]` (see `patch_labels`).
    """

    def __init__(self, num_pages: int, split: str, seed: int = 0) -> None:
        check_split(split)
        self.split = split
        self.tiles, self.questions, self.labels = [], [], []
        for index in range(num_pages):
            page = draw_page(page_rng(seed, split, index), split)
            self.tiles.append(tile_page(page.image))
            self.questions.append(page.questions)
            self.labels.append(patch_labels(page))

    def __len__(self) -> int:
        return len(self.tiles)


def page_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Random generator of page `index`, independent of every other page, split and seed."""
    return np.random.default_rng([seed, ("train", "test").index(split), index])


def evaluation_set(num_questions: int = 3000, seed: int = 1234, split: str = "test") -> list[EvaluationItem]:
    """Questions to measure a model by: one per page, one third of each kind.

    Args:
        num_questions (`int`): number of pages and of questions.
        seed (`int`): same seed, same set. Choose one that no training pool has.
        split (`str`): `"test"` uses only digit samples that no training page shows.
    """
    check_split(split)
    items = []
    for index in range(num_questions):
        rng = page_rng(seed, split, index)
        page = draw_page(rng, split)
        kind = EVALUATED_KINDS[index % len(EVALUATED_KINDS)]
        topics = sorted({question.topic for question in page.questions if question.kind == kind})
        topic = topics[rng.integers(len(topics))]
        choices = [question for question in page.questions if question.topic == topic]
        question = choices[rng.integers(len(choices))]
        items.append(EvaluationItem(page.image, question.text, question.answer, kind))
    return items


def score(items: Sequence[EvaluationItem], predictions: Sequence[str]) -> dict[str, float]:
    """Share of exactly right answers, for each kind and over `"all"`; surrounding white space does not count."""
    if len(items) != len(predictions):
        raise ValueError(f"`predictions` must have one entry per item, got {len(predictions)} for {len(items)} items.")
    right = np.array([item.answer == text.strip() for item, text in zip(items, predictions, strict=True)])
    kinds = np.array([item.kind for item in items])
    return {kind: float(right[kinds == kind].mean()) for kind in EVALUATED_KINDS} | {"all": float(right.mean())}


def write_dataset(folder: str | Path, num_pages: int, split: str = "train", seed: int = 0) -> Path:
    """Write pages as PNG files and their questions as one LLaVA JSON file.

    Args:
        folder (`str` or `Path`): receives `<split>.json` and `<split>/00000.png` and so on.
        num_pages (`int`): pages to write.
        split (`str`): `"train"` or `"test"`.
        seed (`int`): as in [`PagePool`].

    Returns:
        Path of the JSON file: a list of `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`
        with image paths relative to `folder`. Every page is one conversation in random order; the transcription is
        last, so that it gives no other answer away.
    """
    check_split(split)
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(num_pages):
        rng = page_rng(seed, split, index)
        page = draw_page(rng, split)
        name = f"{split}/{index:05d}.png"
        page.image.save(folder / name)
        *questions, transcription = page.questions
        turns = []
        for question in [questions[i] for i in rng.permutation(len(questions))] + [transcription]:
            turns.append({"from": "human", "value": question.text})
            turns.append({"from": "gpt", "value": question.answer})
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append({"id": f"{split}-{index:05d}", "image": name, "conversations": turns})
    path = folder / f"{split}.json"
    path.write_text(json.dumps(records, indent=1) + "\n")
    return path
