"""What `estimate` counts."""

import json
from dataclasses import replace

import pytest
import torch
from factories import METHODS, budgets_of, image_for_estimate, random_batch, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_vtc import estimate
from hf_vtc.methods import record_of
from hf_vtc.methods.costs import tower_of
from hf_vtc.models.configuration_llavolta import LlavoltaConfig
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.prompt_vtc import VisionInputs
from hf_vtc.report import ConvTowerShape, DecoderShape, Hardware, TowerShape, printed_flops
from hf_vtc.report.analytic import _workload, decoder_parts
from hf_vtc.report.measured import plain_features

INTERNVIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 448,
    "patch_size": 14,
}
# width, heads x 128, feed-forward and layers of Qwen3-0.6B, 1.7B, 4B, 8B
QWEN3 = {
    "1B": (1024, 16, 3072, 28),
    "2B": (2048, 16, 6144, 28),
    "4B": (2560, 32, 9728, 36),
    "8B": (4096, 32, 12288, 36),
}


def internvl(size: str) -> dict:
    """`config.json` of an official InternVL3.5, as far as costs depend on it."""
    width, heads, ffn_width, layers = QWEN3[size]
    text = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": ffn_width,
        "num_hidden_layers": layers,
        "vocab_size": 151936,
    }
    return {"model_type": "internvl_chat", "vision_config": INTERNVIT, "llm_config": text, "downsample_ratio": 0.5}


def vicuna() -> DecoderShape:
    return DecoderShape(4096, 32, 4096, 4096, 11008, 32000)


# public analytic tables of such models; 64 text tokens, bound by arithmetic
@pytest.mark.parametrize(
    "size, num_tiles, share, prefill, ttft",
    [
        ("8B", 7, 0.5, 1.97, 1.71),
        ("8B", 7, 0.25, 3.73, 2.60),
        ("4B", 7, 0.5, 2.00, 1.59),
        ("2B", 7, 0.5, 2.00, 1.36),
        ("1B", 7, 0.5, 2.13, 1.18),
        ("1B", 1, 0.5, 1.69, 1.13),
    ],
)
def test_estimate_gives_known_ideals(size, num_tiles, share, prefill, ttft):
    result = estimate(internvl(size), vtc_budget=share, num_tiles=num_tiles)
    assert result.num_reserved == 256 * num_tiles and result.num_kept == 256 * num_tiles * share
    assert round(result.prefill_speedup, 2) == prefill
    assert round(result.ttft_speedup, 2) == ttft


def test_estimate_cache_and_tower():
    result = estimate(internvl("8B"), image_size=(896, 1344))
    assert result.num_tiles == 7
    assert round(result.full_kv_cache_bytes / 2**20) == 261 and round(result.kv_cache_bytes / 2**20) == 135
    assert round(result.tower_flops / 7e12, 2) == 0.72
    batch = estimate(internvl("8B"), image_size=(896, 1344), batch_size=4)
    for name in ("kv_cache_bytes", "prefill_flops", "printed_prefill_flops", "tower_flops", "compressor_flops"):
        if name == "printed_prefill_flops":
            assert batch.printed_prefill_flops == {
                key: 4 * value for key, value in result.printed_prefill_flops.items()
            }
            continue
        assert getattr(batch, name) == pytest.approx(4 * getattr(result, name))


def test_both_conventions_of_flops():
    assert round(vicuna().prefill_flops(640) / 1e12, 2) == 8.40
    assert round(printed_flops(vicuna(), 640) / 1e12, 2) == 3.33
    assert round(printed_flops(vicuna(), 640, "pyramiddrop") / 1e12, 2) == 4.25
    with pytest.raises(ValueError, match="one of fastv, pyramiddrop, got 'exact'"):
        printed_flops(vicuna(), 640, "exact")
    assert round(vicuna().params / 1e9, 2) == 6.48
    assert vicuna().kv_cache_bytes(1) == 524288


