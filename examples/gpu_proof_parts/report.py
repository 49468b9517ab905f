"""Results as Markdown: the whole of one run, and the table of docs/gpu.md from all runs that are kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import PARTS

NOT_RUN = "not run on a GPU"
# said of parts that did not come to their end
_WORDS = {
    "running": "cut off",
    "stopped": "stopped from outside",
    "killed": "cut off at its time box",
    "failed": "FAILED",
    "not started": "not reached",
}


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, dict):
        value = ", ".join(f"{name} {cell(each)}" for name, each in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell(each) for each in line) + " |" for line in lines]


def as_markdown(content: dict[str, Any]) -> str:
    """A run in full: what it ran on, what became of each part, and every row."""
    kind = "Dry run on a CPU, which shows nothing about a GPU" if content["dry"] else "GPU proof"
    lines = [f"# {kind}", "", f"`{content['command']}`, {content['started']}, commit {commit_of(content)}", ""]
    lines += table(("fact", "value"), sorted(content.get("machine", {}).items()))
    lines += [
        "",
        *table(("part", "shows", "status", "seconds", "box", ""), [_line(part) for part in content["parts"]]),
    ]
    for part in content["parts"]:
        if part["rows"]:
            lines += ["", f"## {part['part']}: {part['title']}"]
            lines += _tables_of(part["rows"])
    return "\n".join(lines) + "\n"


def _line(part: dict[str, Any]) -> tuple:
    said = [part.get("headline"), part.get("reason")]
    seconds, box = part.get("seconds"), part.get("box_seconds")
    return part["part"], part["title"], part["status"], seconds, box, "; ".join(each for each in said if each)


def _tables_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == name]
        columns = dict.fromkeys(key for row in own for key in row if key != "table")
        # an empty column says nothing
        columns = [key for key in columns if any(row.get(key) is not None for row in own)]
        header = [key.replace("_", " ") for key in columns]
        lines += ["", f"**{name}**", "", *table(header, [[row.get(key) for key in columns] for row in own])]
    return lines


def commit_of(content: dict[str, Any]) -> str:
    """The commit of a run, and whether files were changed since."""
    changed = " with changed files" if content["changed_files"] else ""
    return f"{content['commit'][:10]}{changed}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The runs that a folder holds, oldest first.

    Raises:
        ValueError: a file is not the result of a run on a GPU.
    """
    runs = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"parts", "dry", "started", "commit"} <= content.keys():
            raise ValueError(f"{file} is not a results.json of gpu_proof.py. Remove it from {folder}.")
        if content["dry"]:
            raise ValueError(f"{file} is a dry run, which shows nothing about a GPU. Remove it from {folder}.")
        runs.append(content | {"file": file.name})
    return sorted(runs, key=lambda run: run["started"])


def outcome(part: dict[str, Any] | None) -> str:
    """What docs/gpu.md says of one part of one run."""
    if part is None or part["status"] == "not started":
        return NOT_RUN
    checks = [row["ok"] for row in part["rows"] if row.get("ok") is not None]
    # a part that was cut off had no time for a sentence
    headline = part.get("headline") or (f"{sum(checks)} of {len(checks)} checks hold" if checks else "")
    said = [headline] if headline else []
    if part["status"] != "done":
        reached = f"{_WORDS[part['status']]} after {len(part['rows'])} results"
        said.append(f"{reached} ({part['reason']})" if part["status"] == "failed" and part.get("reason") else reached)
    return "; ".join(said) or f"done, {len(part['rows'])} results"


def results_table(runs: Sequence[dict[str, Any]]) -> str:
    """One line per part, one column per device: of each device the last run that reached the part."""
    devices = list(dict.fromkeys(run["machine"]["device"] for run in runs if "device" in run.get("machine", {})))
    rows = []
    for part in PARTS:
        cells = []
        for device in devices:
            own = [run for run in runs if run.get("machine", {}).get("device") == device]
            entries = [(run, entry) for run in own for entry in run["parts"] if entry["part"] == part.letter]
            reached = [(run, entry) for run, entry in entries if entry["status"] != "not started"]
            if reached:
                run, entry = reached[-1]
                cells.append(f"{outcome(entry)} ([{run['started'][:10]}](results/{run['file']}), {commit_of(run)})")
            else:
                cells.append(NOT_RUN)
        rows.append([part.letter, part.title, *(cells or [NOT_RUN])])
    return "\n".join(table(("part", "shows", *(devices or ["result"])), rows))
