"""What an evaluation found: rows, one sentence, and the files that hold them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group

from ..report.render import WORTHWHILE, as_table, as_text, binary_bytes, flops
from .recommendation import Recommendation
from .running import Answer, write_atomically
from .summary import ENOUGH_HARD, Row
from .timing import HEADER, Times

SCHEMA = 1
JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"
_TIMES_TITLE = "Time per question"
_BASELINES_NOTE = "Baselines are not trained for this checkpoint; they spend as many tokens as the point beside them."


@dataclass(frozen=True)
class EvalReport:
    """The lines of an evaluation, full length first, then the method's other points with baselines beside them.

    `rows`: see [`Row`]; `recommendation`: which budget to take, and how sure that is; `facts`: everything that the
    figures depend on; `notes`: what a reader must know, such as baselines that are not possible here; `answers`: by
    point and key of a question, which `samples.jsonl` holds; `times`: what `time` measured, if it was asked for.
    """

    rows: list[Row]
    recommendation: Recommendation
    facts: dict[str, Any]
    notes: list[str]
    answers: Mapping[tuple[str, str], Answer] = field(default_factory=dict, repr=False)
    times: list[Times] = field(default_factory=list)

    def row(self, point: str) -> Row:
        """The line of a point.

        Raises:
            KeyError: there is none of that name.
        """
        found = next((row for row in self.rows if row.point == point), None)
        if found is None:
            raise KeyError(f"There is no line {point!r}, only {', '.join(row.point for row in self.rows)}.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "schema": SCHEMA,
            **self.facts,
            "rows": [row.to_dict() for row in self.rows],
            "recommendation": asdict(self.recommendation),
            "times": [asdict(each) for each in self.times],
            "notes": self.notes,
        }

    def to_markdown(self) -> str:
        """Table, sentence and circumstances, ready for a model card."""
        header, *lines = self._lines()
        body, kinds = _markdown_table(header, lines), self._kinds_markdown()
        kinds += _markdown_table(*_of_times(self.times)) + "\n\n" if self.times else ""
        notes = "\n".join(f"- {note}" for note in self._notes())
        return f"# {self._title()}\n\n{self.recommendation.sentence}\n\n{body}\n\n{kinds}{notes}\n"

    def save(self, folder: str | Path) -> list[Path]:
        """Write `report.json`, `report.md`, and plots if matplotlib is there.

        Returns:
            The files that were written.
        """
        from .drawing import draw

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / JSON_FILE, folder / MARKDOWN_FILE]
        write_atomically(files[0], json.dumps(self.to_dict(), indent=2) + "\n")
        write_atomically(files[1], self.to_markdown())
        return files + draw(self.rows, self.recommendation, self.facts, folder)

    def __str__(self) -> str:
        own = as_text(self._title(), *self._narrow(), [self.recommendation.sentence, *self._notes()])
        return own if not self.times else f"{own}\n\n{as_text(_TIMES_TITLE, *_of_times(self.times), [])}"

    def __rich__(self) -> Any:
        own = as_table(self._title(), *self._narrow(), [self.recommendation.sentence, *self._notes()])
        return own if not self.times else Group(own, as_table(_TIMES_TITLE, *_of_times(self.times), []))

    def _narrow(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and lines for a terminal, which has no room for all that the files say."""
        lines = []
        for row in self.rows:
            point = f"  {row.point.removesuffix(f' beside {row.beside}')}" if row.beside else row.point
            score = "-" if row.score is None else f"{100 * row.score:.2f}"
            faster = "" if row.speedup is None else f"{row.speedup:.2f}x"
            lines.append((point, f"{row.tokens:.1f}", score, _difference(row), _counts(row), faster))
        return ("point", "tokens", "score", "difference to full", "lost / gained", "faster"), lines

    def _title(self) -> str:
        facts = self.facts
        return f"{Path(str(facts['model'])).name}: {facts['num_questions']:,} questions, metric {facts['metric']}"

    def _lines(self) -> list[tuple[str, ...]]:
        with_hard = any(row.hard for row in self.rows)
        with_time = any(row.speedup is not None for row in self.rows)
        header = ["point", "tokens", "share", "score", "difference", "lost / gained", "same answer"]
        header += (["on hard"] if with_hard else []) + (["answer time"] if with_time else [])
        header += ["prompt FLOPs", "KV cache"]
        lines = [tuple(header)]
        for row in self.rows:
            cells = [row.point, f"{row.tokens:.1f}", f"{row.share:.1%}", _score(row), _difference(row), _counts(row)]
            cells.append("" if row.same_answer is None else f"{row.same_answer:.1%}")
            cells += [_hard(row)] if with_hard else []
            cells += [_time(row)] if with_time else []
            ideal = "" if row.ideal_speedup is None else f", 1 / {row.ideal_speedup:.2f}"
            cells += [flops(row.costs.prefill_flops) + ideal, binary_bytes(row.costs.kv_cache_bytes)]
            lines.append(tuple(cells))
        return lines

    def _kinds_markdown(self) -> str:
        kinds = sorted({kind for row in self.rows for kind in row.kinds})
        if not kinds or all(row.score is None for row in self.rows):
            return ""
        numbers = [self.rows[0].kinds[kind].num for kind in kinds]
        header = ["point", *(f"{kind} (n = {num:,})" for kind, num in zip(kinds, numbers, strict=True)), "all"]
        lines = []
        for row in self.rows:
            lines.append([row.point, *(_score(row.kinds[kind]) for kind in kinds), _score(row)])
        return _markdown_table(header, lines) + "\n\n"

    def _notes(self) -> list[str]:
        facts = self.facts
        confidence = f"{facts['confidence']:.0%}"
        notes = [
            f"Scores of 100; brackets: {confidence} intervals, two-sided, of differences on the same questions.",
            f"Checkpoint {facts['checkpoint'][:12]}, data {facts['data'][:12]}, {facts['dtype']} on "
            f"{facts['device']}, batches of {facts['batch_size']}, at most {facts['max_new_tokens']} new tokens, "
            f"greedy, seed {facts['seed']}.",
        ]
        chosen = next((row for row in self.rows if row.point == self.recommendation.point), None)
        if chosen is not None and chosen.ideal_speedup is not None and chosen.ideal_speedup < WORTHWHILE:
            notes.insert(0, f"Even at best the prompt gets {chosen.ideal_speedup:.2f} times as fast: not worth it.")
        in_layers = {row.point: row.costs.tokens_in_layers for row in self.rows if row.costs.tokens_in_layers > 1}
        if in_layers:
            means = ", ".join(f"{point}: {self.row(point).tokens * ratio:.1f}" for point, ratio in in_layers.items())
            notes.append(f"Tokens are those that are left; mean over the layers of the language model: {means}.")
        if any(row.beside for row in self.rows):
            notes.append(_BASELINES_NOTE)
        clipped = [f"{row.point}: {row.num_clipped}" for row in self.rows if row.num_clipped]
        if clipped:
            notes.append(f"Images that got more tokens than asked, since they admit no less: {', '.join(clipped)}.")
        cut = [f"{row.point}: {row.truncated}" for row in self.rows if row.truncated]
        if cut:
            notes.append(f"Answers cut off at {facts['max_new_tokens']} tokens: {', '.join(cut)}.")
        return notes + self.notes


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)


