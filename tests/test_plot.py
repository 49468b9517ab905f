"""Pictures of what was kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import METHODS, tiny_config, tiny_model, tiny_processor
from PIL import Image, ImageFont

from hf_vtc.methods import record_of
from hf_vtc.methods.drawing import Kept
from hf_vtc.models.configuration_llavolta import COMPRESSORS
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.plot import COMPRESSED_COLOUR, FULL_COLOUR, canvas, overlay, stack

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
    model, processor = tiny_model("vico"), tiny_processor("vico", max_tiles=12, return_layout=True)
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


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def drawing_of(method, processor, size, decisions=None, num_tokens=None, **fields):
    """Drawing of an image of `size` (height, width) pixels, and the config."""
    config = tiny_config(method, **fields)
    counts = None if num_tokens is None else torch.tensor([num_tokens])
    output = SimpleNamespace(router_decisions=decisions, num_visual_tokens=counts)
    kept = Kept(processor.get_tile_layout(*size), output, config, 0, None, None)
    return record_of(config).draw(kept), config


def tokens_of(drawing):
    """How many cells each visual token has in all tiles together."""
    cells = np.concatenate([tile.cells.flatten() for tile in drawing.tiles])
    tokens, counts = np.unique(cells[cells >= 0], return_counts=True)
    return dict(zip(tokens.tolist(), counts.tolist()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ("auto", "full"))
def test_overlay_of_every_method(method, budget):
    model, processor = tiny_model(method), tiny_processor(method, return_layout=True)
    images = [Image.new("RGB", (96, 64), "red"), Image.new("RGB", (48, 64), "blue")]
    token = processor.image_token
    inputs = processor(images=images, text=f"{token} and {token}?", return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, vtc_budget=budget)
    for image_idx, image in enumerate(images):
        arguments = {"config": model.config, "num_tiles": inputs.get("num_tiles"), "image_idx": image_idx}
        picture = overlay(image, output, processor, **arguments, max_side=160)
        assert picture.mode == "RGB" and max(picture.size) >= 160
        assert count(picture, FULL_COLOUR) + count(picture, COMPRESSED_COLOUR) > 0
        if budget == "full":
            # what is not compressed has the colour of what is not, but for ViCO's legend of both
            assert method == "vico" or count(picture, COMPRESSED_COLOUR) == 0
            assert count(picture, FULL_COLOUR) > 0
    with pytest.raises(ValueError, match="image_idx|Image 2"):
        overlay(images[0], output, processor, **{**arguments, "image_idx": 2})


@pytest.mark.parametrize("granularity_idx", range(5))
@pytest.mark.parametrize("size", [(64, 64), (40, 90), (90, 40), (33, 64)])
def test_avg_llava_draws_the_tokens_that_stay(size, granularity_idx):
    processor = VtcImageProcessor("anyres", 32, image_grid_pinpoints=PINPOINTS)
    decisions = torch.tensor([granularity_idx])
    drawing, config = drawing_of("avg_llava", processor, size, decisions, image_grid_pinpoints=PINPOINTS)
    grid = config.granularity_grids[granularity_idx]
    assert {tile.cells.shape for tile in drawing.tiles} == {grid}
    assert set(tokens_of(drawing).values()) == {1}
    model = tiny_model("avg_llava", image_grid_pinpoints=PINPOINTS)
    full = tiny_processor("avg_llava", image_grid_pinpoints=PINPOINTS)
    inputs = full(images=Image.new("RGB", size[::-1]), text=full.image_token, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, router_decisions=decisions)
    # the rest are newlines, one per row of the map
    newlines = int(output.num_visual_tokens) - len(tokens_of(drawing))
    rows = [np.unique(np.nonzero(tile.cells >= 0)[0]) for tile in drawing.tiles[1:]]
    columns = processor.get_tile_layout(*size).grid[1]
    assert newlines == sum(len(own) for own in rows[::columns])
    assert f"kept {int(output.num_visual_tokens)} of" in drawing.legend[1][1]


def test_avg_llava_shows_what_is_cut():
    processor = VtcImageProcessor("anyres", 32, image_grid_pinpoints=PINPOINTS)
    cut, whole = (
        drawing_of(
            "avg_llava",
            processor,
            (64, 64),
            torch.tensor([3]),
            image_grid_pinpoints=PINPOINTS,
            unpad_rule=rule,
            vis_token_granularity=[1, 2, 4, 8, 16],
        )[0]
        for rule in ("token_grid", "true_aspect")
    )
    # twice as many rows as columns of tokens, so that half of the rows go
    assert sum((tile.cells < 0).sum() for tile in whole.tiles) == 0
    assert sum((tile.cells < 0).sum() for tile in cut.tiles) == 4 * 8 / 2


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("stride", (1, 4))
def test_llavolta_draws_what_becomes_one_token(compressor, stride):
    processor = VtcImageProcessor("pad", 32)
    config = tiny_config("llavolta", compressor=compressor, compress_stride=stride, compress_layer_idx=1)
    reserved = config.image_seq_length
    kept = config.kept_tokens(reserved, stride)
    fields = {"compressor": compressor, "compress_stride": stride, "compress_layer_idx": 1}
    drawing, _ = drawing_of("llavolta", processor, (32, 32), num_tokens=kept, **fields)
    members = tokens_of(drawing)
    if stride == 1 or compressor in ("random", "kmeans", "attention"):
        # where the members are not known, the grid of all tokens
        assert list(members.values()) == [1] * reserved and not drawing.tiles[0].filled
    else:
        assert list(members.values()) == [1 if compressor == "uniform" else stride] * kept
        assert drawing.tiles[0].filled
    assert f"kept {kept} of {reserved}" in drawing.legend[1][1]


@pytest.mark.parametrize(
    "compressor, words",
    [
        ("avgpool1d", "one of 4 spans of 4 neighbours, which becomes one token"),
        ("avgpool2d", "one of 4 spans of 2 x 2 neighbours, which becomes one token"),
        ("uniform", "one of 4 tokens that stay, of 4 neighbours each"),
        ("kmeans", "kmeans chooses by content, which is not drawn"),
    ],
)
def test_llavolta_says_what_its_colours_mean(compressor, words):
    fields = {"compressor": compressor, "compress_stride": 4, "compress_layer_idx": 1}
    processor = VtcImageProcessor("pad", 32)
    drawing, _ = drawing_of("llavolta", processor, (32, 32), num_tokens=4, **fields)
    swatch, text = drawing.legend[2]
    assert words in text and (swatch == "many") == drawing.tiles[0].filled
    # without compression there is nothing to say
    drawing, _ = drawing_of("llavolta", processor, (32, 32), num_tokens=16, **{**fields, "compress_stride": 1})
    assert len(drawing.legend) == 2


def test_llavolta_labels_tiles_whose_spans_are_their_own():
    processor = VtcImageProcessor("dynamic", 32)
    for stride, labels in ((4, ["4", "4", "4"]), (5, [None, None, None])):
        drawing, _ = drawing_of("llavolta", processor, (32, 64), num_tokens=48 // stride, compress_stride=stride)
        assert [tile.label for tile in drawing.tiles] == labels


def test_llavolta_leaves_the_rest_out():
    # 16 tokens by 5: three windows of neighbours, and one token that fills none
    drawing, _ = drawing_of("llavolta", VtcImageProcessor("pad", 32), (32, 32), num_tokens=3, compress_stride=5)
    assert drawing.tiles[0].cells.flatten().tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [-1]


def test_llavolta_spans_run_on_from_tile_to_tile():
    processor = VtcImageProcessor("dynamic", 32)
    drawing, _ = drawing_of("llavolta", processor, (32, 64), num_tokens=48 // 5, compress_stride=5)
    cells = np.concatenate([tile.cells.flatten() for tile in drawing.tiles])
    assert cells.tolist() == [place // 5 if place < 45 else -1 for place in range(48)]


def test_vistog_draws_its_groups():
    processor = VtcImageProcessor("dynamic", 32)
    groups = torch.stack([torch.arange(16) % 4, torch.full((16,), -1), torch.full((16,), 2)])
    drawing, _ = drawing_of("vistog", processor, (32, 64), groups)
    assert np.array_equal(drawing.tiles[0].cells, groups[0].reshape(4, 4).numpy())
    assert [tile.filled for tile in drawing.tiles] == [True, False, True]
    assert len(np.unique(drawing.tiles[1].cells)) == 16
    assert "2 of 3 tiles in 4 semantic groups, at least 1 of them" in drawing.legend[0][1]
    assert "kept 24 of 48" in drawing.legend[1][1]
    assert drawing.legend[2][0] == "many" and "patches of one semantic group" in drawing.legend[2][1]
    assert "a cell without colour is one token" in drawing.legend[3][1]
    # what is not there needs no words
    drawing, _ = drawing_of("vistog", processor, (32, 64), torch.full((3, 16), -1))
    assert [swatch for swatch, _ in drawing.legend] == [FULL_COLOUR, None, None]


def test_convllava_draws_a_grid_over_what_fills_tokens():
    config = tiny_config("convllava")
    stride = config.token_stride
    processor = VtcImageProcessor("keep_aspect", 3 * stride, token_stride=stride)
    size = (2 * stride, 3 * stride)
    drawing, _ = drawing_of("convllava", processor, size, num_tokens=3 * 4)
    # the long side is 4.5 tokens
    assert drawing.tiles[0].cells.shape == (3, 4)
    assert drawing.tiles[0].covered == pytest.approx((1.0, 4 / 4.5))
    with pytest.raises(ValueError, match="3 x 4 visual tokens by its processor, but 5 by the output"):
        drawing_of("convllava", processor, size, num_tokens=5)
    # of a long image the middle is seen
    crop = VtcImageProcessor("crop", 3 * stride, token_stride=stride)
    drawing, _ = drawing_of("convllava", crop, size, num_tokens=9)
    assert drawing.tiles[0].covered == pytest.approx((1.0, 1.0))


def test_cells_are_filled_divided_and_veiled():
    layout = VtcImageProcessor("single", 32).get_tile_layout(40, 40)
    cells = np.array([[0, 1], [0, -1]])

    def pixels_of(**fields):
        tile = canvas.Tile(FULL_COLOUR, cells, **fields)
        drawing = canvas.Drawing([tile], [(None, "text")])
        return np.asarray(canvas.compose(Image.new("RGB", (40, 40)), layout, drawing, None, 40))[14:54, 14:54]

    plain, filled, half = pixels_of(), pixels_of(filled=True), pixels_of(covered=(1.0, 0.5))
    # cells of 20 pixels: black, black, black, veiled
    assert [plain[y, x].max() for y, x in ((10, 10), (10, 30), (30, 10))] == [0, 0, 0] and plain[30, 30].min() > 120
    # no line within a token, one between two
    assert plain[20, 10].max() == 0 and plain[10, 20].max() > 0
    assert tuple(filled[10, 10]) == tuple(filled[30, 10]) != tuple(filled[10, 30])
    assert half[10, 5].max() == 0 and half[10, 15].max() == 0 and half[10, 25].min() > 120


def test_overlay_writes_the_number_of_tokens():
    # numbers of another size change the picture, and nothing else does
    image, processor = Image.new("RGB", (32, 32)), processor_of()
    plain, sixteen, again, other = (
        overlay(image, [False], processor, tokens_per_tile=tokens, max_side=100)
        for tokens in (None, (16, 4), (16, 4), (64, 4))
    )
    assert sixteen.tobytes() == again.tobytes()
    assert len({plain.tobytes(), sixteen.tobytes(), other.tobytes()}) == 3


def test_overlay_caption_is_broken_where_the_picture_ends():
    image, processor = Image.new("RGB", (32, 32)), processor_of()
    plain, one, long = (
        overlay(image, [True], processor, max_side=200, caption=caption)
        for caption in ((), ["Why?"], ["Why? " * 40, "x" * 300])
    )
    line = one.height - plain.height
    assert line > 0 and plain.width == one.width == long.width
    assert (long.height - plain.height) % line == 0 and long.height - plain.height >= 6 * line
    # the last line is written, and within the sheet
    ink = np.asarray(long.convert("L")) < 128
    assert ink[-line - 7 :].any() and not ink[:, -10:].any()


@pytest.mark.parametrize("text", ["", "a", "two words", "w" * 500, "short " + "l" * 90 + " short", "é" * 40, "  "])
def test_broken_text_loses_nothing_and_fits(text):
    font = ImageFont.load_default(12)
    lines = canvas._broken(text, 60, font)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 60 for line in lines)


def test_overlay_names_the_whole_view():
    # of a flat image the name is lower than the tiles, and above the legend
    image, processor = Image.new("RGB", (1600, 100), "red"), VtcImageProcessor(size=32, max_tiles=16)
    assert processor.get_tile_layout(100, 1600).num_tiles == 17
    picture = np.asarray(overlay(image, [True] * 17, processor, max_side=640).convert("L"))
    # black on white right of the tiles, where only the whole view is
    assert (picture[:, 14 + 640 + 14 :] < 100).any()


def test_overlay_swatches():
    image, processor = Image.new("RGB", (32, 32)), VtcImageProcessor("single", 32)
    layout = processor.get_tile_layout(32, 32)
    tile = canvas.Tile(FULL_COLOUR)

    def colours_of(swatch):
        drawing = canvas.Drawing([tile], [(swatch, "")])
        sheet = canvas.compose(image, layout, drawing, None, 32)
        return {colour for _, colour in sheet.crop((14, 46, 40, sheet.height)).getcolors()}

    assert COMPRESSED_COLOUR in colours_of(COMPRESSED_COLOUR)
    assert {canvas._hue(index) for index in range(3)} <= colours_of("many")
    assert colours_of(None) == {canvas.PAPER}
    assert colours_of(canvas.PAPER) == {canvas.PAPER, canvas._INK}


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
        ([True] * 3, {"config": SimpleNamespace(model_type="llava")}, "`model_type` must be one of .*, got 'llava'"),
        (torch.zeros(1), {"config": SimpleNamespace(model_type="vtc_avg_llava")}, "one granularity per image"),
        (torch.zeros(3, 4), {"config": SimpleNamespace(model_type="vtc_vistog")}, "the group of each patch"),
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
