"""VisionZip against a slow reference, written token by token from algorithms 1 and 2 of the paper."""

import math

import pytest
import torch
from factories import random_batch, tiny_config, tiny_model

from hf_vtc.models.layout_vtc import layout_of_images
from hf_vtc.models.modeling_visionzip import received_attention, shared_out, zipped_groups
from hf_vtc.models.prompt_vtc import VisionInputs
from hf_vtc.models.tiling_vtc import ImageSizes

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_CLIP = {**_SIGLIP, "model_type": "clip_vision_model"}
# fields of models on each kind of tower
TOWERS = {
    "internvl": {},
    "internvl v1": {"ps_version": "v1"},
    "clip": {"vision_config": _CLIP, "downsample_ratio": 1.0, "vision_feature_layer": -2},
    "siglip": {
        "vision_config": _SIGLIP,
        "downsample_ratio": 1.0,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
    },
}


def groups_by_hand(attention, keys, num_kept, num_contextual):
    """Which tokens each visual token of one tile is the mean of, in the order of the grid."""
    ranked = sorted(range(len(attention)), key=lambda token: (-attention[token], token))
    dominant = ranked[: num_kept - num_contextual]
    others = [token for token in range(len(attention)) if token not in dominant]
    targets = [others[math.floor(idx * len(others) / num_contextual)] for idx in range(num_contextual)]
    members = {token: [token] for token in [*dominant, *targets]}
    for token in others:
        if targets and token not in targets:
            products = [sum(a * b for a, b in zip(keys[token], keys[target])) for target in targets]
            members[targets[products.index(max(products))]].append(token)
    return [members[token] for token in sorted(members)]


@pytest.mark.parametrize("num_contextual", (0, 1, 3, 5))
@pytest.mark.parametrize("num_kept", (5, 8, 11, 12))
def test_groups_equal_those_of_the_algorithm(num_kept, num_contextual):
    generator = torch.Generator().manual_seed(num_kept)
    attention, keys = torch.rand(3, 12, generator=generator), torch.randn(3, 12, 4, generator=generator)
    # tiles of one call may keep unequal counts
    counts = torch.tensor([num_kept, num_kept, 12]), torch.tensor([num_contextual, 0, num_contextual])
    groups = zipped_groups(attention, keys, *counts)
    for tile, (kept, contextual) in enumerate(zip(*(each.tolist() for each in counts))):
        expected = groups_by_hand(attention[tile].tolist(), keys[tile].tolist(), kept, contextual)
        found = [(groups[tile] == idx).nonzero().flatten().tolist() for idx in range(kept)]
        assert found == [sorted(members) for members in expected]
        assert bool((groups[tile] >= 0).all()) == (contextual > 0 or kept == 12)


def test_groups_of_a_tile_that_can_be_followed_by_eye():
    # dominant are 1 and 4; of 0, 2, 3, 5 the targets are 0 and 3, and 2 is like 3 and 5 like 0
    attention = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.8, 0.0]])
    keys = torch.tensor([[[1.0, 0.0], [5.0, 5.0], [0.0, 1.0], [0.0, 2.0], [7.0, 7.0], [3.0, 1.0]]])
    assert zipped_groups(attention, keys, torch.tensor([4]), torch.tensor([2])).tolist() == [[0, 1, 2, 2, 3, 0]]


@pytest.mark.parametrize("class_token", (True, False))
def test_received_attention_is_that_of_the_map(class_token):
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    found = received_attention(queries, keys, 2, class_token)
    for tile in range(2):
        rows = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            rows.append((queries[tile, :, part] @ keys[tile, :, part].T / 2).softmax(-1))
        whole = torch.stack(rows).mean(0)
        expected = whole[0, 1:] if class_token else whole.mean(0)
        torch.testing.assert_close(found[tile], expected)


def test_tiles_share_what_an_image_keeps():
    assert shared_out(torch.tensor([7, 3, 8]), torch.tensor([3, 1, 4])).tolist() == [3, 2, 2, 3, 2, 2, 2, 2]


def attention_by_host(model, pixel_values):
    """Attention, keys and features of the layer that is read, the first from the maps of the stock tower."""
    tower, config, seen = model.model.vision_tower, model.config, {}
    layers = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    # the last hidden state is what the last layer gives
    layer = layers[config.vision_feature_layer]
    attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
    handles = [
        attention.k_proj.register_forward_hook(lambda module, args, output: seen.update(keys=output)),
        attention.register_forward_hook(lambda module, args, output: seen.update(maps=output[1])),
    ]
    features = model.model.encode(pixel_values)["features"]
    if config.vision_config.model_type == "clip_vision_model":
        # which gives its maps only so on transformers 4.57
        tower(pixel_values, output_attentions=True)
    for handle in handles:
        handle.remove()
    maps, keys = seen["maps"].mean(1), seen["keys"]
    if config.has_class_token:
        return maps[:, 0, 1:], keys[:, 1:], features
    return maps.mean(1), keys, features


