"""Draw a form: a table of fields, some of which are coloured boxes that hold a handwritten number.

A field is exactly one tile of InternVL's dynamic tiling (`FIELD_SIZE` pixels), so that a tile is either worth its
tokens (a box with a number) or nearly empty (blank paper, a stripe, ruled lines): something for a router to decide.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .digits import check_split, load_split, render_digit, samples_by_class
from .questions import Question, ask_all

FIELD_SIZE = 32
PATCH_SIZE = 4
# (rows, columns); every aspect ratio occurs once among the tilings of at most `MAX_TILES`, or wins its tie by area
GRIDS = ((2, 3), (3, 2), (2, 4), (4, 2))
MAX_TILES = 12
# share of pages with 1, 2, 3 boxes, by number of fields: about a quarter of the tiles hold a number
BOX_COUNTS = {6: (0.2, 0.8, 0.0), 8: (0.15, 0.4, 0.45)}
ONE_DIGIT_SHARE = 0.35

PAGE_COLOURS = {
    "white": (248, 248, 246),
    "yellow": (252, 240, 178),
    "blue": (200, 224, 250),
    "green": (206, 242, 206),
    "pink": (252, 210, 222),
}
BOX_COLOURS = {
    "red": (214, 36, 40),
    "blue": (36, 84, 214),
    "green": (26, 144, 64),
    "orange": (244, 140, 16),
    "purple": (134, 44, 172),
    "black": (24, 24, 26),
}
DECORATIONS = ("blank", "rules", "stripe", "dots")
DECORATION_SHARES = (0.4, 0.2, 0.25, 0.15)
INKS = ((20, 20, 28), (24, 32, 92), (52, 52, 56))
TABLE_LINE = (150, 150, 150)
# training pages bend the digits more than test pages do: plain data augmentation
AUGMENTATION = {
    "train": {"angle": 11.0, "shear": 0.16, "stretch": (0.84, 1.18)},
    "test": {"angle": 5.0, "shear": 0.06, "stretch": (0.94, 1.08)},
}


@dataclass(frozen=True)
class Box:
    """One coloured box. Pixel rectangles are (left, top, right, bottom), right and bottom exclusive.

    `row` and `column` count from 0; `number` is the text a reader would give; `samples` are positions in
    `load_split(split)`, one per digit; `frame` is the outer edge of the box; `number_area` bounds the ink and
    `digit_areas` that of each digit.
    """

    row: int
    column: int
    colour: str
    number: str
    samples: tuple[int, ...]
    frame: tuple[int, int, int, int]
    number_area: tuple[int, int, int, int]
    digit_areas: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Page:
    """A drawn form: RGB `image` of `columns * 32` x `rows * 32` pixels, what is on it, and what can be asked.

    `decorations` names the filling of every field without a box, by (row, column). `questions` end with the
    transcription.
    """

    image: Image.Image
    questions: list[Question]
    rows: int
    columns: int
    colour: str
    boxes: list[Box]
    decorations: dict[tuple[int, int], str] = field(default_factory=dict)

    def field_rectangle(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Pixels (left, top, right, bottom) of a field, which is also tile `row * columns + column`."""
        left, top = column * FIELD_SIZE, row * FIELD_SIZE
        return left, top, left + FIELD_SIZE, top + FIELD_SIZE


def tile_grid(width: int, height: int, tile_size: int = FIELD_SIZE, max_tiles: int = MAX_TILES) -> tuple[int, int]:
    """Grid (columns, rows) that InternVL's dynamic tiling chooses for an image.

    Args:
        width (`int`), height (`int`): of the image, in pixels.
        tile_size (`int`): side of a tile, in pixels.
        max_tiles (`int`): largest number of tiles, without the thumbnail.

    Source: OpenGVLab/InternVL `dynamic_preprocess`; the nearest aspect ratio wins, a tie goes to the larger grid if
    the image covers more than half of its area.
    """
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile_size**2 * columns * rows
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = (columns, rows), difference
    return best


