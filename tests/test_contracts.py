"""Contracts C1, C2, C4 to C6 of every method: a method is tested by being listed in `factories.CONTRACTED`."""

import copy
import re

import pytest
import torch
from contract_samples import GREEDY, batch_of, first_part, resolved, some_budget
from factories import (
    CONTRACTED,
    scored_budgets_of,
    stock_inputs,
    tiny_model,
    uncompressed,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vtc.models.host_vtc import RELEASE


@pytest.fixture(scope="module", params=CONTRACTED)
def model(request):
    return tiny_model(request.param)


def first_compact_layer(model):
    """The first decoder layer that sees kept tokens only."""
    return model.config.compress_layer_idx if model.config.model_type == "vtc_llavolta" else 0


def with_labels(batch, model):
    # nothing predicts the first token of a row; half of the others are prompt
    predicted = batch["attention_mask"].cumsum(1) * batch["attention_mask"] > 1
    labels = batch["input_ids"].masked_fill(~predicted, -100)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
    return labels.masked_fill(labels == model.config.image_token_id, -100)


@pytest.mark.parametrize("budget", (None, "auto", "full", "some"))
def test_counts_agree(model, budget):
    budget = resolved(budget, model)
    batch = batch_of(model, 1, num_rows=3)
    with torch.no_grad():
        out = model(**batch, vtc_budget=budget)
    placeholders = batch["input_ids"] == model.config.image_token_id
    assert torch.equal(out.num_visual_tokens, model.count_visual_tokens(**batch, vtc_budget=budget))
    assert int((out.kept_mask & placeholders).sum()) == int(out.num_visual_tokens.sum())
    assert out.image_hidden_states.shape[0] == int(out.num_visual_tokens.sum())
    # text is never dropped and padding is never kept
    text = ~placeholders & batch["attention_mask"].bool()
    assert bool(out.kept_mask[text].all()) and not bool(out.kept_mask[batch["attention_mask"] == 0].any())


def test_language_model_sees_kept_tokens_only(model):
    batch = batch_of(model, 2, num_rows=1, images_per_row=[2])
    seen = []
    decoder = model.get_decoder()
    handle = decoder.layers[first_compact_layer(model)].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            out = model(**batch, vtc_budget=some_budget(model))
    finally:
        handle.remove()
    assert seen == [int(out.kept_mask.sum())]


@pytest.mark.parametrize("padding_side", ("left", "right"))
@pytest.mark.parametrize("budget", ("auto", "some", "full"))
def test_outputs_are_full_length(model, budget, padding_side):
    budget = resolved(budget, model)
    batch = batch_of(model, 3, num_rows=4, padding_side=padding_side)
    with torch.no_grad():
        out = model(**batch, vtc_budget=budget)
        base = model.model(**batch, vtc_budget=budget)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    assert base.last_hidden_state.shape[:2] == batch["input_ids"].shape
    # a dropped position repeats the last kept position before it
    for row in range(out.kept_mask.shape[0]):
        last = None
        for position in batch["attention_mask"][row].nonzero().flatten().tolist():
            if out.kept_mask[row, position]:
                last = position
            assert torch.equal(out.logits[row, position], out.logits[row, last])
            assert torch.equal(base.last_hidden_state[row, position], base.last_hidden_state[row, last])


@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_loss_equals_full_length_loss(model, padding_side):
    batch = batch_of(model, 4, num_rows=4, padding_side=padding_side)
    labels = with_labels(batch, model)
    with torch.no_grad():
        out = model(**batch, labels=labels, vtc_budget=some_budget(model))
        expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        # the fused heads of TRL: base model, boolean mask by the original labels, projection
        states = model.model(**batch, vtc_budget=some_budget(model)).last_hidden_state[:, :-1]
        chosen = labels[:, 1:] != -100
        head = nn.functional.cross_entropy(model.lm_head(states[chosen]), labels[:, 1:][chosen])
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss, head, rtol=1e-6, atol=1e-6)


