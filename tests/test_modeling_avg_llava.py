"""What is particular to AVG-LLaVA: text filter, router, and one granularity per image."""

import pytest
import torch
import torch.nn.functional as F
from avg_llava_samples import SCALES, router_logits
from factories import (
    _CLIP,
    _TEXT,
    random_batch,
    row_of,
    stock_inputs,
    tiny_config,
    tiny_model,
    tiny_processor,
    uncompressed,
)
from PIL import Image

from hf_vtc.convert import from_base
from hf_vtc.models.configuration_avg_llava import AvgLlavaConfig
from hf_vtc.models.modeling_avg_llava import AvgLlavaForConditionalGeneration
from hf_vtc.models.modeling_router_avg_llava import RouterLayer, filter_text, text_similarity
from hf_vtc.models.tiling_vtc import best_canvases


@pytest.fixture(scope="module")
def model():
    return tiny_model("avg_llava")


def batch_of(model, images_per_row, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return random_batch(model.config, generator, images_per_row=images_per_row, **kwargs)


def test_text_similarity_is_the_mean_cosine():
    generator = torch.Generator().manual_seed(0)
    patches, text = torch.randn(2, 7, 6, generator=generator), torch.randn(5, 6, generator=generator)
    text[3] = 0
    expected = F.cosine_similarity(patches[:, :, None], text[None, None], dim=-1).mean(1)
    torch.testing.assert_close(text_similarity(patches, text), expected)


def test_filter_text_takes_the_own_row_in_order_of_similarity():
    base = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    text = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 1.0], [2.0, 0.0], [1.0, 2.0]])
    text_rows = torch.tensor([0, 0, 0, 1, 1])
    chosen = filter_text(base, text, text_rows, torch.tensor([0, 1]), 4)
    assert chosen[0].tolist() == [[1.0, 0.0], [3.0, 3.0], [0.0, 1.0], [0.0, 0.0]]
    # text of others does not fill up
    assert chosen[1].tolist() == [[1.0, 2.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert not bool(filter_text(base, text, text_rows, torch.tensor([-1, 1]), 4)[0].any())


@pytest.mark.parametrize("across_tiles", (True, False))
def test_router_layer_equals_the_stock_encoder_layer(across_tiles):
    torch.manual_seed(0)
    stock = torch.nn.TransformerEncoderLayer(16, 4, 16, batch_first=not across_tiles).double().eval()
    torch.nn.init.normal_(stock.self_attn.in_proj_bias)
    own = RouterLayer(16, 4, 0.1, across_tiles).double().eval()
    state = {name.replace("self_attn.", ""): value for name, value in stock.state_dict().items()}
    for kind in ("weight", "bias"):
        for part, values in zip("qkv", state.pop(f"in_proj_{kind}").chunk(3), strict=True):
            state[f"{part}_proj.{kind}"] = values
    for name in ("linear1", "linear2", "norm1", "norm2"):
        for kind in ("weight", "bias"):
            state[f"{name[:-1]}_{name[-1]}.{kind}"] = state.pop(f"{name}.{kind}")
    own.load_state_dict(state)
    states = torch.randn(5, 7, 16).double()
    # tiles of two images, each of which the original routes alone
    expected = torch.cat([stock(states[:2]), stock(states[2:])])
    torch.testing.assert_close(own(states, torch.tensor([0, 0, 1, 1, 1])), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ("tiles", "tokens"))
@pytest.mark.parametrize("text", ("first_image", "row"))
@pytest.mark.parametrize("unpad_rule", ("token_grid", "true_aspect"))
def test_released_and_corrected_variants_do_not_depend_on_the_batch(attention, text, unpad_rule):
    model = tiny_model("avg_llava", router_attention=attention, router_text=text, unpad_rule=unpad_rule)
    batch = batch_of(model, [2, 0, 1, 3], seed=3)
    with torch.no_grad():
        out = model(**batch)
        alone = [model(**row_of(batch, row)) for row in (0, 2, 3)]
    torch.testing.assert_close(torch.cat([each.router_logits for each in alone]), out.router_logits, rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([each.router_decisions for each in alone]), out.router_decisions)
    assert torch.equal(torch.cat([each.num_visual_tokens for each in alone]), out.num_visual_tokens)
    assert bool((out.num_visual_tokens <= model.count_visual_tokens(**batch, vtc_budget="full")).all())


def with_other_text(batch, row):
    text = (batch["input_ids"][row] != batch.config.image_token_id) & batch["attention_mask"][row].bool()
    ids = batch["input_ids"].clone()
    ids[row, text] = (ids[row, text] + 7) % 200
    return {**batch, "input_ids": ids}


def test_router_reads_the_text_of_the_images_own_row():
    row, first = tiny_model("avg_llava"), tiny_model("avg_llava", router_text="first_image")
    batch = batch_of(row, [1, 2], seed=5)
    # of images 0, 1, 2 the last two are in row 1
    for model, affected in ((row, [False, True, True]), (first, [False, True, False])):
        before, after = router_logits(model, batch), router_logits(model, with_other_text(batch, 1))
        assert [not torch.equal(*pair) for pair in zip(before, after, strict=True)] == affected


def test_attention_across_tiles_and_across_tokens(model):
    across_tiles = tiny_model("avg_llava", router_attention="tiles")
    batch = batch_of(model, [1], seed=6)
    tiles = int(batch["num_tiles"][0])
    assert tiles > 2
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][-1] += 1.0
    for each, mixes in ((across_tiles, True), (model, False)):
        before, after = (router_states(each, inputs) for inputs in (batch, changed))
        # whether the other tiles see what happened to the last one
        assert torch.equal(before[:-1], after[:-1]) != mixes


def router_states(model, batch):
    """What the router's Transformer layer makes of the tokens of all tiles."""
    states = []
    handle = model.model.router.merger.register_forward_hook(lambda module, args, output: states.append(output))
    router_logits(model, batch)
    handle.remove()
    return states[0]


def counts_of(model, batch):
    num_images = len(batch["num_tiles"])
    columns = []
    for idx in range(len(model.config.vis_token_granularity)):
        decisions = torch.full((num_images,), idx)
        columns.append(model.count_visual_tokens(**batch, router_decisions=decisions))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("as_share", (True, False))
def test_every_admissible_budget_is_honoured(model, as_share):
    batch = batch_of(model, [1, 2], seed=7)
    counts = counts_of(model, batch)
    for image, image_counts in enumerate(counts.tolist()):
        assert image_counts == sorted(set(image_counts))
        for idx, count in enumerate(image_counts):
            budgets = ["full"] * len(counts)
            budgets[image] = count / image_counts[-1] if as_share else count
            with torch.no_grad():
                out = model(**batch, vtc_budget=budgets)
            assert out.num_visual_tokens[image] == count and out.router_decisions[image] == idx
            assert out.router_logits is None
            others = [other for other in range(len(counts)) if other != image]
            assert out.num_visual_tokens[others].tolist() == counts[others, -1].tolist()
            if not as_share and idx + 1 < len(image_counts):
                # one token more than admissible changes nothing unless the next count is reached
                budgets[image] = image_counts[idx + 1] - 1
                assert model.count_visual_tokens(**batch, vtc_budget=budgets)[image] == count
    smallest = int(counts[0, 0])
    with pytest.raises(ValueError, match=f"smallest admissible count is {smallest}"):
        model(**batch, vtc_budget=[smallest - 1, None, None])


def test_mixed_list_of_budgets(model):
    batch = batch_of(model, [2, 1], seed=8)
    counts, auto = counts_of(model, batch), model.count_visual_tokens(**batch)
    mixed = model.count_visual_tokens(**batch, vtc_budget=["full", None, int(counts[2, 1])])
    assert mixed.tolist() == [counts[0, -1], auto[1], counts[2, 1]]


def test_auto_is_the_best_logit(model):
    batch = batch_of(model, [2, 1], seed=9)
    with torch.no_grad():
        out = model(**batch)
    assert torch.equal(out.router_decisions, out.router_logits.argmax(1))
    assert out.router_logits.shape == (3, len(SCALES)) and out.router_logits.dtype == torch.float32
    counts = counts_of(model, batch)
    assert torch.equal(out.num_visual_tokens, counts.gather(1, out.router_decisions[:, None])[:, 0])


def test_router_decisions_override_the_router(model):
    batch = batch_of(model, [1, 1], seed=10)
    counts = counts_of(model, batch)
    with torch.no_grad():
        out = model(**batch, router_decisions=torch.tensor([3, 1]))
    assert out.router_decisions.tolist() == [3, 1]
    assert out.num_visual_tokens.tolist() == [counts[0, 3], counts[1, 1]]
    for bad in ([3], [3, 5], [-1, 0], [0.5, 1.0], [True, False]):
        with pytest.raises(ValueError, match="router_decisions"):
            model(**batch, router_decisions=torch.tensor(bad))
    with pytest.raises(ValueError, match="router_decisions"):
        model(**batch, router_decisions=torch.tensor([3, 1]), vtc_budget="full")


@pytest.mark.parametrize(
    "options, expected",
    (({}, 1), ({"vtc_budget": "full"}, 0), ({"vtc_budget": 0.4}, 0), ({"vtc_budget": [0.4, None]}, 1)),
    ids=str,
)
def test_the_router_runs_where_it_decides_only(model, options, expected):
    batch, calls = batch_of(model, [1, 1], seed=11), []
    handle = model.model.router.register_forward_hook(lambda *args: calls.append(1))
    try:
        model.generate(**batch, **options, max_new_tokens=3, do_sample=False)
    finally:
        handle.remove()
    assert len(calls) == expected


def test_router_select_off_is_the_finest_granularity(model):
    batch = batch_of(model, [2], seed=12)
    off = tiny_model("avg_llava", router_select=False)
    with torch.no_grad():
        assert torch.equal(off(**batch).logits, model(**batch, vtc_budget="full").logits)


def test_images_without_text_between_them(model):
    """Two images that share a run of placeholders are still two, each with the text of its row."""
    batch = batch_of(model, [1, 2], seed=13, padding_side="left")
    placeholders = batch["input_ids"] == model.config.image_token_id
    together = {**batch, "input_ids": batch["input_ids"].clone()}
    text = batch["input_ids"][~placeholders & batch["attention_mask"].bool()]
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row, real]
        is_image = ids == model.config.image_token_id
        together["input_ids"][row, real] = torch.cat([ids[is_image], ids[~is_image]])
    assert torch.equal(router_logits(model, together), router_logits(model, batch))
    assert len(text) > 0


