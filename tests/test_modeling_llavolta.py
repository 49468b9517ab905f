"""LLaVolta: caches of two lengths, positions with gaps, spans of every kind, and each compressor by hand."""

import copy

import pytest
import torch
from factories import random_batch, row_of, tiny_model
from torch import nn
from transformers import DynamicCache

from hf_vtc.models.configuration_llavolta import COMPRESSORS
from hf_vtc.models.host_decoder_vtc import last_token_attention
from hf_vtc.models.modeling_compressors_llavolta import (
    consecutive_windows,
    kmeans_centroids,
    most_attended,
    random_picks,
    square_windows,
    strided_picks,
)

GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
NUM_LAYERS = 3
# -1: before the sequence is built, 0: before the first layer, 3: never
LAYER_IDXS = range(-1, NUM_LAYERS + 1)
DECODERS = {
    "qwen3": {},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "llama": {"model_type": "llama", "head_dim": 12},
    # a window that no prompt fits into, so that sliding caches differ from full ones
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "qwen2 with sliding layers": {
        "model_type": "qwen2",
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


def model_with(layer_idx=1, stride=4, decoder="qwen3", **overrides):
    text = {
        "model_type": "qwen3",
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        **DECODERS[decoder],
    }
    text = {name: value for name, value in text.items() if value is not None}
    return tiny_model("llavolta", text_config=text, compress_layer_idx=layer_idx, compress_stride=stride, **overrides)


def batch_of(model, seed=0, images_per_row=(1, 0, 2), padding_side="left"):
    generator = torch.Generator().manual_seed(seed)
    return random_batch(model.config, generator, images_per_row=list(images_per_row), padding_side=padding_side)


def without_cache(model, inputs, new_tokens):
    """Logits `(num_new, vocab_size)` of each new token from one forward pass over the whole unpadded row."""
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new_tokens[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0, length - 1 : -1]


def assert_cached_equals_uncached(model, batch):
    length = batch["input_ids"].shape[1]
    out = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences[:, :length], batch["input_ids"])
    logits = torch.stack(out.logits, 1)
    for row, sequence in enumerate(out.sequences):
        expected = without_cache(model, row_of(batch, row), sequence[length:])
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=2e-5)
        assert torch.equal(sequence[length:], expected.argmax(-1))


# caches


@pytest.mark.window
@pytest.mark.parametrize("layer_idx", LAYER_IDXS)
@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_generate_equals_uncached_recomputation_at_every_layer(layer_idx, padding_side):
    model = model_with(layer_idx)
    assert_cached_equals_uncached(model, batch_of(model, padding_side=padding_side))


@pytest.mark.window
@pytest.mark.parametrize("layer_idx", (-1, 0, 1, 2))
@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "qwen3"])
def test_generate_equals_uncached_recomputation_with_every_decoder(decoder, layer_idx):
    model = model_with(layer_idx, decoder=decoder)
    assert_cached_equals_uncached(model, batch_of(model, 1))


@pytest.mark.window
@pytest.mark.parametrize("layer_idx", LAYER_IDXS)
@pytest.mark.parametrize("decoder", ("llama", "mistral"))
def test_generate_with_static_cache(layer_idx, decoder):
    model = model_with(layer_idx, decoder=decoder)
    batch = batch_of(model, 2)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**batch, **GREEDY, **static), model.generate(**batch, **GREEDY))


@pytest.mark.window
@pytest.mark.parametrize("layer_idx", LAYER_IDXS)
def test_beam_scores_equal_uncached_recomputation(layer_idx):
    model = model_with(layer_idx)
    batch = batch_of(model, 3)
    out = model.generate(**batch, **GREEDY, num_beams=3, return_dict_in_generate=True, output_scores=True)
    length = batch["input_ids"].shape[1]
    for row, sequence in enumerate(out.sequences):
        logits = without_cache(model, row_of(batch, row), sequence[length:])
        score = logits.log_softmax(-1).gather(1, sequence[length:, None]).mean()
        torch.testing.assert_close(out.sequences_scores[row], score, rtol=1e-5, atol=1e-5)


@pytest.mark.window
@pytest.mark.parametrize("layer_idx", (0, 1, 2))
def test_prompt_lookup(layer_idx):
    """Rejected candidates must leave the layers of both lengths."""
    model = model_with(layer_idx)
    batch = batch_of(model, 4, images_per_row=[2])
    text = (batch["input_ids"][0] != model.config.image_token_id).nonzero().flatten()
    batch["input_ids"][0, text[-4:]] = batch["input_ids"][0, text[:4]]
    options = GREEDY | {"max_new_tokens": 12, "eos_token_id": model.config.text_config.vocab_size - 1}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, prompt_lookup_num_tokens=3), expected)


