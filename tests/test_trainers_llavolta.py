"""LLaVolta's trainer: which stage a step has, exactly, and that interruptions and micro-batches change nothing."""

import copy

import pytest
import torch
from factories import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_helpers import arguments, changed, collate, make_records, snapshot

from hf_vtc.trainers import SCHEMES, LlavoltaTrainer, Stage, stages_of
from hf_vtc.trainers.schedule import boundaries, released_stage, stage_at

STAGES = (Stage(1, 8, 0.25), Stage(2, 4, 0.25), Stage(1, 2, 0.25), Stage(0, 1, 0.25))


# schedules


def test_the_published_schemes():
    """The table of the paper, for its 32 layers; stride 1 is no compression."""
    table = {
        "single": [(0, 1)],
        "two": [(2, 8), (0, 1)],
        "three_deeper": [(2, 8), (16, 8), (0, 1)],
        "three_wider": [(2, 8), (2, 2), (0, 1)],
        "four_wider_deeper": [(2, 8), (2, 2), (16, 2), (0, 1)],
        "four_deeper_wider": [(2, 8), (16, 8), (16, 2), (0, 1)],
    }
    assert table.keys() == SCHEMES.keys()
    for scheme, expected in table.items():
        stages = stages_of(scheme, 32)
        assert [stage[:2] for stage in stages] == expected
        assert {stage.share for stage in stages} == {1 / len(expected)}


def test_schemes_of_other_decoders():
    assert [stage[:2] for stage in stages_of("four_deeper_wider", 28)] == [(2, 8), (14, 8), (14, 2), (0, 1)]
    assert [stage[:2] for stage in stages_of("two", 3)] == [(2, 8), (0, 1)]
    # layer 2 is the middle of four layers
    with pytest.raises(ValueError, match="too few"):
        stages_of("three_deeper", 4)
    with pytest.raises(ValueError, match="too few"):
        stages_of("two", 2)
    with pytest.raises(ValueError, match="`scheme` must be one of single, two"):
        stages_of("five", 32)


@pytest.mark.parametrize(
    ("shares", "total", "expected"),
    (
        ([1.0], 10, [0]),
        ([0.25] * 4, 12, [0, 3, 6, 9]),
        ([0.25] * 4, 10, [0, 3, 5, 8]),
        ([1 / 3] * 3, 9, [0, 3, 6]),
        ([1 / 3] * 3, 10, [0, 3, 7]),
        ([0.1] * 10, 10, list(range(10))),
        # in proportion to their sum, as whole numbers too
        ([1, 2, 1], 8, [0, 2, 6]),
        ([0.25] * 4, 5198, [0, 1300, 2599, 3899]),
        # fewer steps than stages
        ([0.25] * 4, 2, [0, 1, 1, 2]),
    ),
)
def test_boundaries(shares, total, expected):
    stages = [Stage(1, 2, share) for share in shares]
    assert boundaries(stages, total) == expected
    for step in range(total):
        begun = [idx for idx, start in enumerate(expected) if start <= step]
        assert stage_at(stages, step, total) == begun[-1]


def test_the_released_code_counts_forward_passes_and_switches_late():
    stages = [released_stage(step, [3, 6, 9], [8, 2, 2, 1]) for step in range(13)]
    assert stages == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 3
    # the last pivot is never reached; a stage of stride 1 has no end
    assert released_stage(9999, [10000], [8, 1]) == 0
    assert released_stage(50, [2, 4], [8, 1, 4]) == 1


# training


def trainer_of(model, records, folder, stages=STAGES, scheme=None, **options):
    return LlavoltaTrainer(
        model,
        arguments(folder, **options),
        scheme=scheme,
        stages=stages,
        train_dataset=records,
        eval_dataset=records,
        data_collator=collate,
    )


class SeenStages:
    """The setting at every forward pass of the base model, with its mode."""

    def __init__(self, model):
        self.seen = []
        config = model.config
        self.handle = model.model.register_forward_pre_hook(
            lambda module, args: self.seen.append(
                (config.compress_layer_idx, config.compress_stride, "train" if module.training else "eval")
            )
        )

    def of(self, mode):
        return [entry[:2] for entry in self.seen if entry[2] == mode]


