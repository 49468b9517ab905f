"""ViCO's router: labels from measured ratios, what trains, and that micro-batches and interruptions change nothing."""

import copy

import pytest
import torch
from factories import tiny_model
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

from hf_vtc.trainers import Responses, VicoConsistencyTrainer, VicoRouterTrainer
from hf_vtc.trainers.vico import tile_rows


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
