"""Draw a page of an account book: fields of uneven density on tinted paper.

A field is exactly one tile of InternVL's dynamic tiling. A *table* (dense) holds 4 x 4 printed digits, a *box*
(sparse) one large digit, printed or handwritten; the others show a crop of a photograph or nothing.
Content is random, so that no language model can guess it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from digit_forms.digits import check_split, load_split, render_digit, samples_by_class
from digit_forms.pages import AUGMENTATION, BOX_COLOURS, PAGE_COLOURS, blend, jitter_colour
from PIL import Image

from .fonts import SHAPES, fonts_of, printed_digit
from .photos import SUBJECTS, photo_crop
from .questions import CELLS, Question, ask

FIELD_SIZE = 48
# (rows, columns): six tiles each
GRIDS = ((2, 3), (3, 2))
MAX_TILES = 6
# rows and columns of digits in a table
TABLE_SIDE = 4
# how many boxes a page has, each as likely as the others
BOX_COUNTS = (1, 2)
PHOTO_SHARE = 0.5
# pixels per em of what is printed in a box
BOX_SIZES = (36, 38, 40, 42, 44, 46)
# of boxes; more of them in training, since a handwritten digit is harder to learn than a print
HANDWRITTEN_SHARE = {"train": 0.4, "test": 0.1}

PAPERS, COLOURS = PAGE_COLOURS, BOX_COLOURS
INK = (20, 20, 28)


@dataclass(frozen=True)
class Field:
    """What a field shows: `kind` is `"empty"`, `"table"`, `"box"` or `"photo"`; `colour` that of a
    table or box; `text` its digits, row by row; `areas` the pixels (left, top, right, bottom) of each digit within the
    field; `sources` the font of a print, the samples of a handwritten number, or the subject of a photograph."""

    kind: str = "empty"
    colour: str = ""
    text: str = ""
    areas: tuple[tuple[int, int, int, int], ...] = ()
    sources: tuple = ()


@dataclass(frozen=True)
class Page:
    """A drawn page: RGB `image`, its `fields` row by row, and what can be asked."""

    image: Image.Image
    questions: list[Question]
    rows: int
    columns: int
    paper: str
    fields: list[Field] = field(default_factory=list)

    @property
    def num_tables(self) -> int:
        return sum(each.kind == "table" for each in self.fields)


def field_bits(kind: str) -> float:
    """log2 of the number of equally likely contents of a field about which some question may ask.

    Colours count as drawn independently, an upper bound. The paper's colour, which every field shows, is left out.
    """
    colour, digit = math.log2(len(COLOURS)), math.log2(10)
    return {"table": colour + TABLE_SIDE**2 * digit, "box": colour + digit, "photo": 1.0, "empty": 1.0}[kind]


def draw_table(rng: np.random.Generator, canvas: np.ndarray, colour: str, split: str) -> Field:
    """4 x 4 digits of one font on a tinted ground; a digit stays within its quarter of each side."""
    fonts, pitch = fonts_of(split), FIELD_SIZE // TABLE_SIDE
    font, size = fonts[rng.integers(len(fonts))], int(rng.integers(11, 14))
    canvas[1:-1, 1:-1] += 0.35 * (jitter_colour(rng, COLOURS[colour], 8) - canvas[1:-1, 1:-1])
    text, areas = "", []
    for row in range(TABLE_SIDE):
        for column in range(TABLE_SIDE):
            text += str(rng.integers(10))
            shape = SHAPES[split][rng.integers(len(SHAPES[split]))]
            alpha = printed_digit(font, size, text[-1], shape)[: pitch - 1, : pitch - 1]
            height, width = alpha.shape
            top = row * pitch + int(rng.integers(1, max(2, pitch - height)))
            left = column * pitch + int(rng.integers(1, max(2, pitch - width)))
            blend(canvas[top : top + height, left : left + width], np.float32(INK), alpha)
            areas.append((column * pitch, row * pitch, (column + 1) * pitch, (row + 1) * pitch))
    return Field("table", colour, text, tuple(areas), (font,))


def draw_box(rng: np.random.Generator, canvas: np.ndarray, colour: str, split: str) -> Field:
    """A coloured frame around one large digit, printed or handwritten."""
    frame, shade = int(rng.integers(2, 4)), jitter_colour(rng, COLOURS[colour], 8)
    for edge in (canvas[:frame], canvas[-frame:], canvas[:, :frame], canvas[:, -frame:]):
        blend(edge, shade, 0.95)
    text = str(rng.integers(10))
    mask, source = _large_digit(rng, text, split)
    room = FIELD_SIZE - 2 * frame
    mask = mask[:room, :room]
    height, width = mask.shape
    top, left = (int(rng.integers(frame, FIELD_SIZE - frame - side + 1)) for side in mask.shape)
    blend(canvas[top : top + height, left : left + width], np.float32(INK), mask)
    return Field("box", colour, text, ((left, top, left + width, top + height),), (source,))


def _large_digit(rng: np.random.Generator, digit: str, split: str) -> tuple[np.ndarray, str | int]:
    """Mask of a digit, and the font or the handwritten sample that it is made of."""
    if rng.random() >= HANDWRITTEN_SHARE[split]:
        fonts, shape = fonts_of(split), SHAPES[split][rng.integers(len(SHAPES[split]))]
        font, size = fonts[rng.integers(len(fonts))], int(rng.choice(BOX_SIZES))
        return printed_digit(font, size, digit, shape), font
    images, by_class = load_split(split)[0], samples_by_class(split)
    sample, spread = int(rng.choice(by_class[int(digit)])), AUGMENTATION[split]
    angle, shear = rng.uniform(-1, 1) * spread["angle"], rng.uniform(-1, 1) * spread["shear"]
    mask = render_digit(images[sample], rng.uniform(26, 32), angle, shear, rng.uniform(*spread["stretch"]))
    return mask, sample


def draw_page(
    rng: np.random.Generator,
    split: str,
    num_tables: int | None = None,
    grids: Sequence[tuple[int, int]] = GRIDS,
    num_boxes: int | None = None,
) -> Page:
    """Draw one page.

    Args:
        rng (`np.random.Generator`): the only source of chance; the same state gives the same page, pixel by pixel.
        split (`str`): `"train"` or `"test"`: fonts, handwriting and regions of photographs that may appear.
        num_tables (`int`, *optional*): 0 to 2; by default each with a chance of a third.
        num_boxes (`int`, *optional*): 0 to 6; by default one of `BOX_COUNTS`.
        grids (`Sequence[tuple[int, int]]`): rows and columns that the page may have, each as likely.
    """
    check_split(split)
    rows, columns = grids[rng.integers(len(grids))]
    paper = list(PAPERS)[rng.integers(len(PAPERS))]
    canvas = np.empty((rows * FIELD_SIZE, columns * FIELD_SIZE, 3), np.float32)
    canvas[:] = jitter_colour(rng, PAPERS[paper], 5)
    drawn = int(rng.integers(3))
    kinds = ["table"] * (drawn if num_tables is None else num_tables)
    boxes = int(rng.choice(BOX_COUNTS))
    kinds += ["box"] * (boxes if num_boxes is None else num_boxes)
    if rng.random() < PHOTO_SHARE:
        kinds.append("photo")
    kinds += ["empty"] * (rows * columns - len(kinds))
    # a page of fewer fields has its tables first, then its boxes
    kinds = kinds[: rows * columns]
    colours = iter(rng.permutation(list(COLOURS)).tolist())
    fields = []
    for place, kind in enumerate([kinds[idx] for idx in rng.permutation(len(kinds))]):
        row, column = divmod(place, columns)
        part = canvas[row * FIELD_SIZE :, column * FIELD_SIZE :][:FIELD_SIZE, :FIELD_SIZE]
        if kind in ("table", "box"):
            fields.append((draw_table if kind == "table" else draw_box)(rng, part, next(colours), split))
            continue
        if kind == "photo":
            subject = SUBJECTS[rng.integers(len(SUBJECTS))]
            # a margin of paper
            part[3:-3, 3:-3] = photo_crop(rng, subject, split, FIELD_SIZE - 6)
        fields.append(Field(kind, sources=(subject,) if kind == "photo" else ()))
    canvas += rng.normal(0, rng.uniform(1, 4), canvas.shape).astype(np.float32)
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return Page(image, questions_of(paper, fields), rows, columns, paper, fields)


def questions_of(paper: str, fields: list[Field]) -> list[Question]:
    """Every question that a page can answer, coarse ones first, its contents last."""
    kinds = [each.kind for each in fields]
    questions = [
        ask("paper", paper),
        ask("tables", str(kinds.count("table"))),
        ask("photo", "yes" if "photo" in kinds else "no"),
    ]
    for tile, each in enumerate(fields):
        if each.kind == "box":
            questions.append(ask("number", each.text, tile, colour=each.colour))
        elif each.kind == "table":
            for cell, digit in zip(CELLS, each.text, strict=True):
                questions.append(ask("digit", digit, tile, colour=each.colour, cell=cell))
    return questions
