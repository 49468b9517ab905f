"""Trainers of AVG-LLaVA: what moves, what stays, and that one graph at a time and micro-batches change nothing."""

import copy

import pytest
import torch
from factories import random_batch, tiny_model
from peft import LoraConfig, get_peft_model
from trainer_helpers import arguments, changed, gradients, model_without_dropout, snapshot

from hf_vtc.trainers import AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer
from hf_vtc.trainers.losses import best_granularity_loss, granularity_ranking_loss


def records_of(model, images_per_row=(1, 2, 0, 1), seed=0):
    """One sample per entry; the last third of its text is the answer."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for num_images in images_per_row:
        batch = random_batch(model.config, generator, images_per_row=[num_images])
        answer = torch.randint(10, 40, (1, 2 + 3 * len(records)), generator=generator)
        prompt = batch["input_ids"]
        record = {name: value for name, value in batch.items() if name != "attention_mask"}
        record["input_ids"] = torch.cat([prompt, answer], dim=1)
        record["labels"] = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
        records.append(record)
    return records


def collate(records):
    longest = max(record["input_ids"].shape[1] for record in records)

    def padded(tensor, value):
        return torch.nn.functional.pad(tensor, (longest - tensor.shape[1], 0), value=value)

    batch = {
        "input_ids": torch.cat([padded(record["input_ids"], 0) for record in records]),
        "attention_mask": torch.cat([padded(torch.ones_like(record["input_ids"]), 0) for record in records]),
        "labels": torch.cat([padded(record["labels"], -100) for record in records]),
    }
    for name in ("pixel_values", "num_tiles", "image_sizes"):
        parts = [record[name] for record in records if name in record]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def trainer_of(trainer_class, model, folder, records=None, trainer_options=None, **options):
    return trainer_class(
        model,
        arguments(folder, **options),
        train_dataset=records,
        eval_dataset=records,
        data_collator=collate,
        **(trainer_options or {}),
    )


def without(model, *parts):
    return {name for name, _ in model.named_parameters() if not set(parts) & set(name.split("."))}


# the losses by hand


def test_best_granularity_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]])
    losses = torch.tensor([[0.3, 0.2, 0.9], [0.4, 0.4, 0.4]])
    # the second has no best one: the coarsest counts
    expected = -(logits.log_softmax(-1)[0, 1] + logits.log_softmax(-1)[1, 0]) / 2
    torch.testing.assert_close(best_granularity_loss(logits, losses), expected)
    torch.testing.assert_close(best_granularity_loss(logits, losses, 4), expected / 2)


def test_granularity_ranking_loss_by_hand():
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    losses = torch.tensor([[0.5, 0.1, 0.2]])
    # sorted by loss: indices 1, 2, 0; the partition function cancels in differences of log-probabilities
    gap_1 = (max(0, 3 - 1 + 0.1) + max(0, 0 - 3 + 0.3)) / 2
    gap_2 = max(0, 0 - 1 + 2 * 0.4)
    torch.testing.assert_close(granularity_ranking_loss(logits, losses), torch.tensor(gap_1 + gap_2))
    pairs = max(0, 3 - 1 + 0.1) + max(0, 0 - 3 + 0.3) + max(0, 0 - 1 + 0.4)
    torch.testing.assert_close(granularity_ranking_loss(logits, losses, rule="paper"), torch.tensor(pairs))
    wide = max(0, 3 - 1 + 10 * 0.1) + max(0, 0 - 3 + 10 * 0.3) + max(0, 0 - 1 + 10 * 0.4)
    torch.testing.assert_close(granularity_ranking_loss(logits, losses, 10.0, "paper"), torch.tensor(wide))


def test_granularity_ranking_loss_has_a_gradient_for_the_router_only():
    logits = torch.randn(3, 5, requires_grad=True)
    losses = torch.rand(3, 5, requires_grad=True)
    granularity_ranking_loss(logits, losses).backward()
    assert logits.grad.abs().max() > 0 and losses.grad is None


# stage 3


def expected_loss(model, batch):
    """Mean over granularities of full forward passes with labels."""
    num_granularities = len(model.config.vis_token_granularity)
    losses = []
    for idx in range(num_granularities):
        decisions = torch.full((len(batch["num_tiles"]),), idx)
        losses.append(model(**batch, router_decisions=decisions).loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("train_vision_tower", (False, True))
def test_granularity_trainer_one_graph_at_a_time_gives_the_gradients_of_the_mean(tmp_path, train_vision_tower):
    model = model_without_dropout("avg_llava")
    options = {"train_vision_tower": train_vision_tower}
    trainer = trainer_of(AvgLlavaGranularityTrainer, model, tmp_path, trainer_options=options)
    trainer.create_optimizer()
    batch = collate(records_of(model))
    loss = trainer.training_step(model, dict(batch), (batch["labels"] != -100).sum())
    stepwise = gradients(model)
    model.zero_grad()
    whole = expected_loss(model.train(), batch)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    at_once = gradients(model)
    assert stepwise.keys() == at_once.keys()
    assert any("vision_tower" in name for name in stepwise) == train_vision_tower
    torch.testing.assert_close(stepwise, at_once, rtol=1e-4, atol=1e-6)


def test_granularity_trainer_keeps_one_graph_and_runs_the_tower_once(tmp_path):
    model = model_without_dropout("avg_llava")
    trainer = trainer_of(AvgLlavaGranularityTrainer, model, tmp_path)
    trainer.create_optimizer()
    order, num_granularities = [], len(model.config.vis_token_granularity)
    model.model.vision_tower.embeddings.register_forward_hook(lambda *args: order.append("tower"))
    model.model.register_forward_hook(lambda *args: order.append("forward"))
    model.lm_head.weight.register_hook(lambda gradient: order.append("backward"))
    model.model.router.register_forward_hook(lambda *args: order.append("router"))
    batch = collate(records_of(model))
    trainer.training_step(model, dict(batch), (batch["labels"] != -100).sum())
    assert order == ["tower"] + ["forward", "backward"] * num_granularities


def test_granularity_trainer_moves_all_but_router_and_tower(tmp_path):
    model = model_without_dropout("avg_llava")
    before = snapshot(model)
    trainer = trainer_of(AvgLlavaGranularityTrainer, model, tmp_path, records_of(model))
    trainer.train()
    assert changed(model, before) == without(model, "router", "vision_tower")
    metrics = trainer.state.log_history[0]
    names = [f"loss_{scale}" for scale in model.config.vis_token_granularity]
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in names) / len(names), abs=1e-3)


def test_granularity_trainer_accumulation_equals_the_large_batch(tmp_path):
    model = model_without_dropout("avg_llava")
    records, steps = records_of(model), []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        policy = copy.deepcopy(model)
        trainer = trainer_of(
            AvgLlavaGranularityTrainer,
            policy,
            tmp_path,
            records,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        )
        before = snapshot(policy)
        trainer.train()
        steps.append({name: value - before[name] for name, value in snapshot(policy).items()})
    assert max(delta.abs().max() for delta in steps[0].values()) > 1e-3
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-6)


def test_granularity_trainer_text_only_batch_is_the_plain_loss(tmp_path):
    model = model_without_dropout("avg_llava")
    trainer = trainer_of(AvgLlavaGranularityTrainer, model, tmp_path)
    trainer.create_optimizer()
    batch = collate(records_of(model, (0, 0)))
    loss = trainer.training_step(model, dict(batch), (batch["labels"] != -100).sum())
    torch.testing.assert_close(loss, model(**batch).loss.detach())
    assert gradients(model).keys() == without(model, "router", "vision_tower")


def test_granularity_trainer_evaluates_all_granularities(tmp_path):
    model = model_without_dropout("avg_llava")
    records = records_of(model)
    trainer = trainer_of(AvgLlavaGranularityTrainer, model, tmp_path, records)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] > 0
    assert all(first[f"eval_loss_{scale}"] > 0 for scale in model.config.vis_token_granularity)


def test_granularity_trainer_trains_an_adapter(tmp_path):
    model = model_without_dropout("avg_llava")
    records = records_of(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    before = snapshot(adapted)
    trainer_of(AvgLlavaGranularityTrainer, adapted, tmp_path, records).train()
    moved = changed(adapted, before)
    assert moved and all("lora" in name for name in moved)
    assert not any("router" in name or "vision_tower" in name for name in moved)


# stage 4


def test_router_trainer_moves_the_router_only(tmp_path):
    model = tiny_model("avg_llava", router_select=False)
    before = snapshot(model)
    trainer_of(AvgLlavaRouterTrainer, model, tmp_path, records_of(model)).train()
    moved = changed(model, before)
    assert moved <= {name for name, _ in model.named_parameters() if "router" in name.split(".")}
    # a shift of all keys changes no attention: its gradient is rounding, and may be exactly zero
    still = {name for name, _ in model.named_parameters() if "router" in name.split(".")} - moved
    assert still <= {"model.router.merger.k_proj.bias"}
    assert model.config.router_select


def test_router_trainer_measures_what_full_passes_measure(tmp_path):
    model = model_without_dropout("avg_llava")
    records = records_of(model)
    trainer = trainer_of(AvgLlavaRouterTrainer, model, tmp_path)
    batch, calls = collate(records), []
    model.model.vision_tower.embeddings.register_forward_hook(lambda *args: calls.append(1))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    losses, image_rows = trainer.measure(model.eval(), batch["labels"], inputs)
    assert len(calls) == 1 and image_rows == [0, 1, 1, 3]
    for idx in range(len(model.config.vis_token_granularity)):
        for row, record in enumerate(records):
            single = collate([record])
            decisions = {}
            if "num_tiles" in single:
                decisions["router_decisions"] = torch.full((len(single["num_tiles"]),), idx)
            with torch.no_grad():
                expected = model(**single, **decisions).loss
            torch.testing.assert_close(losses[row, idx], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_behind", [0, 2])
def test_router_trainer_routes_by_instructions_as_inference_does(tmp_path, num_behind):
    """Answers in the batch do not change what the router says, and without them it is the router of `generate`.

    Nor does what chat templates write behind the last answer, which nobody has written when a model is asked.
    """
    model = model_without_dropout("avg_llava")
    trainer = trainer_of(AvgLlavaRouterTrainer, model, tmp_path)
    records = records_of(model, (1, 2))
    prompt_lengths = [int((record["labels"] == -100).sum()) for record in records]
    for record in records:
        behind = torch.full((1, num_behind), 5)
        record["input_ids"] = torch.cat([record["input_ids"], behind], 1)
        record["labels"] = torch.cat([record["labels"], torch.full_like(behind, -100)], 1)
    batch = collate(records)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    routed = trainer.route(model.eval(), batch["labels"], dict(inputs), training=True)
    assert routed.requires_grad
    for record, prompt_length in zip(records, prompt_lengths, strict=True):
        record["input_ids"] = record["input_ids"][:, :prompt_length]
        record["labels"] = record["labels"][:, :prompt_length]
    prompts = {name: value for name, value in collate(records).items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(routed.detach(), model(**prompts).router_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranking", ("released", "paper"))
def test_router_trainer_accumulation_equals_the_large_batch(tmp_path, ranking):
    model = model_without_dropout("avg_llava")
    records, steps = records_of(model), []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        policy = copy.deepcopy(model)
        trainer = trainer_of(
            AvgLlavaRouterTrainer,
            policy,
            tmp_path,
            records,
            {"ranking": ranking},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.01,
            max_grad_norm=0.0,
        )
        before = snapshot(policy)
        trainer.train()
        steps.append({name: value - before[name] for name, value in snapshot(policy).items()})
    assert max(delta.abs().max() for delta in steps[0].values()) > 1e-4
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-5)


def test_router_trainer_reaches_the_same_parameters_whatever_a_batch_holds(tmp_path):
    model = model_without_dropout("avg_llava")
    trainer = trainer_of(AvgLlavaRouterTrainer, model, tmp_path)
    trainer.create_optimizer()
    unanswered = collate(records_of(model, (1,)))
    unanswered["labels"] = torch.full_like(unanswered["labels"], -100)
    reached = []
    for batch in (collate(records_of(model)), collate(records_of(model, (0, 0))), unanswered):
        model.zero_grad()
        trainer.training_step(model, dict(batch), torch.tensor(1))
        reached.append(gradients(model))
    assert reached[0].keys() == reached[1].keys() == reached[2].keys()
    for nothing in reached[1:]:
        assert max(gradient.abs().max() for gradient in nothing.values()) == 0


def test_router_trainer_evaluates_without_dropout_and_repeatably(tmp_path):
    model = tiny_model("avg_llava", router_dropout=0.5)
    trainer = trainer_of(AvgLlavaRouterTrainer, model, tmp_path, records_of(model))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] > 0
    assert first["eval_router_regret"] >= 0 and 0 < first["eval_kept_tokens"] <= 1


def test_router_trainer_learns_the_best_granularity(tmp_path):
    model = model_without_dropout("avg_llava")
    records = records_of(model, (1, 1))
    trainer = trainer_of(AvgLlavaRouterTrainer, model, tmp_path, records, max_steps=20, per_device_train_batch_size=2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_router_accuracy"] == 1.0 and after["eval_router_regret"] == 0.0


def test_router_trainer_tolerance_prefers_the_coarsest_of_equals(tmp_path):
    model = model_without_dropout("avg_llava")
    trainer = trainer_of(AvgLlavaRouterTrainer, model, tmp_path, trainer_options={"loss_tolerance": 0.1})
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    losses = torch.tensor([[0.58, 0.55, 0.5, 0.56, 0.9], [0.3, 0.2, 0.05, 0.1, 0.14]])
    equal = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.8], [0.2, 0.1, 0.05, 0.05, 0.05]])
    expected = 0.1 * best_granularity_loss(logits, equal) + granularity_ranking_loss(logits, equal)
    torch.testing.assert_close(trainer.router_loss(logits, losses), expected)


@pytest.mark.parametrize(
    "options",
    (
        {"margin": -1.0},
        {"ce_loss_weight": -0.1},
        {"rank_loss_weight": -1.0},
        {"ranking": "pairs"},
        {"loss_tolerance": -1},
    ),
    ids=str,
)
def test_router_trainer_refuses_bad_options(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        trainer_of(AvgLlavaRouterTrainer, tiny_model("avg_llava"), tmp_path, trainer_options=options)


def test_router_trainer_refuses_an_adapter(tmp_path):
    adapted = get_peft_model(tiny_model("avg_llava"), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="PeftModel"):
        trainer_of(AvgLlavaRouterTrainer, adapted, tmp_path)
