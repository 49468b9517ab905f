"""What is particular to ConvLLaVA: images at their own sizes, the tower, its memory, and one admissible count."""

import copy
import json
from collections import Counter
from functools import partial

import pytest
import torch
from factories import images_of, random_batch, tiny_config, tiny_model, tiny_processor
from torch import nn
from transformers import AutoModelForImageTextToText, ConvNextConfig, ConvNextModel

from hf_vtc.models import modeling_convllava
from hf_vtc.models.configuration_convllava import ConvllavaConfig
from hf_vtc.models.modeling_convllava import ConvNextTower, DropPath, encode_sizes
from hf_vtc.models.tiling_vtc import ImageSizes


@pytest.fixture(scope="module")
def model():
    return tiny_model("convllava")


def batch_of(model, images_per_row, seed=0):
    return random_batch(model.config, torch.Generator().manual_seed(seed), images_per_row=images_per_row)


def padded(*images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images `(3, H, W)` as the model takes them, with NaN where nobody may read."""
    sizes = [torch.tensor([image.shape[-2:]]) for image in images]
    parts = [{"pixel_values": image[None], "image_sizes": size} for image, size in zip(images, sizes)]
    return images_of(tiny_config("convllava")).collate(parts)


SIZES = ((48, 48), (16, 80), (37, 21), (48, 48), (80, 16), (37, 21), (48, 48))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.float64, 1e-12)), ids=str)
def test_images_of_any_sizes_equal_each_image_alone(model, dtype, tolerance):
    model = copy.deepcopy(model).to(dtype)
    images = [torch.randn(3, height, width) for height, width in SIZES]
    with torch.no_grad():
        together = model.get_image_features(**padded(*images)).pooler_output
        alone = [model.get_image_features(image[None]).pooler_output[0] for image in images]
    assert [part.shape[0] for part in together] == [9, 5, 2, 9, 5, 2, 9]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_encode_sizes_runs_equal_sizes_together(model):
    tower, batches = model.model.vision_tower, []
    handle = tower.register_forward_pre_hook(lambda _, args: batches.append([tuple(batch.shape) for batch in args]))
    images = padded(*[torch.randn(3, height, width) for height, width in SIZES])
    try:
        with torch.no_grad():
            features = encode_sizes(tower, images["pixel_values"], images["image_sizes"].tolist())
    finally:
        handle.remove()
    # one call, whatever the number of sizes: sharded training needs that
    assert batches == [[(3, 3, 48, 48), (1, 3, 16, 80), (2, 3, 37, 21), (1, 3, 80, 16)]]
    assert [tuple(part.shape) for part in features] == [(n, 32) for n in (9, 5, 2, 9, 5, 2, 9)]


def test_encode_sizes_bounds_what_runs_at_a_time(model, monkeypatch):
    """Without a graph; the tower is called once, and images are what they were."""
    tower, batches = copy.deepcopy(model.model.vision_tower).double(), []
    images = padded(*[torch.randn(3, height, width) for height, width in SIZES])
    given = images["pixel_values"].double(), images["image_sizes"].tolist()
    with torch.no_grad():
        expected = encode_sizes(tower, *given)
    handle = tower.register_forward_pre_hook(lambda _, args: batches.append([len(batch) for batch in args]))
    monkeypatch.setattr(modeling_convllava, "_PIXELS_AT_ONCE_ON_CPU", 2 * 48 * 48)
    try:
        with torch.no_grad():
            bounded = encode_sizes(tower, *given)
        trained = encode_sizes(tower, *given)
        monkeypatch.setattr(modeling_convllava, "_PIXELS_AT_ONCE_ON_CPU", 1)
        with torch.no_grad():
            alone = encode_sizes(tower, *given)
    finally:
        handle.remove()
    assert batches == [[2, 1, 1, 2, 1], [3, 1, 2, 1], [1] * 7]
    for found in (bounded, trained, alone):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_features_are_in_reading_order(model):
    pixel_values = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        features, (maps,) = model.model.encode(pixel_values), model.model.vision_tower(pixel_values)
    assert maps.shape == (1, 32, 3, 4)
    for row in range(3):
        for column in range(4):
            assert torch.equal(features[0, 4 * row + column], maps[0, :, row, column])


@pytest.mark.window
@pytest.mark.parametrize("size", ((48, 48), (37, 83)), ids=str)
def test_tower_equals_the_stock_model_bit_for_bit(model, size):
    stock = ConvNextModel(copy.deepcopy(model.config.vision_config)).eval()
    loaded = stock.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert loaded.missing_keys == ["layernorm.weight", "layernorm.bias"] and not loaded.unexpected_keys
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        (maps,) = model.model.vision_tower(pixel_values)
        assert torch.equal(maps, stock(pixel_values).last_hidden_state)


def test_tower_takes_weights_of_four_stages():
    """A model of transformers is the start of training, before the fifth stage is added."""
    torch.manual_seed(1)
    config = ConvNextConfig(num_stages=4, hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 2, 1], image_size=64)
    stock = ConvNextModel(config).eval()
    four = ConvllavaConfig(config.to_dict(), tiny_config("convllava").text_config)
    assert four.token_stride == 32 and four.image_seq_length == 4
    tower = ConvNextTower(four.vision_config).eval()
    assert tower.load_state_dict(stock.state_dict(), strict=False).unexpected_keys == [
        "layernorm.weight",
        "layernorm.bias",
    ]
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(tower(pixel_values)[0], stock(pixel_values).last_hidden_state)


@pytest.mark.parametrize(
    "size, tokens",
    (((64, 64), 1), ((768, 768), 144), ((1536, 2172), 792), ((200, 281), 12), ((127, 640), 10)),
    ids=str,
)
def test_reserved_tokens_of_sizes(size, tokens):
    config = ConvllavaConfig(text_config={"model_type": "llama"})
    sizes = ImageSizes(None, torch.tensor([size]), None)
    assert config.token_stride == 64 and config.reserved_tokens(sizes).tolist() == [tokens]
    assert config.levels(sizes) == [(tokens,)]


def test_published_stride_counts_what_the_tower_gives():
    vision = {"hidden_sizes": [4, 4, 4, 4, 8], "depths": [1] * 5, "image_size": 128, "layer_scale_init_value": 0.5}
    model = tiny_model("convllava", vision_config=vision)
    assert model.config.token_stride == 64 and model.config.image_seq_length == 4
    for size in ((64, 64), (127, 200), (200, 281), (66, 129)):
        with torch.no_grad():
            features = model.model.encode(torch.randn(1, 3, *size))
        assert features.shape == (1, (size[0] // 64) * (size[1] // 64), 8)


@pytest.mark.parametrize("size", ((15, 48), (48, 15), (1, 1)), ids=str)
def test_images_smaller_than_a_token_are_refused(model, size):
    with pytest.raises(ValueError, match="at least 16 per side"):
        model.model.encode(torch.randn(1, 3, *size))
    ids = torch.tensor([[5] + [model.config.image_token_id] * 9 + [7]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 48, 48), "image_sizes": torch.tensor([size])}
    with pytest.raises(ValueError, match=f"Image 0 has {size[0]} x {size[1]} pixels.*at least 16 per side"):
        model(**batch)


@pytest.mark.parametrize("full", (None, "auto", "full", 1.0, 99))
def test_the_reserved_count_is_the_only_one(model, full):
    batch = batch_of(model, [2, 1], seed=2)
    with torch.no_grad():
        expected = model(**batch)
        out = model(**batch, vtc_budget=full)
    assert torch.equal(out.logits, expected.logits)
    reserved = [height // 16 * (width // 16) for height, width in batch["image_sizes"].tolist()]
    assert out.num_visual_tokens.tolist() == reserved


def test_budgets_below_it_are_refused(model):
    batch = batch_of(model, [2, 1], seed=2)
    reserved = model.count_visual_tokens(**batch).tolist()
    exact = model.count_visual_tokens(**batch, vtc_budget=list(reserved))
    assert exact.tolist() == reserved
    for budget in (0.99, reserved[0] - 1 or 0.5):
        with pytest.raises(ValueError, match=f"image 0, but the smallest admissible count is {reserved[0]}"):
            model(**batch, vtc_budget=budget)
    with pytest.raises(ValueError, match=f"image 2, but the smallest admissible count is {reserved[2]}"):
        model(**batch, vtc_budget=["auto", "full", 0.5])


def test_image_sizes_can_be_left_out_where_images_fill_their_pixels(model):
    images = padded(torch.randn(3, 32, 48), torch.randn(3, 32, 48))
    ids = torch.tensor([[5] + [model.config.image_token_id] * 6 + [6] + [model.config.image_token_id] * 6 + [7]])
    with torch.no_grad():
        expected = model(input_ids=ids, **images).logits
        assert torch.equal(model(input_ids=ids, pixel_values=images["pixel_values"]).logits, expected)


@pytest.mark.parametrize(
    "sizes, message",
    (([[48, 48]], r"shape \(2, 2\)"), ([[48, 48], [49, 32]], "image 1 is 49 x 32.*room for 48 x 48")),
    ids=("one missing", "too large"),
)
def test_image_sizes_must_fit_the_pixels(model, sizes, message):
    ids = torch.tensor([[5] + [model.config.image_token_id] * 18 + [7]])
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 48, 48), image_sizes=torch.tensor(sizes))


def test_precomputed_features_give_the_same_result(model):
    batch = batch_of(model, [1, 2], seed=3)
    with torch.no_grad():
        expected = model(**batch)
        pixel_values = batch.pop("pixel_values")
        features = model.get_image_features(pixel_values, image_sizes=batch["image_sizes"]).last_hidden_state
        assert features.shape[:2] == (1, int(expected.num_visual_tokens.sum()))
        assert torch.equal(model(**batch, image_features=features).logits, expected.logits)
        assert torch.equal(model.count_visual_tokens(**batch, image_features=features), expected.num_visual_tokens)
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(**batch, image_features=features[:, 1:])
        batch.pop("image_sizes")
        with pytest.raises(ValueError, match="`image_sizes` must be given with `image_features`"):
            model(**batch, image_features=features)


def test_text_only_rows_take_no_image(model):
    """The original feeds a dummy image for each."""
    batch = batch_of(model, [0, 1, 0], seed=4)
    with torch.no_grad():
        out = model(**batch)
        text = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
        alone = model(**text)
    assert len(batch["image_sizes"]) == 1 and out.num_visual_tokens.shape == (1,)
    real = text["attention_mask"][0].bool()
    torch.testing.assert_close(out.logits[0, real], alone.logits[0, real], rtol=0, atol=1e-5)


def test_training_on_text_alone_costs_one_token_of_vision(model):
    """At 1536 pixels a black image of full size would cost more than the text."""
    model = copy.deepcopy(model).train()
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.extend(args))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 3, 16, 16)]
    gradients = [parameter.grad for parameter in model.model.vision_tower.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.window
def test_fold_layer_scale(model, tmp_path):
    folded = copy.deepcopy(model)
    before = folded.num_parameters()
    assert folded.model.vision_tower.fold_layer_scale() is folded.model.vision_tower
    num_scales = sum(width * depth for width, depth in zip((8, 8, 12, 16, 32), (1, 1, 2, 1, 1)))
    assert folded.num_parameters() == before - num_scales
    batch = batch_of(model, [2, 1], seed=5)
    with torch.no_grad():
        expected, out = model(**batch).logits, folded(**batch).logits
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        # what was folded stays folded on disk
        folded.save_pretrained(tmp_path, save_code=False)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).logits, out)
        again = copy.deepcopy(folded)
        again.model.vision_tower.fold_layer_scale()
        assert torch.equal(again(**batch).logits, out)
    assert model.config.vision_config.layer_scale_init_value == 0.5


def test_channels_last_memory(model):
    changed = copy.deepcopy(model).to(memory_format=torch.channels_last)
    convolution = changed.model.vision_tower.encoder.stages[1].downsampling_layer[1]
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.weight.is_contiguous()
    batch = batch_of(model, [2, 1], seed=6)
    with torch.no_grad():
        torch.testing.assert_close(changed(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


def count_call(counts: Counter, idx: int, *_) -> None:
    counts[idx] += 1


@pytest.mark.window
@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("num_frozen", (0, 2, 4, 5))
def test_gradient_checkpointing_by_stage(reentrant, num_frozen):
    """The same gradients behind frozen stages too, each trained stage computed once more, frozen ones not."""
    model = tiny_model("convllava").train()
    tower = model.model.vision_tower
    for module in (tower.embeddings, *tower.encoder.stages[:num_frozen]):
        module.requires_grad_(False if num_frozen else True)
    batch = batch_of(model, [1, 1], seed=7)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients, runs = [], []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        counts = Counter()
        handles = [
            stage.layers[0].register_forward_pre_hook(partial(count_call, counts, idx))
            for idx, stage in enumerate(tower.encoder.stages)
        ]
        model(**batch, labels=labels).loss.backward()
        for handle in handles:
            handle.remove()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
        runs.append([counts[idx] for idx in range(5)])
    for name, expected in gradients[0].items():
        assert expected is not None and gradients[1][name] is not None, name
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)
    num_sizes = len({tuple(size) for size in batch["image_sizes"].tolist()})
    assert runs[0] == [num_sizes] * 5
    assert runs[1] == [num_sizes if idx < num_frozen else 2 * num_sizes for idx in range(5)]


def test_drop_path():
    torch.manual_seed(0)
    branch = torch.ones(4000, 2, 3, 1)
    drop = DropPath(0.25)
    dropped = drop.train()(branch)
    assert torch.equal(dropped.amin((1, 2, 3)), dropped.amax((1, 2, 3)))
    kept = dropped[:, 0, 0, 0]
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert abs(float(kept.mean()) - 1) < 0.05
    assert drop.eval()(branch) is branch and DropPath(0.0).train()(branch) is branch


def test_drop_path_rates_rise_over_the_blocks():
    vision = tiny_config("convllava").vision_config.to_dict() | {"drop_path_rate": 0.5}
    tower = ConvNextTower(tiny_config("convllava", vision_config=vision).vision_config)
    rates = [module.p for module in tower.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.window
def test_config_keeps_five_stages(model, tmp_path):
    model.save_pretrained(tmp_path, save_code=False)
    stored = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    assert stored["num_stages"] == 5 and stored["depths"] == [1, 1, 2, 1, 1]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert len(loaded.model.vision_tower.encoder.stages) == 5
    assert loaded.config.token_stride == 16 and loaded.config.image_seq_length == 9
    for name in ("depths", "hidden_sizes", "num_stages", "patch_size", "image_size", "layer_scale_init_value"):
        assert getattr(loaded.config.vision_config, name) == getattr(model.config.vision_config, name), name


def test_config_counts_stages_itself():
    # transformers alone builds four stages of such a config
    fields = {"hidden_sizes": [4, 4, 4, 4, 8], "depths": [1] * 5, "image_size": 128}
    assert ConvNextConfig(**fields).num_stages == 4
    assert ConvllavaConfig(fields).vision_config.num_stages == 5
    with pytest.raises(ValueError, match="num_stages=5"):
        ConvllavaConfig(ConvNextConfig(**fields))
    with pytest.raises(ValueError, match="num_stages=5"):
        ConvllavaConfig(fields | {"num_stages": 4})


def test_default_config_is_the_published_tower():
    config = ConvllavaConfig()
    assert (config.token_stride, config.image_seq_length) == (64, 144)
    with torch.device("meta"):
        tower = ConvNextTower(config.vision_config)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 669_161_664
    assert len(tower.state_dict()) == 398


@pytest.mark.parametrize(
    "fields, message",
    (
        ({"downsample_ratio": 0.5}, "downsample_ratio"),
        ({"vision_feature_layer": -2}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"image_seq_length": 8}, "image_seq_length"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "'convnext', got 'clip_vision_model'"),
        ({"vision_config": {"depths": [1, 1], "hidden_sizes": [4, 4, 4], "image_size": 64}}, "the same stages"),
        ({"vision_config": {"depths": [1, 0], "hidden_sizes": [4, 4], "image_size": 64}}, "at least 1 block"),
        ({"vision_config": {"depths": [1] * 5, "hidden_sizes": [4] * 5, "image_size": 63}}, "at least 64 pixels"),
        ({"vision_config": {"depths": [1] * 4, "hidden_sizes": [4] * 4, "image_size": [64, 96]}}, "image_size"),
    ),
    ids=str,
)
def test_bad_config_fields_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("convllava", **fields)


@pytest.mark.window
@pytest.mark.parametrize("tiling", ("keep_aspect", "pad", "crop", "single"))
def test_processor_reserves_what_the_model_gives(model, tiling):
    processor = tiny_processor("convllava", tiling=tiling)
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for height, width in ((40, 70), (90, 33))]
    images.append(torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8))
    text = [f"{processor.image_token} and {processor.image_token}", f"{processor.image_token}?"]
    inputs = processor(images=[images[:2], images[2:]], text=text, return_tensors="pt")
    sizes = {"keep_aspect": [[48, 84], [130, 48], [48, 48]]}.get(tiling, [[48, 48]] * 3)
    assert inputs["image_sizes"].tolist() == sizes
    assert inputs["pixel_values"].shape[-2:] == tuple(torch.tensor(sizes).amax(0))
    reserved = [height // 16 * (width // 16) for height, width in sizes]
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [sum(reserved[:2]), reserved[2]]
    with torch.no_grad():
        assert model(**inputs).num_visual_tokens.tolist() == reserved
    counted = processor._get_num_multimodal_tokens(image_sizes=[list(image.shape[1:]) for image in images])
    assert counted["num_image_tokens"] == reserved


def test_processor_needs_the_stride_that_it_counts_by():
    processor = tiny_processor("convllava", tiling="pad", token_stride=None)
    with pytest.raises(ValueError, match="`count_rule='stride'` needs `token_stride`"):
        processor.reserved_tokens(40, 70)


def test_modules_hold_no_connector_of_another_shape(model):
    """LLaVA's projector: two linear layers with biases, no LayerNorm, from the width of the last stage."""
    projector = model.model.multi_modal_projector
    assert [name for name, _ in projector.named_parameters()] == [
        "linear_1.weight",
        "linear_1.bias",
        "linear_2.weight",
        "linear_2.bias",
    ]
    assert projector.linear_1.in_features == 32 and isinstance(projector.linear_2, nn.Linear)
