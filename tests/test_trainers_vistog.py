"""VisToG's trainer: what each stage moves, its loss, and that micro-batches and interruptions change nothing."""

import copy
import math

import pytest
import torch
from factories import tiny_model, tiny_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from trainer_helpers import arguments, changed, collate, make_records, snapshot

from hf_vtc.data import VtcCollator
from hf_vtc.trainers import VistogTrainer
from hf_vtc.trainers.vistog import group_usage

TILES = ((1,), (2, 1), (), (3,))
NEW = ("model.semantic_tokens.", "model.grouping.")
TRAINED = {
    (1, True): ("model.multi_modal_projector.", *NEW),
    (1, False): ("model.multi_modal_projector.",),
    (2, True): ("model.multi_modal_projector.", *NEW, "model.language_model.", "lm_head."),
    (2, False): ("model.multi_modal_projector.", "model.language_model.", "lm_head."),
}


def trainer_of(model, records, folder, stage=2, grouping=None, **options):
    return VistogTrainer(
        model,
        arguments(folder, **options),
        stage=stage,
        grouping=grouping,
        train_dataset=records,
        eval_dataset=records,
        data_collator=collate,
    )


def expected_names(model, stage, grouping):
    return {name for name, _ in model.named_parameters() if name.startswith(TRAINED[stage, grouping])}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("stage, grouping", TRAINED)
def test_each_stage_moves_its_parts_alone(tmp_path, stage, grouping):
    model = tiny_model("vistog")
    records, before = make_records(model, TILES), snapshot(model)
    trainer = trainer_of(model, records, tmp_path, stage, grouping)
    trainer.train()
    moved, expected = changed(model, before), expected_names(model, stage, grouping)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == expected
    # a value that is added to all groups alike has no gradient but rounding; AdamW's decay of 0 at bias 0 is none
    still = {"model.grouping.assign.q_proj.bias"} if grouping else set()
    assert moved | still == expected | still
    assert not any(name.startswith("model.vision_tower.") for name in moved)
    usage = logged(trainer, "used_groups")
    assert len(usage) == (2 if grouping else 0)
    assert all(1 <= used <= 4 for used in usage)
    assert all(0 <= entropy <= math.log(4) + 1e-6 for entropy in logged(trainer, "group_entropy"))


def test_grouping_follows_stage_and_config_unless_told_otherwise(tmp_path):
    for field in (True, False):
        model = tiny_model("vistog", stage1_grouping=field)
        for told in (None, True, False):
            trainer = trainer_of(model, make_records(model), tmp_path, 1, told)
            assert trainer.grouping == (field if told is None else told)
        assert trainer_of(model, make_records(model), tmp_path, 2).grouping


@pytest.mark.parametrize("stage, grouping", TRAINED)
def test_loss_is_the_mean_over_response_tokens(tmp_path, stage, grouping):
    model = tiny_model("vistog", gumbel_noise=False)
    records = make_records(model, TILES)
    batch = collate(records)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, vtc_budget="auto" if grouping else "full").logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    trainer = trainer_of(model, records, tmp_path, stage, grouping, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(float(expected), abs=2e-4)


def test_accumulation_equals_the_large_batch(tmp_path):
    model = tiny_model("vistog", gumbel_noise=False)
    records = make_records(model, TILES)
    runs = []
    for batch_size, steps in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        runs.append(trainer_of(copy.deepcopy(model), records, tmp_path, **options))
        runs[-1].train()
    before = snapshot(model)
    whole, split = (
        torch.cat([(each.detach() - before[name]).flatten() for name, each in run.model.named_parameters()])
        for run in runs
    )
    assert float(whole.abs().max()) > 1e-3
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-6)
    for name in ("loss", "used_groups", "group_entropy"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), abs=2e-4)


