"""Contract C3 of every method, and what else `generate` owes to its callers."""

import copy

import pytest
import torch
from contract_samples import GREEDY, batch_of, resolved, settled, some_budget
from factories import CONTRACTED, images_of, row_of, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import TextStreamer

from hf_vtc.models.host_vtc import is_recurrent


@pytest.fixture(scope="module", params=CONTRACTED)
def model(request):
    return tiny_model(request.param)


@pytest.mark.window
@pytest.mark.parametrize("budget", ("auto", "some", "full"))
@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_generate_equals_uncached_recomputation(model, budget, padding_side):
    budget = resolved(budget, model)
    batch = batch_of(model, 20, num_rows=3, images_per_row=[1, 0, 2], padding_side=padding_side)
    length = batch["input_ids"].shape[1]
    cached = model.generate(**batch, **GREEDY, vtc_budget=budget)
    assert torch.equal(cached[:, :length], batch["input_ids"])
    for row in range(3):
        expected = greedy_without_cache(model, row_of(batch, row), budget, GREEDY["max_new_tokens"])
        assert cached[row, length:].tolist() == expected


def greedy_without_cache(model, inputs, budget, num_tokens):
    """One full forward pass per token, on the unpadded row alone."""
    tokens, fixed = [], settled(model, inputs, budget)
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(int(model(**inputs, **fixed, use_cache=False).logits[0, -1].argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[tokens[-1]]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return tokens


@pytest.mark.parametrize("options", ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}), ids=str)
def test_beam_scores_equal_uncached_recomputation(model, options):
    batch = batch_of(model, 21, num_rows=3, images_per_row=[2, 1, 0])
    options = GREEDY | options | {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(**batch, **options, vtc_budget=some_budget(model))
    repeats = options.get("num_return_sequences", 1)
    length = batch["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], batch["input_ids"].repeat_interleave(repeats, 0))
    for idx, sequence in enumerate(out.sequences):
        logits = logits_without_cache(model, row_of(batch, idx // repeats), sequence[length:], some_budget(model))
        score = logits.log_softmax(-1).gather(1, sequence[length:, None]).mean()
        torch.testing.assert_close(out.sequences_scores[idx], score, rtol=1e-5, atol=1e-5)


def test_sampling_with_a_seed_equals_uncached_recomputation(model):
    batch = batch_of(model, 21, num_rows=3, images_per_row=[2, 1, 0])
    options = GREEDY | {"do_sample": True, "num_return_sequences": 3, "top_k": 20}
    torch.manual_seed(5)
    out = model.generate(
        **batch, **options, vtc_budget=some_budget(model), return_dict_in_generate=True, output_logits=True
    )
    torch.manual_seed(5)
    assert torch.equal(model.generate(**batch, **options, vtc_budget=some_budget(model)), out.sequences)
    length = batch["input_ids"].shape[1]
    assert out.sequences.shape == (9, length + GREEDY["max_new_tokens"])
    assert len({tuple(sequence.tolist()) for sequence in out.sequences}) > 3
    for idx, sequence in enumerate(out.sequences):
        expected = logits_without_cache(model, row_of(batch, idx // 3), sequence[length:], some_budget(model))
        torch.testing.assert_close(torch.stack([step[idx] for step in out.logits]), expected, rtol=0, atol=1e-5)


def logits_without_cache(model, inputs, new_tokens, budget):
    """Logits `(num_new, vocab_size)` of each new token from one forward pass over the whole unpadded row."""
    length, fixed = inputs["input_ids"].shape[1], settled(model, inputs, budget)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new_tokens[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return model(**inputs, **fixed, use_cache=False).logits[0, length - 1 : -1]


def test_generate_with_static_cache(model):
    batch = batch_of(model, 22, num_rows=2, images_per_row=[2, 1])
    dynamic = model.generate(**batch, **GREEDY, vtc_budget=some_budget(model))
    static = model.generate(
        **batch, **GREEDY, vtc_budget=some_budget(model), cache_implementation="static", disable_compile=True
    )
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("budget", ("some", "full"))
@pytest.mark.parametrize("images_later", (0, 1))
def test_generate_continues_a_conversation(model, images_later, budget):
    """The second turn with the cache of the first gives what the second turn gives without a cache."""
    budget = resolved(budget, model)
    whole = batch_of(model, 29, num_rows=1, images_per_row=[1 + images_later])
    ids, config = whole["input_ids"], model.config
    image_ends = [0] + (ids[0] == config.image_token_id).nonzero().flatten().tolist()
    first_image = images_of(config).collate(whole.rows[0][1][:1])
    reserved = int(model.count_visual_tokens(**whole, vtc_budget="full")[0])
    first_length = image_ends[reserved] + 2
    first = {"input_ids": ids[:, :first_length], **first_image}
    fixed = settled(model, whole, budget)
    of_first = dict(fixed)
    if "router_decisions" in fixed:
        of_first["router_decisions"] = fixed["router_decisions"][:reserved]
    turn = model.generate(**first, **GREEDY, **of_first, return_dict_in_generate=True)

    whole["input_ids"] = torch.cat([turn.sequences, ids[:, first_length:]], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    expected = model.generate(**whole, **GREEDY, **fixed)
    again = model.generate(**whole, **GREEDY, **fixed, past_key_values=turn.past_key_values)
    assert torch.equal(again, expected)
    if "router_decisions" in fixed:
        turn = model.generate(**first, **GREEDY, vtc_budget=budget, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="past_key_values.* need `router_decisions`"):
            model.generate(**whole, **GREEDY, vtc_budget=budget, past_key_values=turn.past_key_values)
    if images_later:
        with pytest.raises(ValueError, match="past_key_values"):
            model.generate(**whole, **GREEDY, past_key_values=again_cache(model, first, budget))


def test_generate_encodes_no_image_that_the_cache_holds(model, monkeypatch):
    """Later turns of a padded batch run no tower, and give what they give without a cache; changed images do."""
    first = batch_of(model, 31, num_rows=2, images_per_row=[2, 1], padding_side="left")
    fixed = settled(model, first, some_budget(model))
    turn = model.generate(**first, **GREEDY, **fixed, return_dict_in_generate=True)
    later = torch.randint(5, 20, (2, 3), generator=torch.Generator().manual_seed(3))
    second = {**first, "input_ids": torch.cat([turn.sequences, later], dim=1)}
    second["attention_mask"] = F.pad(
        first["attention_mask"], (0, second["input_ids"].shape[1] - first["input_ids"].shape[1]), value=1
    )
    expected = model.generate(**second, **GREEDY, **fixed)

    encoded, encode = [], model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda *args: encoded.append(args) or encode(*args))
    cache = copy.deepcopy(turn.past_key_values)
    again = model.generate(**second, **GREEDY, **fixed, past_key_values=cache)
    assert torch.equal(again, expected) and not encoded
    # what the second turn left on the cache serves a third
    third = {**second, "input_ids": torch.cat([again, later], dim=1)}
    third["attention_mask"] = F.pad(
        second["attention_mask"], (0, third["input_ids"].shape[1] - second["input_ids"].shape[1]), value=1
    )
    again = model.generate(**third, **GREEDY, **fixed, past_key_values=cache)
    assert not encoded and torch.equal(again, model.generate(**third, **GREEDY, **fixed))

    encoded.clear()
    changed = {**second, "pixel_values": second["pixel_values"] + 1}
    model.generate(**changed, **GREEDY, **fixed, past_key_values=turn.past_key_values)
    assert len(encoded) == 1


def again_cache(model, inputs, budget):
    return model.generate(**inputs, **GREEDY, vtc_budget=budget, return_dict_in_generate=True).past_key_values


def test_generate_with_prompt_lookup(model):
    if is_recurrent(model.config.text_config):
        batch = batch_of(model, 23, num_rows=1)
        with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` does not work with .* recurrent layers"):
            model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=3)
        return
    batch = batch_of(model, 23, num_rows=1, images_per_row=[2])
    # a prompt that repeats itself, so that the lookup finds candidates
    text = (batch["input_ids"][0] != model.config.image_token_id).nonzero().flatten()
    batch["input_ids"][0, text[-4:]] = batch["input_ids"][0, text[:4]]
    # the lookup of transformers 4.57 cannot do without an end token
    options = GREEDY | {"eos_token_id": model.config.text_config.vocab_size - 1}
    expected = model.generate(**batch, **options, vtc_budget=some_budget(model))
    assert torch.equal(
        model.generate(**batch, **options, vtc_budget=some_budget(model), prompt_lookup_num_tokens=3), expected
    )


@pytest.mark.window
def test_generate_lengths_and_return_dict(model):
    batch = batch_of(model, 24, num_rows=2, images_per_row=[2, 1])
    length = batch["input_ids"].shape[1]
    greedy = model.generate(**batch, **GREEDY, vtc_budget=some_budget(model))
    options = {key: value for key, value in GREEDY.items() if key != "max_new_tokens"}
    assert torch.equal(
        model.generate(**batch, **options, vtc_budget=some_budget(model), max_length=length + 6), greedy
    )
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.do_sample, config.pad_token_id = length + 6, False, 0
    out = model.generate(
        **batch,
        generation_config=config,
        eos_token_id=None,
        vtc_budget=some_budget(model),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(out.sequences, greedy) and len(out.scores) == 6
    # positional prompt, and a minimum that counts the prompt
    ids = batch.pop("input_ids")
    assert torch.equal(
        model.generate(ids, **batch, **GREEDY, vtc_budget=some_budget(model), min_length=length + 2), greedy
    )
    with pytest.raises(ValueError, match="max_length"):
        model.generate(ids, **batch, **options, max_length=length)


class Recorder(TextStreamer):
    """Collects what `generate` puts."""

    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_sees_the_original_prompt(model):
    batch = batch_of(model, 25, num_rows=1, images_per_row=[1])
    recorder = Recorder()
    out = model.generate(**batch, **GREEDY, vtc_budget=some_budget(model), streamer=recorder)
    assert recorder.ended and recorder.values[0] == batch["input_ids"][0].tolist()
    assert sum(recorder.values, []) == out[0].tolist()


def test_generate_from_embeddings(model):
    batch = batch_of(model, 26, num_rows=2, images_per_row=[1, 1])
    length = batch["input_ids"].shape[1]
    expected = model.generate(**batch, **GREEDY, vtc_budget=some_budget(model))[:, length:]
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(
        model.generate(**batch, inputs_embeds=embeds, **GREEDY, vtc_budget=some_budget(model)), expected
    )


@pytest.mark.parametrize("option", ({"prefill_chunk_size": 4}, {"assistant_model": nn.Identity()}))
def test_generate_refuses_what_cannot_work(model, option):
    batch = batch_of(model, 27, num_rows=1, images_per_row=[1])
    with pytest.raises(ValueError, match=next(iter(option))):
        model.generate(**batch, **GREEDY, **option)


def test_forward_refuses_images_with_a_filled_cache(model):
    batch = batch_of(model, 28, num_rows=1, images_per_row=[1])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="generate"):
            model(**batch, past_key_values=cache)
