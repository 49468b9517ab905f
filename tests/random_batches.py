"""Random calls of a model, each with what it must give: the same as its rows alone or without a cache, or a refusal.

One seed gives one sequence of calls. `check_random_call` draws a kind of call, a batch (rows, images, tilings, side of
the padding, rows of text alone) and a budget (one, or one for each image), and fails where the promise does not hold.
"""

from collections import Counter

import pytest
import torch
from factories import budgets_of, images_of, random_batch, row_of
from random_images import draw_int

from hf_vtc.models.host_vtc import cache_of, named_cache

GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def draw(choices, generator):
    return choices[draw_int(0, len(choices) - 1, generator)]


def draw_budget(config, num_images, generator):
    """One budget, or in a third of the cases a list with one for each image."""
    choices = (None, "auto", "full", *budgets_of(config))
    if num_images and draw_int(0, 2, generator) == 0:
        return [draw(choices, generator) for _ in range(num_images)]
    return draw(choices, generator)


def images_before(batch, row):
    return sum(len(images) for _, images in batch.rows[:row])


def vision_of_row(batch, row, budget):
    """The budget of one row's images as an argument, nothing for a row of text."""
    first, num_images = images_before(batch, row), len(batch.rows[row][1])
    if not num_images:
        return {}
    return {"vtc_budget": budget[first : first + num_images] if isinstance(budget, list) else budget}


def vision_of(batch, budget):
    return {"vtc_budget": budget} if "pixel_values" in batch else {}


def new_tokens(model, inputs, **options):
    return model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :]


def next_tokens_without_cache(model, inputs, budget):
    """One full forward pass for each new token of one unpadded row."""
    inputs, tokens = dict(inputs), []
    for _ in range(GREEDY["max_new_tokens"]):
        out = model(**inputs, **budget, use_cache=False)
        tokens.append(int(out.logits[0, -1].argmax()))
        if out.router_decisions is not None:
            # a router that reads the question would read the answer as well
            budget = {"router_decisions": out.router_decisions}
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[-1:]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return tokens


def check_rows(model, batch, budget, generator):
    """States, what is kept and what is generated of every row are those of the row alone."""
    out = model(**batch, **vision_of(batch, budget))
    generated = new_tokens(model, batch, **vision_of(batch, budget))
    for row in torch.randperm(len(batch.rows), generator=generator).tolist():
        alone, extra = row_of(batch, row), vision_of_row(batch, row, budget)
        expected = model(**alone, **extra)
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(out.logits[row, real], expected.logits[0], **TOLERANCE)
        if "pixel_values" in alone:
            assert torch.equal(out.kept_mask[row, real], expected.kept_mask[0])
        assert torch.equal(generated[row], new_tokens(model, alone, **extra)[0])


def check_cache(model, batch, budget, generator):
    """Generation with a cache, dynamic or static, gives what one forward pass for each token gives."""
    row = draw_int(0, len(batch.rows) - 1, generator)
    options = draw(({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}), generator)
    generated = new_tokens(model, batch, **vision_of(batch, budget), **options)[row].tolist()
    assert generated == next_tokens_without_cache(model, row_of(batch, row), vision_of_row(batch, row, budget))


def check_second_turn(model, batch, budget, generator):
    """The second turn with the cache of the first gives what it gives without, or the cache is refused."""
    row = draw_int(0, len(batch.rows) - 1, generator)
    whole, extra = row_of(batch, row), vision_of_row(batch, row, budget)
    ids, images = batch.rows[row]
    num_first = draw_int(0, len(images), generator)
    ends = [position for position, token in enumerate(ids) if token == model.config.image_token_id]
    num_reserved = 0
    if num_first:
        counts = model.count_visual_tokens(**whole, vtc_budget="full")
        num_reserved = int(counts[:num_first].sum())
    cut = 1 if num_reserved == 0 else ends[num_reserved - 1] + 2
    first = {"input_ids": whole["input_ids"][:, :cut]}
    first_extra = {}
    if num_first:
        first.update(images_of(model.config).collate(images[:num_first]))
        asked = extra["vtc_budget"]
        first_extra = {"vtc_budget": asked[:num_first] if isinstance(asked, list) else asked}
    turn = model.generate(**first, **first_extra, **GREEDY, return_dict_in_generate=True)
    # what was generated is part of the next prompt
    assert not bool((turn.sequences[:, cut:] == model.config.image_token_id).any())
    whole["input_ids"] = torch.cat([turn.sequences, whole["input_ids"][:, cut:]], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    expected = new_tokens(model, whole, **extra)
    try:
        again = new_tokens(model, whole, **extra, **named_cache(cache_of(turn)))
    except ValueError as error:
        assert "past_key_values" in str(error), error
        return "refused"
    assert torch.equal(again, expected)


def check_packed_rows(model, batch, budget, generator):
    """Rows one behind the other in one row, whose positions start anew, are those rows alone, or are refused."""
    whole = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    lengths = [len(ids) for ids, _ in batch.rows]
    whole["input_ids"] = torch.tensor([[token for ids, _ in batch.rows for token in ids]])
    whole["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    try:
        out = model(**whole, **vision_of(batch, budget), use_cache=False)
    except ValueError as error:
        assert "position_ids" in str(error), error
        return "refused"
    for row, logits in enumerate(out.logits[0].split(lengths)):
        expected = model(**row_of(batch, row), **vision_of_row(batch, row, budget)).logits[0]
        torch.testing.assert_close(logits, expected, **TOLERANCE)


def check_hole(model, batch, budget, generator):
    """A mask with a hole beside images is refused by forward, counting and generation alike."""
    row = draw([row for row, (_, images) in enumerate(batch.rows) if images] or [None], generator)
    if row is None:
        return "text only"
    mask = batch["attention_mask"].clone()
    text = (batch["input_ids"][row] != model.config.image_token_id) & mask[row].bool()
    places = text.nonzero().flatten().tolist()[1:-1]
    mask[row, draw(places, generator)] = 0
    holed = {**batch, "attention_mask": mask, "vtc_budget": budget}
    for call in (model, model.count_visual_tokens, lambda **inputs: model.generate(**inputs, **GREEDY)):
        with pytest.raises(ValueError, match="attention_mask"):
            call(**holed)


# rows and caches are what most calls are
CHECKS = (check_rows, check_rows, check_cache, check_second_turn, check_packed_rows, check_hole)


@torch.no_grad()
def check_random_calls(model, seed, number) -> Counter:
    """Check `number` random calls; how many of each kind were given, refused or without an image where one is due."""
    generator, seen = torch.Generator().manual_seed(seed), Counter()
    for _ in range(number):
        check = draw(CHECKS, generator)
        batch = random_batch(model.config, generator)
        budget = draw_budget(model.config, images_before(batch, len(batch.rows)), generator)
        seen[check.__name__.removeprefix("check_"), check(model, batch, budget, generator) or "given"] += 1
    return seen
