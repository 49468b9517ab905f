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
from trainer_helpers import arguments, changed, collate, make_records, model_without_dropout, snapshot

from hf_vtc.data import VtcCollator
from hf_vtc.trainers import Responses, VicoConsistencyTrainer, VicoRouterTrainer
from hf_vtc.trainers.vico import tile_rows


def consistency_trainer(model, records, folder, reference_model=None, compress_probability=0.5, **options):
    return VicoConsistencyTrainer(
        model,
        arguments(folder, **options),
        reference_model=reference_model,
        compress_probability=compress_probability,
        train_dataset=records,
        eval_dataset=records,
        data_collator=collate,
    )


def router_trainer(model, records, folder, trainer_class=VicoRouterTrainer, trainer_options=None, **options):
    trainer_options = {"ratio_loss": "cross_entropy", **(trainer_options or {})}
    return trainer_class(
        model,
        arguments(folder, **options),
        train_dataset=records,
        eval_dataset=records,
        data_collator=collate,
        **trainer_options,
    )


def named(model, *, router):
    return {name for name, _ in model.named_parameters() if ("router" in name.split(".")) == router}


def disturbed(model, scale=0.05):
    """A copy with slightly different weights: a policy that is no longer its reference."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


# ViCO stage 1


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


@pytest.mark.parametrize("probe", ["one_tile", "all_tiles"])
def test_router_trainer_moves_the_router_alone(tmp_path, probe):
    model = tiny_model("vico")
    # as stage 1 leaves it: router frozen, all else trainable
    VicoConsistencyTrainer(model, arguments(tmp_path))
    before = snapshot(model)
    trainer = router_trainer(model, make_records(model), tmp_path, trainer_options={"probe": probe})
    trainer.train()
    assert changed(model, before) == named(model, router=True)


def brute_force_ratios(policy, reference, records, probe, ratio_loss):
    """Each tile of each record by itself, on full-length logits of a batch of one."""

    def loss_of(record, **options):
        batch = collate([record])
        labels = batch.pop("labels")[0, 1:]
        supervised = labels != -100
        logits = policy(**batch, **options).logits[0, :-1][supervised].log_softmax(-1)
        if ratio_loss == "cross_entropy":
            return -logits.gather(1, labels[supervised][:, None]).mean()
        target = reference(**batch, vtc_budget="full").logits[0, :-1][supervised].log_softmax(-1)
        return (target.exp() * (target - logits)).sum(-1).mean()

    ratios = []
    for record in records:
        count = sum(record["num_tiles"])
        for tile in range(count):
            decisions = torch.ones(count, dtype=torch.bool)
            if probe == "one_tile":
                decisions = torch.arange(count) == tile
            full = loss_of(record, vtc_budget="full")
            ratios.append(loss_of(record, router_decisions=decisions) / (full + 1e-6))
    return torch.stack(ratios)


@pytest.mark.parametrize("ratio_loss", ["kl", "cross_entropy"])
@pytest.mark.parametrize(("probe", "probe_batch_size"), [("one_tile", None), ("one_tile", 3), ("all_tiles", None)])
def test_router_trainer_ratios_equal_brute_force(tmp_path, probe, probe_batch_size, ratio_loss):
    reference = tiny_model("vico").eval()
    policy = disturbed(reference).eval()
    records = make_records(policy)
    options = {"probe": probe, "probe_batch_size": probe_batch_size, "ratio_loss": ratio_loss}
    trainer = router_trainer(policy, records, tmp_path, trainer_options={**options, "reference_model": reference})
    batch = collate(records)
    responses = Responses.from_labels(batch.pop("labels"))
    router_logits, ratios = trainer.route_and_probe(policy, responses, batch)
    with torch.no_grad():
        expected = brute_force_ratios(policy, reference, records, probe, ratio_loss)
    assert router_logits.requires_grad and router_logits.shape == (len(expected), 2)
    assert expected.std() > 1e-4
    torch.testing.assert_close(ratios, expected, rtol=1e-3, atol=1e-5)


def test_router_trainer_gives_no_ratio_without_response(tmp_path):
    model = tiny_model("vico").eval()
    records = make_records(model, tiles_of_images=((1,), (2,)))
    records[0]["labels"] = [-100] * len(records[0]["labels"])
    trainer = router_trainer(model, records, tmp_path)
    batch = collate(records)
    responses = Responses.from_labels(batch.pop("labels"))
    _, ratios = trainer.route_and_probe(model, responses, batch)
    assert ratios.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("probe", ["one_tile", "all_tiles"])
def test_router_trainer_runs_the_tower_once_per_step(tmp_path, probe):
    model = tiny_model("vico")
    runs = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    trainer = router_trainer(model, make_records(model), tmp_path, trainer_options={"probe": probe}, max_steps=3)
    trainer.train()
    assert len(runs) == 3


def test_router_trainer_keeps_all_but_the_router_in_eval_mode(tmp_path):
    model = tiny_model("vico")
    trainer = router_trainer(model, make_records(model), tmp_path)
    modes = {"router": set(), "others": set()}

    def note(name):
        return lambda module, *_: modes[name].add(module.training)

    model.model.router.block1.dropout.register_forward_hook(note("router"))
    for module in (model.model.vision_tower, model.model.compressed_projector.dropout, model.model.language_model):
        module.register_forward_hook(note("others"))
    trainer.train()
    assert modes == {"router": {True}, "others": {False}}
    trainer.evaluate()
    assert modes == {"router": {True, False}, "others": {False}}


def test_router_trainer_accumulation_equals_the_large_batch(tmp_path):
    model = model_without_dropout("vico")
    records = make_records(model, tiles_of_images=((1,), (2, 1), (), (3,)))
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        router = copy.deepcopy(model)
        trainer = router_trainer(
            router,
            records,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
            max_steps=3,
        )
        before = snapshot(router)
        trainer.train()
        results.append((trainer, {name: value - before[name] for name, value in snapshot(router).items()}))
    (whole, step), (split, split_step) = results
    assert max(delta.abs().max() for delta in step.values()) > 1e-3
    torch.testing.assert_close(split_step, step, rtol=1e-3, atol=1e-6)
    assert len(whole.ratio_window) == 3 * 7
    assert list(split.ratio_window.values) == pytest.approx(list(whole.ratio_window.values), rel=1e-4)


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_router_trainer_resumes_as_if_uninterrupted(tmp_path, restore_callbacks):
    model = tiny_model("vico")
    records = make_records(model, tiles_of_images=((1,), (2, 1), (), (3,), (2,), (1, 1)))
    trainer_options = {"window_length": 9, "percentile": 40.0}
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "restore_callback_states_from_checkpoint": restore_callbacks,
    }
    runs = [
        router_trainer(copy.deepcopy(model), records, tmp_path / name, trainer_options=trainer_options, **options)
        for name in ("straight", "resumed")
    ]
    straight, resumed = runs
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert changed(resumed.model, snapshot(straight.model)) == set()
    assert resumed.ratio_window.state_dict() == straight.ratio_window.state_dict()
    assert len(straight.ratio_window) == 9


def test_router_trainer_needs_the_window_to_resume(tmp_path):
    model = tiny_model("vico")
    records = make_records(model)
    stage_1 = consistency_trainer(copy.deepcopy(model), records, tmp_path, save_strategy="steps", save_steps=1)
    stage_1.train()
    trainer = router_trainer(model, records, tmp_path / "stage_2", max_steps=3)
    # the optimizer of stage 1 holds other parameters
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="no window of loss ratios"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_router_trainer_text_only_batch_reaches_the_same_parameters(tmp_path):
    model = tiny_model("vico")
    mixed, text = make_records(model), make_records(model, tiles_of_images=((), ()))
    trainer = router_trainer(model, mixed, tmp_path)
    trainer.ratio_window.update([1.0])
    reached = []
    for records in (mixed, text):
        model.train()
        model.zero_grad()
        trainer.compute_loss(model, collate(records)).backward()
        reached.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1] == named(model, router=True)


def test_router_trainer_labels_come_from_earlier_steps(tmp_path):
    model = tiny_model("vico")
    trainer = router_trainer(model, make_records(model), tmp_path, max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # the first step has no threshold, hence no labels
    assert "tau" not in logs[0] and logs[0]["loss"] == 0.0
    for entry in logs[1:]:
        assert {"tau", "compress_labels", "router_accuracy"} <= set(entry)
    for entry in logs:
        assert {"router_entropy", "compressed_tiles", "kept_tokens"} <= set(entry)


def test_router_trainer_evaluates_without_touching_the_window(tmp_path):
    model = tiny_model("vico")
    records = make_records(model)
    trainer = router_trainer(model, records, tmp_path)
    trainer.train()
    window = trainer.ratio_window.state_dict()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] > 0
    assert {"eval_tau", "eval_compress_labels", "eval_router_accuracy"} <= set(first)
    assert trainer.ratio_window.state_dict() == window


class PlantedRatios(VicoRouterTrainer):
    """Brightness of a tile in place of its loss ratio: dark tiles are the compressible ones, or bright ones."""

    sign = 1

    def route_and_probe(self, model, responses, inputs):
        self.planted = self.sign * inputs["pixel_values"].mean((1, 2, 3))
        return super().route_and_probe(model, responses, inputs)

    def tile_ratios(self, model, responses, inputs, full_losses, reference_logits):
        return self.planted


def planted_records(model, count, seed):
    records = make_records(model, tiles_of_images=[(1 + idx % 2,) for idx in range(count)], seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    for record in records:
        levels = 2 * torch.rand(len(record["pixel_values"]), 1, 1, 1, generator=generator) - 1
        record["pixel_values"] = levels + 0.1 * record["pixel_values"]
    return records


# both signs: an untrained router may agree with one of them by chance
@pytest.mark.parametrize("sign", [1, -1])
def test_router_trainer_learns_a_planted_signal(tmp_path, sign):
    model = tiny_model("vico")
    trainer = router_trainer(
        model,
        planted_records(model, 64, seed=0),
        tmp_path,
        trainer_class=PlantedRatios,
        per_device_train_batch_size=16,
        max_steps=40,
        learning_rate=3e-3,
    )
    trainer.sign = sign
    trainer.train()
    unseen = torch.cat([record["pixel_values"] for record in planted_records(model, 32, seed=1)])
    with torch.no_grad():
        compressed = model.eval().model.router(model.model.encode(unseen)).argmax(-1) == 0
    wanted = sign * unseen.mean((1, 2, 3)) < 0
    assert (compressed == wanted).float().mean() > 0.9
    # half the tiles lie below the median, the default percentile
    assert 0.3 < compressed.float().mean() < 0.7


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


def test_tile_rows():
    input_ids = torch.tensor([[1, 9, 9, 9, 9, 2], [9, 9, 1, 2, 0, 0], [1, 2, 3, 0, 0, 0]])
    assert tile_rows(input_ids, image_token_id=9, image_seq_length=2) == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_loss": "mse"}, "`ratio_loss`"),
        ({"probe": "some"}, "`probe`"),
        ({"probe_batch_size": 0}, "`probe_batch_size`"),
        ({"ratio_loss": "kl"}, "`reference_model` is None"),
    ],
)
def test_router_trainer_checks_its_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        router_trainer(tiny_model("vico"), None, tmp_path, trainer_options=options)
