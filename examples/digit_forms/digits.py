"""Real handwritten digits: a fixed train/test split and their rendering as ink.

Source: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49 (CC BY 4.0 according to the UCI page). scikit-learn carries its 1797 test samples as
`load_digits`; they are read from there and never copied into this repository.
"""

import functools
import math

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = ("train", "test")
# 30 samples of each class, about one in six, are held out
TEST_SAMPLES_PER_CLASS = 30
SPLIT_SEED = 0
# side of a sample, and the intensity of full ink in it
SAMPLE_SIZE = 8
SAMPLE_MAXIMUM = 16
# alpha below which a rendered pixel counts as paper
INK_THRESHOLD = 0.15


def check_split(split: str) -> None:
    """Raise a `ValueError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}, got {split!r}. Use 'train' or 'test'.")


@functools.cache
def split_indices(split: str) -> np.ndarray:
    """Sample numbers of a split within `load_digits`, ascending.

    The split is stratified (30 test samples a class), depends on nothing but a constant seed, and covers every sample
    exactly once. It was drawn once and not chosen by its results.
    """
    check_split(split)
    labels = load_digits().target
    rng = np.random.default_rng(SPLIT_SEED)
    test = np.concatenate([rng.permutation(np.flatnonzero(labels == d))[:TEST_SAMPLES_PER_CLASS] for d in range(10)])
    if split == "test":
        return np.sort(test)
    return np.setdiff1d(np.arange(len(labels)), test)


@functools.cache
def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load the handwritten digits of one split.

    Args:
        split (`str`): `"train"` (1497 samples) or `"test"` (300 samples). No sample is in both.

    Returns:
        Images `(num_samples, 8, 8)` float32 in [0, 1], 1 = full ink, and labels `(num_samples,)` int64 in 0..9.

    Raises:
        ValueError: `split` is not one of the two.
    """
    digits = load_digits()
    indices = split_indices(split)
    return digits.images[indices].astype(np.float32) / SAMPLE_MAXIMUM, digits.target[indices].astype(np.int64)


@functools.cache
def samples_by_class(split: str) -> tuple[np.ndarray, ...]:
    """Positions within `load_split(split)` of each class, 0 to 9."""
    _, labels = load_split(split)
    return tuple(np.flatnonzero(labels == digit) for digit in range(10))


def render_digit(sample: np.ndarray, height: float, angle: float, shear: float, stretch: float) -> np.ndarray:
    """Draw one 8x8 sample as an alpha mask, cropped to its ink.

    Args:
        sample (`np.ndarray` of shape `(8, 8)`): ink in [0, 1].
        height (`float`): height in pixels that the eight rows of the sample fill.
        angle (`float`): rotation in degrees, counter-clockwise.
        shear (`float`): horizontal slant, in pixels a pixel of height.
        stretch (`float`): width of a sample column over the height of a sample row.

    Returns:
        Alpha in [0, 1], float32, shape `(rows, columns)`.
    """
    padding = 2
    padded = np.pad(sample, padding) * 255
    source = Image.fromarray(padded.astype(np.uint8))
    scale = height / SAMPLE_SIZE
    side = math.ceil(height * 1.7)
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # PIL wants the inverse map: output pixel -> sample coordinates, around both centres
    a, b = (cosine + shear * sine) / (scale * stretch), (-sine + shear * cosine) / (scale * stretch)
    d, e = sine / scale, cosine / scale
    centre_in, centre_out = padding + SAMPLE_SIZE / 2, side / 2
    matrix = (a, b, centre_in - (a + b) * centre_out, d, e, centre_in - (d + e) * centre_out)
    alpha = np.asarray(source.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
    alpha = alpha.astype(np.float32) / 255
    rows, columns = np.flatnonzero(alpha.max(1) > INK_THRESHOLD), np.flatnonzero(alpha.max(0) > INK_THRESHOLD)
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
