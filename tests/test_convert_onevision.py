"""LLaVA-OneVision of transformers as a base: equal models and processor, several images in a row, what is refused."""

import pytest
import torch
from contract_samples import GREEDY
from factories import tiny_config
from onevision_models import (
    SIZES,
    both,
    onevision_tokenizer,
    picture,
    rows_of,
    stock_images,
    stock_model,
    stock_processor,
    texts_of,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaOnevisionForConditionalGeneration,
)

from hf_vtc.convert import convert, from_base
from hf_vtc.methods import record_named
from hf_vtc.models.counting_vtc import COUNT_RULES
from hf_vtc.models.grids_vtc import grid_windows, halved_grids
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.ops_vtc import pool_pyramid

pytestmark = pytest.mark.window

FIELDS = {"compress_layer_idx": 1, "compress_stride": 4}
# alone, alone and scaled down, several, several without text between them, none
ROWS = [[SIZES[2]], [SIZES[0]], [SIZES[1], SIZES[3], SIZES[2]], [SIZES[4], SIZES[3]], [], [SIZES[1]]]


def stock_folder(folder, **fields):
    """A folder of the layout of `llava-hf`."""
    stock = stock_model(**fields)
    stock.generation_config = GenerationConfig(pad_token_id=0)
    stock.save_pretrained(folder)
    onevision_tokenizer().save_pretrained(folder)
    stock_images().save_pretrained(folder)
    return stock


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A stock model, ours and its processor, as `convert` writes them."""
    folder = tmp_path_factory.mktemp("onevision")
    stock = stock_folder(folder / "hf")
    report = convert(folder / "hf", folder / "dst", "llavolta", **FIELDS)
    assert not report.fresh_keys and not report.unused_keys and not report.missing_keys and report.has_processor
    model = AutoModelForImageTextToText.from_pretrained(folder / "dst")
    return stock, model, AutoProcessor.from_pretrained(folder / "dst"), folder


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("tied", (False, True))
def test_from_base_equals_the_stock_model_bit_for_bit(converted, tmp_path, tied, dtype):
    stock_folder(tmp_path / "hf", tied=tied, dtype=dtype)
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    theirs, ours = both(converted[2], rows_of(*ROWS), dtype)
    # pixels of one processor, which differ in their last bit
    ours["pixel_values"] = torch.cat(
        [own[:count] for own, count in zip(theirs["pixel_values"], ours["num_tiles"].tolist())]
    )
    for source in (stock, tmp_path / "hf"):
        model = from_base(source, "llavolta", **FIELDS)
        assert model.dtype == dtype and model.config.max_map_tiles == 9
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        with torch.no_grad():
            expected = stock(**theirs).logits
            assert torch.equal(model(**ours, vtc_budget="full").logits, expected)
            assert not torch.allclose(model(**ours).logits, expected, atol=1e-2)


@pytest.mark.parametrize("side", ("left", "right"))
def test_stock_ids_and_every_way_to_name_the_same_images(converted, side):
    """Rows alone and in a batch, by tiles and by blocks of them, with and without `num_tiles`, greedy and beams."""
    stock, model, processor, _ = converted
    rows = rows_of(*ROWS)
    processor.tokenizer.padding_side = side
    ours = dict(processor(images=rows, text=texts_of(rows), return_tensors="pt"))
    processor.tokenizer.padding_side = "left"
    theirs, left = both(processor, rows)
    pixels = theirs["pixel_values"]
    ours["pixel_values"] = torch.cat([own[:count] for own, count in zip(pixels, ours["num_tiles"].tolist())])
    with torch.no_grad():
        out = model(**ours, vtc_budget="full")
        expected = stock(**theirs).logits
        real, of_left = ours["attention_mask"].bool(), left["attention_mask"].bool()
        torch.testing.assert_close(out.logits[real], expected[of_left], rtol=0, atol=1e-4)
        untold = {name: value for name, value in ours.items() if name != "num_tiles"}
        assert torch.equal(model(**untold, vtc_budget="full").logits, out.logits)
        # what the stock processor returns
        blocks = untold | {"pixel_values": pixels, "batch_num_images": theirs["batch_num_images"]}
        assert torch.equal(model(**blocks, vtc_budget="full").logits, out.logits)
    assert torch.equal(model.count_visual_tokens(**blocks, vtc_budget="full"), out.num_visual_tokens)
    if side == "left":
        ours_ids = model.generate(**blocks, **GREEDY, vtc_budget="full")
        assert torch.equal(ours_ids, stock.generate(**theirs, **GREEDY))


def test_a_row_generates_what_the_stock_model_does(converted):
    stock, model, processor, _ = converted
    for row, options in ((ROWS[1], {}), (ROWS[1], {"num_beams": 3}), (ROWS[2], {})):
        # of several images, transformers 4.57 shows the beams those of each other
        theirs, ours = both(processor, rows_of(row))
        expected = stock.generate(**theirs, **GREEDY | options)
        assert torch.equal(model.generate(**ours, **GREEDY | options, vtc_budget="full"), expected)


def test_the_processor_gives_what_that_of_the_base_gives(converted):
    processor, stock = converted[2], stock_processor()
    sizes = [*SIZES, (1, 40), (130, 9), (64, 128), (127, 65), (200, 300), (31, 33)]
    # alone each; in a prompt of several; and as transformers takes a list without rows, alone although in one prompt
    for images in ([[picture(*size)] for size in sizes], rows_of(sizes), [picture(*size) for size in sizes[:3]]):
        nested = isinstance(images[0], list)
        texts = texts_of(images) if nested else ["<image> a <image><image>"]
        arguments = {"images": images, "text": texts, "return_tensors": "pt", "padding": True}
        ours, theirs = processor(**arguments), stock(**arguments)
        for row, expected in zip(ours["input_ids"], theirs["input_ids"]):
            assert int((row == processor.image_token_id).sum()) == int((expected == processor.image_token_id).sum())
        assert torch.equal(ours["image_sizes"], theirs["image_sizes"])
        given = torch.cat([own[:count] for own, count in zip(theirs["pixel_values"], ours["num_tiles"].tolist())])
        # 255 is divided by here, and its inverse is multiplied with there
        torch.testing.assert_close(ours["pixel_values"], given, rtol=0, atol=1e-6)
        assert len(given) == int(ours["num_tiles"].sum())


def test_a_chat_with_several_images_is_that_of_the_base(converted):
    processor, stock = converted[2], stock_processor()
    template = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
    template += "{% endfor %}{% endfor %}"
    for pictures in ([picture(*SIZES[0])], [picture(*SIZES[0]), picture(*SIZES[2])]):
        parts = [{"type": "image", "image": each} for each in pictures] + [{"type": "text", "text": "what?"}]
        arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "chat_template": template}
        chat = [{"role": "user", "content": parts}]
        ours, theirs = (each.apply_chat_template(chat, **arguments) for each in (processor, stock))
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_counts_equal_the_formula_of_the_base():
    """On the tower of the published checkpoints: 27 x 27 tokens, canvases of up to 6 x 6 tiles."""
    sides = list(range(384, 2305, 384))
    images = VtcImageProcessor(
        "anyres", 384, image_grid_pinpoints=[[h, w] for h in sides for w in sides], max_map_tiles=9
    )
    stock = stock_processor()
    stock.num_image_tokens, stock.image_processor.image_grid_pinpoints = 729, images.image_grid_pinpoints
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 4000, (1500, 2), generator=generator).tolist()
    sizes += [[side, side + gap] for side in range(900, 2400, 60) for gap in (-1, 0, 1)]
    for height, width in sizes:
        found = COUNT_RULES["unpad_true_aspect"](images.get_tile_layout(height, width), 729)
        assert found == stock._get_number_of_features(height, width, 384, 384), (height, width)
        assert COUNT_RULES["unpad_true_aspect"](images.get_tile_layout(height, width, alone=False), 729) == 730


def test_a_tile_with_an_odd_rest_is_read_as_the_base_reads_it():
    """As of 384 pixels and patches of 14, whose last columns no patch sees."""
    stock = stock_model(image_size=27)
    stock.config.image_grid_pinpoints = [[27 * rows, 27 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    model = from_base(stock, "llavolta", **FIELDS)
    assert model.config.token_grid == (3, 3)
    pixels, sizes = torch.randn(17, 3, 27, 27), torch.tensor([[100, 101]])
    features = stock.get_image_features(pixels, sizes, vision_feature_layer=-1)
    features = features if isinstance(features, (list, tuple)) else features.pooler_output
    ours = model.get_image_features(pixels, num_tiles=torch.tensor([17]), image_sizes=sizes).pooler_output
    assert len(ours) == 1 and torch.equal(ours[0], features[0])


def test_a_pyramid_of_an_odd_grid_by_hand():
    """27 x 27 tokens: windows of 1 x 2, 2 x 2, 2 x 4 and 4 x 4, those at an edge of what is there."""
    assert halved_grids(27)[:5] == [(27, 27), (27, 14), (14, 14), (14, 7), (7, 7)]
    features = torch.randn(2, 729, 5)
    pyramid = pool_pyramid(features, [49, 98, 196, 378, 729])
    assert pyramid[-1] is features
    for found, (high, wide) in zip(pyramid, ((4, 4), (2, 4), (2, 2), (1, 2))):
        members, widths = grid_windows(729, 27, high, wide)
        expected = torch.stack([features[:, own].mean(1) for own in members.split(widths.tolist())], dim=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="364 tokens cannot be reached.*729, 378, 196"):
        pool_pyramid(features, [364])


# what is refused


@pytest.mark.parametrize("method", ("vico", "vistog", "visionzip", "convllava"))
def test_methods_that_do_not_fit_are_refused_with_the_reason(method):
    reason = record_named(method).config.refused_bases["llava_onevision"]
    with pytest.raises(ValueError, match=f"{method} does not fit llava_onevision: {reason}"):
        from_base(stock_model(), method)


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"vision_aspect_ratio": "anyres"}, "`vision_aspect_ratio` must be 'anyres_max_' and a number of tiles"),
        ({"vision_feature_layer": [-2, -1]}, "must be one layer"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    ),
    ids=str,
)
def test_settings_without_a_counterpart_are_refused(fields, message):
    stock = stock_model()
    for name, value in fields.items():
        setattr(stock.config, name, value)
    with pytest.raises(ValueError, match=message):
        from_base(stock, "llavolta")


@pytest.mark.parametrize(
    "fields",
    (
        {"max_map_tiles": 0},
        {"unpad_rule": "token_grid"},
        {"mm_patch_merge_type": "flat", "image_grid_pinpoints": None},
    ),
    ids=str,
)
def test_a_limit_that_means_nothing_is_refused(fields):
    with pytest.raises(ValueError, match="`max_map_tiles` must be a positive number of tiles"):
        tiny_config("llavolta on llava_onevision", **fields)
    with pytest.raises(ValueError, match="`max_map_tiles` must be a positive number of tiles"):
        VtcImageProcessor("dynamic", 32, max_map_tiles=9)


def test_wrong_tiles_are_refused(converted):
    stock, model, processor, _ = converted
    theirs, ours = both(processor, rows_of([SIZES[1]], [SIZES[3], SIZES[2]]))
    with pytest.raises(ValueError, match="do not match"):
        # as if each were cut
        model(**{**ours, "num_tiles": torch.tensor([13, 2, 4])})
    with pytest.raises(ValueError, match="needs 3 x 4 tiles"):
        model(**{**ours, "num_tiles": torch.tensor([14, 1, 1]), "pixel_values": torch.zeros(16, 3, 32, 32)})
