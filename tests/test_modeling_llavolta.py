"""LLaVolta: caches of two lengths, positions with gaps, and spans of every kind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from factories import row_of
from llavolta_models import (
    DECODERS,
    GREEDY,
    LAYER_IDXS,
    NUM_LAYERS,
    LayerInputs,
    assert_cached_equals_uncached,
    batch_of,
    model_with,
    without_cache,
)
from transformers import DynamicCache

from hf_vtc.models.modeling_compressors_llavolta import float16_means

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


def means_of_windows(positions):
    """Of positions `(M, stride)`."""
    num_kept, stride = positions.shape
    return float16_means(positions.flatten(), torch.arange(num_kept * stride), torch.full((num_kept,), stride))


def test_float16_positions_are_those_of_the_released_code():
    """A number of 11 bits: of 1201.5 and its like the even neighbour is left, and from 2048 on of every odd one."""
    assert means_of_windows(torch.tensor([[603, 604], [1200, 1201], [1201, 1202], [2049, 2050]])).tolist() == [
        603,
        1200,
        1202,
        2048,
    ]
    # an image of 576 tokens by 8 that starts at 600, of whose 72 positions 19 are one further back
    windows = 600 + torch.arange(576).reshape(72, 8)
    exact = windows[:, 0] + 3
    assert (means_of_windows(windows) - exact).tolist() == [0] * 53 + [1] * 19
    for stride in (2, 4, 8, 16, 64):
        places = torch.arange(64 * stride)
        for start in (0, 600, 1023, 1024, 1025, 1999, 2048, 3001):
            pooled = F.avg_pool1d((start + places)[None].to(torch.float16), stride, stride)[0].long()
            assert torch.equal(means_of_windows((start + places).reshape(64, stride)), pooled)


def test_positions_of_a_prompt_in_float16():
    seen = {}
    for rounded in (False, True):
        model = model_with(1, float16_positions=rounded)
        batch = batch_of(model, 11, images_per_row=[2])
        batch["input_ids"] = torch.cat([torch.full((1, 1201), 7), batch["input_ids"]], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad(), LayerInputs(model) as inputs:
            logits = model(**batch).logits
        seen[rounded] = inputs.positions[1][0].tolist(), logits
    image, by_hand, place = (batch["input_ids"][0] == model.config.image_token_id).tolist(), [], 0
    while place < len(image):
        if image[place]:
            # 1.5 behind the first of four, of which float16 keeps the even neighbour
            by_hand.append(place + 1 if place % 2 else place + 2)
        else:
            by_hand.append(place)
        place += 4 if image[place] else 1
    assert seen[True][0] == by_hand
    assert seen[False][0] != by_hand and not torch.equal(seen[True][1], seen[False][1])


def test_float16_positions_count_in_every_step():
    """Decoding with a cache goes on as without one, and where positions are low nothing changes."""
    rounded, exact = model_with(1, float16_positions=True), model_with(1)
    batch = batch_of(exact, 12)
    assert_cached_equals_uncached(rounded, batch)
    with torch.no_grad():
        assert torch.equal(rounded(**batch).logits, exact(**batch).logits)
    with pytest.raises(ValueError, match="`float16_positions` needs `compress_layer_idx` of at least 1"):
        model_with(0, float16_positions=True)(**batch)


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
        ({"compressor": "kmeans", "float16_positions": True}, "`float16_positions`"),
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
