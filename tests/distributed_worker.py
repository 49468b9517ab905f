"""Trains every trainer for a few steps on mixed batches, in one process or in several; run by `test_distributed.py`.

    torchrun --nproc_per_node 2 distributed_worker.py result.pt fsdp2

Rows are dealt out in turn: in the first step rank 0 has text alone and rank 1 has images, in the second rank 0 has an
image and a row of text, and images differ in tiles or size throughout.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from factories import METHODS, images_of, random_batch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from trainer_helpers import arguments, model_without_dropout
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_vtc.trainers import (
    AvgLlavaGranularityTrainer,
    AvgLlavaRouterTrainer,
    ConvllavaTrainer,
    LlavoltaTrainer,
    Stage,
    VicoConsistencyTrainer,
    VicoRouterTrainer,
    VistogTrainer,
)

STEPS = 5
ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    # SGD of torch, as in all other runs
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
# images of each row; a step takes four rows, and rank r has rows r and r + 2 of them
IMAGES_PER_ROW = (0, 1, 0, 2, 2, 1, 0, 1)
STAGES = (Stage(1, 4, 0.5), Stage(0, 1, 0.5))


class Case(NamedTuple):
    """A trainer and its options; `fields` are those of the model's configuration.

    The learning rate is such that every step teaches, and rounding errors do not grow from step to step.
    """

    method: str
    trainer: Callable
    options: dict
    fields: dict = {}
    learning_rate: float = 0.05


CASES = {
    # tiles are drawn for each process anew, so all of them or none can be compared
    "vico_consistency": Case("vico", VicoConsistencyTrainer, {"compress_probability": 1.0}),
    "vico_router": Case("vico", VicoRouterTrainer, {"ratio_loss": "cross_entropy", "probe": "all_tiles"}),
    "vico_router_one_tile": Case("vico", VicoRouterTrainer, {"ratio_loss": "cross_entropy", "probe": "one_tile"}),
    "avg_llava_granularity": Case("avg_llava", AvgLlavaGranularityTrainer, {}),
    "avg_llava_granularity_tower": Case("avg_llava", AvgLlavaGranularityTrainer, {"train_vision_tower": True}),
    "avg_llava_router": Case("avg_llava", AvgLlavaRouterTrainer, {}, learning_rate=0.002),
    "vistog_1": Case("vistog", VistogTrainer, {"stage": 1}, {"gumbel_noise": False}),
    "vistog_2": Case("vistog", VistogTrainer, {"stage": 2}, {"gumbel_noise": False}),
    "llavolta": Case("llavolta", LlavoltaTrainer, {"stages": STAGES}),
    "convllava_1": Case("convllava", ConvllavaTrainer, {"stage": 1}),
    "convllava_2": Case("convllava", ConvllavaTrainer, {"stage": 2}),
    "convllava_3": Case("convllava", ConvllavaTrainer, {"stage": 3}),
}
# with the units that accelerate finds by itself, in the model's `_no_split_modules`
STOCK_CASES = {f"stock_{method}": Case(method, Trainer, {}) for method in METHODS}


def rows_of(config, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """One row per entry of `IMAGES_PER_ROW`, with an answer behind the prompt."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for num_images in IMAGES_PER_ROW:
        prompt, images = random_batch(config, generator, images_per_row=[num_images]).rows[0]
        answer = torch.randint(10, 40, (2 + len(rows),), generator=generator).tolist()
        rows.append({"ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "images": images})
    return rows


def collator_of(config) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["ids"]) for row in rows)
        pads = [length - len(row["ids"]) for row in rows]
        batch = {
            "input_ids": torch.tensor([[0] * pad + row["ids"] for pad, row in zip(pads, rows)]),
            "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads]),
            "labels": torch.tensor([[-100] * pad + row["labels"] for pad, row in zip(pads, rows)]),
        }
        images = [image for row in rows for image in row["images"]]
        return batch | images_of(config).collate(images) if images else batch

    return collate


def disturbed(model: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """The model with other weights, which teach more than those of its own reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def trainer_of(name: str, folder: str, **options):
    """The trainer of a case, which takes its rows in their order; `options` are `TrainingArguments`."""
    case = (CASES | STOCK_CASES)[name]
    model = model_without_dropout(case.method, **case.fields)
    extra = dict(case.options)
    if (
        "reference_model" in (case.trainer.__init__.__kwdefaults__ or ())
        and extra.get("ratio_loss") != "cross_entropy"
    ):
        extra["reference_model"] = model_without_dropout(case.method, **case.fields)
        model = disturbed(model)
    rows = rows_of(model.config)
    fields = {"optim": "sgd", "learning_rate": case.learning_rate, "max_steps": STEPS, "remove_unused_columns": False}
    trainer = case.trainer(
        model,
        arguments(folder, **{**fields, **options}),
        train_dataset=rows,
        data_collator=collator_of(model.config),
        **extra,
    )
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
    return trainer


def train(name: str, **options) -> dict:
    """Losses of each step, weights after the last, how many of them are sharded, and those that are saved.

    Of a trainer or model that refuses to work, the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = trainer_of(name, folder, **options)
        except ValueError as refusal:
            return {"refused": str(refusal)}
        try:
            trainer.train()
        except RuntimeError as refusal:
            if "FSDP must not wrap" not in str(refusal):
                raise
            return {"refused": str(refusal)}
        trainer.save_model(f"{folder}/saved")
        saved = Path(folder, "saved", "model.safetensors")
        saved = load_file(saved) if saved.is_file() else {}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    weights = {key: whole(value) for key, value in named.items()}
    sharded = sum(map(is_sharded, named.values()))
    return {"losses": losses, "weights": weights, "sharded": sharded, "saved": saved}


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether this process holds a part of a parameter, under FSDP2 or ZeRO-3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A copy of all of a parameter; every process must ask."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().clone()
    if not is_sharded(parameter):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter):
        return parameter.detach().clone()


def allow_fsdp_on_cpu() -> None:
    """Let accelerate switch FSDP on, which it does for accelerators alone; all that comes after runs on a CPU."""
    initialise = AcceleratorState.__init__

    def with_accelerators(self, *args, **kwargs) -> None:
        known = PartialState._shared_state
        kind = known.get("distributed_type")
        if kind == DistributedType.MULTI_CPU:
            known["distributed_type"] = DistributedType.MULTI_GPU
        try:
            initialise(self, *args, **kwargs)
        finally:
            if kind is not None and known["distributed_type"] != DistributedType.FSDP:
                known["distributed_type"] = kind

    AcceleratorState.__init__ = with_accelerators


def main(result: str, kind: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    if kind == "fsdp2":
        allow_fsdp_on_cpu()
        fields = {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}
        options |= {"fsdp": True, "fsdp_config": fields}
    if kind == "zero3":
        options |= {"deepspeed": ZERO_3}
    results = {}
    for name in names:
        # shows where it was if it hangs
        print(name, file=sys.stderr, flush=True)
        results[name] = train(name, **options)
        # while one is set, new models come into the world in parts
        unset_hf_deepspeed_config()
    if dist.get_rank() == 0:
        torch.save(results, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] or list(CASES))
