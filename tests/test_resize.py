"""Pixels of a resize: the same on every version of Pillow, and on Pillow 13 those of its own `resize`."""

import hashlib
import random

import PIL
import pytest
from PIL import Image

from hf_vtc.models.pixels_vtc import resized

# of every pixel of `resizes()`, the same with Pillow 10.1.0, 11.3.0, 12.3.0 and 13.0.0
DIGEST = "65a32cd4f0378f88db9eeab3752ef6e2c87695f89ba05ba61f16e3b85642248d"


def resizes():
    """Pictures of noise with a size and a filter each; in some the height loses more than the width, in some less."""
    generator = random.Random(0)
    # the filters that every version has
    for resample in range(6):
        for _ in range(10):
            old, new = ([generator.randint(1, 200) for _ in range(2)] for _ in range(2))
            yield Image.frombytes("RGB", tuple(old), generator.randbytes(old[0] * old[1] * 3)), tuple(new), resample


@pytest.mark.window
def test_pixels_do_not_depend_on_the_version_of_pillow():
    digest = hashlib.sha256()
    for image, size, resample in resizes():
        digest.update(resized(image, size, resample).tobytes())
    assert digest.hexdigest() == DIGEST


@pytest.mark.window
@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 has one order of passes")
def test_pixels_are_those_of_pillow_13():
    pictures = list(resizes())
    assert all(resized(*picture).tobytes() == picture[0].resize(*picture[1:]).tobytes() for picture in pictures)
    # both orders of the passes are among them
    assert len({image.height - size[1] > max(0, 2 * (image.width - size[0])) for image, size, _ in pictures}) == 2
