"""Measure a finished ledger model: the router's choice against every fixed choice and against choice by lot.

    PYTHONPATH=examples python -m ledger.measure model_cards/vico-ledger

All answers come from `hf_vtc.evaluate`, on held-out questions, one per page. Beside its lines stands `line`: pages at
the two nearest fixed lengths, mixed so that they spend the router's tokens: its score is the weighted mean of both. A
rival is beaten where the 95 % intervals of both scores do not overlap and that of their paired difference is above 0.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import hf_vtc
from hf_vtc.evaluation import EvalReport
from hf_vtc.evaluation.statistics import Difference, Interval, difference, score_interval
from hf_vtc.methods import record_of

from .dataset import evaluation_set, records_of
from .questions import EVALUATED_KINDS
from .stages import load

EVALUATION_SEED = 1234
CONFIDENCE = 0.95
_BATCH_SIZE, _MAX_ANSWER_TOKENS = 100, 6
_BASELINES = {"vico": ("random", "fixed", "pool", "smaller"), "avg_llava": ("random", "fixed")}


@dataclass(frozen=True)
class Rival:
    """A line beside the router's: its score and interval, tokens per image, and how much more the router has right."""

    name: str
    tokens: float
    score: float
    interval: Interval
    kinds: dict[str, float]
    gap: Difference | None

    def is_beaten_by(self, auto: "Rival") -> bool:
        return auto.interval.low > self.interval.high and self.gap.interval.low > 0


def rivals_of(scores: Mapping[str, np.ndarray], tokens: Mapping[str, float], kinds: np.ndarray) -> dict[str, Rival]:
    """All lines, `auto` among them; means over draws are graded.

    Args:
        scores: of each line, question by question.
        tokens: of each line, per image.
        kinds: of each question.
    """
    images, found = [str(idx) for idx in range(len(kinds))], {}
    for name, values in scores.items():
        graded = bool(np.any((values > 0) & (values < 1)))
        gap = None if name == "auto" else difference(values, scores["auto"], images, CONFIDENCE, graded)
        interval = score_interval(values, images, CONFIDENCE, graded)
        by_kind = {kind: float(values[kinds == kind].mean()) for kind in EVALUATED_KINDS}
        found[name] = Rival(name, tokens[name], float(values.mean()), interval, by_kind, gap)
    return found


def lines_of(report: EvalReport) -> tuple[dict[str, np.ndarray], dict[str, float], list[str]]:
    """Scores of each line of a report, question by question, tokens per image, and the questions' keys."""
    keys = [key for point, key in report.answers if point == "auto"]
    drawn: dict[str, list[list[float]]] = {}
    tokens: dict[str, list[float]] = {}
    for point in dict.fromkeys(point for point, _ in report.answers):
        line = re.sub(r" #\d+$", "", point)
        drawn.setdefault(line, []).append([report.answers[point, key].score for key in keys])
        tokens.setdefault(line, []).append(float(np.mean([report.answers[point, key].tokens for key in keys])))
    scores = {line: np.mean(values, axis=0) for line, values in drawn.items()}
    return scores, {line: float(np.mean(values)) for line, values in tokens.items()}, keys


def add_line(scores: dict[str, np.ndarray], tokens: dict[str, float]) -> None:
    """The line between the fixed points around the router's tokens, in place."""
    fixed = sorted((tokens[name], name) for name in scores if name == "full" or name.endswith(" per tile"))
    below = [name for count, name in fixed if count <= tokens["auto"]][-1]
    above = next((name for count, name in fixed if count > tokens["auto"]), None)
    if above is None:
        # the router takes all there are
        above, share = below, 0.0
    else:
        share = (tokens["auto"] - tokens[below]) / (tokens[above] - tokens[below])
    scores["line"] = share * scores[above] + (1 - share) * scores[below]
    tokens["line"] = tokens["auto"]


def measure(model: Any, processor: Any, num_questions: int, console: Console, output: Path | None = None) -> dict:
    """Evaluate, print, and return all figures."""
    items = evaluation_set(num_questions, EVALUATION_SEED)
    report = hf_vtc.evaluate(
        model,
        processor,
        records_of(items),
        budgets=("auto",),
        baselines=_BASELINES[record_of(model.config).name],
        metric="exact",
        batch_size=_BATCH_SIZE,
        max_new_tokens=_MAX_ANSWER_TOKENS,
        seeds=3,
        output=output,
    )
    scores, tokens, keys = lines_of(report)
    kind_of = {f"page {idx}": item.kind for idx, item in enumerate(items)}
    kinds = np.array([kind_of[key] for key in keys])
    add_line(scores, tokens)
    rivals = rivals_of(scores, tokens, kinds)
    return tell(rivals, num_questions, report, console)


def _bounds(interval: Interval, sign: str = "") -> str:
    return f"{interval.low:{sign}.2%}, {interval.high:{sign}.2%}"


def tell(rivals: Mapping[str, Rival], num_questions: int, report: EvalReport, console: Console) -> dict[str, Any]:
    """Print the lines and the claim; figures for the card."""
    auto, full = rivals["auto"], rivals["full"]
    table = Table(title=f"{num_questions} held-out questions, one per page, greedy; 95 % intervals")
    for column in ("", *EVALUATED_KINDS, "all", "tokens per image", "auto minus this"):
        table.add_column(column, justify="left" if column == "" else "right")
    for rival in rivals.values():
        kinds = [f"{rival.kinds[kind]:.1%}" for kind in EVALUATED_KINDS]
        overall = f"{rival.score:.2%} [{_bounds(rival.interval)}]"
        gap = "" if rival.gap is None else f"{rival.gap.value:+.2%} [{_bounds(rival.gap.interval, '+')}]"
        table.add_row(rival.name, *kinds, overall, f"{rival.tokens:.1f}", gap)
    console.print(table)
    # as many tokens in the mean, up to what a draw by lot or a fit to whole tiles can differ
    no_more = {name: each for name, each in rivals.items() if name != "auto" and each.tokens <= 1.02 * auto.tokens}
    beaten = {name: each.is_beaten_by(auto) for name, each in no_more.items()}
    console.print(f"{1 - auto.tokens / full.tokens:.1%} fewer visual tokens than at full length")
    for name, won in beaten.items():
        console.print(f"{'beats' if won else 'DOES NOT BEAT'} {name}, which spends no more tokens")
    console.print(report.recommendation.sentence)
    return {
        "questions": num_questions,
        "seed": EVALUATION_SEED,
        "lines": {
            name: {
                "tokens": each.tokens,
                "score": each.score,
                "interval": list(each.interval),
                "kinds": each.kinds,
                "auto_minus_this": None if each.gap is None else [each.gap.value, *each.gap.interval],
                "lost_gained": None
                if each.gap is None or each.gap.counts is None
                else [each.gap.counts.lost, each.gap.counts.gained],
            }
            for name, each in rivals.items()
        },
        "beaten": beaten,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--questions", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--save", type=Path, help="folder of answers; a run that was ended goes on there")
    args = parser.parse_args(arguments)
    found = measure(*load(args.model), args.questions, Console(width=150), args.save)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
