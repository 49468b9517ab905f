"""Printed digits: fonts that matplotlib ships, split into those of training and those of the test.

DejaVu (Bitstream Vera licence, changes in the public domain), STIX General (STIX fonts user licence), and Computer
Modern as BaKoMa has it (BaKoMa fonts licence): the licences lie beside the files. They are read from the installed
package; none is copied into this repository.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from digit_forms.digits import check_split
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# whole files are held out; other cuts of the same families are in training
TEST_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSerif", "STIXGeneralBol")
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
# digits are drawn larger by so much, distorted, and scaled down
_ENLARGED = 4


@dataclass(frozen=True)
class Shape:
    """How a digit differs from that of its font: strokes that are wider by `weight` (0 or 1) quarters of a pixel on
    each side, horizontal `shear` in pixels a pixel of height, `stretch` of its width, and `angle` in degrees."""

    weight: int = 0
    shear: float = 0.0
    stretch: float = 1.0
    angle: float = 0.0


def _shapes(count: int) -> tuple[Shape, ...]:
    rng, shapes = np.random.default_rng(0), [Shape()]
    for _ in range(count - 1):
        weight, (shear, angle) = int(rng.integers(2)), rng.uniform(-1, 1, 2)
        shapes.append(Shape(weight, 0.25 * shear, rng.uniform(0.8, 1.2), 7 * angle))
    return tuple(shapes)


# a training on few fonts learns these fonts; digits of the test are as their fonts have them
SHAPES = {"train": _shapes(24), "test": (Shape(),)}


def fonts_of(split: str) -> tuple[str, ...]:
    """Names of the fonts of `"train"` or `"test"`; none is in both."""
    check_split(split)
    return TRAIN_FONTS if split == "train" else TEST_FONTS


@functools.cache
def printed_digit(font: str, size: int, digit: str, shape: Shape = Shape()) -> np.ndarray:
    """Alpha mask of a digit, cropped to its ink, float32 in [0, 1].

    Args:
        font (`str`): a name of `TRAIN_FONTS` or `TEST_FONTS`.
        size (`int`): in pixels per em; a digit is about 0.73 of it high in DejaVu.
        digit (`str`): `"0"` to `"9"`.
        shape (`Shape`): how it differs from the font's.
    """
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    side, large = 2 * size * _ENLARGED, size * _ENLARGED
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text((large // 2, large // 4), digit, 255, ImageFont.truetype(str(file), large))
    if shape.weight:
        canvas = canvas.filter(ImageFilter.MaxFilter(2 * shape.weight + 1))
    # output pixels to input pixels, about the middle of the canvas
    cosine, sine, middle = math.cos(math.radians(shape.angle)), math.sin(math.radians(shape.angle)), side / 2
    matrix = np.array([[cosine, -sine], [sine, cosine]]) @ [[1 / shape.stretch, shape.shear], [0, 1]]
    offset = middle - matrix @ [middle, middle]
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    canvas = canvas.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    alpha = np.asarray(canvas.reduce(_ENLARGED)).astype(np.float32) / 255
    rows, columns = np.flatnonzero(alpha.max(1) > 0.15), np.flatnonzero(alpha.max(0) > 0.15)
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