def folded_by_hand(rows, model):
    """Of a tile `(N, C)` the patches of each visual token, `(n, f * f, C)`."""
    side, factor = model.config.patches_per_side, model.config.shuffle_factor
    grid, small = rows.reshape(side, side, -1), side // factor
    places = [(row, column) for row in range(small) for column in range(small)]
    if model.config.ps_version == "v1" and factor > 1:
        places = [(row, column) for column, row in places]
    windows = [
        grid[factor * row : factor * row + factor, factor * column : factor * column + factor]
        for row, column in places
    ]
    return torch.stack([window.flatten(0, 1) for window in windows])


@pytest.mark.window
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("budget", ("auto", 0.6, "full"))
@torch.no_grad()
def test_visual_tokens_equal_those_by_hand(tower, budget):
    model = tiny_model("visionzip", **TOWERS[tower])
    # which gives its maps; ours reads queries and keys
    model.set_attn_implementation("eager")
    batch = random_batch(model.config, torch.Generator().manual_seed(3), num_rows=2, images_per_row=[2, 1])
    out = model(**batch, vtc_budget=budget)
    attention, keys, features = attention_by_host(model, batch["pixel_values"])
    factor, visual, tile = model.config.shuffle_factor, [], 0
    for num_tiles, kept in zip(batch["num_tiles"].tolist(), out.num_visual_tokens.tolist()):
        for place in range(num_tiles):
            own = kept // num_tiles + int(place < kept % num_tiles)
            contextual = math.floor(own * 10 / 64 + 0.5)
            scores = folded_by_hand(attention[tile][:, None], model).mean((1, 2))
            patches = folded_by_hand(features[tile], model)
            groups = groups_by_hand(
                scores.tolist(), folded_by_hand(keys[tile], model).mean(1).tolist(), own, contextual
            )
            means = torch.stack([patches[members].mean(0) for members in groups])
            visual.append(model.model.multi_modal_projector(means.reshape(own, factor**2, -1))[:, 0])
            tile += 1
    torch.testing.assert_close(out.image_hidden_states, torch.cat(visual), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_features_of_a_call_for_all_tokens_hold_no_attention():
    model = tiny_model("visionzip")
    batch = dict(random_batch(model.config, torch.Generator().manual_seed(4), num_rows=1, images_per_row=[1]))
    features = model.get_image_features(batch["pixel_values"], num_tiles=batch["num_tiles"]).last_hidden_state
    vision = VisionInputs(batch["pixel_values"], num_tiles=batch["num_tiles"], vtc_budget="full")
    encoded = model.model.encode(batch["pixel_values"], layout_of_images(model.config, vision))
    assert encoded.keys() == {"features"} and torch.equal(encoded["features"], features)
    batch["image_features"] = {"features": features}
    del batch["pixel_values"]
    assert torch.equal(model(**batch, vtc_budget="full").logits, model(**batch, vtc_budget=1.0).logits)
    with pytest.raises(ValueError, match="hold no attention"):
        model(**batch, vtc_budget=0.5)


def test_counts_of_every_size_are_admissible():
    config = tiny_config("visionzip")
    sizes = ImageSizes(torch.tensor([1, 3]), None, None)
    assert [list(counts) for counts in config.levels(sizes)] == [list(range(16, 0, -1)), list(range(48, 2, -1))]
    assert [config.own_level(counts) for counts in config.levels(sizes)] == [16 - 5, 48 - 16]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kept_share": 0.0}, "`kept_share` of the visual tokens must lie in"),
        ({"contextual_share": 1.5}, "`contextual_share` of the kept tokens must lie in"),
        ({"vision_feature_layer": 0}, "`vision_feature_layer` must be a hidden state"),
        ({"vision_feature_layer": 3}, "`vision_feature_layer` must be a hidden state"),
        ({"vision_feature_select_strategy": "full"}, "`vision_feature_select_strategy` must be 'default'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "`mm_patch_merge_type` must be 'flat'"),
        ({"vision_config": {"model_type": "dinov2", "image_size": 28}}, "reads the attention of towers of the types"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("visionzip", **fields)


@torch.no_grad()
def test_decisions_of_the_caller_are_taken():
    model = tiny_model("visionzip")
    batch = dict(random_batch(model.config, torch.Generator().manual_seed(8), num_rows=2, images_per_row=[1, 1]))
    own = model(**batch, vtc_budget=0.5)
    given = model(**batch, router_decisions=own.router_decisions)
    assert torch.equal(given.logits, own.logits)
    groups = {"router_decisions": own.router_decisions.clone()}
    assert torch.equal(model.count_visual_tokens(**batch, **groups), own.num_visual_tokens)
    groups["router_decisions"][0] = 3
    with pytest.raises(ValueError, match="must count the visual tokens of each tile from 0 on"):
        model(**batch, **groups)
    with pytest.raises(ValueError, match="needs the visual token of its tile that each token becomes"):
        model(**batch, router_decisions=own.router_decisions[1:])