def tile_page(image: Image.Image) -> np.ndarray:
    """Cut a page as the processor of the model does.

    Args:
        image (`PIL.Image.Image`): RGB.

    Returns:
        uint8 array `(num_tiles, 32, 32, 3)`: crops row by row, then the thumbnail if there is more than one crop.
    """
    columns, rows = tile_grid(*image.size)
    resized = np.asarray(image.resize((columns * FIELD_SIZE, rows * FIELD_SIZE), Image.Resampling.BICUBIC))
    crops = resized.reshape(rows, FIELD_SIZE, columns, FIELD_SIZE, 3).swapaxes(1, 2)
    crops = crops.reshape(rows * columns, FIELD_SIZE, FIELD_SIZE, 3)
    if len(crops) == 1:
        return crops
    thumbnail = np.asarray(image.resize((FIELD_SIZE, FIELD_SIZE), Image.Resampling.BICUBIC))
    return np.concatenate([crops, thumbnail[None]])


def jitter_colour(rng: np.random.Generator, colour: tuple[int, int, int], amount: int) -> np.ndarray:
    """The colour, moved by at most `amount` levels in each channel. Float32 `(3,)`."""
    return np.clip(np.float32(colour) + rng.integers(-amount, amount + 1, 3), 0, 255).astype(np.float32)


def blend(canvas: np.ndarray, colour: np.ndarray, alpha: np.ndarray | float) -> None:
    """Paint `colour (3,)` over `canvas (h, w, 3)` in place; `alpha` is a number or `(h, w)`."""
    weight = alpha[..., None] if isinstance(alpha, np.ndarray) else alpha
    canvas += weight * (colour - canvas)


def draw_decoration(rng: np.random.Generator, canvas: np.ndarray, decoration: str) -> None:
    """Fill a field without a box; `canvas (32, 32, 3)` is painted in place."""
    grey = np.full(3, rng.integers(140, 190), np.float32)
    if decoration == "rules":
        spacing, start = rng.integers(6, 10), rng.integers(4, 9)
        for y in range(start, FIELD_SIZE - 3, spacing):
            blend(canvas[y : y + 1, 3:-3], grey, 0.8)
    elif decoration == "stripe":
        colour = jitter_colour(rng, BOX_COLOURS[rng.choice(list(BOX_COLOURS))], 16)
        start, thickness = rng.integers(4, 20), rng.integers(4, 9)
        band = canvas[start : start + thickness, 1:] if rng.random() < 0.5 else canvas[1:, start : start + thickness]
        blend(band, colour, float(rng.uniform(0.35, 0.7)))
    elif decoration == "dots":
        y = rng.integers(6, 26)
        blend(canvas[y : y + 2, 4:-4:4], grey, 0.9)


def compose_number(
    rng: np.random.Generator, number: str, split: str, room: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, ...], list[tuple[int, int, int, int]]]:
    """Write a number with handwritten digits of a split.

    Args:
        rng (`np.random.Generator`): picks samples, slant, size and spacing.
        number (`str`): decimal digits.
        split (`str`): where the samples come from.
        room (`tuple[int, int]`): largest (width, height) in pixels.

    Returns:
        Alpha `(height, width)`, the sample of each digit, and the rectangle of each digit within the alpha.
    """
    images, _ = load_split(split)
    bend = AUGMENTATION[split]
    size = rng.uniform(13, 17)
    samples = tuple(int(rng.choice(samples_by_class(split)[int(digit)])) for digit in number)
    slant = rng.uniform(-bend["shear"], bend["shear"])
    glyphs = []
    for sample in samples:
        angle = rng.uniform(-bend["angle"], bend["angle"])
        stretch = rng.uniform(*bend["stretch"]) * 0.92
        glyphs.append(render_digit(images[sample], size * rng.uniform(0.95, 1.05), angle, slant, stretch))
    gap = int(rng.integers(1, 4))
    # shrink until the number fits: the last resort is a smaller hand
    while sum(glyph.shape[1] for glyph in glyphs) + gap * (len(glyphs) - 1) > room[0]:
        if gap > 1:
            gap -= 1
            continue
        size *= 0.93
        glyphs = [render_digit(images[sample], size, 0.0, slant, 0.9) for sample in samples]
    offsets = [int(rng.integers(0, 3)) if len(glyphs) > 1 else 0 for _ in glyphs]
    height = min(max(glyph.shape[0] + offset for glyph, offset in zip(glyphs, offsets, strict=True)), room[1])
    width = sum(glyph.shape[1] for glyph in glyphs) + gap * (len(glyphs) - 1)
    alpha = np.zeros((height, width), np.float32)
    areas, left = [], 0
    for glyph, offset in zip(glyphs, offsets, strict=True):
        rows, columns = glyph.shape
        top = min(offset, max(height - rows, 0))
        glyph = glyph[: height - top]
        alpha[top : top + len(glyph), left : left + columns] = glyph
        areas.append((left, top, left + columns, top + len(glyph)))
        left += columns + gap
    return np.minimum(alpha * rng.uniform(0.9, 1.4), 1), samples, areas


