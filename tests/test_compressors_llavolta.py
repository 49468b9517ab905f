"""The compressors of LLaVolta, each by hand and in the model."""

import copy

import pytest
import torch
from factories import row_of
from llavolta_models import GREEDY, NUM_LAYERS, LayerInputs, assert_cached_equals_uncached, batch_of, model_with
from torch import nn

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
        pytest.skip("refused by the config, see test_modeling_llavolta.py")
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
