"""`VtcImageProcessor`: bit-exact tiles, layouts, fields and clear errors."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_samples import random_image
from packaging.version import Version
from PIL import Image
from PIL import __version__ as PILLOW
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_vtc.models  # noqa: F401 - registers the Auto classes
from hf_vtc.models.image_processing_vtc import IMAGENET_MEAN, IMAGENET_STD, VtcImageProcessor
from hf_vtc.models.tiling_vtc import anyres_layout, dynamic_layout

try:
    # transformers 5
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ClipProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil as InternVLProcessor,
    )
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as LlavaProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil as LlavaNextProcessor,
    )
except ImportError:
    # 4.57
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor as ClipProcessor
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor as InternVLProcessor
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor as LlavaProcessor
    from transformers.models.llava_next.image_processing_llava_next import (
        LlavaNextImageProcessor as LlavaNextProcessor,
    )

samples_as_pillow_13 = pytest.mark.skipif(
    Version(PILLOW) < Version("13"),
    reason="before Pillow 13 a resize makes its passes in another order than ours",
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# height, width: upright, flat, exact ties between two grids (1.25, 0.75, 1.75), one tile, extremes
SIZES = [(64, 96), (97, 41), (80, 100), (100, 75), (40, 70), (400, 500), (32, 32), (7, 300), (300, 7), (65, 64)]


def to_tensor_and_normalize(tile: Image.Image, mean, std) -> torch.Tensor:
    """torchvision's ToTensor and Normalize, spelt out."""
    tensor = torch.from_numpy(np.array(tile)).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    return (tensor - mean[:, None, None]) / std[:, None, None]


