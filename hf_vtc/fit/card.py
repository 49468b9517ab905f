"""What a model card says of a fit: how the model was made, and what was measured."""

import json
from collections.abc import Mapping
from typing import Any

from .folder import FitFolder
from .measure import Measured
from .request import Plan
from .split import Split


def sections_of(plan: Plan, folder: FitFolder, split: Split, measured: Measured | None) -> str:
    """The sections of a card that a fit can fill, in Markdown."""
    return f"{_made_by(plan, folder, split)}\n\n{_measured(measured, split)}"


def score_text(row: Mapping[str, Any]) -> str:
    """Score and interval of a line of `report.json`."""
    if row["score"] is None:
        return "no score, since no answer is known"
    low, high = (100 * bound for bound in row["interval"])
    return f"{100 * row['score']:.2f} % [{low:.1f}, {high:.1f}]"


def _made_by(plan: Plan, folder: FitFolder, split: Split) -> str:
    request = plan.request
    several = f"{plan.num_processes} processes" if plan.num_processes > 1 else "one process"
    how = ", those with a language model by LoRA" if request.lora else ""
    lines = [
        f"`hf-vtc fit` from {request.model}, method {plan.record.name}, on {split.num_training:,} records, seed "
        f"{request.seed}, {several}. Stages in turn{how}:",
        "",
        "| stage | trainer | steps | records a step | learning rate | last loss |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for idx, (name, recipe) in enumerate(plan.recipes.items(), start=1):
        history = json.loads(folder.stage(idx, name).joinpath("log.json").read_text(encoding="utf-8"))
        losses = [f"{entry['loss']:.4g}" for entry in history if "loss" in entry]
        steps = max((entry["step"] for entry in history), default=0)
        rate = recipe["training"].get("learning_rate", "default")
        cells = (name, f"`{recipe['trainer']}`", steps, recipe["batch_size"], rate, losses[-1] if losses else "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "## Made by\n\n" + "\n".join(lines)


def _measured(measured: Measured | None, split: Split) -> str:
    if measured is None:
        return "## Measured\n\nNothing: no record was kept aside."
    # its title is that of a report by itself
    _, _, table = measured.table.partition("\n")
    (before,) = (row for row in measured.before["rows"] if row["point"] == "full")
    return (
        f"## Measured\n\nOn records that were kept aside before training ({len(split.held_out):,}, with all their "
        f"pictures, {len(split.images):,}), which no stage has seen. Before training, with all visual tokens: "
        f"{score_text(before)}. After it:\n\n{table.strip()}"
    )
