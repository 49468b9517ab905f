"""TRL's SFTTrainer trains every method as it is: its fused head takes the base model's states, full-length."""

import numpy as np
import pytest
import torch
from factories import tiny_model, tiny_processor
from PIL import Image
from trainer_helpers import changed, snapshot

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
