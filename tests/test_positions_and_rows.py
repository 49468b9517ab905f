"""Positions of several axes, and rows beside the embeddings, through packing, expansion, loss and `generate`.

By a small decoder that has both: Qwen3-VL's, behind a tower of LLaVA's shape. Every image has coordinates here, and
two more rows for each of its tokens, which the first two layers add to their output.
"""

import copy

import pytest
import torch
from contract_samples import GREEDY
from factories import random_batch, row_of, tiny_config
from torch import nn
from transformers import AutoModelForImageTextToText

from hf_vtc.models.configuration_llavolta import LlavoltaConfig
from hf_vtc.models.head_vtc import VtcForConditionalGeneration
from hf_vtc.models.modeling_llavolta import LlavoltaModel, LlavoltaSteps
from hf_vtc.models.modeling_vtc import VtcModel
from hf_vtc.models.prompt_vtc import VisionInputs

pytestmark = pytest.mark.window

SIDE = 4
STRIDE = 3
NUM_LAYERS = 3
LAYER_IDXS = (0, 1, 2, 3)
TEXT = {
    "model_type": "qwen3_vl_text",
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default", "mrope_section": [2, 3, 3]},
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    "num_hidden_layers": NUM_LAYERS,
}


def coordinates(length):
    """Time, row and column of each token of an image."""
    places = torch.arange(length)
    return torch.stack([torch.zeros_like(places), places // SIDE, places % SIDE])


def positions_by_hand(mask, placeholders, lengths):
    """Positions `(3, L)` of one row, and that of the token behind it."""
    positions, now, column, lengths = torch.zeros(3, len(mask), dtype=torch.long), 0, 0, list(lengths)
    while column < len(mask):
        length = lengths.pop(0) if placeholders[column] else 1
        if mask[column]:
            places = coordinates(length) + now
            positions[:, column : column + length] = places
            now = int(places.max()) + 1
        column += length
    return positions, now


class DeepConfig(LlavoltaConfig):
    model_type = "vtc_deep"

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        super().__init__(vision_config, text_config, **kwargs)

    def positions(self, layout):
        rows = []
        for row in range(len(layout.attention_mask)):
            lengths = [n for n, own in zip(layout.num_reserved.tolist(), layout.rows) if own == row]
            rows.append(positions_by_hand(layout.attention_mask[row], layout.placeholder_mask[row], lengths)[0])
        return torch.stack(rows, dim=1)


class DeepRows:
    """A projector for each row, beside the one for embeddings."""

    def connect(self, features, choice, layout, scores):
        visual = super().connect(features, choice, layout, scores)
        visual.layer_rows = torch.stack([project(features).flatten(0, 1) for project in self.row_projectors])
        return visual


class DeepModel(LlavoltaSteps, DeepRows, VtcModel):
    config_class = DeepConfig
    reads_padding_mask = True
    shorten = LlavoltaModel.shorten

    def make_parts(self, config):
        super().make_parts(config)
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        self.row_projectors = nn.ModuleList([nn.Linear(*widths) for _ in range(2)])


class DeepForConditionalGeneration(VtcForConditionalGeneration):
    config_class, model_class = DeepConfig, DeepModel


def deep_model(layer_idx):
    torch.manual_seed(0)
    plain = tiny_config("llavolta")
    config = DeepConfig(
        vision_config=plain.vision_config,
        text_config={**plain.text_config.to_dict(), **TEXT},
        image_token_id=plain.image_token_id,
        vision_feature_layer=-2,
        compress_layer_idx=layer_idx,
        compress_stride=STRIDE,
    )
    AutoModelForImageTextToText.register(DeepConfig, DeepForConditionalGeneration, exist_ok=True)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module", params=LAYER_IDXS, ids=lambda idx: f"K{idx}")
def model(request):
    return deep_model(request.param)


def batch_of(model, seed, **kwargs):
    config = tiny_config("llavolta")
    return random_batch(config, torch.Generator().manual_seed(seed), **kwargs)


def pooled(states, images):
    """Means of `STRIDE` neighbours of each image, (start, length), of `(..., L, D)`."""
    pieces, last = [], 0
    for start, length in images:
        whole = start + length // STRIDE * STRIDE
        pieces += [states[..., last:start, :], states[..., start:whole, :].unflatten(-2, (-1, STRIDE)).mean(-2)]
        last = start + length
    return torch.cat([*pieces, states[..., last:, :]], dim=-2)


@torch.no_grad()
def logits_by_hand(model, row, stride=STRIDE):
    """Logits `(K, V)` of one row without padding: every layer by itself, and images pooled before one of them."""
    own, layer_idx = model.model, model.config.compress_layer_idx
    placeholders = row["input_ids"][0] == model.config.image_token_id
    embeds, rows = own.get_input_embeddings()(row["input_ids"]), torch.zeros(0)
    lengths = (row["num_tiles"] * SIDE**2).tolist() if "num_tiles" in row else []
    positions, _ = positions_by_hand(torch.ones(len(placeholders)), placeholders, lengths)
    states, rows = embeds, torch.zeros(2, *embeds.shape)
    images = []
    if lengths:
        features = own.encode(row["pixel_values"])
        states[0, placeholders] = own.multi_modal_projector(features).flatten(0, 1)
        for each, project in zip(rows, own.row_projectors):
            each[0, placeholders] = project(features).flatten(0, 1)
        starts = placeholders.nonzero().flatten()
        firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        images = list(zip(starts[firsts].tolist(), lengths))
    decoder = own.language_model
    for idx, layer in enumerate(decoder.layers):
        if idx == layer_idx and stride > 1:
            states, rows = pooled(states, images), pooled(rows, images)
            # integer means on each axis
            positions = pooled(positions.double()[..., None], images)[..., 0].add(1e-6).floor().long()
        rotary = decoder.rotary_emb(states, positions[:, None])
        states = layer(states, attention_mask=None, position_embeddings=rotary)
        states = states[0] if isinstance(states, tuple) else states
        if idx < len(rows):
            states = states + rows[idx]
    return model.lm_head(decoder.norm(states))[0]


@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_packed_rows_equal_a_row_by_hand(model, padding_side):
    batch = batch_of(model, 1, images_per_row=[2, 0, 1], padding_side=padding_side)
    for budget, stride in ((None, STRIDE), ("full", 1)):
        with torch.no_grad():
            out = model(**batch, vtc_budget=budget)
        for row in range(3):
            kept = out.kept_mask[row]
            expected = logits_by_hand(model, row_of(batch, row), stride)
            torch.testing.assert_close(out.logits[row, kept], expected, rtol=0, atol=2e-5)


def test_full_equals_the_stock_decoder_bit_for_bit(model):
    batch = batch_of(model, 2, images_per_row=[1, 2, 0], padding_side="left")
    own, placeholders = model.model, batch["input_ids"] == model.config.image_token_id
    with torch.no_grad():
        features, embeds = own.encode(batch["pixel_values"]), own.get_input_embeddings()(batch["input_ids"])
        embeds[placeholders] = own.multi_modal_projector(features).flatten(0, 1)
        lengths = [(row_of(batch, row).get("num_tiles", torch.zeros(0)) * SIDE**2).int().tolist() for row in range(3)]
        positions = [
            positions_by_hand(batch["attention_mask"][row], placeholders[row], lengths[row])[0] for row in range(3)
        ]
        expected = own.language_model(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"],
            position_ids=torch.stack(positions, dim=1),
            visual_pos_masks=placeholders,
            deepstack_visual_embeds=[project(features).flatten(0, 1) for project in own.row_projectors],
        ).last_hidden_state
        assert torch.equal(own(**batch, vtc_budget="full").last_hidden_state, expected)


def test_loss_and_gradients_reach_the_rows(model):
    model = copy.deepcopy(model).train()
    batch = batch_of(model, 3, images_per_row=[1, 2], padding_side="left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert all(project.weight.grad.abs().sum() > 0 for project in model.model.row_projectors)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    labels = labels.masked_fill(nn.functional.pad(batch["attention_mask"][:, :-1] == 0, (1, 0), value=True), -100)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-6)


def greedy_by_hand(model, row, num_tokens):
    new = []
    for _ in range(num_tokens):
        new.append(int(logits_by_hand(model, row)[-1].argmax()))
        row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[new[-1]]])], dim=1)
    return new