def _of_times(times: Sequence[Times]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines, without money where no price is known."""
    width = len(HEADER) - all(each.saved is None for each in times)
    return HEADER[:width], [each.cells()[:width] for each in times]


def _bounds(interval: Sequence[float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _score(row: Row) -> str:
    if row.score is None:
        return "-"
    draws = (
        f" ({100 * min(row.draws):.1f} to {100 * max(row.draws):.1f} in {len(row.draws)} draws)" if row.draws else ""
    )
    return f"{100 * row.score:.2f} {_bounds(row.interval)}{draws}"


def _difference(row: Row) -> str:
    return "" if row.difference is None else f"{100 * row.difference.value:+.2f} {_bounds(row.difference.interval)}"


def _counts(row: Row) -> str:
    if row.difference is None or row.difference.counts is None:
        return ""
    return f"{row.difference.counts.lost} / {row.difference.counts.gained}"


def _hard(row: Row) -> str:
    if row.hard is None:
        return ""
    num, right = row.hard
    return f"{right} of {num}" + (f" ({right / num:.1%})" if num >= ENOUGH_HARD else "")


def _time(row: Row) -> str:
    if row.seconds is None:
        return ""
    times = f"{1e3 * row.seconds:.1f} ms"
    if row.speedup is None:
        return times
    text = f"{times}, {row.speedup:.2f}x"
    if row.speedup_interval is not None:
        text += f" [{row.speedup_interval.low:.2f}, {row.speedup_interval.high:.2f}]"
    return text


def versions() -> Mapping[str, str]:
    """Of what decides about figures."""
    import platform

    import torch
    import transformers

    from ..version import __version__

    return {
        "hf_vtc": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
