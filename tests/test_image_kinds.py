"""`VtcImageProcessor`: every kind and source of image is read, or refused by name."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from image_samples import random_image
from PIL import Image

import hf_vtc.models  # noqa: F401 - registers the Auto classes
from hf_vtc.models.image_processing_vtc import VtcImageProcessor


def grey(height=40, width=64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8)


def odd_images() -> dict:
    """Name -> (image, the RGB image that it stands for)."""
    rgb = random_image(40, 64)
    level = grey()
    as_rgb = Image.fromarray(level).convert("RGB")
    pixels = np.asarray(rgb)
    alpha = Image.fromarray(np.full((40, 64), 3, np.uint8))
    rgba, grey_alpha = rgb.copy(), Image.fromarray(level)
    rgba.putalpha(alpha)
    grey_alpha.putalpha(alpha)
    palette = rgb.quantize(16)
    one_bit = Image.fromarray(level > 127)
    return {
        "rgb": (rgb, rgb),
        "grey": (Image.fromarray(level), as_rgb),
        "grey+alpha": (grey_alpha, as_rgb),
        "rgba": (rgba, rgb),
        "palette": (palette, palette.convert("RGB")),
        "palette+transparency": (transparent(palette), palette.convert("RGB")),
        "one bit": (one_bit, one_bit.convert("RGB")),
        "cmyk": (rgb.convert("CMYK"), rgb.convert("CMYK").convert("RGB")),
        "ycbcr": (rgb.convert("YCbCr"), rgb.convert("YCbCr").convert("RGB")),
        "16 bit": (Image.fromarray(level.astype(np.uint16) * 257), as_rgb),
        "16 bit in mode I": (Image.fromarray(level.astype(np.int32) * 257), as_rgb),
        "8 bit in mode I": (Image.fromarray(level.astype(np.int32)), as_rgb),
        "float levels": (Image.fromarray(level.astype(np.float32)), as_rgb),
        "float unit": (Image.fromarray(level.astype(np.float32) / np.float32(255)), as_rgb),
        "uint8 hwc": (pixels, rgb),
        "uint8 chw": (pixels.transpose(2, 0, 1), rgb),
        "uint8 hw": (level, as_rgb),
        "uint8 hw1": (level[:, :, None], as_rgb),
        "uint8 1hw": (level[None], as_rgb),
        "uint8 hw2": (np.stack([level, level // 2], -1), as_rgb),
        "uint8 hw4": (np.dstack([pixels, level]), rgb),
        "int64": (pixels.astype(np.int64), rgb),
        "uint16": (pixels.astype(np.uint16) * 257, rgb),
        "bool": (level > 127, one_bit.convert("RGB")),
        "float32": (pixels.astype(np.float32) / np.float32(255), rgb),
        "float64": (pixels / 255, rgb),
        "float16": ((pixels / 255).astype(np.float16), rgb),
        "not contiguous": (pixels[:, ::-1][:, ::-1], rgb),
        "torch chw": (torch.from_numpy(pixels.transpose(2, 0, 1).copy()), rgb),
        "torch hwc": (torch.from_numpy(pixels.copy()), rgb),
        "torch float": (torch.from_numpy(pixels.transpose(2, 0, 1) / 255).requires_grad_(), rgb),
    }


def transparent(palette: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    return Image.open(buffer)


@pytest.mark.window
@pytest.mark.parametrize("kind", odd_images())
def test_every_kind_of_image_is_read(kind):
    image, plain = odd_images()[kind]
    processor = VtcImageProcessor(size=32, max_tiles=4)
    out, expected = processor(image), processor(plain)
    assert np.array_equal(out["pixel_values"], expected["pixel_values"])
    assert out["image_sizes"].tolist() == [[40, 64]]


def test_bfloat16_tensor_is_read():
    image = torch.zeros(3, 40, 64, dtype=torch.bfloat16)
    image[0] = 1
    out = VtcImageProcessor(tiling="single", size=32, do_normalize=False)(image)
    assert out["pixel_values"].mean(axis=(0, 2, 3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("tiling", ["single", "pad", "anyres", "dynamic"])
@pytest.mark.parametrize("shape", [(1, 4000, 3), (4000, 1, 3), (1, 1, 3), (2, 4000, 3)])
def test_strips_are_read_as_channels_last_arrays(tiling, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    processor = VtcImageProcessor(tiling=tiling, size=32, image_grid_pinpoints=[[32, 64], [64, 32]])
    out = processor(pixels)
    assert np.array_equal(out["pixel_values"], processor(Image.fromarray(pixels))["pixel_values"])
    assert out["image_sizes"].tolist() == [list(shape[:2])]
    assert len(out["pixel_values"]) == processor.get_tile_layout(*shape[:2]).num_tiles


def test_input_data_format_decides_ambiguous_arrays():
    pixels = np.zeros((3, 40, 3), np.uint8)
    processor = VtcImageProcessor(size=32)
    assert processor(pixels)["image_sizes"].tolist() == [[3, 40]]
    assert processor(torch.from_numpy(pixels))["image_sizes"].tolist() == [[40, 3]]
    assert processor(pixels, input_data_format="channels_first")["image_sizes"].tolist() == [[40, 3]]


@pytest.mark.window
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = random_image(48, 80)
    # what undoes the rotation that the tag asks for
    undo = (
        "",
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    )
    name = undo[orientation - 1]
    stored = upright.transpose(Image.Transpose[name]) if name else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    stored.save(file, exif=exif)
    processor = VtcImageProcessor(size=32)
    expected = processor(upright)["pixel_values"]
    for image in (Image.open(file), str(file), file):
        out = processor(image)
        assert out["image_sizes"].tolist() == [[48, 80]]
        assert np.array_equal(out["pixel_values"], expected)


@pytest.mark.window
def test_every_source_is_read(tmp_path):
    image = random_image(48, 80)
    file = tmp_path / "image.png"
    image.save(file)
    text = base64.b64encode(file.read_bytes()).decode()
    processor = VtcImageProcessor(size=32)
    expected = processor(image)["pixel_values"]
    for source in (file, str(file), file.as_uri(), text, f"data:image/png;base64,{text}"):
        assert np.array_equal(processor(source)["pixel_values"], expected)


@pytest.mark.window
def test_nesting_is_flattened_in_order_and_kept_by_fetch_images():
    first, second, third = (random_image(40, 40 + 30 * index, index) for index in range(3))
    processor = VtcImageProcessor(size=32)
    parts = [processor(image) for image in (first, second, third)]
    expected = np.concatenate([part["pixel_values"] for part in parts])
    for images in (
        [first, second, third],
        [[first], [second, third]],
        [[], [first, second, third]],
        (first, (second, third)),
    ):
        out = processor(images)
        assert np.array_equal(out["pixel_values"], expected)
        assert out["num_tiles"].tolist() == [part["num_tiles"][0] for part in parts]
    batch = np.stack([np.asarray(first)] * 2)
    assert processor(batch)["image_sizes"].tolist() == [[40, 40]] * 2
    assert [len(row) for row in processor.fetch_images([[first, second], None, [third]])] == [2, 0, 1]


def test_fetch_images_leaves_plain_images_alone():
    image = random_image(8, 8)
    processor = VtcImageProcessor()
    assert processor.fetch_images(image) is image
    assert processor.fetch_images(processor.fetch_images([image]))[0] is image


@pytest.mark.window
@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (Image.new("RGB", (0, 5)), "at least one pixel"),
        (np.zeros(5, np.uint8), "2 dimensions"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), "2 dimensions"),
        (np.zeros((9, 9, 5), np.uint8), "1 to 4 channels"),
        (np.full((4, 4, 3), np.nan), "finite"),
        (np.full((4, 4, 3), np.inf, np.float32), "finite"),
        (np.full((4, 4, 3), 2.0), "must be 0..1"),
        (np.full((4, 4, 3), -0.5), "must be 0..1"),
        (np.full((4, 4, 3), 256), "must be 0..255"),
        (np.full((4, 4, 3), -1), "must be 0..255"),
        (np.zeros((4, 4, 3), complex), "booleans, integers or floats"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "0..65535"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "finite"),
        (Image.new("La", (4, 4)), "converts to RGB"),
        (object(), "must be a path"),
        ([], "at least one image"),
        ([[], []], "at least one image"),
        ([[np.zeros((4, 4, 3), np.uint8)], [np.zeros(3)]], re.escape("images[1][0]")),
    ],
)
def test_unusable_images_are_named(image, words):
    with pytest.raises(ValueError, match=words):
        VtcImageProcessor(size=32)(image)


@pytest.mark.window
def test_unreadable_files_are_named(tmp_path):
    processor = VtcImageProcessor(size=32)
    with pytest.raises(FileNotFoundError, match="no existing file"):
        processor("missing/picture.png")
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(OSError, match="no image could be read"):
        processor(text)
    for extension in ("png", "jpg", "gif", "tiff", "webp", "bmp"):
        whole, half = tmp_path / f"whole.{extension}", tmp_path / f"half.{extension}"
        random_image(60, 60).save(whole)
        half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(OSError, match=re.escape(half.name)):
            processor(half)
    with pytest.raises(OSError, match="damaged or truncated"):
        processor(Image.open(tmp_path / "half.png"))
    with pytest.raises(OSError, match="could not be downloaded"):
        processor((tmp_path / "nothing.png").as_uri())
