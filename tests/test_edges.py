"""Where other people's code meets ours: what changes a result is honoured or refused by name, in every method."""

import pytest
import torch
from contract_samples import first_part, settled
from factories import CONTRACTED, budgets_of, random_batch, row_of, tiny_model
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig

from hf_vtc.models.host_vtc import is_recurrent
from hf_vtc.models.padding_vtc import images_apart

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=CONTRACTED)
def shared(request):
    return tiny_model(request.param)


@pytest.fixture
def model(shared):
    yield shared
    shared.eval()
    shared.generation_config = GenerationConfig()


def batch_of(model, seed=61, **kwargs):
    return random_batch(model.config, torch.Generator().manual_seed(seed), **kwargs)


def placeholders_of(model, batch):
    return batch["input_ids"] == model.config.image_token_id


# arguments

MISSPELT = ("vtc_bugdet", "router_decision", "image_size", "pixel_value", "anything")


@pytest.mark.parametrize("name", MISSPELT)
def test_unknown_arguments_are_refused_by_name(model, name):
    batch = dict(batch_of(model, num_rows=1, images_per_row=[1]))
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    images = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
    for call in (
        lambda: model(**batch, **{name: 0.5}),
        lambda: model.model(**batch, **{name: 0.5}),
        lambda: model(**text, **{name: 0.5}),
        lambda: model.count_visual_tokens(**batch, **{name: 0.5}),
        lambda: model.get_image_features(**images, **{name: 0.5}),
    ):
        with pytest.raises(TypeError, match=f"`{name}` is no argument"):
            call()
    with pytest.raises(ValueError, match=name):
        model.generate(**batch, **GREEDY, **{name: 0.5})


@pytest.mark.parametrize("budget", ("some", 1.5, True, [0.5], ["some"]))
def test_what_is_no_budget_is_refused_without_images_too(model, budget):
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "vtc_budget": budget}
    for call in (lambda: model(**text), lambda: model.generate(**text, **GREEDY)):
        with pytest.raises(ValueError, match="`vtc_budget`"):
            call()


def test_the_nearest_name_is_told(model):
    with pytest.raises(TypeError, match="Did you mean `vtc_budget`"):
        model(**batch_of(model, num_rows=1, images_per_row=[1]), vtc_bugdet=0.5)


def test_lists_are_as_good_as_tensors(model):
    batch = dict(batch_of(model, num_rows=2, images_per_row=[1, 2]))
    lists = {name: batch[name].tolist() if name in ("num_tiles", "image_sizes") else batch[name] for name in batch}
    with torch.no_grad():
        assert torch.equal(model(**lists).logits, model(**batch).logits)


@pytest.mark.parametrize("wrong", (7, 0.5, -3))
def test_decisions_of_a_wrong_kind_are_refused(model, wrong):
    batch = batch_of(model, num_rows=1, images_per_row=[1])
    with torch.no_grad():
        own = model(**batch).router_decisions
    shape = (1,) if own is None else own.shape
    with pytest.raises(ValueError, match="router_decisions"):
        model(**batch, router_decisions=torch.full(shape, wrong))


# budgets


@pytest.mark.parametrize("where", ("call", "model"))
def test_a_budget_of_the_generation_config_is_the_default(model, where):
    batch, budget = batch_of(model, num_rows=2, images_per_row=[1, 2]), budgets_of(model.config)[0]
    asked = GenerationConfig(vtc_budget=budget, **GREEDY)
    expected = model.generate(**batch, **GREEDY, vtc_budget=budget, output_logits=True, return_dict_in_generate=True)
    full = model.generate(**batch, **GREEDY, vtc_budget="full")
    options = {"output_logits": True, "return_dict_in_generate": True}
    if where == "call":
        out = model.generate(**batch, generation_config=asked, **options)
        own = model.generate(**batch, generation_config=asked, vtc_budget="full")
    else:
        model.generation_config.vtc_budget = budget
        out = model.generate(**batch, **GREEDY, **options)
        own = model.generate(**batch, **GREEDY, vtc_budget="full")
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    # the call's own argument wins
    assert torch.equal(own, full)


def test_an_impossible_default_budget_is_refused(model):
    batch = batch_of(model, num_rows=1, images_per_row=[1])
    with pytest.raises(ValueError, match="smallest admissible count"):
        model.generate(**batch, generation_config=GenerationConfig(vtc_budget=1e-9, **GREEDY))


# masks and labels


