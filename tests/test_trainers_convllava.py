"""ConvLLaVA's three stages: what moves, what stays, and where stage 1 starts."""

import copy

import pytest
import torch
from factories import images_of, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_helpers import arguments, changed, snapshot
from transformers import AutoModelForImageTextToText

from hf_vtc.trainers import ConvllavaTrainer
from hf_vtc.trainers.convllava import RECIPES, add_stage

SIZES = (((32, 32),), ((16, 48), (37, 21)), (), ((32, 32),))


@pytest.fixture(scope="module")
def records():
    """Rows with images of several sizes, and one without any."""
    model = tiny_model("convllava")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for idx, sizes in enumerate(SIZES):
        prompt = torch.randint(10, 40, (2 + idx,), generator=generator).tolist()
        images = []
        for height, width in sizes:
            prompt += [model.config.image_token_id] * ((height // 16) * (width // 16)) + [9]
            pixels = torch.randn(1, 3, height, width, generator=generator)
            images.append({"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})
        response = torch.randint(10, 40, (3 + idx,), generator=generator).tolist()
        labels = [-100] * len(prompt) + response
        rows.append({"input_ids": prompt + response, "labels": labels, "images": images})
    return rows


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        pad = length - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * pad)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * pad)
        batch["labels"].append(row["labels"] + [-100] * pad)
    batch = {name: torch.tensor(values) for name, values in batch.items()}
    images = [image for row in rows for image in row["images"]]
    return batch | images_of(tiny_model("convllava").config).collate(images) if images else batch


def trainer_of(model, records, folder, **options):
    own = {
        name: options.pop(name)
        for name in ("stage", "tower_stages", "first_block", "freeze_lm_head")
        if name in options
    }
    return ConvllavaTrainer(model, arguments(folder, **options), **own, train_dataset=records, data_collator=collate)


def moved_by(trainer, model) -> set[str]:
    before = snapshot(model)
    trainer.train()
    return changed(model, before)


STAGE = "model.vision_tower.encoder.stages."
PROJECTOR, DECODER, HEAD = "model.multi_modal_projector.", "model.language_model.", "lm_head."


@pytest.mark.parametrize(
    "options, parts",
    (
        ({"stage": 1}, (f"{STAGE}4.", PROJECTOR)),
        ({"stage": 1, "freeze_lm_head": False}, (f"{STAGE}4.", PROJECTOR, HEAD)),
        ({"stage": 2}, (f"{STAGE}2.", f"{STAGE}3.", f"{STAGE}4.", PROJECTOR, DECODER, HEAD)),
        ({"stage": 2, "tower_stages": 1}, (f"{STAGE}4.", PROJECTOR, DECODER, HEAD)),
        (
            {"stage": 2, "first_block": 1},
            (f"{STAGE}2.layers.1.", f"{STAGE}3.", f"{STAGE}4.", PROJECTOR, DECODER, HEAD),
        ),
        ({"stage": 3}, (PROJECTOR, DECODER, HEAD)),
    ),
    ids=str,
)
def test_what_a_stage_trains(records, tmp_path, options, parts):
    model = tiny_model("convllava")
    trainer = trainer_of(model, records, tmp_path, **options)
    expected = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == expected
    # every trainable parameter moves, every other stays bit for bit
    assert moved_by(trainer, model) == expected


def test_stages_follow_each_other(records, tmp_path):
    """What one stage froze, the next one trains."""
    model = tiny_model("convllava")
    for stage in (1, 2, 3):
        trainer = trainer_of(model, records, tmp_path, stage=stage, max_steps=1)
        moved = moved_by(trainer, model)
        assert any(name.startswith(PROJECTOR) for name in moved)
        assert any(name.startswith(DECODER) for name in moved) == RECIPES[stage].language_model
        assert any(name.startswith(STAGE) for name in moved) == (RECIPES[stage].tower_stages > 0)


def test_tied_head_is_frozen_with_the_embeddings(records, tmp_path):
    model = tiny_model("convllava", tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    trainer = trainer_of(model, records, tmp_path, stage=1)
    assert not [name for name in moved_by(trainer, model) if not name.startswith((f"{STAGE}4.", PROJECTOR))]


def test_loss_is_the_mean_over_supervised_tokens(records, tmp_path):
    model = tiny_model("convllava")
    batch = collate(records)
    with torch.no_grad():
        logits = model(**batch).logits
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        trainer = trainer_of(model, records, tmp_path, stage=3)
        num_items = int((batch["labels"][:, 1:] != -100).sum())
        loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(num_items))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", (1, 2))
def test_accumulation_and_checkpointing_equal_the_large_batch(records, tmp_path, stage):
    results = []
    for options in (
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        model = tiny_model("convllava")
        # a step along the gradient itself shows what Adam would hide
        trainer = trainer_of(
            model, records, tmp_path, stage=stage, max_steps=1, optim="sgd", lr_scheduler_type="constant", **options
        )
        trainer.train()
        results.append(model.state_dict())
    initial = tiny_model("convllava").state_dict()
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(results[0][name], value) for name, value in initial.items())


def test_rows_without_images_train_too(records, tmp_path):
    model = tiny_model("convllava")
    text = [record for record in records if not record["images"]] * 4
    moved = moved_by(trainer_of(model, text, tmp_path, stage=2, max_steps=1), model)
    # the vision part takes part with weight zero, so only weight decay or nothing could move it
    assert any(name.startswith(DECODER) for name in moved)
    assert not [name for name in moved if name.startswith((STAGE, PROJECTOR))]


def test_an_adapter_decides_what_trains(records, tmp_path):
    model = tiny_model("convllava")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    )
    wanted = {name for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    trainer_of(adapted, records, tmp_path, stage=2).train()
    assert {name for name, tensor in adapted.named_parameters() if tensor.requires_grad} == wanted


@pytest.mark.parametrize(
    "options, message",
    (
        ({"stage": 0}, "`stage` must be 1, 2 or 3, got 0"),
        ({"stage": 2, "tower_stages": 6}, "`tower_stages` must be 0 to 5"),
        ({"stage": 2, "first_block": 2}, "`first_block` must be 0 to 1"),
        ({"stage": 3, "first_block": 1}, "`first_block` must be 0 to 0"),
    ),
    ids=str,
)
def test_bad_options_raise(records, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model("convllava"), records, tmp_path, **options)


def four_stages():
    vision = {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 2, 1], "patch_size": 2, "image_size": 64}
    return tiny_model("convllava", vision_config=vision | {"layer_scale_init_value": 1e-6})


def test_add_stage(tmp_path):
    model = four_stages()
    before = copy.deepcopy(model)
    assert (model.config.token_stride, model.config.image_seq_length) == (16, 16)
    torch.manual_seed(0)
    add_stage(model, num_blocks=2, width=24)
    assert (model.config.token_stride, model.config.image_seq_length) == (32, 4)
    stage = model.model.vision_tower.encoder.stages[4]
    bound = (4 * 16) ** -0.5
    largest = float(stage.downsampling_layer[1].weight.abs().max())
    assert 0.9 * bound < largest <= bound
    assert all(bool((block.layer_scale_parameter == 1e-6).all()) for block in stage.layers)
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (small,), (large,) = model.model.vision_tower(pixel_values), before.model.vision_tower(pixel_values)
        # the new blocks are almost the identity: what the new convolution gives goes through
        expected = large
        for module in stage.downsampling_layer:
            expected = module(expected)
    assert small.shape == (1, 24, 2, 3)
    torch.testing.assert_close(small, expected, rtol=0, atol=1e-4)
    kept = {name for name in before.state_dict() if not name.startswith(PROJECTOR)}
    assert all(torch.equal(model.state_dict()[name], before.state_dict()[name]) for name in kept)

    model.save_pretrained(tmp_path, save_code=False)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.model.vision_tower(pixel_values)[0], small)
        assert loaded.get_image_features(pixel_values).pooler_output[0].shape == (6, 48)


def test_a_new_stage_trains_in_stage_one(records, tmp_path):
    model = four_stages()
    # 16 pixels for a token, as the records expect
    model = tiny_model("convllava", vision_config=model.config.vision_config.to_dict() | {"patch_size": 1})
    add_stage(model, num_blocks=1, width=24)
    moved = moved_by(trainer_of(model, records, tmp_path, stage=1), model)
    assert moved == {name for name, _ in model.named_parameters() if name.startswith((f"{STAGE}4.", PROJECTOR))}