@pytest.mark.window
@pytest.mark.parametrize("layer_idx", LAYER_IDXS)
def test_cache_lengths(layer_idx):
    model = model_with(layer_idx)
    batch = batch_of(model, 5, images_per_row=[2])
    with torch.no_grad():
        out = model(**batch, use_cache=True)
    dropped = batch["input_ids"].shape[1] - int(out.kept_mask.sum())
    assert dropped > 0 or layer_idx == NUM_LAYERS
    lengths = [out.past_key_values.get_seq_length(idx) for idx in range(NUM_LAYERS)]
    assert lengths == [batch["input_ids"].shape[1] - (dropped if idx >= layer_idx else 0) for idx in range(NUM_LAYERS)]


@pytest.mark.window
@pytest.mark.parametrize("layer_idx", (1, 2))
@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_a_caller_may_go_on_with_the_cache_of_forward(layer_idx, padding_side):
    model = model_with(layer_idx)
    batch = batch_of(model, 6, padding_side=padding_side)
    cache, new = DynamicCache(config=model.config.text_config), torch.tensor([[11, 12], [13, 14], [15, 16]])
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        mask, ids = batch["attention_mask"], []
        for step in range(2):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            ids.append(new[:, step : step + 1])
            logits = model(input_ids=ids[-1], attention_mask=mask, past_key_values=cache).logits
        for row in range(3):
            inputs = row_of(batch, row)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new[row][None]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            torch.testing.assert_close(logits[row, 0], model(**inputs).logits[0, -1], rtol=0, atol=1e-5)


def test_a_cache_remembers_what_it_needs_and_modules_nothing():
    model = model_with(1)
    batch = batch_of(model, 7, images_per_row=[1])
    with torch.no_grad():
        # transformers notes on a tower that it has looked for its outputs
        model(**batch)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        # another setting of the model is no business of a cache that exists
        model.config.set_compression(2, 2)
        ids, mask = torch.tensor([[9]]), torch.ones(1, batch["input_ids"].shape[1] + 1)
        later = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        model.config.set_compression(1, 4)
        assert torch.equal(model(input_ids=ids, attention_mask=mask, past_key_values=twin).logits, later)
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


def test_a_cache_that_was_cropped_inside_the_prompt_is_refused():
    model = model_with(1)
    batch = batch_of(model, 8, images_per_row=[1])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        cache.crop(-3)
        with pytest.raises(RuntimeError, match="cropped"):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        with pytest.raises(ValueError, match="4 dimensions"):
            cache = model(**batch, use_cache=True).past_key_values
            model(input_ids=torch.tensor([[9]]), attention_mask=torch.zeros(1, 1, 1, 9), past_key_values=cache)


# states and positions


