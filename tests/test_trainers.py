"""Trainers: what moves, what stays, and that micro-batches, interruptions and probes change nothing."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model, tiny_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from trainer_helpers import (
    arguments,
    changed,
    collate,
    consistency_trainer,
    disturbed,
    make_records,
    model_without_dropout,
    named,
    router_trainer,
    snapshot,
)

from hf_vtc.data import VtcCollator
from hf_vtc.trainers import VicoConsistencyTrainer, VicoRouterTrainer


def test_consistency_trainer_moves_all_but_router_and_reference(tmp_path):
    model = model_without_dropout("vico")
    before = snapshot(model)
    trainer = consistency_trainer(model, make_records(model), tmp_path)
    trainer.train()
    assert changed(model, before) == named(model, router=False)
    assert changed(trainer.reference_model, before) == set()


def test_consistency_trainer_loss_equals_full_length_logits(tmp_path):
    model = model_without_dropout("vico")
    policy = disturbed(model).train()
    records = make_records(model)
    trainer = consistency_trainer(policy, records, tmp_path, reference_model=model)
    batch = collate(records)
    loss = trainer.compute_loss(policy, dict(batch))

    trainer._num_drawn = 0
    decisions = trainer.draw_decisions(batch["input_ids"], training=True)
    assert 0 < decisions.sum() < len(decisions)
    labels = batch.pop("labels")
    reference_logits = model(**batch, vtc_budget="full").logits
    policy_logits = policy(**batch, router_decisions=decisions).logits
    total = 0.0
    for row, position in (labels != -100).nonzero().tolist():
        reference = reference_logits[row, position - 1].log_softmax(-1)
        total += (reference.exp() * (reference - policy_logits[row, position - 1].log_softmax(-1))).sum()
    torch.testing.assert_close(loss, total / (labels != -100).sum())


def test_consistency_trainer_loss_is_zero_for_the_uncompressed_reference(tmp_path):
    model = model_without_dropout("vico")
    records = make_records(model)
    losses = []
    for probability in (0.0, 1.0):
        trainer = consistency_trainer(copy.deepcopy(model), records, tmp_path, compress_probability=probability)
        losses.append(trainer.compute_loss(trainer.model, collate(records)).item())
    assert losses[0] == pytest.approx(0.0, abs=1e-6)
    assert losses[1] > 1e-6


def test_consistency_trainer_never_projects_the_whole_sequence(tmp_path):
    model = model_without_dropout("vico")
    records = make_records(model)
    trainer = consistency_trainer(model, records, tmp_path)
    projected = []
    for head in (model.lm_head, trainer.reference_model.lm_head):
        head.register_forward_hook(lambda module, args, output: projected.append(output.numel() // output.shape[-1]))
    trainer.compute_loss(model, collate(records))
    supervised = sum(label != -100 for record in records for label in record["labels"])
    assert projected == [supervised, supervised]


def test_consistency_trainer_cross_entropy_weight_adds_the_model_loss(tmp_path):
    model = model_without_dropout("vico")
    records = make_records(model)
    losses = []
    for weight in (0.0, 0.5):
        trainer = VicoConsistencyTrainer(
            copy.deepcopy(model), arguments(tmp_path), compress_probability=0.0, cross_entropy_weight=weight
        )
        losses.append(trainer.compute_loss(trainer.model, collate(records)).item())
    expected = model(**collate(records), vtc_budget="full").loss.item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.5])
def test_consistency_trainer_accumulation_equals_the_large_batch(tmp_path, cross_entropy_weight):
    model = disturbed(model_without_dropout("vico"))
    records = make_records(model)
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        policy = disturbed(model)
        trainer = VicoConsistencyTrainer(
            policy,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=0.1,
            ),
            reference_model=copy.deepcopy(model),
            compress_probability=(0.2, 1.0),
            cross_entropy_weight=cross_entropy_weight,
            train_dataset=records,
            data_collator=collate,
        )
        before = snapshot(policy)
        trainer.train()
        results.append((trainer, {name: value - before[name] for name, value in snapshot(policy).items()}))
    (whole, step), (split, split_step) = results
    assert max(delta.abs().max() for delta in step.values()) > 1e-3
    torch.testing.assert_close(split_step, step, rtol=1e-3, atol=1e-6)
    for key in ("loss", "kl", "compressed_tiles", "kept_tokens"):
        logged = [[entry[key] for entry in trainer.state.log_history if key in entry] for trainer in (whole, split)]
        assert len(logged[0]) == 2
        assert logged[1] == pytest.approx(logged[0], abs=2e-4)


def test_consistency_trainer_resumes_as_if_uninterrupted(tmp_path):
    model = tiny_model("vico")
    records = make_records(model, tiles_of_images=((1,), (2, 1), (), (3,), (2,), (1, 1)))
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    straight = consistency_trainer(copy.deepcopy(model), records, tmp_path, **options)
    straight.train()
    resumed = consistency_trainer(copy.deepcopy(model), records, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changed(resumed.model, snapshot(straight.model)) == set()


def test_consistency_trainer_text_only_batch_reaches_the_same_parameters(tmp_path):
    model = model_without_dropout("vico")
    mixed, text = make_records(model), make_records(model, tiles_of_images=((), ()))
    trainer = consistency_trainer(model, mixed, tmp_path)
    model.train()
    reached = []
    for records in (mixed, text):
        model.zero_grad()
        loss = trainer.compute_loss(model, collate(records))
        loss.backward()
        reached.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1] == named(model, router=False)
    vision = [p.grad.abs().max() for n, p in model.named_parameters() if "vision_tower" in n]
    assert max(vision) == 0.0


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_consistency_trainer_reaches_both_connectors_whatever_is_drawn(tmp_path, probability):
    model = model_without_dropout("vico")
    trainer = consistency_trainer(model, None, tmp_path, compress_probability=probability)
    model.train()
    trainer.compute_loss(model, collate(make_records(model))).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == named(model, router=False)


def test_draw_depends_on_seed_step_and_position_alone(tmp_path):
    model = model_without_dropout("vico")
    trainer = consistency_trainer(model, None, tmp_path)
    whole = trainer.draw(6, training=True)
    trainer._num_drawn = 0
    torch.testing.assert_close(torch.cat([trainer.draw(n, training=True) for n in (1, 3, 2)]), whole, rtol=0, atol=0)
    trainer._num_drawn = 0
    trainer.state.global_step = 1
    assert not torch.equal(trainer.draw(6, training=True), whole)
    trainer._num_drawn = 0
    trainer.state.global_step = 0
    other = consistency_trainer(model, None, tmp_path, seed=4)
    assert not torch.equal(other.draw(6, training=True), whole)
    many = other.draw(4000, training=True)
    assert 0.45 < (many < 0.5).float().mean() < 0.55


def test_consistency_trainer_evaluates_without_logits_and_repeatably(tmp_path):
    model = disturbed(model_without_dropout("vico"))
    records = make_records(model)
    trainer = consistency_trainer(model, records, tmp_path, reference_model=model_without_dropout("vico"))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] > 0
    assert first["eval_kl"] > 0
    assert 0.0 < first["eval_compressed_tiles"] < 1.0
    assert trainer.predict(records).predictions in (None, ())


def test_consistency_trainer_follows_the_router(tmp_path):
    model = model_without_dropout("vico")
    trainer = consistency_trainer(model, None, tmp_path, compress_probability="auto")
    batch = collate(make_records(model))
    decisions = model(**{name: value for name, value in batch.items() if name != "labels"}).router_decisions
    assert 0 < decisions.sum() < len(decisions)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.router_decisions))
    trainer.compute_loss(model, batch)
    assert any(torch.equal(choice, decisions) for choice in seen)


def test_draw_decisions_gives_every_sample_a_rate_of_its_range(tmp_path):
    model = model_without_dropout("vico")
    trainer = consistency_trainer(model, None, tmp_path, compress_probability=(0.2, 1.0))
    tiles, per_tile = 50, model.config.image_seq_length
    prompts = torch.full((400, tiles * per_tile), model.config.image_token_id)
    rates = trainer.draw_decisions(prompts, training=True).view(400, tiles).float().mean(1)
    assert 0.57 < rates.mean() < 0.63
    # an even spread over the range, and not one rate for all
    assert 0.2 < (rates < 0.4).float().mean() < 0.3 and 0.2 < (rates > 0.8).float().mean() < 0.3


def test_draw_decisions_of_micro_batches_are_those_of_the_whole(tmp_path):
    model = model_without_dropout("vico")
    trainer = consistency_trainer(model, None, tmp_path, compress_probability=(0.2, 1.0))
    tiles = torch.tensor([3, 0, 1, 4])
    prompts = torch.zeros(4, 4 * model.config.image_seq_length, dtype=torch.long)
    for prompt, length in zip(prompts, (tiles * model.config.image_seq_length).tolist(), strict=True):
        prompt[:length] = model.config.image_token_id
    whole = trainer.draw_decisions(prompts, training=True)
    trainer._num_drawn = 0
    parts = [trainer.draw_decisions(part, training=True) for part in prompts.split([1, 3])]
    assert len(whole) == 8 and torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"compress_probability": 1.5},
        {"compress_probability": (0.8, 0.2)},
        {"compress_probability": "full"},
        {"cross_entropy_weight": -1.0},
    ],
    ids=str,
)
def test_consistency_trainer_checks_its_options(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VicoConsistencyTrainer(tiny_model("vico"), arguments(tmp_path), **options)


# ViCO stage 2


def train_both_stages(folder, **options):
    """Weights after each stage, from the same start whatever the number of processes."""
    weights = {}
    model = model_without_dropout("vico")
    records = make_records(model)
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, **options}
    # draws differ between processes, so every tile is compressed
    stage_1 = consistency_trainer(
        disturbed(model), records, folder, reference_model=model, compress_probability=1.0, **options
    )
    stage_2 = router_trainer(model_without_dropout("vico"), records, folder, **options)
    for name, trainer in (("stage_1", stage_1), ("stage_2", stage_2)):
        trainer.train()
        weights[name] = snapshot(trainer.model)
    return weights, sorted(stage_2.ratio_window.values)


def test_buffers_do_not_travel_at_every_step_unless_asked(tmp_path):
    model = tiny_model("vico")
    for given, expected in ((None, False), (True, True)):
        trainer = consistency_trainer(model, None, tmp_path, ddp_broadcast_buffers=given)
        assert trainer.accelerator.ddp_handler.broadcast_buffers is expected


DISTRIBUTED = """
import sys
import torch
from test_trainers import train_both_stages
options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
result = train_both_stages(sys.argv[1], **options)
if torch.distributed.get_rank() == 0:
    torch.save(result, sys.argv[2])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_trainers_on_two_processes_equal_one(tmp_path):
    # one process holds the text-only record while the other holds an image
    script, result = tmp_path / "script.py", tmp_path / "result.pt"
    script.write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    run = subprocess.run(
        [*launch, str(script), str(tmp_path / "many"), str(result)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    weights, ratios = torch.load(result)
    expected_weights, expected_ratios = train_both_stages(tmp_path / "one")
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    assert ratios == pytest.approx(expected_ratios, rel=1e-4)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_trainers_take_chat_records(tmp_path, precision):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in pixels]
    part = {"type": "image"}
    records = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], "images": given}
        for content, answer, given in (
            ([part, {"type": "text", "text": "what is it?"}], "a page", images[:1]),
            ([part, part], "two of them", images[1:]),
            ("hello", "hi there", []),
        )
    ]
    collator = VtcCollator(tiny_processor("vico"))
    model = tiny_model("vico")
    before = snapshot(model)
    reference = copy.deepcopy(model)
    options = arguments(tmp_path, per_device_train_batch_size=3, **precision)
    shared = {"train_dataset": records, "data_collator": collator}
    VicoConsistencyTrainer(model, options, **shared).train()
    assert changed(model, before) == named(model, router=False)
    before = snapshot(model)
    VicoRouterTrainer(model, options, reference_model=reference, **shared).train()
    assert changed(model, before) == named(model, router=True)


def test_consistency_trainer_trains_an_adapter_alone(tmp_path):
    base = model_without_dropout("vico")
    records = make_records(base)
    targets = r"model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj"
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["router", "compressed_projector"])
    model = get_peft_model(base, config)
    before = snapshot(model)
    trainer = consistency_trainer(model, records, tmp_path)
    trainer.train()
    expected = {name for name in before if "lora_" in name or "compressed_projector.modules_to_save" in name}
    assert changed(model, before) == expected
    assert changed(trainer.reference_model, before) == set()
    with pytest.raises(ValueError, match="must not be a `PeftModel`"):
        router_trainer(model, records, tmp_path)