def test_estimate_by_hand():
    text = {
        "hidden_size": 2,
        "num_attention_heads": 1,
        "intermediate_size": 3,
        "num_hidden_layers": 1,
        "vocab_size": 5,
    }
    vision = {"hidden_size": 2, "intermediate_size": 4, "num_hidden_layers": 1, "image_size": 4, "patch_size": 2}
    config = {"model_type": "llava", "vision_config": vision, "text_config": text, "image_seq_length": 4}
    hardware = Hardware("by hand", 100.0, 1000.0)
    result = estimate(config, (4, 4), num_text_tokens=1, max_new_tokens=2, hardware=hardware)
    # 4 attention matrices of 2 x 2 and 3 of 2 x 3 are 34 weights
    assert result.full_prefill_flops == 2 * 34 * 5 + 2 * 5**2 * 2
    assert result.prefill_flops == 2 * 34 * 3 + 2 * 3**2 * 2
    printed = 4 * 3 * 4 + 2 * 9 * 2 + 2 * 3 * 2 * 3
    assert result.printed_prefill_flops == {"fastv": printed, "pyramiddrop": printed + 3 * 2 * 3}
    # 4 of 2 x 2 and 2 of 2 x 4 are 32 weights; 5 tokens with the class token; 4 patches of 3 colours and 2 x 2 pixels
    assert result.tower_flops == 2 * 32 * 5 + 4 * 25 * 2 + 2 * 4 * 12 * 2
    # 34 weights and 5 x 2 of `lm_head` at 2 bytes; keys and values of 2 numbers at 2 bytes
    decode = [(2 * 44 + 2 * 2 * 2 * length) / 1000 for length in (5, 3)]
    first = [(result.tower_flops + flops) / 100 for flops in (result.full_prefill_flops, result.prefill_flops)]
    assert (result.full_ttft_seconds, result.ttft_seconds) == pytest.approx(tuple(first))
    assert result.end_to_end_speedup == pytest.approx((first[0] + decode[0]) / (first[1] + decode[1]))
    assert result.decode_share == pytest.approx(decode[1] / (first[1] + decode[1]))


def test_estimate_counts_active_experts():
    config = internvl("8B")
    dense = DecoderShape.from_config(config["llm_config"])
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 6144}
    sparse = DecoderShape.from_config({**config["llm_config"], **experts})
    # 2 experts of half of the width compute as much as the dense layer, 8 hold four times as much
    assert sparse.prefill_flops(100) == dense.prefill_flops(100)
    assert sparse.params - dense.params == 36 * 3 * 4096 * 12288 * 3
    # one token reads two experts, very many tokens read all
    assert sparse.weight_bytes(1) == pytest.approx(dense.weight_bytes(1))
    assert sparse.weight_bytes(10**6) == pytest.approx(2 * (sparse.params + 151936 * 4096))


def test_tower_reads_up_to_the_feature_layer():
    config = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 24, "image_size": 28, "patch_size": 14}
    layers = [TowerShape.from_config(config, layer).num_layers for layer in (-1, -2, 20)]
    assert layers == [24, 23, 20]
    # of several the last one, whichever end they are counted from
    several = tower_of({"vision_config": config, "vision_feature_layer": [-2, 5, 20]})
    assert several.num_layers == 23


# tokens of official AVG-LLaVA at 36, 72, 144, 288 and 576 per tile, base view and newlines included
@pytest.mark.parametrize(
    "width, height, counts",
    [
        (336, 336, (78, 114, 300, 444, 1176)),
        (672, 672, (192, 228, 744, 888, 2928)),
        (640, 480, (166, 202, 594, 738, 2340)),
        (480, 640, (168, 280, 600, 1088, 2352)),
        (1080, 1920, (120, 358, 504, 1338, 1968)),
        (2000, 500, (112, 148, 514, 658, 1890)),
    ],
)
def test_estimate_of_avg_llava_gives_known_counts(width, height, counts):
    fields = {
        "model_type": "vtc_avg_llava",
        "vision_config": {**INTERNVIT, "image_size": 336},
        "image_seq_length": 576,
        "vis_token_granularity": [36, 72, 144, 288, 576],
        "filtered_text_num": 32,
        "mm_patch_merge_type": "spatial_unpad",
        # (height, width)
        "image_grid_pinpoints": [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]],
        "unpad_rule": "token_grid",
        "router_attention": "tiles",
        "downsample_ratio": 1.0,
    }
    config = {**internvl("8B"), **fields}
    results = [estimate(config, (height, width), vtc_budget=count) for count in counts]
    assert tuple(result.num_kept for result in results) == counts
    assert {result.num_reserved for result in results} == {counts[-1]}
    with pytest.raises(ValueError, match="Give `image_size`"):
        estimate(config, num_tiles=5)