def test_holes_in_masks_are_refused_with_images(model):
    batch = dict(batch_of(model, num_rows=2, images_per_row=[1, 1], padding_side="left"))
    mask = batch["attention_mask"].clone()
    mask[0, -2] = 0
    for call in (model, model.count_visual_tokens, lambda **inputs: model.generate(**inputs, **GREEDY)):
        with pytest.raises(ValueError, match="attention_mask. of sample 0 has zeros between"):
            call(**{**batch, "attention_mask": mask})


def test_images_under_padding_are_refused(model):
    batch = dict(batch_of(model, num_rows=1, images_per_row=[1]))
    mask = batch["attention_mask"].clone()
    mask[0, : int(placeholders_of(model, batch)[0].nonzero()[0]) + 1] = 0
    with pytest.raises(ValueError, match="is 0 at image placeholders"):
        model(**{**batch, "attention_mask": mask})


def test_labels_mean_the_same_beside_embeddings(model):
    batch = dict(batch_of(model, num_rows=2, images_per_row=[1, 2]))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
        assert torch.equal(model(**rest, inputs_embeds=embeds, labels=labels).loss, expected)
        # placeholders never count
        assert torch.equal(
            model(**batch, labels=labels.masked_fill(placeholders_of(model, batch), -100)).loss, expected
        )


@pytest.mark.parametrize("images_per_row", ([0, 0], [1, 2]))
def test_the_side_of_the_padding_does_not_change_a_loss(model, images_per_row):
    losses = []
    for side in ("left", "right"):
        batch = batch_of(model, images_per_row=images_per_row, padding_side=side)
        # the first token of a row is labelled too, before which nothing stands
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            losses.append(model(**batch, labels=labels).loss)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)


def test_a_zero_of_an_overflowing_router_does_not_reach_the_loss():
    model = tiny_model("avg_llava")
    batch = batch_of(model, num_rows=1, images_per_row=[1])
    decisions = torch.zeros(1, dtype=torch.long)
    expected = model(**batch, labels=batch["input_ids"], router_decisions=decisions).loss
    with torch.no_grad():
        model.model.router.voter.fill_(float("inf"))
    model.train()
    loss = model(**batch, labels=batch["input_ids"], router_decisions=decisions).loss
    assert bool(loss.isfinite()) and bool(expected.isfinite())


# images


@pytest.mark.parametrize("method", ("llavolta", "vistog"))
def test_touching_images_are_as_many_as_their_tiles(method):
    model = tiny_model(method)
    length, token, size = model.config.image_seq_length, model.config.image_token_id, model.config.tile_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    for budget in ("full", "auto", ["full", "auto"]):
        counts = []
        for between in ([], [9]):
            ids = torch.tensor([[1] + [token] * length + between + [token] * length + [7, 8]])
            counts.append(model.count_visual_tokens(input_ids=ids, pixel_values=pixels, vtc_budget=budget).tolist())
        assert counts[0] == counts[1] and len(counts[0]) == 2


# generate


def test_generate_runs_the_tower_once_in_training_mode(model):
    batch = batch_of(model, num_rows=2, images_per_row=[1, 1])
    expected = model.generate(**batch, **GREEDY, vtc_budget="full")
    model.train()
    part = first_part(model.model.vision_tower)
    runs = []
    handle = part.register_forward_pre_hook(lambda *args: runs.append(1))
    try:
        out = model.generate(**batch, **GREEDY, vtc_budget="full")
    finally:
        handle.remove()
    assert out.shape == expected.shape
    model.eval()
    handle = part.register_forward_pre_hook(lambda *args: runs.append(-1))
    try:
        model.generate(**batch, **GREEDY, vtc_budget="full")
    finally:
        handle.remove()
    assert sum(runs) == 0 and runs


@pytest.mark.parametrize("budget", (None, "full"))
def test_static_caches_need_no_padding(model, budget):
    batch = batch_of(model, num_rows=1, images_per_row=[1])
    for inputs in (batch, {name: value for name, value in batch.items() if name != "attention_mask"}):
        expected = model.generate(**inputs, **GREEDY, vtc_budget=budget)
        out = model.generate(**inputs, **GREEDY, vtc_budget=budget, cache_implementation="static")
        assert torch.equal(out, expected)