@pytest.mark.parametrize("options", ({}, {"use_cache": False}, {"cache_implementation": "static"}), ids=str)
def test_generate_equals_rows_by_hand(model, options):
    batch = batch_of(model, 4, images_per_row=[1, 0, 2])
    # a prompt that ends with an image, behind which text goes on where it would without compression
    batch = ending_with_an_image(batch)
    if "cache_implementation" in options:
        options = options | {"disable_compile": True}
    out = model.generate(**batch, **GREEDY, **options)
    for row in range(3):
        expected = greedy_by_hand(model, row_of(batch, row), GREEDY["max_new_tokens"])
        assert out[row, batch["input_ids"].shape[1] :].tolist() == expected


def ending_with_an_image(batch):
    ids, images = batch.rows[2]
    last = max(idx for idx, each in enumerate(ids) if each == batch.config.image_token_id)
    rows = [*batch.rows[:2], (ids[: last + 1], images)]
    return type(batch)(batch.config, rows, batch.padding_side)


def test_beams_score_as_rows_by_hand(model):
    batch = batch_of(model, 5, images_per_row=[2, 1, 0])
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    out = model.generate(**batch, **options, output_scores=True)
    length = batch["input_ids"].shape[1]
    for idx, sequence in enumerate(out.sequences):
        row, new = row_of(batch, idx // 2), sequence[length:]
        row["input_ids"] = torch.cat([row["input_ids"], new[None]], dim=1)
        logits = logits_by_hand(model, row)[-len(new) - 1 : -1]
        score = logits.log_softmax(-1).gather(1, new[:, None]).mean()
        torch.testing.assert_close(out.sequences_scores[idx], score, rtol=1e-5, atol=1e-5)


def test_prompt_lookup_and_a_second_turn_equal_greedy(model):
    batch = batch_of(model, 6, images_per_row=[1])
    text = (batch["input_ids"][0] != model.config.image_token_id).nonzero().flatten()
    batch["input_ids"][0, text[-2:]] = batch["input_ids"][0, text[:2]]
    # the lookup of transformers 4.57 cannot do without an end token
    options = GREEDY | {"eos_token_id": model.config.text_config.vocab_size - 1}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, prompt_lookup_num_tokens=3), expected)

    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    batch["input_ids"] = nn.functional.pad(first.sequences, (0, 3), value=7)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, past_key_values=first.past_key_values), expected)