def internvl_tiles(image: Image.Image, size: int, max_tiles: int) -> list[Image.Image]:
    """InternVL's preprocessing as its description reads, one sentence per block."""
    width, height = image.size
    candidates = []
    for count in range(1, max_tiles + 1):
        candidates += [(columns, count // columns) for columns in range(1, count + 1) if count % columns == 0]

    chosen = None
    for columns, rows in candidates:
        distance = abs(width / height - columns / rows)
        if chosen is None or distance < chosen[0]:
            chosen = (distance, columns, rows)
        elif distance == chosen[0] and width * height > 0.5 * size * size * columns * rows:
            chosen = (distance, columns, rows)
    _, columns, rows = chosen

    canvas = image.resize((size * columns, size * rows))
    tiles = []
    for k in range(columns * rows):
        left, top = (k % columns) * size, (k // columns) * size
        tiles.append(canvas.crop((left, top, left + size, top + size)))
    return tiles if len(tiles) == 1 else [*tiles, image.resize((size, size))]


@pytest.mark.window
@samples_as_pillow_13
@pytest.mark.parametrize("max_tiles", [1, 4, 12])
@pytest.mark.parametrize("size", [*SIZES, (1, 1)])
def test_dynamic_equals_the_description_bit_for_bit(size, max_tiles):
    image = random_image(*size)
    out = VtcImageProcessor(size=32, max_tiles=max_tiles)(image, return_tensors="pt")
    expected = [
        to_tensor_and_normalize(tile, IMAGENET_MEAN, IMAGENET_STD) for tile in internvl_tiles(image, 32, max_tiles)
    ]
    assert out["num_tiles"].tolist() == [len(expected)]
    assert out["image_sizes"].tolist() == [list(size)]
    assert out["pixel_values"].dtype == torch.float32
    assert torch.equal(out["pixel_values"], torch.stack(expected))


@pytest.mark.window
@samples_as_pillow_13
@pytest.mark.parametrize("size", SIZES)
def test_dynamic_equals_transformers_bit_for_bit(size):
    image = random_image(*size)
    theirs = InternVLProcessor(
        size={"height": 32, "width": 32},
        crop_to_patches=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )(image, return_tensors="pt")
    ours = VtcImageProcessor(size=32)(image, return_tensors="pt")
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_dynamic_at_the_published_size_equals_transformers_bit_for_bit():
    image = random_image(601, 803)
    theirs = InternVLProcessor(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )(image, return_tensors="pt")
    ours = VtcImageProcessor()(image, return_tensors="pt")
    assert ours["num_tiles"].tolist() == [13]
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.window
@samples_as_pillow_13
@pytest.mark.parametrize(
    "size", [(40, 64), (64, 40), (32, 32), (100, 100), (7, 90), (90, 7), (48, 64), (333, 500), (33, 32)]
)
def test_anyres_equals_transformers_bit_for_bit(size):
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    shared = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_grid_pinpoints": pinpoints}
    image = random_image(*size)
    theirs = LlavaNextProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **shared)(
        image, return_tensors="pt"
    )
    ours = VtcImageProcessor(tiling="anyres", size=32, **shared)(image, return_tensors="pt")
    assert ours["image_sizes"].tolist() == theirs["image_sizes"].tolist()
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"][0])
    assert ours["num_tiles"].tolist() == [len(ours["pixel_values"])]


@pytest.mark.window
@samples_as_pillow_13
@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_transformers_bit_for_bit(size):
    image = random_image(*size)
    theirs = LlavaProcessor(
        do_pad=True,
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )(image, return_tensors="pt")
    ours = VtcImageProcessor(tiling="pad", size=32, image_mean=CLIP_MEAN, image_std=CLIP_STD)(
        image, return_tensors="pt"
    )
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert "num_tiles" not in ours


@pytest.mark.window
@samples_as_pillow_13
@pytest.mark.parametrize("tiling", ("crop", "keep_aspect"))
@pytest.mark.parametrize("size", SIZES)
def test_short_side_equals_transformers_bit_for_bit(size, tiling):
    image = random_image(*size)
    shared = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    theirs = ClipProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        do_center_crop=tiling == "crop",
        **shared,
    )(image, return_tensors="pt")
    ours = VtcImageProcessor(tiling=tiling, size=32, token_stride=8, **shared)(image, return_tensors="pt")
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert ours["image_sizes"].tolist() == [list(theirs["pixel_values"].shape[-2:])]
    assert "num_tiles" not in ours


@pytest.mark.window
def test_keep_aspect_pads_images_of_a_batch_with_zeros():
    processor = VtcImageProcessor(tiling="keep_aspect", size=32, token_stride=8)
    images = [random_image(40, 64), random_image(96, 33), random_image(20, 20)]
    together = processor(images, return_tensors="pt")
    assert together["image_sizes"].tolist() == [[32, 51], [93, 32], [32, 32]]
    assert together["pixel_values"].shape == (3, 3, 93, 51)
    for image, padded, (height, width) in zip(images, together["pixel_values"], together["image_sizes"].tolist()):
        (alone,) = processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(padded[:, :height, :width], alone)
        assert not padded[:, height:].any() and not padded[:, :, width:].any()


@pytest.mark.parametrize("tiling", ("single", "pad", "crop", "keep_aspect"))
def test_token_stride_counts_tokens_of_the_processed_image(tiling):
    processor = VtcImageProcessor(tiling=tiling, size=50, token_stride=16)
    layout = processor.get_tile_layout(40, 90)
    assert layout.token_grid == ((3, 7) if tiling == "keep_aspect" else (3, 3))
    # what the model is told gives the same count again
    size = processor(random_image(40, 90), return_tensors="pt")["image_sizes"][0].tolist()
    assert processor.get_tile_layout(*size).token_grid == layout.token_grid
    assert VtcImageProcessor(tiling="pad", size=50).get_tile_layout(40, 90).token_grid is None


def test_crop_box_is_what_is_left():
    layout = VtcImageProcessor(tiling="crop", size=32).get_tile_layout(40, 80)
    assert (layout.resized_size, layout.offset) == ((32, 64), (0, -16))
    assert layout.boxes == ((20.0, 0.0, 60.0, 40.0),)


@pytest.mark.parametrize(
    "fields, message",
    (
        ({"tiling": "keep_aspect"}, "`token_stride` must be given"),
        ({"tiling": "keep_aspect", "size": 63, "token_stride": 64}, "`size` must be at least 64 pixels"),
        ({"tiling": "pad", "size": 64, "token_stride": 0}, "`token_stride` must be a positive number"),
        ({"tiling": "dynamic", "token_stride": 64}, "one tile per image"),
    ),
    ids=str,
)
def test_bad_token_strides_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        VtcImageProcessor(**fields)


@pytest.mark.window
@samples_as_pillow_13
@pytest.mark.parametrize("size", SIZES)
def test_single_equals_transformers_bit_for_bit(size):
    image = random_image(*size)
    theirs = ClipProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )(image, return_tensors="pt")
    ours = VtcImageProcessor(tiling="single", size=32, image_mean=CLIP_MEAN, image_std=CLIP_STD)(
        image, return_tensors="pt"
    )
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_pad_uses_the_truncated_mean_colour():
    processor = VtcImageProcessor(tiling="pad", size=32, image_mean=CLIP_MEAN, do_rescale=False, do_normalize=False)
    corner = processor(Image.new("RGB", (2, 32)))["pixel_values"][0, :, 0, 0]
    assert corner.tolist() == [122, 116, 104]


