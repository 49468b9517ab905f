"""TRL trains every method as it is: its fused head takes the base model's states, full-length."""

import math

import numpy as np
import pytest
import torch
from factories import tiny_model, tiny_processor
from PIL import Image
from trainer_helpers import changed, snapshot
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc.data import VtcCollator, load_records
from hf_vtc.lora import default_lora_config

trl = pytest.importorskip("trl", reason="TRL is optional: pip install trl")
datasets = pytest.importorskip("datasets", reason="TRL needs its data sets")


def rows():
    rng = np.random.default_rng(0)

    def picture(height, width):
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    def turns(question, answer, images=0):
        parts = [{"type": "image", "text": None}] * images + [{"type": "text", "text": question}]
        return [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]

    return [
        {"messages": turns("how many?", "two boxes", 1), "images": [picture(40, 60)]},
        {"messages": turns("hello", "good day"), "images": []},
        {"messages": turns("and these?", "one", 2), "images": [picture(60, 32), picture(33, 33)]},
        {"messages": turns("which colour?", "red", 1), "images": [picture(32, 32)]},
    ]


def sft_trainer(model, processor, folder, data, collator=None, **options):
    peft_config = options.pop("peft_config", None)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_length=None,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    return trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=data,
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_trainer_trains_the_loss_of_the_model(method, lora, tmp_path):
    processor, model = tiny_processor(method), tiny_model(method)
    collator, records = VtcCollator(processor), load_records(rows())
    batch = collator(records)
    with torch.no_grad():
        expected = model(**batch).loss
    peft_config = default_lora_config(model, r=4) if lora else None
    trainer = sft_trainer(
        model,
        processor,
        tmp_path,
        records.to_dataset(),
        collator,
        peft_config=peft_config,
        remove_unused_columns=False,
    )
    with torch.no_grad():
        assert abs(trainer.compute_loss(trainer.model.eval(), dict(batch)) - expected) < 1e-5

    before = snapshot(trainer.model)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    moved = changed(trainer.model, before)
    assert moved <= trained
    assert any(".language_model." in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_the_collator_of_trl_makes_the_same_labels(tmp_path):
    """With `assistant_only_loss`, which the generation marks in our chat templates serve."""
    processor, model = tiny_processor("vico"), tiny_model("vico")
    data = [row for row in rows() if row["images"]]
    dataset = datasets.Dataset.from_list(data)
    trainer = sft_trainer(model, processor, tmp_path, dataset, assistant_only_loss=True)
    theirs = trainer.data_collator([dict(row) for row in dataset])
    ours = VtcCollator(processor)(load_records(dataset))
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    assert torch.equal(theirs["labels"], ours["labels"])
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"])
    trainer.train()


def pictures(*sizes):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def prompts(most_images=2):
    """Rows of one image, and of two and of none if they may; of one tile and of several."""
    images = [pictures((40, 60)), pictures((60, 50), (33, 33)), pictures((32, 96), (64, 64)), pictures((64, 64))]
    images = [own[:1] for own in images] if most_images == 1 else [*images[:3], []]
    asked = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": f"{idx}: "},
                    *(part for _ in own for part in ({"type": "image"}, {"type": "text", "text": "what"})),
                ],
            }
        ]
        for idx, own in enumerate(images)
    ]
    return datasets.Dataset.from_dict({"prompt": asked, "images": images})


@pytest.mark.parametrize("method", ["vico", "avg_llava"], scope="session")
def test_dealing_out_two_images_a_row_names_the_remedy(method, saved, tmp_path):
    trainer = online_trainer("RLOO", saved, AutoProcessor.from_pretrained(saved), prompts(2).select([1, 2]), tmp_path)
    with pytest.raises(ValueError, match="set `return_layout=False` of the processor"):
        trainer.train()


def rewards(completions, **kwargs):
    return [float(len(str(each)) % 7) for each in completions]


COMMON = {
    "max_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
}
ONLINE = {"GRPO": (trl.GRPOTrainer, trl.GRPOConfig), "RLOO": (trl.RLOOTrainer, trl.RLOOConfig)}


def online_trainer(name, folder, processor, data, tmp_path):
    """With a reference model, and with old probabilities, whose batches hold all that the processor returns."""
    trainer_class, config_class = ONLINE[name]
    options = {**COMMON, "beta": 0.1, "num_generations": 2, "max_completion_length": 5, "num_iterations": 2}
    return trainer_class(
        AutoModelForImageTextToText.from_pretrained(folder),
        reward_funcs=rewards,
        args=config_class(str(tmp_path), per_device_train_batch_size=4, **options),
        train_dataset=data,
        processing_class=processor,
    )


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("return_layout", [None, False])
def test_online_trainers_take_steps(name, return_layout, saved, tmp_path):
    """As the processor comes with one image to a row, and with any number in blocks."""
    processor = AutoProcessor.from_pretrained(saved)
    processor.return_layout = return_layout
    trainer = online_trainer(name, saved, processor, prompts(1 if return_layout is None else 2), tmp_path)
    before = snapshot(trainer.model)
    trainer.train()
    assert {name for name in changed(trainer.model, before) if ".language_model." in name}


@pytest.mark.parametrize("return_layout", [None, False])
def test_images_that_are_dealt_out_stay_with_their_rows(return_layout, saved, tmp_path):
    """A row has the probabilities that it had before TRL shuffled the rows and dealt out their images."""
    processor = AutoProcessor.from_pretrained(saved)
    processor.return_layout = return_layout
    trainer = online_trainer("RLOO", saved, processor, prompts(1 if return_layout is None else 2), tmp_path)
    probabilities, taken = trainer._get_per_token_logps_and_entropies, []

    def recorded(model, input_ids, *args, **kwargs):
        model.eval()
        found = probabilities(model, input_ids, *args, **kwargs)
        model.train()
        taken.append({tuple(ids): row.tolist() for ids, row in zip(input_ids.tolist(), found[0].detach())})
        return found

    trainer._get_per_token_logps_and_entropies = recorded
    trainer.model.train()
    trainer.args.steps_per_generation = 2
    shuffled = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = dict(taken[0])
    taken.clear()
    for batch in trainer._buffered_inputs:
        trainer.compute_loss(trainer.model, batch)
    after = {ids: row for part in taken for ids, row in part.items()}
    assert len(trainer._buffered_inputs) == 2 and len(shuffled["prompt_ids"]) < len(before)
    assert after.keys() == before.keys()
    for ids, row in after.items():
        assert row == pytest.approx(before[ids], abs=1e-5)


def preferences():
    rng = prompts()
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("yes", "no, two")]
    return rng.add_column("chosen", [answers[0]] * len(rng)).add_column("rejected", [answers[1]] * len(rng))


@pytest.mark.parametrize("kind", ["full", "lora", "made here"])
def test_dpo_starts_at_ln_2(method, kind, tmp_path):
    model = tiny_model(method)
    if kind == "full":
        # the reference is loaded from where the model came from, which has no code of its own
        model.save_pretrained(tmp_path / "model", save_code=False)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    options = {**COMMON, "max_steps": 1, "logging_steps": 1, "max_length": None}
    trainer = trl.DPOTrainer(
        model,
        ref_model=tiny_model(method) if kind == "made here" else None,
        args=trl.DPOConfig(str(tmp_path), per_device_train_batch_size=4, **options),
        train_dataset=preferences(),
        processing_class=tiny_processor(method),
        peft_config=default_lora_config(model, r=4) if kind == "lora" else None,
    )
    before = snapshot(trainer.model)
    trainer.train()
    [loss] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert changed(trainer.model, before)