def test_precomputed_features_give_the_same_result(model):
    batch = batch_of(model, [1, 2], seed=14)
    with torch.no_grad():
        expected = model(**batch)
        features = model.model.encode(batch.pop("pixel_values"))
        assert torch.equal(model(**batch, image_features=features).logits, expected.logits)


def test_get_image_features_are_the_reserved_tokens(model):
    batch = batch_of(model, [2], seed=15)
    with torch.no_grad():
        features = model.get_image_features(
            batch["pixel_values"], num_tiles=batch["num_tiles"], image_sizes=batch["image_sizes"]
        )
        full = model(**batch, vtc_budget="full").image_hidden_states
    torch.testing.assert_close(torch.cat(features.pooler_output), full)


def test_images_of_several_tiles_need_their_sizes(model):
    batch = dict(batch_of(model, [1], seed=16))
    num_tiles = batch.pop("num_tiles")
    with torch.no_grad():
        # sizes alone say how many tiles there are
        assert torch.equal(model(**batch).logits, model(**batch, num_tiles=num_tiles).logits)
    del batch["image_sizes"]
    for tiles in ({}, {"num_tiles": num_tiles}):
        with pytest.raises(ValueError, match="Image features and image tokens do not match.*`num_tiles`"):
            model(**batch, **tiles)