@pytest.mark.window
@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    tiling=st.sampled_from(["single", "pad", "anyres", "dynamic"]),
    max_tiles=st.integers(1, 40),
    use_thumbnail=st.booleans(),
)
def test_get_tile_layout_covers_the_image(height, width, tiling, max_tiles, use_thumbnail):
    processor = VtcImageProcessor(tiling=tiling, size=336, max_tiles=max_tiles, use_thumbnail=use_thumbnail)
    layout = processor.get_tile_layout(height, width)
    rows, columns = layout.grid
    grid_tiles = rows * columns
    whole = (0.0, 0.0, float(width), float(height))
    boxes = list(layout.boxes)
    if tiling == "anyres":
        assert boxes.pop(0) == whole
    elif tiling == "dynamic":
        assert grid_tiles <= max_tiles
        if use_thumbnail and grid_tiles > 1:
            assert boxes.pop() == whole
    assert len(boxes) == grid_tiles
    assert layout.num_tiles == processor.get_number_of_image_patches(height, width)
    # neighbours touch, and together they hold the image
    for k, (left, top, right, bottom) in enumerate(boxes):
        assert left < right and top < bottom
        if (k + 1) % columns:
            assert boxes[k + 1][0] == pytest.approx(right) and boxes[k + 1][1] == top
        if k + columns < grid_tiles:
            assert boxes[k + columns][1] == pytest.approx(bottom) and boxes[k + columns][0] == left
    assert boxes[0][0] <= 0 and boxes[0][1] <= 0
    assert boxes[-1][2] >= width - 1e-6 * width and boxes[-1][3] >= height - 1e-6 * height


@pytest.mark.parametrize("tiling", ["single", "pad", "anyres", "dynamic"])
def test_get_tile_layout_boxes_show_what_the_tiles_show(tiling):
    # a red square at a known place of a black image must appear in exactly those tiles whose box meets it
    image = Image.new("RGB", (300, 200))
    image.paste((255, 0, 0), (210, 130, 230, 150))
    processor = VtcImageProcessor(
        tiling=tiling, size=32, image_grid_pinpoints=[[64, 96]], image_mean=[0.0] * 3, do_normalize=False
    )
    tiles = processor(image)["pixel_values"]
    for tile, (left, top, right, bottom) in zip(tiles, processor.get_tile_layout(200, 300).boxes):
        rows, columns = np.nonzero(tile[0] > 0.5)
        inside = left < 220 < right and top < 140 < bottom
        assert bool(len(rows)) == inside
        if inside:
            # the centre of mass, taken back to pixels of the original
            x = left + (columns.mean() + 0.5) / 32 * (right - left)
            y = top + (rows.mean() + 0.5) / 32 * (bottom - top)
            assert abs(x - 220) < (right - left) / 32 and abs(y - 140) < (bottom - top) / 32


