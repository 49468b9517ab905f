"""Photographs that scikit-learn and matplotlib ship, of which training and test see different regions.

- `temple`: china.jpg, (c) danielbuechele, CC BY 2.0, from scikit-learn;
- `flower`: flower.jpg, (c) vultilion, CC BY 2.0, from scikit-learn;
- `officer`: grace_hopper.jpg, a portrait by the US Navy, public domain, from matplotlib.

They are read from the installed packages; none is copied into this repository. Three photographs are a background, and
whether there is one is a coarse question; they say nothing about understanding photographs.
"""

import functools

import matplotlib.cbook
import numpy as np
from digit_forms.digits import check_split
from PIL import Image
from sklearn.datasets import load_sample_image

SUBJECTS = ("temple", "flower", "officer")
# a photograph is cut into so many strips from left to right, of which the test has every third
_STRIPS, _TEST_STRIPS = 6, (1, 4)


@functools.cache
def _photo(subject: str) -> Image.Image:
    if subject == "officer":
        with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as stream:
            return Image.open(stream).convert("RGB")
    return Image.fromarray(load_sample_image({"temple": "china.jpg", "flower": "flower.jpg"}[subject]))


def regions_of(subject: str, split: str) -> list[tuple[int, int]]:
    """Left and right edges, in pixels, of the strips of a photograph that a split may show."""
    check_split(split)
    edges = np.linspace(0, _photo(subject).width, _STRIPS + 1).astype(int).tolist()
    chosen = [strip for strip in range(_STRIPS) if (strip in _TEST_STRIPS) == (split == "test")]
    return [(edges[strip], edges[strip + 1]) for strip in chosen]


def photo_crop(rng: np.random.Generator, subject: str, split: str, side: int) -> np.ndarray:
    """A square from one strip of a photograph, its full width, as float32 `(side, side, 3)`."""
    photo, regions = _photo(subject), regions_of(subject, split)
    left, right = regions[rng.integers(len(regions))]
    width = right - left
    # the middle half of the height, where the subject is
    top = int(rng.integers(photo.height // 4, photo.height * 3 // 4 - width // 2))
    top = min(top, photo.height - width)
    crop = photo.crop((left, top, right, top + width)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(crop).astype(np.float32)