def test_loss_takes_shift_labels(model):
    batch = batch_of(model, 4, num_rows=3, padding_side="left")
    labels = with_labels(batch, model)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        expected = model(**batch, labels=labels, vtc_budget=some_budget(model)).loss
        # whoever shifts the labels replaces them
        loss = model(**batch, labels=labels.flip(0), shift_labels=shifted, vtc_budget=some_budget(model)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_set_attn_implementation_reaches_every_part(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"


def test_loss_of_a_label_right_after_an_image(model):
    batch = batch_of(model, 5, num_rows=1, images_per_row=[1])
    image = (batch["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, image[-1] + 1] = 7
    with torch.no_grad():
        out = model(**batch, labels=labels, vtc_budget=some_budget(model))
    # a method without a choice drops nothing
    kept = out.kept_mask[0, image]
    assert bool(kept.all()) == (int(out.num_visual_tokens) == len(image))
    # the state before the label is that of the last token that is kept, wherever it stands
    for before in (image[kept][-1], image[-1]):
        expected = nn.functional.cross_entropy(out.logits[0, before][None], torch.tensor([7]))
        torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)


def test_placeholders_are_never_labels(model):
    batch = batch_of(model, 6, num_rows=2, images_per_row=[1, 1])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    masked = labels.masked_fill(labels == model.config.image_token_id, -100)
    with torch.no_grad():
        assert torch.equal(model(**batch, labels=labels).loss, model(**batch, labels=masked).loss)


class LargestVocabularyTensor(TorchDispatchMode):
    """Records the most rows that any tensor with a vocabulary axis had."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # turned round, the weight of the head has a vocabulary axis too
        for tensor in () if func.is_view else out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size:
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return out


def test_training_makes_no_full_length_vocabulary_tensor(model):
    model = copy.deepcopy(model).train()
    # the tied or untied weight itself has rows of another length
    assert model.config.text_config.hidden_size != model.config.text_config.vocab_size
    batch = batch_of(model, 7, num_rows=4)
    labels = with_labels(batch, model)
    with LargestVocabularyTensor(model.config.text_config.vocab_size) as largest:
        out = model(**batch, labels=labels, vtc_budget=some_budget(model))
        out.loss.backward()
    assert out.logits is None
    # the first token of a row is predicted by nothing
    assert 0 < largest.rows == int((labels[:, 1:] != -100).sum()) < batch["input_ids"].numel()
    model.eval()
    with torch.no_grad():
        assert model(**batch, labels=labels, vtc_budget=some_budget(model)).logits.shape[:2] == labels.shape


@pytest.mark.window
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("shifted", (False, True))
def test_the_head_runs_once_on_the_rows_that_are_read(model, shifted, training):
    model = copy.deepcopy(model).train(training)
    batch = batch_of(model, 4, num_rows=3)
    labels = with_labels(batch, model)
    targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    given = {"labels": labels.flip(0), "shift_labels": targets} if shifted else {"labels": labels}
    num_targets, rows = int((targets != -100).sum()), []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0][..., 0].numel()))
    with torch.no_grad():
        for keep in (0, 2, torch.tensor([0, 5])):
            torch.manual_seed(0)
            out = model(**batch, **given, vtc_budget=some_budget(model), logits_to_keep=keep)
            num_kept = int(out.kept_mask.sum()) if out.kept_index is not None else labels.numel()
            in_evaluation = num_kept if isinstance(keep, int) and keep == 0 else num_targets + 2 * len(labels)
            assert rows == [num_targets if training else in_evaluation]
            if not training:
                logits = model(**batch, vtc_budget=some_budget(model)).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
                torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-6)
                asked = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
                torch.testing.assert_close(out.logits, logits[:, asked])
            rows.clear()


@pytest.mark.parametrize("training", (True, False))
def test_a_batch_without_labels_has_the_loss_of_nothing(model, training):
    model = copy.deepcopy(model).train(training)
    batch = batch_of(model, 4, num_rows=2)
    nothing = torch.full_like(batch["input_ids"], -100)
    loss = model(**batch, labels=nothing, num_items_in_batch=torch.tensor(3), vtc_budget=some_budget(model)).loss
    loss.backward()
    assert float(loss.detach()) == 0 and not float(model.lm_head.weight.grad.abs().max())
    # as in transformers
    assert bool(model(**batch, labels=nothing, vtc_budget=some_budget(model)).loss.isnan())


def test_logits_to_keep(model):
    batch = batch_of(model, 8, num_rows=2, images_per_row=[1, 2])
    with torch.no_grad():
        everything = model(**batch, vtc_budget=some_budget(model)).logits
        torch.testing.assert_close(
            model(**batch, vtc_budget=some_budget(model), logits_to_keep=3).logits, everything[:, -3:]
        )
        index = torch.tensor([0, 5])
        torch.testing.assert_close(
            model(**batch, vtc_budget=some_budget(model), logits_to_keep=index).logits, everything[:, index]
        )


def test_tuple_output_and_inputs_embeds(model):
    batch = batch_of(model, 9, num_rows=2)
    with torch.no_grad():
        out = model(**batch, vtc_budget=some_budget(model))
        as_tuple = model(**batch, vtc_budget=some_budget(model), return_dict=False)
        assert torch.equal(as_tuple[0], out.logits)
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        assert torch.equal(model(**batch, inputs_embeds=embeds, vtc_budget=some_budget(model)).logits, out.logits)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    plain, checkpointed = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(model, 10, num_rows=3)
    for each in (plain, checkpointed):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        # a method may draw noise in training
        torch.manual_seed(0)
        each(**batch, labels=with_labels(batch, model), vtc_budget=some_budget(model)).loss.backward()
    reached = 0
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            reached += int(one.grad.abs().max() > 0)
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert reached > 10


@pytest.mark.parametrize("images_per_row", ([0, 0], [1, 0], [2, 1]))
@pytest.mark.parametrize("budget", (None, "full", "some"))
def test_every_batch_touches_every_trainable_parameter(model, images_per_row, budget):
    """Sharded training hangs where ranks run different modules, so gradients must exist whatever a batch holds."""
    budget = resolved(budget, model)
    model = copy.deepcopy(model).train()
    batch = batch_of(model, 11, num_rows=2, images_per_row=images_per_row)
    budget = {} if sum(images_per_row) == 0 else {"vtc_budget": budget}
    model(**batch, labels=with_labels(batch, model), **budget).loss.backward()
    untouched = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert untouched == []


@pytest.mark.window
@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_full_equals_the_uncompressed_model_bit_for_bit(model, padding_side):
    stock = uncompressed(model)
    batch = batch_of(model, 30, num_rows=4, padding_side=padding_side)
    theirs = stock_inputs(stock, batch)
    read = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if model.config.grid_base is not None and RELEASE < (5, 5):
        # where padding stands differs by version, and nobody reads it
        read = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**batch, vtc_budget="full").logits[read], stock(**theirs).logits[read])
    left = batch_of(model, 30, num_rows=4, padding_side="left")
    theirs = stock_inputs(stock, left)
    assert torch.equal(model.generate(**left, **GREEDY, vtc_budget="full"), stock.generate(**theirs, **GREEDY))


@pytest.mark.parametrize(
    "budget", (0, -3, 0.0, 1.5, float("nan"), "half", True, [0.5], [0.5, None, "x"], {"share": 0.5}), ids=str
)
def test_bad_budgets_raise(model, budget):
    batch = batch_of(model, 31, num_rows=2, images_per_row=[1, 1])
    with pytest.raises(ValueError, match="vtc_budget"):
        model(**batch, vtc_budget=budget)


def smallest_count(model, image, batch):
    """The smallest admissible count of one image, which the error of a budget of nothing names."""
    budgets = ["full"] * len(model.count_visual_tokens(**batch, vtc_budget="full"))
    budgets[image] = 1
    try:
        return int(model.count_visual_tokens(**batch, vtc_budget=budgets)[image])
    except ValueError as error:
        found = re.search(r"`vtc_budget` of 1 .* image (\d+), .*smallest admissible count is (\d+)", str(error))
        assert found and int(found[1]) == image, error
        return int(found[2])


@torch.no_grad()
def test_budgets_bound_the_images_that_they_are_for(model):
    batch = batch_of(model, 32, num_rows=2, images_per_row=[2, 1])
    reserved = model.count_visual_tokens(**batch, vtc_budget="full").tolist()
    for image in range(len(reserved)):
        smallest, previous = smallest_count(model, image, batch), 0
        assert 1 <= smallest <= reserved[image]
        budgets = ["full"] * len(reserved)
        for allowed in sorted({smallest, (smallest + reserved[image]) // 2, reserved[image], reserved[image] + 7}):
            # as a number of tokens, and as the share that is as large
            for budget in (allowed, min(allowed / reserved[image], 1.0)):
                budgets[image] = budget
                counts = model.count_visual_tokens(**batch, vtc_budget=budgets).tolist()
                assert previous <= counts[image] <= allowed
                assert counts[:image] + counts[image + 1 :] == reserved[:image] + reserved[image + 1 :]
            previous = counts[image]
        # the largest that fits, and nothing below the smallest
        assert previous == reserved[image]
        budgets[image] = smallest
        assert model.count_visual_tokens(**batch, vtc_budget=budgets)[image] == smallest
        if smallest > 1:
            budgets[image] = smallest - 1
            with pytest.raises(ValueError, match=f"smallest admissible count is {smallest} "):
                model(**batch, vtc_budget=budgets)


def state_of(model):
    """What the modules of a model hold: values of numbers and strings, identities of all else, members of dicts."""

    def seen(value):
        if isinstance(value, dict):
            return {name: seen(member) for name, member in value.items()}
        return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)

    return {name: seen(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("budget", ("auto", "some", "full"))
def test_transfers_happen_before_the_language_model_and_leave_no_state(model, monkeypatch, budget):
    """One for the layout, before the tower; a second one, of scores alone, where only scores can tell (C6)."""
    from hf_vtc.models import layout_vtc, vision_vtc

    events = []
    for module in (layout_vtc, vision_vtc):
        name = module.__name__.rpartition(".")[2]
        original = module.to_host

        def noted(*tensors, name=name, original=original):
            # nothing to fetch is no transfer
            events.extend([name] * bool(tensors))
            return original(*tensors)

        monkeypatch.setattr(module, "to_host", noted)
    by_scores = budget in scored_budgets_of(model.config)
    batch, budget = batch_of(model, 40, num_rows=3, images_per_row=[2, 0, 1]), resolved(budget, model)
    # what transformers notes at the first call, such as that a mask is needed, is not ours
    model.generate(**batch, **GREEDY, vtc_budget=budget)
    before = state_of(model)
    expected = ["layout_vtc", "tower", *["vision_vtc"] * by_scores, "decoder"]
    tower_part = first_part(model.model.vision_tower)
    handles = [
        tower_part.register_forward_pre_hook(lambda module, args: events.append("tower")),
        model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: events.append("decoder")),
    ]
    try:
        events.clear()
        with torch.no_grad():
            out = model(**batch, vtc_budget=budget)
        assert list(dict.fromkeys(events)) == expected and events.count("layout_vtc") == 1
        assert events.count("vision_vtc") == by_scores
        events.clear()
        model.generate(**batch, **GREEDY, vtc_budget=budget)
        assert list(dict.fromkeys(events)) == expected and events.count("layout_vtc") == 1
        assert events.count("vision_vtc") == by_scores
    finally:
        for handle in handles:
            handle.remove()
    assert before == state_of(model)
    assert out.num_visual_tokens.device.type == "cpu"


def test_placeholders_must_match_images(model):
    batch = batch_of(model, 50, num_rows=2, images_per_row=[1, 1], padding_side="right")
    row = batch["input_ids"][0]
    image = (row == model.config.image_token_id).nonzero().flatten()
    fewer = dict(batch, input_ids=batch["input_ids"].clone())
    fewer["input_ids"][0, image[-1]] = 1
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**fewer)
    none = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 1))
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**none)


def test_placeholders_without_images_raise(model):
    batch = batch_of(model, 51, num_rows=1, images_per_row=[1])
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY)
    with pytest.raises(ValueError, match="pixel_values"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
