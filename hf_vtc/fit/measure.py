"""What a model scores on the records that were kept aside, before and after."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from ..evaluation import evaluate, read_questions, records_to_ask
from ..evaluation.points import method_points
from ..files import read_json
from ..hub.source import load_model, load_processor
from ..models.prompt_vtc import Budget
from .folder import REPORT
from .recipe import process_state
from .stage import release_memory

_TABLE = "report.md"


@dataclass(frozen=True)
class Measured:
    """Two evaluations on the same questions.

    Args:
        before (`dict`): `report.json` of the model that training started from, at full length alone.
        after (`dict`): that of the result, at every budget.
        table (`str`): the latter in Markdown.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    table: str

    @classmethod
    def load(cls, before: Path, after: Path) -> "Measured":
        """From the folders of two reports."""
        table = (after / _TABLE).read_text(encoding="utf-8")
        return cls(read_json(before / REPORT), read_json(after / REPORT), table)


@contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """Whether transformers shows bars: for a model that loads in a moment they are a nuisance."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def check_budgets(model_folder: Path, questions: Path, image_folder: Path, budgets: Sequence[Budget] | None) -> None:
    """Refuse budgets that some image or video does not admit before they are asked for, which is after training.

    Raises:
        ValueError: naming one, and what all images admit.
    """
    config, processor = AutoConfig.from_pretrained(model_folder, trust_remote_code=False), load_processor(model_folder)
    asked = read_questions(records_to_ask(questions, image_folder, takes_videos=processor.video is not None))
    method_points(processor, config, asked, budgets)


def is_measured(folder: Path) -> bool:
    # written one after the other
    return (folder / REPORT).is_file() and (folder / _TABLE).is_file()


def measure(
    model_folder: Path,
    name: str,
    dtype: str | torch.dtype,
    questions: Path,
    image_folder: Path,
    budgets: Sequence[Budget] | None,
    metric: str,
    tolerance: float,
    relative: bool,
    seed: int,
    folder: Path,
) -> None:
    """Evaluate a model and leave the report in a folder, where answers stand as soon as they are given.

    Args:
        model_folder (`Path`): where the model lies.
        name (`str`): what the report calls it.
        dtype: of the weights that are measured; on a CPU they are computed with in float32.
        questions (`Path`), image_folder (`Path`): the records.
        budgets, metric, tolerance, relative, seed: see `hf_vtc.evaluate`.
        folder (`Path`): of the report.
    """
    device = process_state().device
    model = load_model(model_folder, dtype)
    if device.type == "cpu":
        # 16-bit arithmetic is slow or inexact on most CPUs
        model = model.float()
    model.config.name_or_path = name
    processor = load_processor(model_folder)
    with progress_bars(True):
        report = evaluate(
            model.to(device).eval(),
            processor,
            str(questions),
            image_folder=str(image_folder),
            budgets=budgets,
            metric=metric,
            tolerance=tolerance,
            relative=relative,
            seed=seed,
            output=folder,
        )
    report.save(folder)
    del model
    release_memory()