def test_sizes_that_do_not_fit_the_tiles_raise(model):
    batch = batch_of(model, [1], seed=17)
    for sizes in ([[0, 40]], [[40, 40], [40, 40]]):
        with pytest.raises(ValueError, match="image_sizes"):
            model(**{**batch, "image_sizes": torch.tensor(sizes)})
    # a size whose canvas has another number of tiles
    canvas = [[64, 64]] if int(batch["num_tiles"]) != 5 else [[96, 32]]
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        model(**{**batch, "image_sizes": torch.tensor(canvas)})


# (height, width) in pixels of images of whose finest map no row, or no column, is left without padding, and the
# visual tokens that they have then: those of the base tile, and a newline for each row, of which a map may have none
EMPTY_MAPS = {(10, 2000): 16, (2000, 10): 16 + 4, (10, 130): 16, (130, 10): 16 + 12}


def joined_by_hand(pooled, newline, grid, size):
    """Tokens of one image from those of its tiles, `(T, rows, columns, D)`, as the released code joins them."""
    base, tiles = pooled[0], pooled[1:]
    rows, columns = tiles.shape[1:3]
    whole = torch.cat(
        [torch.cat(list(tiles[row * grid[1] : (row + 1) * grid[1]]), dim=1) for row in range(grid[0])], dim=0
    )
    rows, columns, (height, width) = *whole.shape[:2], size
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        whole = whole[cut : rows - cut]
    else:
        cut = (columns - int(width * (rows / height))) // 2
        whole = whole[:, cut : columns - cut]
    lines = [token for line in whole for token in [*line, newline]]
    return torch.stack([*base.flatten(0, 1), *lines])


