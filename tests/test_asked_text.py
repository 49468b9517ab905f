"""A choice by the text reads what is asked: no answers where labels tell them, nor what stands behind the last."""

import pytest
import torch
from factories import CONTRACTED, random_batch
from trainer_helpers import arguments, model_without_dropout

from hf_vtc.models.prompt_vtc import asked_tokens, supervised_tokens
from hf_vtc.trainers import Responses, VtcTrainer
from hf_vtc.trainers.avg_llava import without_answers

BY_TEXT = [name for name in CONTRACTED if name.partition(" ")[0] in ("avg_llava", "cdpruner")]
by_text = pytest.mark.parametrize("method", BY_TEXT)
on_either_side = pytest.mark.parametrize("padding_side", ("left", "right"))


def question_of(model, padding_side, seed=0):
    """Prompts of unequal rows: two images, none, one."""
    generator = torch.Generator().manual_seed(seed)
    return random_batch(model.config, generator, images_per_row=[2, 0, 1], padding_side=padding_side)


def answered(question, answers=0):
    """The same conversations with answers, and with a template's end behind them, labelled as for training."""
    generator = torch.Generator().manual_seed(1000 + answers)
    rows = []
    for ids, mask in zip(question["input_ids"], question["attention_mask"], strict=True):
        prompt = ids[mask.bool()].tolist()
        answer, end = (torch.randint(1, 200, (2 + answers,), generator=generator).tolist() for _ in range(2))
        rows.append((prompt + answer + end, [-100] * len(prompt) + answer + [-100] * len(end)))
    longest = max(len(ids) for ids, _ in rows)

    def padded(row, value):
        blank = [value] * (longest - len(row))
        return blank + row if question.padding_side == "left" else row + blank

    batch = {name: value for name, value in question.items() if name not in ("input_ids", "attention_mask")}
    return batch | {
        "input_ids": torch.tensor([padded(ids, 0) for ids, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
        "labels": torch.tensor([padded(labels, -100) for _, labels in rows]),
    }


def budget_of(model):
    return "auto" if model.config.model_type == "vtc_avg_llava" else 0.7


def told(model, batch):
    return model(**batch, vtc_budget=budget_of(model)).router_logits


@by_text
@on_either_side
@pytest.mark.parametrize("with_gradient", (True, False))
def test_labels_hide_answers_and_what_is_behind_them(method, padding_side, with_gradient):
    model = model_without_dropout(method)
    question = question_of(model, padding_side)
    with torch.set_grad_enabled(with_gradient):
        # as `generate` reads it
        expected = told(model.eval(), question)
        for answers in (0, 5):
            batch = answered(question, answers)
            torch.testing.assert_close(told(model.train(), batch), expected)
            shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
            torch.testing.assert_close(told(model, batch | {"shift_labels": shifted}), expected)
            # otherwise the answers are part of the context, and the comparison above can fail
            assert not torch.allclose(told(model, batch), expected, atol=1e-3)


@by_text
def test_labels_change_no_logits_in_eval_mode(method):
    model = model_without_dropout(method).eval()
    batch = answered(question_of(model, "left"))
    labels = batch.pop("labels")
    with torch.no_grad():
        plain, labelled = (model(**each, vtc_budget=budget_of(model)) for each in (batch, batch | {"labels": labels}))
    assert torch.equal(labelled.logits, plain.logits)
    assert torch.equal(labelled.router_decisions, plain.router_decisions)


@by_text
def test_training_keeps_the_tokens_of_generate(method):
    """The loss is that of the decisions made for the prompt alone."""
    model = model_without_dropout(method)
    question = question_of(model, "right")
    batch = answered(question)
    with torch.no_grad():
        decisions = model.eval()(**question, vtc_budget=budget_of(model)).router_decisions
        out = model.train()(**batch, vtc_budget=budget_of(model))
        forced = model(**batch, router_decisions=decisions)
    assert torch.equal(out.router_decisions, decisions)
    torch.testing.assert_close(out.loss, forced.loss)


@by_text
@pytest.mark.parametrize("training", (True, False))
def test_trainers_choose_by_the_question_in_evaluation_too(method, training, tmp_path):
    model = model_without_dropout(method)
    question = question_of(model, "left")
    batch = answered(question)
    responses = Responses.from_labels(batch.pop("labels"))
    trainer = VtcTrainer(model, arguments(tmp_path))
    with torch.no_grad():
        expected = told(model.eval(), question)
        _, outputs = trainer.next_token_loss(
            model.train(training), responses, batch | {"vtc_budget": budget_of(model)}
        )
    torch.testing.assert_close(outputs.router_logits, expected)


def test_rows_without_labels_are_read_whole_and_rows_of_labels_not_at_all():
    model = model_without_dropout("avg_llava").train()
    batch = random_batch(model.config, torch.Generator().manual_seed(3), images_per_row=[1, 1], padding_side="right")
    nothing, everything = torch.full_like(batch["input_ids"], -100), batch["input_ids"]
    with torch.no_grad():
        plain, unlabelled = told(model, batch), told(model, batch | {"labels": nothing})
        labelled = told(model, batch | {"labels": torch.stack([nothing[0], everything[1]])})
        # the first token of a row, which nothing predicts, stays, and so do images
        ids = torch.where(everything == model.config.image_token_id, everything, everything % 7 + 100)
        ids[:, 0] = everything[:, 0]
        otherwise = told(model, {**batch, "input_ids": ids, "labels": torch.stack([nothing[0], ids[1]])})
    assert torch.equal(unlabelled, plain)
    torch.testing.assert_close(labelled[0], plain[0])
    assert not torch.allclose(labelled[1], plain[1], atol=1e-3)
    torch.testing.assert_close(otherwise[1], labelled[1])


@pytest.mark.parametrize("padding", (0, 2))
def test_the_rule_by_hand(padding):
    labels = torch.tensor([[-100, -100, 5, -100, 6, -100], [-100] * 6, [1, 2, 3, -100, -100, -100]])
    expected = torch.tensor([[1, 1, 0, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]])
    for pads in ((padding, 0), (0, padding)):
        real = torch.nn.functional.pad(torch.ones_like(expected), pads).bool()
        wide = torch.nn.functional.pad(labels, pads, value=-100)
        supervised = supervised_tokens(wide)
        asked = asked_tokens(supervised, real)
        assert torch.equal(asked, torch.nn.functional.pad(expected, pads).bool())
        shifted = torch.nn.functional.pad(wide[:, 1:], (0, 1), value=-100)
        assert torch.equal(asked_tokens(supervised_tokens(None, shifted), real), asked)
    assert supervised_tokens(None) is None


def test_prompts_without_answers_keep_images_behind_the_last_answer():
    ids, labels = torch.tensor([[4, 9, 5, 6, 9, 7]]), torch.tensor([[-100, 9, 5, -100, -100, -100]])
    asked = without_answers({"input_ids": ids}, labels, (9,))
    assert asked["input_ids"].tolist() == [[4, 9, 9]]


def test_labels_of_another_length_are_named():
    model = model_without_dropout("avg_llava").train()
    batch = random_batch(model.config, torch.Generator().manual_seed(0), images_per_row=[1])
    with pytest.raises(ValueError, match="Labels must say of each token"):
        model(**batch, labels=batch["input_ids"][:, 1:])