def test_a_run_resumes_as_if_uninterrupted(tmp_path):
    # noise included: Trainer keeps the state of the generator that it is drawn from
    model = tiny_model("vistog", gumbel_noise=True)
    records = make_records(model, ((1,), (2, 1), (), (3,), (2,), (1, 1)))
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_of(copy.deepcopy(model), records, tmp_path, **options)
    straight.train()
    resumed = trainer_of(copy.deepcopy(model), records, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changed(resumed.model, snapshot(straight.model)) == set()


@pytest.mark.parametrize("stage, grouping", TRAINED)
def test_a_batch_of_text_reaches_the_same_parameters(tmp_path, stage, grouping):
    model = tiny_model("vistog")
    for records in (make_records(model, TILES), make_records(model, ((), ()))):
        own = copy.deepcopy(model)
        trainer = trainer_of(own, records, tmp_path, stage, grouping)
        own.train()
        trainer.compute_loss(own, collate(records)).backward()
        found = {name for name, each in own.named_parameters() if each.grad is not None}
        assert found == expected_names(own, stage, grouping)


def test_the_frozen_tower_stays_in_eval_mode(tmp_path):
    vision = {"attention_dropout": 0.5}
    model = tiny_model("vistog", gumbel_noise=False)
    for name, value in vision.items():
        for layer in model.model.vision_tower.encoder.layers:
            setattr(layer.self_attn, name.removeprefix("attention_"), value)
    records = make_records(model, TILES)
    trainer = trainer_of(model, records, tmp_path, optim="sgd", learning_rate=0.0)
    trainer.train()
    losses = logged(trainer, "loss")
    # the same records in every step: dropout would show
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert model.model.grouping.training and not model.model.vision_tower.training


def test_evaluation_is_repeatable_and_builds_no_logits(tmp_path, monkeypatch):
    model = tiny_model("vistog")
    trainer = trainer_of(model, make_records(model, TILES), tmp_path)
    rows, head = [], type(model.lm_head).forward
    monkeypatch.setattr(
        type(model.lm_head),
        "forward",
        lambda self, states: (
            (rows.append(states.shape[:-1].numel()) if self is model.lm_head else None) or head(self, states)
        ),
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] and first["eval_used_groups"] == second["eval_used_groups"]
    batch = collate(make_records(model, TILES))
    assert max(rows) < batch["input_ids"].numel()


def test_chat_records_train(tmp_path):
    picture = Image.radial_gradient("L").convert("RGB").resize((48, 32))
    part = {"type": "image"}
    records = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], "images": given}
        for content, answer, given in (
            ([part, {"type": "text", "text": "what is it?"}], "a page", [picture]),
            ("hello", "hi there", []),
        )
    ]
    model = tiny_model("vistog")
    before = snapshot(model)
    VistogTrainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=2, bf16=True),
        stage=1,
        train_dataset=records,
        data_collator=VtcCollator(tiny_processor("vistog")),
    ).train()
    assert changed(model, before) <= expected_names(model, 1, True)
    assert {name.split(".")[1] for name in changed(model, before)} == {
        "semantic_tokens",
        "grouping",
        "multi_modal_projector",
    }


def test_an_adapter_trains_alone(tmp_path):
    base = tiny_model("vistog")
    records = make_records(base, TILES)
    targets = r"model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj"
    saved = ["semantic_tokens", "grouping", "multi_modal_projector"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, modules_to_save=saved))
    before = snapshot(model)
    trainer_of(model, records, tmp_path).train()
    expected = {name for name in before if "lora_" in name or "modules_to_save" in name}
    moved = changed(model, before)
    assert expected - moved <= {name for name in before if name.endswith("assign.q_proj.bias")} | {
        name for name in before if "assign.modules_to_save" in name and name.endswith("q_proj.bias")
    }
    assert moved <= expected and any("lora_" in name for name in moved) and any("grouping" in name for name in moved)
    with pytest.raises(ValueError, match="PeftModel"):
        trainer_of(model, records, tmp_path, stage=1)


def test_options_are_checked(tmp_path):
    model = tiny_model("vistog")
    for stage in (0, 3, "1"):
        with pytest.raises(ValueError, match="stage"):
            trainer_of(model, [], tmp_path, stage)
    with pytest.raises(ValueError, match="vtc_vico"):
        trainer_of(tiny_model("vico"), [], tmp_path)


def test_group_usage_by_hand():
    groups = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [2, 2, 1, 1]])
    used, entropy = group_usage(groups, 5)
    assert used.tolist() == [1, 4, 2]
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(4), math.log(2)]))
