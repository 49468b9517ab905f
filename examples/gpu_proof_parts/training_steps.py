"""Part e: one step of LoRA, QLoRA, int8 and RGLF, with its time and its memory."""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, TrainingArguments

from hf_vtc.lora import default_lora_config, quantization_config
from hf_vtc.trainers import AvgLlavaRouterTrainer

from .models import build, inputs_of, training_batch
from .work import Proof

METHOD = "avg_llava"
# of a decoder that is written to disk and read again in a few seconds
NUM_LAYERS = 8
_TABLE = "one training step"


def run(proof: Proof) -> None:
    attempts: list[tuple[str, float, Callable[[], None]]] = [
        ("LoRA, whole decoder", 8, lambda: lora_step(proof, "LoRA, whole decoder", _built(proof, None))),
        ("LoRA", 5, lambda: lora_step(proof, "LoRA", _built(proof, NUM_LAYERS))),
        ("RGLF", 8, lambda: rglf_step(proof)),
    ]
    for name, needs, work in attempts:
        proof.attempt(_TABLE, name, work, needs)
    quantised = {"QLoRA, 4 bits": {}, "LoRA, 8 bits": {"load_in_8bit": True}}
    if proof.dry or importlib.util.find_spec("bitsandbytes") is not None:
        proof.attempt(_TABLE, "quantised", functools.partial(quantised_steps, proof, quantised), needs=12)
    else:
        for name in quantised:
            proof.skip(_TABLE, name, "bitsandbytes is not installed")
    proof.headline()


def _built(proof: Proof, num_layers: int | None) -> PreTrainedModel:
    return build(METHOD, proof.device, proof.dtype, proof.dry, num_layers)


def _batch(proof: Proof) -> dict[str, torch.Tensor]:
    return training_batch(inputs_of(METHOD, proof.dry, 1, proof.device, proof.dtype))


def lora_step(proof: Proof, name: str, model: PreTrainedModel) -> None:
    """Adapters on the decoder and the compressor whole: forward, backward and optimizer."""
    model = get_peft_model(model, default_lora_config(model, r=16)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        # as in finetune_lora.py: steps of the optimizer are smaller than bfloat16 can hold
        parameter.data = parameter.data.float()
    # a tiny model needs longer steps to show that it learns
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if proof.dry else 2e-4)
    batch, losses = _batch(proof), []

    def step() -> None:
        with torch.autocast(proof.device.type, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    # steps on one batch must bring its loss down
    measured = _measure(proof, step)
    proof.record(
        _TABLE,
        name,
        ok=losses[-1] < losses[0],
        decoder_layers=model.config.text_config.num_hidden_layers,
        trained_parameters=sum(parameter.numel() for parameter in trained),
        first_loss=losses[0],
        last_loss=losses[-1],
        tokens=batch["input_ids"].shape[1],
        **measured,
    )


def _measure(proof: Proof, step: Callable[[], Any]) -> dict[str, float]:
    peak, before = proof.peak_gib(step)
    seconds = proof.seconds(step, repeats=1 if proof.dry else 5, warmup=int(not proof.dry))
    return {"milliseconds": round(1e3 * seconds, 1), "peak_gib": peak, "weights_gib": before}


def rglf_step(proof: Proof) -> None:
    """The router's training step: losses at every granularity, gradients of the router alone."""
    model = _built(proof, NUM_LAYERS)
    batch = _batch(proof)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(folder, report_to=[], use_cpu=proof.dry, disable_tqdm=True)
        trainer = AvgLlavaRouterTrainer(model, options)
        optimizer = trainer.create_optimizer()
        num_images = torch.tensor(len(batch["num_tiles"]), device=proof.device)
        losses = []

        def step() -> None:
            model.train()
            losses.append(float(trainer.training_step(model, dict(batch), num_images)))
            optimizer.step()
            optimizer.zero_grad()

        measured = _measure(proof, step)
    proof.record(
        _TABLE,
        "RGLF",
        ok=all(loss == loss and loss != float("inf") for loss in losses),
        decoder_layers=model.config.text_config.num_hidden_layers,
        first_loss=losses[0],
        last_loss=losses[-1],
        tokens=batch["input_ids"].shape[1],
        **measured,
    )


def quantised_steps(proof: Proof, quantised: dict[str, dict[str, Any]]) -> None:
    """The same LoRA step on a checkpoint whose decoder is quantised as it is read."""
    with tempfile.TemporaryDirectory() as folder:
        _built(proof, NUM_LAYERS).save_pretrained(folder, save_code=False)
        for name, fields in quantised.items():
            proof.attempt(_TABLE, name, functools.partial(quantised_step, proof, name, Path(folder), fields), needs=6)


def quantised_step(proof: Proof, name: str, folder: Path, fields: dict[str, Any]) -> None:
    how: dict[str, Any] = {}
    # without a GPU nothing can be quantised; the rest is the same
    if not proof.dry:
        chosen = quantization_config(AutoConfig.from_pretrained(folder), **fields)
        how = {"quantization_config": chosen, "device_map": {"": 0}}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=proof.dtype, **how)
    lora_step(proof, name if not proof.dry else f"{name} (not quantised in a dry run)", model)
