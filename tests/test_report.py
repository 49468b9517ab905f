"""What `estimate` counts and what `bench` measures."""

import json

import pytest
import torch
from factories import METHODS, random_batch, tiny_config, tiny_model

from hf_vtc import bench, estimate, report
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.report import DecoderShape, TowerShape, printed_flops

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
    for name in ("kv_cache_bytes", "prefill_flops", "printed_prefill_flops", "tower_flops"):
        assert getattr(batch, name) == pytest.approx(4 * getattr(result, name))


def test_both_conventions_of_flops():
    assert round(vicuna().prefill_flops(640) / 1e12, 2) == 8.40
    assert round(printed_flops(vicuna(), 640) / 1e12, 2) == 3.33
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
    result = estimate(
        config, (4, 4), num_text_tokens=1, max_new_tokens=2, peak_flops=100.0, bandwidth=1000.0, bytes_per_value=2
    )
    # 4 attention matrices of 2 x 2 and 3 of 2 x 3 are 34 weights
    assert result.full_prefill_flops == 2 * 34 * 5 + 2 * 5**2 * 2
    assert result.prefill_flops == 2 * 34 * 3 + 2 * 3**2 * 2
    assert result.printed_prefill_flops == 4 * 3 * 4 + 2 * 9 * 2 + 2 * 3 * 2 * 3
    # 4 of 2 x 2 and 2 of 2 x 4 are 32 weights; 5 tokens with the class token
    assert result.tower_flops == 2 * 32 * 5 + 4 * 25 * 2
    # 34 weights and 5 x 2 of `lm_head` at 2 bytes; keys and values of 2 numbers at 2 bytes
    decode = [(2 * 44 + 2 * 2 * 2 * length) / 1000 for length in (5, 3)]
    first = [(result.tower_flops + flops) / 100 for flops in (result.full_prefill_flops, result.prefill_flops)]
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


def test_estimate_says_when_there_is_little_to_gain():
    small = estimate(internvl("1B"), num_tiles=1, vtc_budget=0.75, max_new_tokens=512)
    assert small.ttft_speedup < 1.1 and small.end_to_end_speedup < 1.1
    assert sum("below 1.1" in note for note in small.notes) == 2
    assert all(note in str(small) for note in small.notes)
    large = estimate(internvl("8B"), num_tiles=13, vtc_budget=0.25, max_new_tokens=1, batch_size=8)
    assert large.ttft_speedup > 1.1 and large.end_to_end_speedup > 1.1 and not large.notes


@pytest.mark.parametrize("method", METHODS)
def test_estimate_keeps_what_the_model_keeps(method):
    model = tiny_model(method)
    batch = random_batch(model.config, torch.Generator().manual_seed(5), num_rows=1, images_per_row=[1])
    num_tiles = int(batch["num_tiles"][0])
    for budget in ("full", 1.0, 0.6, 0.3):
        result = estimate(model, num_tiles=num_tiles, vtc_budget=budget)
        assert result.num_kept == int(model.count_visual_tokens(**batch, vtc_budget=budget)[0])
        assert result == estimate(model.config, num_tiles=num_tiles, vtc_budget=budget)
        json.dumps(result.to_dict())


def test_estimate_uses_the_given_tiling():
    config = tiny_config("vico")
    assert estimate(config, (64, 96)).num_tiles == 7
    processor = VtcImageProcessor(size=32, max_tiles=2, use_thumbnail=False)
    assert estimate(config, (64, 96), image_processor=processor).num_tiles == 2


def test_estimate_counts_the_compressor():
    official = {**internvl("8B"), "model_type": "vtc_vico", "image_seq_length": 256}
    none, every = (estimate(official, num_tiles=1, vtc_budget=count) for count in (256, 64))
    # 17 and 30 GFLOP for the two connectors, 9 for the router's four projections of every patch
    assert round((none.compressor_flops + every.compressor_flops) / 1e9) == 17 + 30 + 2 * 9
    assert estimate(internvl("8B")).compressor_flops == 0


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