def draw_box(rng: np.random.Generator, canvas: np.ndarray, row: int, column: int, colour: str, split: str) -> Box:
    """Draw a frame and a number into the field at (row, column) of `canvas (H, W, 3)`, in place."""
    left, top = column * FIELD_SIZE, row * FIELD_SIZE
    insets = rng.integers(1, 3, 4)
    thickness = 2
    x0, y0, x1, y1 = insets[0], insets[1], FIELD_SIZE - insets[2], FIELD_SIZE - insets[3]
    frame = canvas[top + y0 : top + y1, left + x0 : left + x1]
    tint = jitter_colour(rng, BOX_COLOURS[colour], 14)
    for edge in (frame[:thickness], frame[-thickness:], frame[:, :thickness], frame[:, -thickness:]):
        blend(edge, tint, 0.95)

    number = str(rng.integers(10)) if rng.random() < ONE_DIGIT_SHARE else str(rng.integers(10, 100))
    room = (int(x1 - x0 - 2 * thickness - 1), int(y1 - y0 - 2 * thickness - 1))
    alpha, samples, areas = compose_number(rng, number, split, room)
    height, width = alpha.shape
    number_x = left + x0 + thickness + int(rng.integers(room[0] - width + 2))
    number_y = top + y0 + thickness + int(rng.integers(room[1] - height + 2))
    ink = jitter_colour(rng, INKS[rng.integers(len(INKS))], 12)
    blend(canvas[number_y : number_y + height, number_x : number_x + width], ink, alpha)
    digit_areas = tuple((number_x + a, number_y + b, number_x + c, number_y + d) for a, b, c, d in areas)
    return Box(
        row=row,
        column=column,
        colour=colour,
        number=number,
        samples=samples,
        frame=tuple(int(v) for v in (left + x0, top + y0, left + x1, top + y1)),
        number_area=tuple(int(v) for v in (number_x, number_y, number_x + width, number_y + height)),
        digit_areas=tuple(tuple(int(v) for v in area) for area in digit_areas),
    )


def draw_page(rng: np.random.Generator, split: str) -> Page:
    """Draw one form.

    Args:
        rng (`np.random.Generator`): the only source of chance; the same state gives the same page, pixel by pixel.
        split (`str`): `"train"` or `"test"`: the digit samples that may appear.

    Returns:
        [`Page`]

    Raises:
        ValueError: `split` is not one of the two.
    """
    check_split(split)
    rows, columns = GRIDS[rng.integers(len(GRIDS))]
    colour = list(PAGE_COLOURS)[rng.integers(len(PAGE_COLOURS))]
    canvas = np.empty((rows * FIELD_SIZE, columns * FIELD_SIZE, 3), np.float32)
    canvas[:] = jitter_colour(rng, PAGE_COLOURS[colour], 5)

    num_boxes = 1 + int(rng.choice(3, p=BOX_COUNTS[rows * columns]))
    places = sorted(int(place) for place in rng.permutation(rows * columns)[:num_boxes])
    box_colours = rng.permutation(list(BOX_COLOURS))[:num_boxes]
    decorations = {}
    for place in range(rows * columns):
        if place not in places:
            row, column = divmod(place, columns)
            decorations[row, column] = str(rng.choice(DECORATIONS, p=DECORATION_SHARES))
            top, left = row * FIELD_SIZE, column * FIELD_SIZE
            draw_decoration(rng, canvas[top : top + FIELD_SIZE, left : left + FIELD_SIZE], decorations[row, column])
    # the lines of the table run along the upper and left edge of every field, so each tile shows them alike
    line = np.float32(TABLE_LINE)
    blend(canvas[::FIELD_SIZE], line, 0.7)
    blend(canvas[:, ::FIELD_SIZE], line, 0.7)
    boxes = [
        draw_box(rng, canvas, *divmod(place, columns), str(box_colour), split)
        for place, box_colour in zip(places, box_colours, strict=True)
    ]
    canvas += rng.normal(0, rng.uniform(1, 4), canvas.shape).astype(np.float32)
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    questions = ask_all(rng, colour, rows, columns, boxes)
    return Page(image, questions, rows, columns, colour, boxes, decorations)
