"""Part h: how many pages per second the recipes of the tiny checkpoints train on, to size what can be trained."""

import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_vtc.data import VtcCollator, load_records
from hf_vtc.trainers import (
    AvgLlavaGranularityTrainer,
    AvgLlavaRouterTrainer,
    ConvllavaTrainer,
    LlavoltaTrainer,
    VicoConsistencyTrainer,
    VicoRouterTrainer,
    VistogTrainer,
)

from .work import Proof

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "examples" / "finetune_data" / "records.json"
_EIGHT_MINUTES = 480

Make = Callable[..., Trainer]
# checkpoint, pages per step in `train_*.py`, trainer; the most costly recipe of each method first
RECIPES: dict[str, tuple[str, int, Make]] = {
    "ViCO, consistency": ("vico-tiny", 16, VicoConsistencyTrainer),
    "AVG-LLaVA, granularities": ("avg-llava-tiny", 16, AvgLlavaGranularityTrainer),
    "LLaVolta": ("llavolta-tiny", 16, functools.partial(LlavoltaTrainer, scheme="two")),
    "VisToG": ("vistog-tiny", 16, functools.partial(VistogTrainer, stage=2)),
    "ConvLLaVA, stage 3": ("convllava-tiny", 16, functools.partial(ConvllavaTrainer, stage=3)),
    "AVG-LLaVA, router": ("avg-llava-tiny", 48, AvgLlavaRouterTrainer),
    "ViCO, router": ("vico-tiny", 16, VicoRouterTrainer),
}


class StepClock(TrainerCallback):
    """When each step has ended, the device's work included."""

    def __init__(self, proof: Proof):
        self.proof, self.ends = proof, []

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.proof.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Of a step in the middle; the first one sets everything up."""
        return statistics.median(later - before for before, later in itertools.pairwise(self.ends))


def run(proof: Proof) -> None:
    for name, (folder, batch_size, make) in RECIPES.items():
        work = functools.partial(train, proof, name, ROOT / "model_cards" / folder, batch_size, make)
        proof.attempt("recipes", name, work, needs=3)
    proof.headline()


def load(folder: Path, proof: Proof) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(proof.device)


def train(proof: Proof, name: str, folder: Path, batch_size: int, make: Make) -> None:
    """Steps of a recipe on the sample pages: with reading and drawing of pages, and on a batch that lies ready."""
    steps, batch_size = (2, 2) if proof.dry else (12, batch_size)
    collator = VtcCollator(AutoProcessor.from_pretrained(folder))
    records = load_records(SAMPLES)
    pages = [records[idx % len(records)] for idx in range(steps * batch_size)]
    own: dict[str, Any] = {}
    if make in (VicoConsistencyTrainer, VicoRouterTrainer):
        own["reference_model"] = load(folder, proof)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            remove_unused_columns=False,
            use_cpu=proof.dry,
        )
        trainer = make(load(folder, proof), arguments, train_dataset=pages, data_collator=collator, **own)
        clock = StepClock(proof)
        trainer.add_callback(clock)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        batch = collator(pages[:batch_size])
        ready = proof.seconds(lambda: one_step(trainer, batch), repeats=1 if proof.dry else 5)
    whole = clock.seconds()
    proof.record(
        "recipes",
        name,
        ok=len(losses) == steps and all(float(loss) == float(loss) for loss in losses),
        pages_per_step=batch_size,
        pages_per_second=round(batch_size / whole, 1),
        pages_per_second_ready=round(batch_size / ready, 1),
        steps_in_eight_minutes=int(_EIGHT_MINUTES / whole),
        peak_gib=proof.peak_gib(lambda: one_step(trainer, batch))[0],
    )


def one_step(trainer: Trainer, batch: dict[str, Any]) -> None:
    """Forward, backward and optimizer, as Trainer does them."""
    inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    num_items = (inputs["labels"] != -100).sum().to(trainer.args.device)
    trainer.training_step(trainer.model, inputs, num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
