"""What tests of trainers share: records, their collator, arguments, and what moved."""

import copy

import torch
from factories import tiny_model
from transformers import TrainingArguments

from hf_vtc.trainers import VicoConsistencyTrainer, VicoRouterTrainer

TEXT_TOKENS = (10, 40)


def model_without_dropout(method, **overrides):
    """A tiny model; its dropout would draw differently for four micro-batches of one than for one of four."""
    model = tiny_model(method, **overrides)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make_records(model, tiles_of_images=((1,), (2, 1), (), (3,)), seed=0):
    """One record per entry of `tiles_of_images`, with prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    side = config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]

    def text(length):
        return torch.randint(*TEXT_TOKENS, (length,), generator=generator).tolist()

    records = []
    for idx, tiles in enumerate(tiles_of_images):
        prompt = text(2 + idx)
        for num_tiles in tiles:
            prompt += [config.image_token_id] * (num_tiles * config.image_seq_length) + text(1)
        response = text(2 + 3 * idx)
        records.append(
            {
                "input_ids": prompt + response,
                "labels": [-100] * len(prompt) + response,
                "pixel_values": torch.randn(sum(tiles), 3, side, side, generator=generator),
                "num_tiles": list(tiles),
            }
        )
    return records


def collate(records):
    length = max(len(record["input_ids"]) for record in records)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for record in records:
        pad = length - len(record["input_ids"])
        batch["input_ids"].append([0] * pad + record["input_ids"])
        batch["attention_mask"].append([0] * pad + [1] * (length - pad))
        batch["labels"].append([-100] * pad + record["labels"])
    batch = {name: torch.tensor(rows) for name, rows in batch.items()}
    num_tiles = [tiles for record in records for tiles in record["num_tiles"]]
    if num_tiles:
        batch["pixel_values"] = torch.cat([record["pixel_values"] for record in records])
        batch["num_tiles"] = torch.tensor(num_tiles)
    return batch


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


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
