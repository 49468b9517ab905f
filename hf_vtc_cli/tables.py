"""Answers as tables for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = [
    "bench_table",
    "closing_tables",
    "comparison_table",
    "gain_lines",
    "is_small",
    "page_table",
    "ranking_table",
    "summary_table",
]

# parameters below which a first token costs about the same however many tokens there are
_SMALL_MODEL = 50e6
_TOKEN_HEADINGS = ("tokens kept", "ratio", "first token")
_TIME_NOTE = "Time to the first token: median, from pixels to token, without loading and tiling of images."


def page_table(name: str, answers: Sequence[Mapping[str, Any]]) -> Group:
    """What one model answered about one page, a line per question and budget."""
    table = _table(("question", "budget", "answer"), _TOKEN_HEADINGS)
    for answer in answers:
        for run_idx, run in enumerate(answer["runs"]):
            table.add_row(
                _question(answer) if run_idx == 0 else "",
                str(run["budget"]),
                _answer(run),
                *_token_cells(run),
                end_section=run_idx == len(answer["runs"]) - 1,
            )
    return Group(Text(name, style="bold"), table)


def summary_table(content: Mapping[str, Any]) -> Group:
    """All questions of one model, a line per budget."""
    title = f"All questions, {_name(content)} on {content['device']} in {content['dtype']}"
    table = _table(("budget",), ("right answers", *_TOKEN_HEADINGS))
    for line in content["summary"]:
        table.add_row(str(line["budget"]), _right(line), *_token_cells(line))
    return Group(Text(title, style="bold"), table, Text(_note([content])))


def comparison_table(contents: Sequence[Mapping[str, Any]]) -> Group:
    """What several models answered to the same questions: a line per question, a column per model.

    Each has answered uncompressed, then compressed; the second answer is shown with its tokens, their ratio to the
    uncompressed ones and its time.
    """
    # narrow columns, so that five fit
    table = _table(("question", *(_name(content).removesuffix("-tiny") for content in contents)), ())
    for answers in zip(*(content["results"] for content in contents), strict=True):
        cells = []
        for answer in answers:
            _, run = answer["runs"]
            tokens, ratio, first = _token_cells(run)
            cells.append(Text("\n").join([_answer(run), Text(tokens), Text(f"ratio {ratio}"), Text(first)]))
        table.add_row(_question(answers[0]), *cells, end_section=True)
    title = f"The same questions, compressed (budget {contents[0]['summary'][1]['budget']})"
    return Group(Text(title, style="bold"), table)


def ranking_table(contents: Sequence[Mapping[str, Any]]) -> Group:
    """All questions of several models, a line each: compressed beside its own uncompressed answers."""
    table = _table(("model",), ("right", "full", "tokens kept", "ratio", "time", "faster"))
    for content in contents:
        full, line = content["summary"]
        table.add_row(
            _name(content),
            _right(line),
            "" if full["num_correct"] is None else str(full["num_correct"]),
            *_token_cells(line),
            f"{full['ttft_ms'] / line['ttft_ms']:.2f}",
        )
    title = f"All questions, on {contents[0]['device']} in {contents[0]['dtype']}"
    note = (
        "Full: right answers of the same model without compression. Ratio, faster: without / with compression. "
        f"{_note(contents)}"
    )
    return Group(Text(title, style="bold"), table, Text(note))


def closing_tables(contents: Sequence[Mapping[str, Any]], compare: bool) -> list[Group]:
    """What ends a run: the summary of one model, or several models side by side."""
    return [comparison_table(contents), ranking_table(contents)] if compare else [summary_table(contents[0])]


def bench_table(source: str, reports: Sequence[Any]) -> Group:
    """Several measurements of one model, a line each.

    Args:
        reports (`Sequence[BenchReport]`): of `hf_vtc.report.bench`.
    """
    numbers = ("batch", "tokens kept", "full", "ours", "oracle", "faster", "possible", "eta", "phi")
    table = _table(("budget",), numbers)
    for report in reports:
        times = (f"{1e3 * timing.median:.1f}" for timing in (report.full, report.measured, report.oracle))
        table.add_row(
            str(report.vtc_budget),
            str(report.batch_size),
            f"{sum(report.num_kept)} of {sum(report.num_reserved)}",
            *times,
            f"{report.speedup:.2f}",
            f"{report.oracle_speedup:.2f}",
            f"{report.eta:.3f}",
            "-" if report.phi is None else f"{report.phi:.2f}",
        )
    return Group(
        Text(f"Time to first token of {Path(source).name}, medians in ms", style="bold"),
        table,
        *map(Text, (*_WORDS_OF_BENCH, reports[0].notes()[3])),
    )


_WORDS_OF_BENCH = (
    "Faster: full / ours. Oracle: the same tower, the connectors that were needed, and the stock language model on "
    "embeddings that are packed already; possible: full / oracle.",
    "eta: oracle / ours, 1 if choosing and packing cost nothing. phi: share of the possible gain (full - oracle) that "
    "arrives, - where the oracle gains nothing.",
)


def gain_lines(gain: Any) -> list[Text]:
    """What `hf-vtc run` measured beside the answers.

    Args:
        gain (`Gain`): of `hf_vtc.report.measure_gain`.
    """
    rounds = len(gain.full_seconds)
    return [
        Text("What compression gains on this machine", style="bold"),
        Text(str(gain), style="green" if gain.speedup > 1 else ""),
        Text(
            f"Measured just now in turns, {rounds} round{'s' * (rounds > 1)}, on {gain.device} with {gain.threads} "
            f"thread{'s' * (gain.threads > 1)}: the method of this checkpoint at a size where tokens cost, a language "
            f"model of {gain.num_decoder_parameters / 1e6:.0f} M parameters. Its weights are random, which changes "
            f"answers and not times. Again, with more figures: hf-vtc bench --random-weights {gain.shape}"
        ),
    ]


def _name(content: Mapping[str, Any]) -> str:
    return Path(content["model"]).name


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table()
    for heading in words:
        table.add_column(heading, max_width=32 if heading == "question" else None)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _question(answer: Mapping[str, Any]) -> Text:
    expected = f"\n({answer['answer']})" if "answer" in answer else ""
    return Text(answer["question"]).append(expected, style="dim")


def _answer(run: Mapping[str, Any]) -> Text:
    mark, style = {True: (" ✓", "green"), False: (" ✗", "red"), None: ("", "")}[run["correct"]]
    return Text(run["answer"] + mark, style=style)


def _right(line: Mapping[str, Any]) -> str:
    return "" if line["num_correct"] is None else f"{line['num_correct']} of {line['num_marked']}"


def _token_cells(line: Mapping[str, Any]) -> tuple[str, str, str]:
    tokens = f"{line['num_kept']} of {line['num_reserved']}"
    return tokens, f"{line['compression_ratio']:.2f}", f"{line['ttft_ms']:.1f} ms"


def is_small(num_parameters: int) -> bool:
    """Whether a model spends a first token on fixed costs, and not on tokens."""
    return num_parameters < _SMALL_MODEL


def _note(contents: Sequence[Mapping[str, Any]]) -> str:
    largest = max(content["num_parameters"] for content in contents)
    if not is_small(largest):
        return _TIME_NOTE
    return (
        f"{_TIME_NOTE} A model of {largest / 1e6:.1f} M parameters spends it on fixed costs, not on tokens: "
        "`hf-vtc estimate` says what larger ones gain."
    )
