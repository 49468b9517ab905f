"""Sizes of images that would ask for too much memory are refused by the layout, before there are pixels."""

import numpy as np
import pytest
from PIL import Image

from hf_vtc.models.image_processing_vtc import VtcImageProcessor


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("tiling", ("crop", "keep_aspect"))
def test_extreme_aspect_ratios_are_refused_before_memory_is_gone(tiling, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 400)
    processor = VtcImageProcessor(tiling=tiling, size=32, token_stride=8)
    assert processor(random_image(2, 50))["image_sizes"][0].tolist()[0] == 32
    with pytest.raises(ValueError, match=f"`tiling='{tiling}'` would resize an image of 1 x 50 pixels .*32 x 1600"):
        processor(random_image(1, 50))
    # the layout says so before there are pixels
    with pytest.raises(ValueError, match="Crop or shrink the image first"):
        processor.get_tile_layout(1, 50)
    with pytest.raises(ValueError, match="Crop or shrink the image first"):
        processor.check_sizes([(32, 32), (1, 50)])


def test_images_that_no_batch_can_hold_together_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 400)
    processor = VtcImageProcessor(tiling="keep_aspect", size=32, token_stride=8)
    tall, wide = random_image(50, 2), random_image(2, 50)
    assert processor.padded_size([(50, 2), (2, 50)]) == (800, 800)
    for image in (tall, wide):
        processor.check_sizes([(image.height, image.width)])
        assert processor([image, image])["pixel_values"].shape[0] == 2
    for refused in (lambda: processor.check_sizes([(50, 2), (2, 50)]), lambda: processor([tall, wide])):
        with pytest.raises(ValueError, match="padded to the largest sides, here 800 x 800 pixels"):
            refused()


def test_a_batch_that_is_mostly_padding_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 800)
    processor = VtcImageProcessor(tiling="keep_aspect", size=32, token_stride=8)
    strip, plain = random_image(2, 50), random_image(20, 20)
    # as many pixels in strips alone are what the images have
    assert processor([strip] * 9)["pixel_values"].shape == (9, 3, 32, 800)
    assert processor([strip, plain])["pixel_values"].shape == (2, 3, 32, 800)
    images = [strip] + [plain] * 8
    for refused in (lambda: processor.check_sizes([(2, 50)] + [(20, 20)] * 8), lambda: processor(images)):
        with pytest.raises(ValueError, match="9 images that share a call .*: 230400 pixels, of which .* fill 33792"):
            refused()


@pytest.mark.window
def test_thin_images_of_the_published_model_are_refused_before_memory_is_asked_for():
    """4 x 900 and 900 x 4 pixels, resized and padded to each other, are 334 GiB of float32 each."""
    processor = VtcImageProcessor(tiling="keep_aspect", size=768, token_stride=64)
    tall, wide = (900, 4), (4, 900)
    for size in (tall, wide):
        processor.check_sizes([size])
    together = "padded to the largest sides, here 172800 x 172800 pixels"
    with pytest.raises(ValueError, match=together):
        processor.check_sizes([tall, wide])
    with pytest.raises(ValueError, match=together):
        processor([Image.new("RGB", size[::-1]) for size in (tall, wide)])
    # one strip makes a large batch of ordinary images as long as itself
    with pytest.raises(ValueError, match="64 images that share a call"):
        processor.check_sizes([wide] + [(600, 800)] * 63)
    processor.check_sizes([(600, 800), (800, 600)] * 32)


def test_padding_that_exhausts_memory_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    processor = VtcImageProcessor(tiling="pad", size=32)
    with pytest.raises(ValueError, match="Crop or shrink"):
        processor(Image.new("RGB", (100, 2)))
    assert processor(Image.new("RGB", (30, 20)))["image_sizes"].tolist() == [[20, 30]]
