"""Pictures of what was kept."""

import numpy as np
import pytest
import torch
from factories import tiny_model, tiny_processor
from PIL import Image

from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.plot import COMPRESSED_COLOUR, FULL_COLOUR, overlay, stack

BLACK = (0, 0, 0)


def processor_of(**fields):
    return VtcImageProcessor(size=32, **fields)


def count(picture, colour):
    return int((np.asarray(picture) == np.array(colour)).all(-1).sum())


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (640, 31), (33, 700), (1, 1), (2000, 1500)])
@pytest.mark.parametrize("tiling", ["dynamic", "anyres", "pad", "single"])
def test_overlay_takes_images_of_any_size(size, tiling):
    processor = processor_of(tiling=tiling, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
    num_tiles = processor.get_tile_layout(size[1], size[0]).num_tiles
    decisions = torch.arange(num_tiles) % 2 == 1
    image = Image.new("RGB", size)
    picture = overlay(image, decisions, processor, max_side=160)
    assert picture.mode == "RGB" and max(picture.size) >= 160
    assert count(picture, FULL_COLOUR) > 0
    assert count(picture, COMPRESSED_COLOUR) > 0
    # what is given is not drawn upon
    assert image.getcolors() == [(size[0] * size[1], BLACK)]


def test_overlay_shows_full_tiles_and_veils_compressed_ones():
    image, processor = Image.new("RGB", (64, 32)), processor_of(use_thumbnail=False)
    left, right = (overlay(image, [flag, not flag], processor, max_side=200) for flag in (False, True))
    pixels, mirrored = np.asarray(left), np.asarray(right)
    # 14 pixels of margin, 100 of the first tile, 100 of the second; cells of a quarter of a tile
    full, veiled = pixels[14 + 40, 14 + 40], pixels[14 + 40, 114 + 40]
    assert tuple(full) == BLACK and min(veiled) > 120
    assert tuple(mirrored[14 + 40, 114 + 40]) == BLACK and min(mirrored[14 + 40, 14 + 40]) > 120


def test_overlay_shows_the_thumbnail_beside_the_tiles():
    image = Image.new("RGB", (64, 32))
    without = overlay(image, [False] * 2, processor_of(use_thumbnail=False), max_side=200)
    with_thumbnail = overlay(image, [False] * 3, processor_of(), max_side=200)
    veiled = overlay(image, [False, False, True], processor_of(), max_side=200)
    beside = slice(14 + 200, None)
    assert count(np.asarray(without)[:, beside], BLACK) == 0
    assert count(np.asarray(with_thumbnail)[:, beside], BLACK) > 1000
    assert count(np.asarray(veiled)[:, beside], BLACK) == 0


def test_overlay_of_an_output():
    model, processor = tiny_model("vico"), tiny_processor("vico", max_tiles=12)
    images = [Image.new("RGB", (96, 64), "red"), Image.new("RGB", (32, 32), "blue")]
    inputs = processor(images=images, text="<IMG_CONTEXT> and <IMG_CONTEXT>?", return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, vtc_budget=[0.5, "full"])
    assert output.num_visual_tokens.tolist() == [52, 16]
    first = overlay(images[0], output, processor, num_tiles=inputs["num_tiles"])
    assert count(first, (255, 0, 0)) > 0 and count(first, COMPRESSED_COLOUR) > 0
    second = overlay(images[1], output, processor, num_tiles=inputs["num_tiles"], image_idx=1)
    assert count(second, (0, 0, 255)) > 0 and count(second, COMPRESSED_COLOUR) > 0
    # the legend alone has the other colour
    assert count(second, COMPRESSED_COLOUR) < 1000


def test_overlay_writes_the_number_of_tokens():
    # numbers of another size change the picture, and nothing else does
    image, processor = Image.new("RGB", (32, 32)), processor_of()
    plain, sixteen, again, other = (
        overlay(image, [False], processor, tokens_per_tile=tokens, max_side=100)
        for tokens in (None, (16, 4), (16, 4), (64, 4))
    )
    assert sixteen.tobytes() == again.tobytes()
    assert len({plain.tobytes(), sixteen.tobytes(), other.tobytes()}) == 3


def test_overlay_title_gets_a_line():
    image, processor = Image.new("RGB", (32, 32)), processor_of()
    plain = overlay(image, [True], processor, max_side=100)
    titled = overlay(image, [True], processor, max_side=100, title="budget 0.5")
    assert titled.height > plain.height


@pytest.mark.parametrize(
    "output, fields, message",
    [
        ([True], {}, "has 3 tiles, but the decisions are for"),
        ([True] * 3, {"num_tiles": [2]}, "decisions are for"),
        ([True] * 3, {"num_tiles": [3], "image_idx": 1}, "Image 1"),
        (torch.tensor([0, 1, 2]), {}, "one truth value per tile"),
        (torch.zeros(3, 2, dtype=torch.bool), {}, "one truth value per tile"),
    ],
)
def test_overlay_refuses(output, fields, message):
    with pytest.raises(ValueError, match=message):
        overlay(Image.new("RGB", (64, 32)), output, processor_of(), **fields)


def test_overlay_needs_decisions():
    model = tiny_model("vico")
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="no `router_decisions`"):
        overlay(Image.new("RGB", (64, 32)), output, processor_of())


def test_stack_arranges_rows():
    small, large = Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 5), "blue")
    sheet = stack([[small, large], [large]])
    assert sheet.size == (40, 25)
    assert sheet.getpixel((9, 19)) == (255, 0, 0) and sheet.getpixel((10, 0)) == (0, 0, 255)
    assert sheet.getpixel((0, 20)) == (0, 0, 255) and sheet.getpixel((39, 20)) == (255, 255, 255)
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="at least one picture"):
            stack(nothing)
