"""Printed digits: fonts that matplotlib ships, split into those of training and those of the test.

DejaVu (Bitstream Vera licence, changes in the public domain) and STIX General (STIX fonts user licence): both licences
lie beside the files. They are read from the installed package; none is copied into this repository.
"""

import functools
from pathlib import Path

import matplotlib
import numpy as np
from digit_forms.digits import check_split
from PIL import Image, ImageDraw, ImageFont

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
)


def fonts_of(split: str) -> tuple[str, ...]:
    """Names of the fonts of `"train"` or `"test"`; none is in both."""
    check_split(split)
    return TRAIN_FONTS if split == "train" else TEST_FONTS


@functools.cache
def printed_digit(font: str, size: int, digit: str) -> np.ndarray:
    """Alpha mask of a digit, cropped to its ink, float32 in [0, 1].

    Args:
        font (`str`): a name of `TRAIN_FONTS` or `TEST_FONTS`.
        size (`int`): in pixels per em; a digit is about 0.73 of it high in DejaVu.
        digit (`str`): `"0"` to `"9"`.
    """
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    canvas = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size // 2, size // 4), digit, 255, ImageFont.truetype(str(file), size))
    alpha = np.asarray(canvas).astype(np.float32) / 255
    rows, columns = np.flatnonzero(alpha.max(1) > 0.15), np.flatnonzero(alpha.max(0) > 0.15)
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