@pytest.mark.parametrize("budget", ("some", "full"))
def test_virtual_tokens_of_prompt_learning_stand_before_the_prompt(model, budget):
    """Generation from a prompt with learnt embeddings in front is that of the same embeddings given by hand."""
    budget = budgets_of(model.config)[0] if budget == "some" else budget
    batch = dict(row_of(batch_of(model, num_rows=1, images_per_row=[1]), 0))
    # a question that virtual tokens are no part of
    fixed = settled(model, batch, budget)
    adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    virtual = adapted.get_prompt(1).detach()
    out = adapted.generate(**batch, **GREEDY, **fixed)
    embeds = torch.cat([virtual, model.get_input_embeddings()(batch["input_ids"])], dim=1)
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    expected = model.generate(inputs_embeds=embeds, **rest, **GREEDY, **fixed)
    assert torch.equal(out[:, batch["input_ids"].shape[1] :], expected)
    text = torch.tensor([[5, 6, 7]])
    embeds = torch.cat([virtual, model.get_input_embeddings()(text)], dim=1)
    assert torch.equal(
        adapted.generate(input_ids=text, **GREEDY)[:, 3:], model.generate(inputs_embeds=embeds, **GREEDY)
    )


def test_prefix_tuning_generates(model):
    batch = dict(row_of(batch_of(model, num_rows=1, images_per_row=[1]), 0))
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    if is_recurrent(model.config.text_config):
        # PEFT fills caches of keys and values, which recurrent layers have not, those of the stock model neither
        with pytest.raises(ValueError, match="Cannot get conv state"):
            adapted.generate(**batch, **GREEDY, vtc_budget="full")
        return
    out = adapted.generate(**batch, **GREEDY, vtc_budget="full")
    assert out.shape[1] == batch["input_ids"].shape[1] + GREEDY["max_new_tokens"]


# files


def test_a_reloaded_model_computes_the_same_bits(model, tmp_path):
    batch = batch_of(model, num_rows=2, images_per_row=[1, 2])
    with torch.no_grad():
        expected = model(**batch).logits
        # headers of several lengths put the weights at several addresses
        for name in ("a", "a_longer_name", "b" * 37):
            model.config.some_note = name
            model.save_pretrained(tmp_path / name, save_code=False)
            loaded = type(model).from_pretrained(tmp_path / name).eval()
            assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.parametrize("training", (False, True))
def test_no_images_are_as_none(model, training):
    """A trainer that deals out images has none for a batch of text."""
    batch = dict(batch_of(model, 3, images_per_row=[1]))
    given = {name: batch[name][:0] for name in ("pixel_values", "num_tiles", "image_sizes") if name in batch}
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    model.train(training)
    assert torch.isfinite(model(**text, **given).loss)
    model.eval()
    assert torch.equal(model(**text, **given).loss, model(**text).loss)
    assert torch.equal(
        model.generate(input_ids=text["input_ids"], **given, **GREEDY), model.generate(text["input_ids"], **GREEDY)
    )
    with pytest.raises(ValueError, match="no `pixel_values` were given"):
        model(batch["input_ids"], **given)
    with pytest.raises(ValueError, match="at least one image"):
        model.get_image_features(given["pixel_values"])


def test_tiles_may_come_in_a_block_for_each_image(model):
    """As those of LLaVA-NeXT's processor, which holds for every method that cuts images into tiles."""
    # beside others in its prompt an image of LLaVA-OneVision is a single tile
    alone = model.config.max_map_tiles is not None
    images_per_row = [1, 0, 1, 1] if alone else [2, 0, 2]
    batch = dict(batch_of(model, 6 if alone else 3, images_per_row=images_per_row, padding_side="left"))
    if not model.config.sees_tiles:
        said = "be \\(images, 3, H, W\\)|have a row for each patch"
        with pytest.raises(ValueError, match=f"`pixel_values` must ({said})"):
            model(**{**batch, "pixel_values": batch["pixel_values"][None]})
        return
    num_tiles = batch["num_tiles"]
    assert num_tiles.max() > num_tiles.min()
    blocks = images_apart(batch["pixel_values"], num_tiles)
    # what stands behind an image's own tiles is never read
    blocks.flatten(0, 1)[~(torch.arange(int(num_tiles.max())) < num_tiles[:, None]).flatten()] = torch.nan
    apart = {name: value for name, value in {**batch, "pixel_values": blocks}.items() if name != "num_tiles"}
    for inputs in (apart, {**apart, "num_tiles": num_tiles}):
        assert torch.equal(model(**inputs).logits, model(**batch).logits)
        assert torch.equal(model.count_visual_tokens(**inputs), model.count_visual_tokens(**batch))
        assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**batch, **GREEDY))
    vision = {name: batch[name] for name in ("image_sizes", "num_tiles") if name in batch}
    expected = model.get_image_features(batch["pixel_values"], **vision).pooler_output
    found = model.get_image_features(blocks, **vision).pooler_output
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    with pytest.raises(ValueError, match="with room for"):
        model(**{**batch, "pixel_values": blocks[:, :1]})
    with pytest.raises(ValueError, match="images with room for|must|shape|`image_sizes`"):
        model(**{**apart, "pixel_values": blocks[1:]})