@pytest.mark.parametrize("accumulation", (1, 2))
def test_every_step_has_its_stage(tmp_path, accumulation):
    model = tiny_model("llavolta")
    records = make_records(model)
    seen = SeenStages(model)
    trainer = trainer_of(
        model,
        records,
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    # boundaries 0, 1.5, 3, 4.5, halves up
    expected = [(1, 8), (1, 8), (2, 4), (1, 2), (1, 2), (0, 1)]
    assert seen.of("train") == [stage for stage in expected for _ in range(accumulation)]
    # evaluation between the steps moves nothing, and has the stage of its moment
    per_evaluation = len(seen.of("eval")) // 6
    assert seen.of("eval") == [stage for stage in expected for _ in range(per_evaluation)]
    assert (model.config.compress_layer_idx, model.config.compress_stride) == (0, 1)


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    model = tiny_model("llavolta")
    records = make_records(model, tiles_of_images=((1,), (2, 1), (), (3,), (2,), (1, 1)))
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    straight = trainer_of(copy.deepcopy(model), records, tmp_path, **options)
    straight.train()
    resumed = trainer_of(copy.deepcopy(model), records, tmp_path / "again", **options)
    seen = SeenStages(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen.of("train") == [(2, 4), (1, 2), (1, 2), (0, 1), (0, 1)]
    assert changed(resumed.model, snapshot(straight.model)) == set()


def test_a_run_resumed_at_its_end_has_the_last_stage(tmp_path):
    model = tiny_model("llavolta")
    records = make_records(model)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer_of(copy.deepcopy(model), records, tmp_path, **options).train()
    resumed = trainer_of(copy.deepcopy(model), records, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.model.config.compress_stride == 1


def test_the_tower_is_frozen_and_the_rest_moves(tmp_path):
    model = tiny_model("llavolta")
    before = snapshot(model)
    trainer = trainer_of(model, make_records(model), tmp_path)
    trainer.train()
    tower = {name for name in before if name.startswith("model.vision_tower.")}
    assert changed(model, before) == before.keys() - tower


def test_the_tower_may_train(tmp_path):
    model = tiny_model("llavolta")
    before = snapshot(model)
    trainer = LlavoltaTrainer(
        model,
        arguments(tmp_path),
        stages=STAGES,
        train_vision_tower=True,
        train_dataset=make_records(model),
        data_collator=collate,
    )
    trainer.train()
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert changed(model, before) == before.keys() - still
    assert any(name.startswith("model.vision_tower.") for name in changed(model, before))


@pytest.mark.parametrize("stride", (1, 4))
def test_the_loss_is_that_of_the_model(tmp_path, stride):
    model = tiny_model("llavolta")
    records = make_records(model)
    trainer = trainer_of(model, records, tmp_path, stages=[Stage(1, stride, 1)])
    trainer.set_stage(0, 1)
    batch = collate(records)
    loss = trainer.compute_loss(model, dict(batch))
    expected = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    plain = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, plain)


def test_micro_batches_give_the_step_of_the_large_batch(tmp_path):
    model = tiny_model("llavolta")
    records = make_records(model)
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        own = copy.deepcopy(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer_of(own, records, tmp_path, optim="sgd", learning_rate=1.0, **options).train()
        runs.append(snapshot(own))
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_an_adapter_trains(tmp_path):
    model = get_peft_model(tiny_model("llavolta"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    before = snapshot(model)
    trainer_of(model, make_records(model.get_base_model()), tmp_path, max_steps=4).train()
    moved = changed(model, before)
    assert moved and all("lora_" in name for name in moved)
    assert model.get_base_model().config.compress_stride == 1


def test_visual_tokens_are_logged(tmp_path):
    model = tiny_model("llavolta")
    records = make_records(model, tiles_of_images=((1,), (1,)))
    trainer = trainer_of(model, records, tmp_path, max_steps=4, per_device_train_batch_size=2)
    trainer.train()
    logged = [entry["visual_tokens"] for entry in trainer.state.log_history if "visual_tokens" in entry]
    assert logged == [2, 4, 8, 16]


def test_what_cannot_work_is_refused(tmp_path):
    model = tiny_model("llavolta")
    with pytest.raises(ValueError, match="not both"):
        trainer_of(model, None, tmp_path, scheme="two")
    with pytest.raises(ValueError, match="at least one stage"):
        trainer_of(model, None, tmp_path, stages=[])
    with pytest.raises(ValueError, match="positive share"):
        trainer_of(model, None, tmp_path, stages=[Stage(1, 2, 0)])
    with pytest.raises(ValueError, match="compress_layer_idx"):
        trainer_of(model, None, tmp_path, stages=[Stage(9, 2, 1)])
    with pytest.raises(ValueError, match="too few"):
        trainer_of(model, None, tmp_path, stages=None)
    assert (model.config.compress_layer_idx, model.config.compress_stride) == (1, 4)