class LayerInputs:
    """What each decoder layer got."""

    def __init__(self, model):
        self.layers, self.states, self.positions = model.get_decoder().layers, {}, {}

    def __enter__(self):
        def record(idx):
            def hook(module, args, kwargs):
                self.states[idx], self.positions[idx] = args[0], kwargs["position_ids"]

            return hook

        self.handles = [
            layer.register_forward_pre_hook(record(idx), with_kwargs=True) for idx, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("stride", (2, 3, 4, 5, 16))
@pytest.mark.parametrize("layer_idx", (0, 1, 2))
def test_pooled_tokens_and_positions_by_hand(layer_idx, stride):
    model = model_with(layer_idx, stride)
    batch = batch_of(model, 9, images_per_row=[2])
    long = model_with(NUM_LAYERS)
    with torch.no_grad(), LayerInputs(model) as seen:
        model(**batch)
    with torch.no_grad(), LayerInputs(long) as unpooled:
        long(**batch)
    before, states, positions = unpooled.states[layer_idx][0], [], []
    image = (batch["input_ids"][0] == model.config.image_token_id).tolist()
    place = 0
    while place < len(image):
        if not image[place]:
            states.append(before[place])
            positions.append(place)
            place += 1
            continue
        end = place
        while end < len(image) and image[end]:
            end += 1
        for start in range(place, end - stride + 1, stride):
            states.append(before[start : start + stride].mean(0))
            positions.append(start + (stride - 1) // 2)
        place = end
    torch.testing.assert_close(seen.states[layer_idx][0], torch.stack(states), rtol=1e-5, atol=1e-6)
    assert seen.positions[layer_idx].tolist() == [positions]


def test_without_a_sequence_there_are_no_gaps():
    model = model_with(-1)
    batch = batch_of(model, 10, images_per_row=[2])
    with torch.no_grad(), LayerInputs(model) as seen:
        out = model(**batch)
    assert seen.positions[0].tolist() == [list(range(int(out.kept_mask.sum())))]


def test_positions_are_exact_in_half_precision():
    """The original averages positions in float16, which cannot tell 1201 from 1201.5."""
    model = model_with(1).to(torch.bfloat16)
    batch = batch_of(model, 11, images_per_row=[1])
    batch["input_ids"] = torch.cat([torch.full((1, 1200), 7), batch["input_ids"]], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    with torch.no_grad(), LayerInputs(model) as seen:
        model(**batch)
    image = (batch["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    expected = [place + 1 for place in image[::4]]
    assert [place for place in seen.positions[1][0].tolist() if image[0] <= place <= image[-1]] == expected


@pytest.mark.parametrize("layer_idx", (0, 1, 2))
def test_text_before_the_first_image_does_not_change(layer_idx):
    compressed, plain = model_with(layer_idx), model_with(NUM_LAYERS)
    batch = batch_of(compressed, 12, images_per_row=[1])
    first = int((batch["input_ids"][0] == plain.config.image_token_id).nonzero()[0])
    with torch.no_grad():
        ours, theirs = compressed(**batch).logits[0], plain(**batch).logits[0]
    torch.testing.assert_close(ours[:first], theirs[:first], rtol=0, atol=1e-5)
    assert not torch.allclose(ours[-1], theirs[-1], atol=1e-3)


@pytest.mark.window
@pytest.mark.parametrize(("layer_idx", "stride"), ((1, 1), (NUM_LAYERS, 4)))
def test_no_compression_is_the_stock_model_bit_for_bit(layer_idx, stride):
    model, other = model_with(layer_idx, stride), model_with(1)
    batch = batch_of(model, 13)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, other(**batch, vtc_budget="full").logits)


@pytest.mark.window
@pytest.mark.parametrize("decoder", DECODERS)
def test_hidden_states_and_attentions(decoder):
    """A stride of one image only: what is not shortened must come out of our loop as out of the stock decoder."""
    model = model_with(1, decoder=decoder)
    model.set_attn_implementation("eager")
    batch = batch_of(model, 14, images_per_row=[1])
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True, output_attentions=True)
        stock = model(**batch, vtc_budget="full", output_hidden_states=True, output_attentions=True)
    kept = int(out.kept_mask.sum())
    assert [states.shape[1] for states in out.hidden_states] == [length, length, kept, kept]
    assert [weights.shape[-2:] for weights in out.attentions] == [(length, length), (kept, kept), (kept, kept)]
    assert len(out.hidden_states) == len(stock.hidden_states) and len(out.attentions) == len(stock.attentions)
    torch.testing.assert_close(out.hidden_states[1], stock.hidden_states[1])
    torch.testing.assert_close(out.attentions[0], stock.attentions[0])
    last = model.model(**batch).last_hidden_state[out.kept_mask]
    torch.testing.assert_close(out.hidden_states[-1][0], last)


@pytest.mark.parametrize("decoder", DECODERS)
def test_attention_kernels_agree(decoder):
    model = model_with(1, decoder=decoder)
    batch = batch_of(model, 15)
    with torch.no_grad():
        sdpa = model(**batch).logits
        model.set_attn_implementation("eager")
        eager = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(sdpa[real], eager[real], rtol=1e-5, atol=3e-5)


# counts


def test_budgets_choose_the_smallest_stride_that_fits():
    model = model_with(1)
    batch = batch_of(model, 16, images_per_row=[1, 2])
    reserved = model.count_visual_tokens(**batch, vtc_budget="full")
    assert model.count_visual_tokens(**batch).tolist() == (reserved // 4).tolist()
    assert model.count_visual_tokens(**batch, vtc_budget=0.5).tolist() == (reserved // 2).tolist()
    for budget in range(1, int(reserved.max()) + 1):
        counts = model.count_visual_tokens(**batch, vtc_budget=budget).tolist()
        expected = [next(length // s for s in range(1, length + 1) if length // s <= budget) for length in reserved]
        assert counts == expected
    mixed = model.count_visual_tokens(**batch, vtc_budget=["full", None, 3]).tolist()
    assert mixed == [int(reserved[0]), int(reserved[1]) // 4, 3]


@pytest.mark.parametrize("layer_idx", (-1, 0, 1))
def test_images_of_one_batch_may_have_different_strides(layer_idx):
    model = model_with(layer_idx)
    batch = batch_of(model, 17, images_per_row=[2, 1])
    budgets = [0.2, "full", 0.6]
    with torch.no_grad():
        together = model(**batch, vtc_budget=budgets)
        for row, own in ((0, budgets[:2]), (1, budgets[2:])):
            alone = model(**row_of(batch, row), vtc_budget=own)
            real = batch["attention_mask"][row].bool()
            assert torch.equal(together.kept_mask[row, real], alone.kept_mask[0])
            torch.testing.assert_close(together.logits[row, real], alone.logits[0], rtol=0, atol=1e-5)


def test_a_stride_larger_than_an_image_is_refused():
    model = model_with(1, stride=1000)
    with pytest.raises(ValueError, match="compress_stride.*larger than image 0"):
        model(**batch_of(model, 18, images_per_row=[1]))


def test_where_nothing_is_compressed_budgets_must_allow_everything():
    model = model_with(NUM_LAYERS)
    batch = batch_of(model, 19, images_per_row=[1])
    with torch.no_grad():
        assert torch.equal(model(**batch, vtc_budget=1.0).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="smallest admissible"):
        model(**batch, vtc_budget=0.9)


def test_decisions_are_refused():
    model = model_with(1)
    batch = batch_of(model, 20, images_per_row=[1])
    with pytest.raises(ValueError, match="router_decisions"):
        model(**batch, router_decisions=torch.tensor([True]))


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"layer_idx": -2}, "compress_layer_idx"),
        ({"layer_idx": NUM_LAYERS + 1}, "compress_layer_idx"),
        ({"stride": 0}, "compress_stride"),
        ({"compressor": "vq"}, "compressor"),
        ({"compressor": "attention", "layer_idx": 0}, "at least 1"),
        ({"compressor": "avgpool2d", "stride": 8}, "square"),
        ({"compressor": "avgpool2d", "stride": 25}, "square"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "image_grid_pinpoints"),
    ),
    ids=str,
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        model_with(**fields)


# compressors


def test_windows_by_hand():
    assert consecutive_windows(7, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert strided_picks(7, 3).tolist() == [[0], [3]]
    # two grids of 3 x 3, of which the last row and column fill no window
    assert square_windows(18, 4, 3).tolist() == [[0, 1, 3, 4], [9, 10, 12, 13]]
    assert square_windows(16, 4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_random_picks():
    generator = torch.Generator().manual_seed(0)
    picks = torch.stack([random_picks(10, 3, generator)[:, 0] for _ in range(400)])
    assert picks.shape == (400, 3) and bool((picks.diff(dim=1) > 0).all())
    # uniform: every token is picked three times in ten
    share = torch.bincount(picks.flatten(), minlength=10) / 400
    assert float((share - 0.3).abs().max()) < 0.08


def test_most_attended_by_hand():
    scores = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.4])
    assert most_attended(scores, 3).tolist() == [1, 3, 4]
    assert most_attended(torch.ones(4), 2).tolist() == [0, 1]


def test_kmeans_by_hand():
    states = torch.tensor([[0.0], [10.0], [0.2], [10.2], [0.1], [10.1]])
    centroids, places = kmeans_centroids(states, 2)
    torch.testing.assert_close(centroids, torch.tensor([[0.1], [10.1]]))
    assert places.tolist() == [2, 3]
    # one token per cluster: nothing changes
    centroids, places = kmeans_centroids(states, 6)
    torch.testing.assert_close(centroids, states)
    assert places.tolist() == list(range(6))
    # equal tokens leave clusters without members, whose centres stay
    centroids, _ = kmeans_centroids(torch.ones(6, 2), 3)
    assert torch.equal(centroids, torch.ones(3, 2))
    with_gradient = states.clone().requires_grad_()
    kmeans_centroids(with_gradient, 2)[0].sum().backward()
    torch.testing.assert_close(with_gradient.grad, torch.full((6, 1), 1 / 3))


@pytest.mark.window
@pytest.mark.parametrize("decoder", ("qwen3", "qwen2", "llama", "mistral"))
def test_attention_scores_are_those_of_the_layer(decoder):
    model = model_with(2, decoder=decoder)
    model.set_attn_implementation("eager")
    batch = batch_of(model, 21)
    with torch.no_grad(), LayerInputs(model) as seen:
        # a sliding window, which the scores do not know, must not hide anything here
        model.config.text_config.sliding_window = None
        out = model(**batch, vtc_budget="full", output_attentions=True)
        layers, rotary = model.get_decoder().layers, model.get_decoder().rotary_emb
        states = seen.states[1]
        real = batch["attention_mask"].bool()
        attention, normed = layers[1].self_attn, layers[1].input_layernorm(states)
        parts = dict(attention.named_children())
        queries, keys = (
            parts.get(f"{name}_norm", torch.nn.Identity())(
                parts[f"{name}_proj"](normed).unflatten(-1, (-1, attention.head_dim))
            )
            for name in ("q", "k")
        )
        scores = last_token_attention(attention, queries, keys, rotary(states, seen.positions[1]), real)
    # left-padded: the last column is the last token of every row
    torch.testing.assert_close(scores, out.attentions[1][:, :, -1].mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("layer_idx", (-1, 0, 1))
def test_every_compressor(compressor, layer_idx):
    if compressor == "attention" and layer_idx < 1:
        pytest.skip("refused by the config, see test_bad_settings_are_refused")
    model = model_with(layer_idx, compressor=compressor)
    batch = batch_of(model, 22)
    with torch.no_grad(), LayerInputs(model) as seen:
        out = model(**batch)
        again = model(**batch)
    assert torch.equal(out.logits, again.logits)
    assert torch.equal(out.num_visual_tokens, model.count_visual_tokens(**batch))
    image = batch["input_ids"] == model.config.image_token_id
    assert int((out.kept_mask & image).sum()) == int(out.num_visual_tokens.sum()) == len(out.image_hidden_states)
    assert out.num_visual_tokens.tolist() == (model.count_visual_tokens(**batch, vtc_budget="full") // 4).tolist()
    positions = seen.positions[max(layer_idx, 0)]
    for row, count in enumerate(out.kept_mask.sum(1).tolist()):
        assert bool((positions[row, -count:].diff() >= 0).all())
    with torch.no_grad():
        for row in range(len(batch.rows)):
            alone = model(**row_of(batch, row))
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(out.logits[row, real], alone.logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("compressor", [name for name in COMPRESSORS if name != "attention"])
@pytest.mark.parametrize("layer_idx", (0, 1))
def test_every_compressor_decodes_as_without_a_cache(compressor, layer_idx):
    """All but `attention`, which asks the last token of a call: with a cache, that of the prompt."""
    model = model_with(layer_idx, compressor=compressor)
    assert_cached_equals_uncached(model, batch_of(model, 23))


def test_the_attention_compressor_keeps_the_choice_of_the_prompt():
    model = model_with(1, compressor="attention")
    batch = batch_of(model, 24)
    length = batch["input_ids"].shape[1]
    out = model.generate(**batch, **GREEDY)
    with torch.no_grad():
        for row in range(len(batch.rows)):
            assert int(model(**row_of(batch, row)).logits[0, -1].argmax()) == int(out[row, length])


def test_selecting_compressors_keep_tokens_as_they_are():
    for compressor in ("uniform", "random", "attention"):
        model = model_with(1, compressor=compressor)
        batch = batch_of(model, 25, images_per_row=[1])
        with torch.no_grad(), LayerInputs(model) as seen:
            out = model(**batch)
        places = out.kept_mask[0].nonzero().flatten()
        assert seen.positions[1][0].tolist() == places.tolist()
        # what layer 0 gave at these places
        first = copy.deepcopy(model)
        first.config.set_compression(NUM_LAYERS, 1)
        with torch.no_grad(), LayerInputs(first) as unpooled:
            first(**batch)
        torch.testing.assert_close(seen.states[1][0], unpooled.states[1][0, places])


def test_random_is_drawn_anew_in_training():
    model = model_with(1, compressor="random").train()
    batch = batch_of(model, 26, images_per_row=[1])
    masks = {tuple(model(**batch, labels=batch["input_ids"]).kept_mask[0].tolist()) for _ in range(5)}
    assert len(masks) > 1


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_gradients_reach_the_tower_through_every_compressor(compressor):
    model = model_with(1, compressor=compressor).train()
    batch = batch_of(model, 27, images_per_row=[1])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    weight = next(p for name, p in model.named_parameters() if "vision_tower" in name and isinstance(p, nn.Parameter))
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)