def test_positions_of_the_caller_are_kept(model):
    batch = batch_of(model, 7, images_per_row=[1, 1], padding_side="left")
    layout = model.model.layout_of(
        batch["input_ids"] == model.config.image_token_id, batch["attention_mask"], vision_of(batch)
    )
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**batch, position_ids=layout.positions).logits, expected)
        moved = layout.positions * torch.tensor([1, 2, 2])[:, None, None]
        assert not torch.allclose(model(**batch, position_ids=moved).logits, expected, atol=1e-3)


def vision_of(batch):
    return VisionInputs(batch["pixel_values"], num_tiles=batch["num_tiles"])


def test_virtual_tokens_stand_before_positions_and_rows(model):
    batch = batch_of(model, 8, images_per_row=[1, 0])
    plan = model.model.compress_prompt(
        batch["input_ids"], vision_of(batch), batch["attention_mask"], align_left=True
    ).plan
    behind = plan.for_rows(4).behind(2)
    assert torch.equal(behind.positions[..., :2], torch.arange(2).expand(3, 4, 2))
    assert torch.equal(behind.positions[..., 2:], plan.positions.repeat_interleave(2, 1) + 2)
    length = plan.real.shape[1] + 2
    rows = behind.of_columns(0, length + 1).layer_rows
    # nothing is added to virtual tokens, nor to what was generated
    assert rows.shape[:3] == (2, 4, length + 1) and not rows[:, :, [0, 1, -1]].any()
    assert torch.equal(rows[:, :, 2:-1], plan.layer_rows.repeat_interleave(2, 1))