def granularities_by_hand(model, inputs, scales):
    """Visual tokens of the one image of `inputs` at each of `scales`, by `avg_pool2d` and `joined_by_hand`."""
    projected = model.model.multi_modal_projector(model.model.encode(inputs["pixel_values"]))
    side = round(projected.shape[1] ** 0.5)
    maps = projected.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    (size,) = inputs["image_sizes"].tolist()
    grid = (best_canvases(inputs["image_sizes"], model.config.image_grid_pinpoints)[0] // 32).tolist()
    for scale in scales:
        rows = round(scale**0.5) if round(scale**0.5) ** 2 == scale else 2 * round((scale / 2) ** 0.5)
        kernel = (side // rows, side // (scale // rows))
        pooled = F.avg_pool2d(maps, kernel).permute(0, 2, 3, 1)
        yield joined_by_hand(pooled, model.model.image_newline, grid, size)


@pytest.mark.parametrize(("size", "full"), EMPTY_MAPS.items())
@pytest.mark.parametrize("rule", ("token_grid", "true_aspect"))
def test_an_image_whose_map_is_empty_is_its_base_tile_and_newlines(size, full, rule):
    model = tiny_model("avg_llava", unpad_rule=rule)
    processor = tiny_processor("avg_llava", count_rule=f"unpad_{rule}")
    image = Image.effect_noise(size[::-1], 50).convert("RGB")
    inputs = processor(images=image, text=f"{processor.image_token} What?", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == full
    expected = list(granularities_by_hand(model, inputs, SCALES))
    assert len(expected[-1]) == full
    for idx, tokens in enumerate(expected):
        if len(tokens) > full:
            # at a coarse granularity a row of padding may be left
            continue
        out = model(**inputs, router_decisions=torch.tensor([idx]))
        torch.testing.assert_close(out.image_hidden_states, tokens, rtol=1e-4, atol=1e-4)
        assert out.num_visual_tokens.tolist() == [len(tokens)]
    out = model(**inputs)
    assert out.num_visual_tokens.tolist() == [len(expected[int(out.router_decisions)])]
    if rule == "true_aspect":
        stock = uncompressed(model)
        torch.testing.assert_close(
            model(**inputs, vtc_budget="full").logits,
            stock(**stock_inputs(stock, inputs)).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_router_may_choose_without_the_full_grid():
    """`vis_token_granularity` that does not end there: nothing but what the router reads and may choose is less."""
    scales = [1, 2, 8]
    model = tiny_model("avg_llava", vis_token_granularity=scales, unpad_rule="token_grid")
    processor = tiny_processor("avg_llava", count_rule="unpad_token_grid")
    image = Image.effect_noise((90, 50), 50).convert("RGB")
    inputs = processor(images=image, text=f"{processor.image_token} What?", return_tensors="pt")
    assert model.model.router.voter.shape == (sum(scales) + model.config.filtered_text_num, 1)
    expected = list(granularities_by_hand(model, inputs, [*scales, 16]))
    for idx, tokens in enumerate(expected):
        out = model(**inputs, router_decisions=torch.tensor([idx]))
        torch.testing.assert_close(out.image_hidden_states, tokens, rtol=1e-4, atol=1e-4)
    full = model(**inputs, vtc_budget="full")
    assert full.router_decisions.tolist() == [3] and full.num_visual_tokens.tolist() == [len(expected[-1])]
    seen = []
    handle = model.model.router.register_forward_pre_hook(lambda router, args: seen.append(args[0]))
    auto = model(**inputs)
    handle.remove()
    assert [tokens.shape[1] for tokens in seen[0]] == scales
    assert auto.router_logits.shape == (1, 3)
    assert auto.router_decisions.tolist() == auto.router_logits.argmax(1).tolist()
    # the text is still compared with all tokens of the base tile, so that the same words are found
    widest = tiny_model("avg_llava", vis_token_granularity=[1, 2, 8, 16], unpad_rule="token_grid")
    texts = []
    for each in (model, widest):
        handle = each.model.router.register_forward_pre_hook(lambda router, args: texts.append(args[1]))
        widest.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
        widest.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
        widest.model.language_model.load_state_dict(model.model.language_model.state_dict())
        each(**inputs)
        handle.remove()
    assert torch.equal(*texts)
    with pytest.raises(ValueError, match="must lie in 0 .coarsest. to 3"):
        model(**inputs, router_decisions=torch.tensor([4]))


def test_a_coarser_granularity_that_needs_more_tokens_is_not_admissible():
    """Possible on tall canvases of small tiles only: an odd number of columns is kept where the finest keeps fewer."""
    tower = {**_CLIP, "image_size": 24, "patch_size": 4}
    model = tiny_model("avg_llava", vision_config=tower, image_grid_pinpoints=[[96, 24]], unpad_rule="token_grid")
    assert model.config.vis_token_granularity == [9, 18, 36]
    size, reserved = torch.tensor([[96, 9]]), 36 + 24 * 3
    inputs = {
        "input_ids": torch.tensor([[5] + [model.config.image_token_id] * reserved + [6, 7]]),
        "pixel_values": torch.randn(5, 3, 24, 24),
        "num_tiles": torch.tensor([5]),
        "image_sizes": size,
    }
    assert model.count_visual_tokens(**inputs, vtc_budget="full").tolist() == [reserved]
    with pytest.raises(ValueError, match="needs more tokens"):
        model(**inputs, router_decisions=torch.tensor([1]))
    assert model.count_visual_tokens(**inputs, vtc_budget=reserved - 1).tolist() == [9 + 12 * 2]
    with torch.no_grad():
        model.model.router.norm.bias.copy_(torch.tensor([0.0, 100.0, 1.0]))
    assert model(**inputs).router_decisions.tolist() != [1]


def test_llava_next_base_becomes_joined(model):
    base = uncompressed(model)
    torch.manual_seed(0)
    result = from_base(base, "avg_llava", filtered_text_num=8, router_num_heads=4)
    assert result.config.mm_patch_merge_type == "spatial_unpad" and not result.config.router_select
    batch = batch_of(result, [2, 0, 1], seed=19)
    with torch.no_grad():
        assert torch.equal(result(**batch).logits, base(**stock_inputs(base, batch)).logits)


@pytest.mark.parametrize(
    "fields",
    (
        {"vis_token_granularity": [1, 2, 4, 32]},
        {"vis_token_granularity": [16, 8, 4]},
        {"vis_token_granularity": [3, 16]},
        {"filtered_text_num": 0},
        {"router_num_heads": 5},
        {"router_dropout": 1.0},
        {"router_attention": "patches"},
        {"router_text": "batch"},
        {"mm_patch_merge_type": "spatial"},
        {"unpad_rule": "none"},
        {"base_tile": "last"},
        {"image_grid_pinpoints": [[32, 48]]},
        {"image_grid_pinpoints": []},
    ),
    ids=str,
)
def test_bad_config_fields_raise(fields):
    with pytest.raises(ValueError, match="granularity" if "vis_token" in str(fields) else next(iter(fields))):
        tiny_config("avg_llava", **fields)


def test_defaults_are_the_corrected_variants():
    config = AvgLlavaConfig(dict(_CLIP), dict(_TEXT), vision_feature_layer=-2)
    assert (config.router_attention, config.router_text, config.unpad_rule) == ("tokens", "row", "true_aspect")
    assert config.vis_token_granularity == SCALES and config.mm_patch_merge_type == "flat"
    model = AvgLlavaForConditionalGeneration(config)
    assert model.model.router.voter.shape == (sum(SCALES) + config.filtered_text_num, 1)
    assert 0.7 < float(model.model.router.voter.std()) < 1.3


def test_reserved_tokens_are_the_count_at_the_finest_granularity():
    for rule in ("token_grid", "true_aspect"):
        model = tiny_model("avg_llava", unpad_rule=rule)
        processor = tiny_processor("avg_llava", count_rule=f"unpad_{rule}")
        for height, width in ((40, 60), (90, 31), (33, 100), (64, 64), (20, 20)):
            image = Image.effect_noise((width, height), 50).convert("RGB")
            inputs = processor(images=image, text=f"{processor.image_token} What?", return_tensors="pt")
            reserved = int((inputs["input_ids"] == model.config.image_token_id).sum())
            assert reserved == processor.reserved_tokens(height, width)
            assert model.count_visual_tokens(**inputs, vtc_budget="full").tolist() == [reserved]


def test_frozen_parts_of_the_tower_are_those_that_no_feature_needs(model):
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    layers = model.config.vision_config.num_hidden_layers
    assert frozen and all("post_layernorm" in name or f"layers.{layers - 1}." in name for name in frozen)
