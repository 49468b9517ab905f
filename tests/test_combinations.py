"""ViCO and AVG-LLaVA before the language model together with LLaVolta in it, against a row written by hand."""

import pytest
import torch
from combinations import COMBINATIONS
from factories import random_batch, row_of, tiny_config, tiny_model
from transformers import AutoModelForImageTextToText

GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
STRIDE = 3
CASES = [(method, layer_idx) for method in COMBINATIONS for layer_idx in (-1, 0, 1)]


def combined(method, layer_idx):
    """A combination with the weights of the tiny model of its first method, and two decoder layers."""
    config_class, _, _ = COMBINATIONS[method]
    fields = tiny_config(method).to_dict()
    for name in ("model_type", "transformers_version", "auto_map", "image_grid_pinpoints", "mm_patch_merge_type"):
        fields.pop(name, None)
    if method == "avg_llava":
        # its batches are of tiles in a row here
        fields["base_tile"] = "first"
    config = config_class(**fields, compress_layer_idx=layer_idx, compress_stride=STRIDE)
    model = AutoModelForImageTextToText.from_config(config).eval()
    missing = model.load_state_dict(tiny_model(method).state_dict(), strict=False)
    assert not missing.missing_keys and set(missing.unexpected_keys) <= {"model.image_newline"}
    return model


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request):
    return combined(*request.param)


def batch_of(model, seed, **kwargs):
    config = tiny_config("vico" if model.config.model_type == "vtc_vico_llavolta" else "llavolta")
    config.image_token_id = model.config.image_token_id
    batch = random_batch(config, torch.Generator().manual_seed(seed), **kwargs)
    return batch


def packed_by_first(model, row):
    """Embeddings `(1, L, D)` of one row after the first method, and where its images are: (start, length) each."""
    layer_idx, stride = model.config.compress_layer_idx, model.config.compress_stride
    # N layers: nothing is shortened, so that what enters is the first method's
    model.config.set_compression(model.config.text_config.num_hidden_layers, 1)
    try:
        out = model(**row)
    finally:
        model.config.set_compression(layer_idx, stride)
    counts, embeds = out.num_visual_tokens.tolist(), model.get_input_embeddings()(row["input_ids"])[0]
    kept, ids = out.kept_mask[0], row["input_ids"][0]
    embeds[kept & (ids == model.config.image_token_id)] = out.image_hidden_states
    packed_ids = ids[kept]
    places = (packed_ids == model.config.image_token_id).nonzero().flatten()
    starts, first = [], 0
    for count in counts:
        starts.append((int(places[first]), count))
        first += count
    return embeds[kept][None], starts


def shortened_by_hand(states, positions, images):
    """Means of `STRIDE` neighbours of each image, at the position of the middle one."""
    pieces, places, last = [], [], 0
    for start, length in images:
        pieces.append(states[:, last:start])
        places.append(positions[last:start])
        kept = length // STRIDE
        windows = states[:, start : start + kept * STRIDE].unflatten(1, (kept, STRIDE))
        pieces.append(windows.mean(2))
        places.append(positions[start : start + kept * STRIDE : STRIDE] + (STRIDE - 1) // 2)
        last = start + length
    pieces.append(states[:, last:])
    places.append(positions[last:])
    return torch.cat(pieces, 1), torch.cat(places)


def layers_by_hand(decoder, states, positions, first, last):
    rotary = decoder.rotary_emb(states, positions[None])
    length = states.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    for layer in decoder.layers[first:last]:
        states = layer(states, attention_mask=mask, position_embeddings=rotary, position_ids=positions[None])
    return states


@torch.no_grad()
def logits_by_hand(model, row):
    decoder, layer_idx = model.get_decoder(), model.config.compress_layer_idx
    states, images = packed_by_first(model, row)
    positions = torch.arange(states.shape[1])
    states = layers_by_hand(decoder, states, positions, 0, max(layer_idx, 0))
    states, positions = shortened_by_hand(states, positions, images)
    if layer_idx == -1:
        positions = torch.arange(states.shape[1])
    states = layers_by_hand(decoder, states, positions, max(layer_idx, 0), len(decoder.layers))
    return model.lm_head(decoder.norm(states))[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", ("left", "right"))
def test_rows_of_a_batch_equal_rows_by_hand(model, seed, side):
    batch = batch_of(model, seed, num_rows=3, images_per_row=[2, 1, 1], padding_side=side)
    with torch.no_grad():
        out = model(**batch)
    for row in range(3):
        alone = row_of(batch, row)
        expected = logits_by_hand(model, alone)
        torch.testing.assert_close(out.logits[row][out.kept_mask[row]], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("budget", (None, "full", 0.5, 0.2))
def test_generate_caches_and_counts(model, budget):
    batch = batch_of(model, 5, num_rows=3, images_per_row=[2, 0, 1])
    cached = model.generate(**batch, **GREEDY, vtc_budget=budget)
    assert torch.equal(model.generate(**batch, **GREEDY, vtc_budget=budget, use_cache=False), cached)
    counts = model.count_visual_tokens(**batch, vtc_budget=budget)
    with torch.no_grad():
        out = model(**batch, vtc_budget=budget)
    assert torch.equal(out.num_visual_tokens, counts)
    placeholders = batch["input_ids"] == model.config.image_token_id
    assert int((out.kept_mask & placeholders).sum()) == int(counts.sum()) == len(out.image_hidden_states)
    if isinstance(budget, float):
        reserved = model.count_visual_tokens(**batch, vtc_budget="full")
        assert bool((counts <= budget * reserved).all())


def test_an_image_of_another_stride_elsewhere_changes_nothing(model):
    batch = batch_of(model, 7, num_rows=2, images_per_row=[1, 1])
    with torch.no_grad():
        out = model(**batch, vtc_budget=["full", 0.2])
        alone = model(**row_of(batch, 0), vtc_budget="full")
    real = batch["attention_mask"][0].bool()
    torch.testing.assert_close(out.logits[0, real], alone.logits[0], rtol=0, atol=1e-4)


def test_training_gives_every_parameter_a_gradient(model):
    batch = batch_of(model, 9, num_rows=2, images_per_row=[1, 1])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()
    try:
        model(**batch, labels=labels).loss.backward()
        unused = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    finally:
        model.eval()
        model.zero_grad()
    assert not unused