@pytest.fixture(scope="module", params=METHODS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def batch(model):
    return random_batch(model.config, torch.Generator().manual_seed(1), num_rows=3)


@pytest.mark.parametrize("budget", ("auto", "full", 0.4))
@torch.no_grad()
def test_oracle_computes_what_the_model_computes(model, batch, budget):
    oracle = report._Oracle(model, batch, budget)
    ours = model.generate(**batch, vtc_budget=budget, max_new_tokens=1, do_sample=False, min_new_tokens=1)[:, -1:]
    assert torch.equal(oracle.forward(), ours)
    assert torch.equal(oracle.generate(), ours)
    assert oracle.num_kept == model.count_visual_tokens(**batch, vtc_budget=budget).tolist()


@torch.no_grad()
def test_oracle_skips_router_and_needless_connectors(model, batch):
    called = []
    for name in ("router", "multi_modal_projector", "compressed_projector"):
        module = model.model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    oracle = report._Oracle(model, batch, "full")
    called.clear()
    oracle.forward()
    assert called == ["multi_modal_projector"]


@pytest.mark.parametrize("entry", ("generate", "forward"))
def test_bench_reports(model, batch, entry):
    result = bench(model, batch, 0.5, repeats=3, warmup=1, entry=entry)
    assert all(len(timing.seconds) == 3 for timing in (result.full, result.measured, result.oracle))
    assert result.num_kept == model.count_visual_tokens(**batch, vtc_budget=0.5).tolist()
    assert result.num_reserved == model.count_visual_tokens(**batch, vtc_budget="full").tolist()
    real = int(batch["attention_mask"].sum())
    assert result.num_text_tokens == real - sum(result.num_reserved)
    assert result.ideal_speedup > 1
    assert json.loads(json.dumps(result.to_dict()))["environment"]["entry"] == entry
    assert "eta = oracle / measured" in str(result)


def test_bench_ideal_is_the_estimate(model):
    batch = random_batch(model.config, torch.Generator().manual_seed(2), num_rows=1, images_per_row=[1])
    result = bench(model, batch, 0.5, repeats=1, warmup=0)
    expected = estimate(
        model, num_tiles=result.num_tiles, num_text_tokens=result.num_text_tokens, vtc_budget=0.5
    ).ttft_speedup
    assert result.ideal_speedup == pytest.approx(expected)


def test_bench_figures_by_hand(model, batch):
    result = bench(model, batch, 0.5, repeats=1, warmup=0)
    result.full.seconds, result.measured.seconds, result.oracle.seconds = [9.0, 10, 30], [5.0, 6, 5], [4.0, 4, 8]
    assert (result.eta, result.speedup, result.oracle_speedup) == (4 / 5, 2, 2.5)
    assert result.paired_eta == 4 / 5
    assert result.phi == pytest.approx(5 / 6)
    assert result.full.p90 == 30
    # where the oracle gains nothing there is no share of it
    result.oracle.seconds = [10.0, 10, 10]
    assert result.phi is None and "not defined" in str(result)


def test_rounds_rotate():
    order = []
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = report._in_turns(variants, torch.device("cpu"), repeats=2, warmup=1)
    assert "".join(order) == "abcbcacab"
    assert all(len(values) == 2 for values in seconds.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"repeats": 0}, "`repeats` must be at least 1"),
        ({"entry": "both"}, "`entry` must be"),
        ({"vtc_budget": 1}, "smallest admissible count"),
    ],
)
def test_bench_refuses(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        bench(model, batch, **change)


def test_bench_refuses_training_mode(model, batch):
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            bench(model, batch)
    finally:
        model.eval()


def test_bench_needs_an_image(model, batch):
    with pytest.raises(ValueError, match="`pixel_values`"):
        bench(model, {"input_ids": batch["input_ids"]})