# visual tokens of LLaVA-1.5, summed over its 32 decoder layers, by layer and stride
@pytest.mark.parametrize(
    "layer_idx, stride, total",
    [
        (2, 8, 3312),
        (2, 4, 5472),
        (2, 2, 9792),
        (8, 4, 8064),
        (16, 8, 10368),
        (16, 2, 13824),
        (2, 64, 1422),
        (32, 8, 18432),
    ]
    + [(0, 8, 32 * 72), (-1, 8, 32 * 72)],
)
def test_estimate_of_llavolta_counts_layers_apart(layer_idx, stride, total):
    text = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 32}
    tower = {**INTERNVIT, "image_size": 336, "hidden_size": 64}
    config = LlavoltaConfig(tower, {**text, "vocab_size": 128}, compress_layer_idx=layer_idx, compress_stride=stride)
    result = estimate(config, num_tiles=1, num_text_tokens=10, vtc_budget="auto", max_new_tokens=2)
    assert result.num_reserved == 576
    shape = DecoderShape.from_config(config.text_config.to_dict())
    # a cache grows with the tokens, layer by layer
    assert result.kv_cache_bytes == (total + 32 * 10) * replace(shape, num_layers=1).kv_cache_bytes(1)
    assert result.full_kv_cache_bytes == shape.kv_cache_bytes(586)
    long, short = (replace(shape, num_layers=1).prefill_flops(10 + count) for count in (576, result.num_kept))
    num_long = min(max(layer_idx, 0), 32)
    assert result.prefill_flops == pytest.approx(num_long * long + (32 - num_long) * short)


