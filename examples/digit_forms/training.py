"""Settings that all trainings of the tiny models share."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def training_arguments(
    folder: Path, steps: int, batch_size: int, learning_rate: float, seed: int, **overrides: Any
) -> TrainingArguments:
    """Arguments of a quiet run of `steps` optimizer steps on one device, checkpoints in `folder`; `overrides` win."""
    fields = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": max(steps // 20, 1),
        "save_steps": max(steps // 3, 1),
        "save_total_limit": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        **{**fields, **overrides},
    )
