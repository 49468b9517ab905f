"""Forms as records of `hf_vtc.evaluate`, which measures, and its lines as the tables of the model cards."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

import hf_vtc
from hf_vtc.evaluation import EvalReport, Row

from .dataset import EvaluationItem
from .questions import EVALUATED_KINDS

MAX_ANSWER_TOKENS = 12
_BATCH_SIZE = 100


def records_of(items: Sequence[EvaluationItem]) -> list[dict[str, Any]]:
    """One record for each question."""
    return [
        {
            "id": f"page {idx}",
            "images": [item.image],
            "messages": [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}],
            "kind": item.kind,
        }
        for idx, item in enumerate(items)
    ]


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[EvaluationItem],
    budgets: Sequence[Any] = ("auto",),
    baselines: Sequence[str] = (),
    **image_options: int,
) -> EvalReport:
    """`hf_vtc.evaluate` of greedy answers, exactly right or wrong.

    Args:
        image_options: other fields of the image processor, such as `max_tiles`.
    """
    if image_options:
        processor = copy.deepcopy(processor)
        for name, value in image_options.items():
            setattr(processor.image_processor, name, value)
    return hf_vtc.evaluate(
        model,
        processor,
        records_of(items),
        budgets=budgets,
        baselines=baselines,
        metric="exact",
        batch_size=_BATCH_SIZE,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )


@dataclass(frozen=True)
class Measurement:
    """Accuracy by kind (and `"all"`) with `mean_tokens` visual tokens per image."""

    name: str
    accuracy: dict[str, float]
    mean_tokens: float

    @classmethod
    def of(cls, name: str, row: Row) -> "Measurement":
        """From a line of an evaluation."""
        accuracy = {kind: row.kinds[kind].score for kind in EVALUATED_KINDS if kind in row.kinds}
        return cls(name, {**accuracy, "all": row.score}, row.tokens)


def as_table(rows: Sequence[Measurement], num_questions: int) -> Table:
    """The measurements as a table; the last column compares with the first line."""
    table = Table(title=f"{num_questions} held-out questions, one per page, greedy")
    for column in ("", *EVALUATED_KINDS, "all", "visual tokens", "fewer", "of full accuracy"):
        table.add_column(column, justify="left" if column == "" else "right")
    full = rows[0]
    for row in rows:
        accuracies = [f"{row.accuracy[kind]:.2%}" for kind in (*EVALUATED_KINDS, "all")]
        fewer = 1 - row.mean_tokens / full.mean_tokens
        share = row.accuracy["all"] / max(full.accuracy["all"], 1e-9)
        table.add_row(row.name, *accuracies, f"{row.mean_tokens:.1f}", f"{fewer:.1%}", f"{share:.2%}")
    return table
