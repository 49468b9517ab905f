"""Score against visual tokens, and against time, as pictures. Needs matplotlib, which is an extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .recommendation import Recommendation
from .statistics import margin_of
from .summary import Row

logger = logging.get_logger(__name__)

_SUFFIXES = (".png", ".svg")
# ratio of neighbouring labels
_APART = 1.08
# told apart without colour too
_MARKERS = "os^DvP*X"
# of Okabe and Ito, which colour-blind people tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def draw(rows: Sequence[Row], recommendation: Recommendation, facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `tokens.png`, `tokens.svg`, and the same of `time` where it was measured.

    Returns:
        The files; none, with a warning, where matplotlib is missing or no reference is known.
    """
    scored = [row for row in rows if row.score is not None]
    if not scored:
        return []
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No plot was drawn, since matplotlib is missing: `pip install matplotlib`.")
        return []
    files = []
    values = {"tokens": ("visual tokens per image", lambda row: row.tokens)}
    if all(row.seconds is not None for row in scored):
        values["time"] = ("seconds per answer, tower included", lambda row: row.seconds)
    for name, (label, value_of) in values.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _plot(axes, scored, recommendation, facts, label, value_of)
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = _apart([value_of(row) for row in scored if row.family == "method"])
        axes.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
        for suffix in _SUFFIXES:
            file = folder / f"{name}{suffix}"
            # without its date, so that the same figures give the same file
            metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(file, dpi=150, metadata=metadata)
            files.append(file)
    return files


def _apart(values: Sequence[float]) -> list[float]:
    """Those of the values whose labels have room beside each other on a logarithmic axis."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value > _APART * kept[-1]:
            kept.append(value)
    return kept


def _plot(
    axes: Any, rows: Sequence[Row], recommendation: Recommendation, facts: Mapping[str, Any], label: str, value_of: Any
) -> None:
    full = rows[0]
    margin = margin_of(facts["tolerance"], full.score, facts["relative"])
    axes.axhspan(
        100 * (full.score - margin), 100 * full.score, color="0.9", label=f"within {100 * margin:.1f} points of full"
    )
    for idx, family in enumerate(dict.fromkeys(row.family for row in rows)):
        own = sorted((row for row in rows if row.family == family), key=value_of)
        colour, marker = _COLOURS[idx % len(_COLOURS)], _MARKERS[idx % len(_MARKERS)]
        axes.plot([value_of(row) for row in own], [100 * row.score for row in own], color=colour, linewidth=1)
        for row in own:
            # hollow where something has a better score for no more
            beaten = any(
                other.score >= row.score and value_of(other) <= value_of(row) and other is not row for other in rows
            )
            bounds = [[100 * (row.score - row.interval.low)], [100 * (row.interval.high - row.score)]]
            axes.errorbar(
                [value_of(row)],
                [100 * row.score],
                yerr=[[max(side[0], 0)] for side in bounds],
                color=colour,
                marker=marker,
                markerfacecolor="white" if beaten else colour,
                capsize=2,
                linewidth=1,
                label=family if row is own[0] else None,
            )
            if row.point == recommendation.point:
                ring = {"marker": "o", "markersize": 16, "markerfacecolor": "none", "color": "black"}
                axes.plot([value_of(row)], [100 * row.score], linestyle="", label="recommended", **ring)
    axes.set_xlabel(label)
    axes.set_ylabel(f"score ({facts['metric']}), {facts['confidence']:.0%} intervals")
    axes.set_title(f"{Path(str(facts['model'])).name}, {facts['num_questions']:,} questions")
    axes.legend(fontsize="small")