def test_layouts_of_known_sizes():
    grids = {
        # height, width: rows, columns
        (800, 1300): (2, 3),
        (896, 896): (2, 2),
        # too few pixels to earn two by two
        (600, 600): (1, 1),
        # two by one and four by two have this ratio; the larger needs more than half of its pixels
        (1200, 600): (2, 1),
        (1300, 650): (4, 2),
        (10, 5000): (1, 12),
    }
    for (height, width), grid in grids.items():
        assert dynamic_layout(height, width, 448, 1, 12, True).grid == grid
    # small squares: the first of two equally good pinpoints, in (height, width)
    assert anyres_layout(100, 100, 336, [(336, 672), (672, 336)]).grid == (1, 2)
    assert anyres_layout(100, 100, 336, [(672, 336), (336, 672)]).grid == (2, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tiling": "grid"}, "`tiling`"),
        ({"size": 0}, "`size`"),
        ({"size": {"height": 3, "width": 4}}, "`size`"),
        ({"min_tiles": 3, "max_tiles": 2}, "`min_tiles`"),
        ({"image_mean": [0.5]}, "`image_mean`"),
        ({"tiling": "anyres", "size": 32, "image_grid_pinpoints": [[33, 64]]}, "`image_grid_pinpoints`"),
        ({"tiling": "anyres", "image_grid_pinpoints": []}, "`image_grid_pinpoints`"),
    ],
)
def test_wrong_fields_are_refused_at_construction_and_at_call(fields, words):
    with pytest.raises(ValueError, match=words):
        VtcImageProcessor(**fields)
    with pytest.raises(ValueError, match=words):
        VtcImageProcessor()(random_image(8, 8), **fields)


@pytest.mark.window
def test_fields_can_be_overridden_per_call():
    processor = VtcImageProcessor(size=32)
    image = random_image(64, 64)
    assert processor(image)["num_tiles"].tolist() == [5]
    assert processor(image, max_tiles=1)["pixel_values"].shape == (1, 3, 32, 32)
    assert processor(image, max_tiles=4, use_thumbnail=False)["num_tiles"].tolist() == [4]
    assert processor(image, tiling="single", size=16)["pixel_values"].shape == (1, 3, 16, 16)
    assert processor.get_tile_layout(64, 64, max_tiles=1).num_tiles == 1
    assert processor.max_tiles == 12
    with pytest.raises(ValueError, match=r"no argument `max_tile` \(did you mean `max_tiles`\?\)"):
        processor(image, max_tile=3)


@pytest.mark.window
def test_save_pretrained_and_load(tmp_path):
    processor = VtcImageProcessor(tiling="anyres", size=32, image_grid_pinpoints=[[32, 64], [64, 32]], max_tiles=3)
    processor.save_pretrained(tmp_path / "code")
    processor.save_pretrained(tmp_path / "plain", save_code=False)
    with_code = {file.name for file in (tmp_path / "code").iterdir()}
    assert {"preprocessor_config.json", "image_processing_vtc.py", "host_processor_vtc.py"} <= with_code
    assert "image_loading_vtc.py" in with_code
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {"preprocessor_config.json"}
    assert "auto_map" not in json.loads((tmp_path / "plain" / "preprocessor_config.json").read_text())
    image = random_image(40, 90)
    expected = processor(image)["pixel_values"]
    for folder in ("code", "plain"):
        loaded = AutoImageProcessor.from_pretrained(tmp_path / folder)
        assert type(loaded) is VtcImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert np.array_equal(loaded(image)["pixel_values"], expected)
    assert VtcImageProcessor.from_pretrained(tmp_path / "plain", tiling="single").tiling == "single"