CONVNEXT = {"depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072], "patch_size": 4}


# multiply-accumulates of the four-stage ConvNeXt-L and with a fifth stage, and the features that they give
@pytest.mark.parametrize(
    "side, four_stages, five_stages, features",
    [(512, 0.180, 0.210, 64), (768, 0.404, 0.472, 144), (1024, 0.718, 0.839, 256), (1536, 1.616, 1.888, 576)],
)
def test_convnext_tower_gives_known_costs(side, four_stages, five_stages, features):
    towers = [
        ConvTowerShape(tuple(CONVNEXT["depths"][:count]), tuple(CONVNEXT["hidden_sizes"][:count]), 4, (side, side))
        for count in (4, 5)
    ]
    assert [round(tower.flops() / 2e12, 3) for tower in towers] == [four_stages, five_stages]
    assert [tower.num_patches for tower in towers] == [4 * features, features]


def test_convnext_tower_drops_what_fills_no_window():
    # 200 x 281 pixels give a map of 3 x 4
    tower = ConvTowerShape.from_config(CONVNEXT, (200, 281))
    assert (tower.num_patches, tower.width) == (12, 3072)
    assert ConvTowerShape.from_config({**CONVNEXT, "image_size": 768}).num_patches == 144


def test_convnext_tower_by_hand():
    tower = ConvTowerShape((1, 2), (2, 3), 4, (8, 16))
    # 2 x 4 pixels of the stem, 1 x 2 of the second stage
    stem, first = 8 * 3 * 16 * 2, 8 * (49 * 2 + 8 * 4)
    down, second = 2 * 4 * 2 * 3, 2 * 2 * (49 * 3 + 8 * 9)
    assert tower.flops() == 2 * (stem + first + down + second)


def test_estimate_says_when_there_is_little_to_gain():
    small = estimate(internvl("1B"), num_tiles=1, vtc_budget=0.75, max_new_tokens=512)
    assert small.ttft_speedup < 1.1 and small.end_to_end_speedup < 1.1
    assert sum("below 1.1" in note for note in small.notes) == 2
    assert all(note in str(small) for note in small.notes)
    large = estimate(internvl("8B"), num_tiles=13, vtc_budget=0.25, max_new_tokens=1, batch_size=8)
    assert large.ttft_speedup > 1.1 and large.end_to_end_speedup > 1.1
    # how FLOPs are counted is always said
    assert len(large.notes) == 1 and "2 per multiply-accumulate" in large.notes[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_estimate_keeps_what_the_model_keeps(method, seed):
    model = tiny_model(method)
    batch = random_batch(model.config, torch.Generator().manual_seed(seed), num_rows=1, images_per_row=[1])
    image = image_for_estimate(model.config, batch)
    for budget in ("full", 1.0, *budgets_of(model.config)):
        result = estimate(model, **image, vtc_budget=budget)
        assert result.num_kept == int(model.count_visual_tokens(**batch, vtc_budget=budget)[0])
        assert result.num_reserved == int((batch["input_ids"] == model.config.image_token_id).sum())
        assert result == estimate(model.config, **image, vtc_budget=budget)
        json.dumps(result.to_dict())


def workload_of(config, batch):
    image = image_for_estimate(config, batch)
    return _workload(config.to_dict(), image.get("image_size", (32, 32)), image.get("num_tiles"))


def test_estimate_uses_the_given_tiling():
    config = tiny_config("vico")
    assert estimate(config, (64, 96)).num_tiles == 7
    processor = VtcImageProcessor(size=32, max_tiles=2, use_thumbnail=False)
    assert estimate(config, (64, 96), image_processor=processor).num_tiles == 2


def test_estimate_counts_the_compressor():
    official = {**internvl("8B"), "model_type": "vtc_vico", "image_seq_length": 256, "router_num_heads": 16}
    none, every = (estimate(official, num_tiles=1, vtc_budget=count) for count in (256, 64))
    # 17 and 30 GFLOP for the two connectors, 4.9 for the router, of which 4.3 do not grow with the tiles
    assert [round(result.compressor_flops / 1e9, 1) for result in (none, every)] == [22.0, 34.9]
    assert estimate(internvl("8B")).compressor_flops == 0


def flops_of(run) -> int:
    """Of matrix products and convolutions, counted as they run."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ("full", 1.0, "some"))
def test_estimate_counts_what_the_model_computes(method, budget):
    model = tiny_model(method).requires_grad_(False)
    config = model.config
    batch = random_batch(config, torch.Generator().manual_seed(1), num_rows=1, images_per_row=[1])
    if budget == "some":
        # a router runs for a given count only where it says which tokens stay
        budget = int(model.count_visual_tokens(**batch)[0])
    vision = VisionInputs(
        **{name: batch.get(name) for name in ("pixel_values", "num_tiles", "image_sizes")}, vtc_budget=budget
    )
    result = estimate(model, **image_for_estimate(config, batch), vtc_budget=budget)
    tower = flops_of(plain_features(model.model, batch))
    everything = flops_of(lambda: model.model.compress_prompt(batch["input_ids"], vision, batch["attention_mask"]))
    assert result.compressor_flops == pytest.approx(everything - tower, rel=2e-3)
    assert result.tower_flops == pytest.approx(tower, rel=0.02)


# what `auto` costs where a router decides, which needs pixels
@pytest.mark.parametrize("method", ("vico", "avg_llava"))
def test_router_is_counted_where_it_runs(method):
    model = tiny_model(method).requires_grad_(False)
    batch = random_batch(model.config, torch.Generator().manual_seed(1), num_rows=1, images_per_row=[1])
    images = {name: batch.get(name) for name in ("pixel_values", "num_tiles", "image_sizes")}

    def connected(budget) -> int:
        vision = VisionInputs(**images, vtc_budget=budget)
        return flops_of(lambda: model.model.compress_prompt(batch["input_ids"], vision, batch["attention_mask"]))

    kept = int(model.count_visual_tokens(**batch)[0])
    full = estimate(model, **image_for_estimate(model.config, batch), vtc_budget="full")
    some = estimate(model, **image_for_estimate(model.config, batch), vtc_budget=kept)
    assert full.router_flops == 0 and any("does not run with this budget" in note for note in full.notes)
    if method == "vico":
        assert some.router_flops > 0 and connected("auto") == connected(kept)
    else:
        # granularities follow from a count alone
        assert some.router_flops == 0
        router = record_of(model.config).costs.router_flops(workload_of(model.config, batch))
        assert connected("auto") - connected(kept) == pytest.approx(router, rel=2e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ("full", "some"))
def test_estimate_is_within_two_percent_of_torch(method, budget):
    """Of a whole forward pass; torch counts the square of a causal attention whole, and `estimate` half of it."""
    model = tiny_model(method).requires_grad_(False)
    config = model.config
    batch = random_batch(config, torch.Generator().manual_seed(1), num_rows=1, images_per_row=[1])
    budget = int(model.count_visual_tokens(**batch)[0]) if budget == "some" else budget
    counted = flops_of(lambda: model(**batch, vtc_budget=budget, logits_to_keep=1))
    num_text = int((batch["input_ids"] != config.image_token_id).sum())
    result = estimate(model, **image_for_estimate(config, batch), num_text_tokens=num_text, vtc_budget=budget)
    text = DecoderShape.from_config(config.text_config.to_dict())
    costs = record_of(config).costs
    parts = decoder_parts(costs, config, text, num_text, result.num_reserved, result.num_kept)
    other_half = sum(part.num_layers * 2 * length**2 * part.query_width for part, length in parts)
    head = 2 * text.width * text.vocab_size
    total = result.tower_flops + result.compressor_flops + result.prefill_flops + other_half + head
    assert total == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    "change, budget, message",
    [
        ({}, "auto", "router decides from the pixels"),
        ({}, 0.0, "float in"),
        ({"llm_config": None}, 0.5, "`text_config` or `llm_config`"),
        ({"vision_config": {"model_type": "convnext"}}, 0.5, "no `num_hidden_layers`"),
    ],
)
def test_estimate_refuses(change, budget, message):
    with pytest.raises(ValueError, match=message):
        estimate({**internvl("1B"), **change}, vtc_budget=budget)


def test_estimate_names_the_smallest_count():
    with pytest.raises(ValueError, match="smallest admissible count is 4"):
        estimate(tiny_config("vico"), num_tiles=1, vtc_budget=3)


def test_estimate_wants_a_config():
    with pytest.raises(ValueError, match="must be a model, a config or a dictionary, got str"):
        estimate("some/path")
