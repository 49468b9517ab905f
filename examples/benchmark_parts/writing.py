"""Results as JSON, and as tables of Markdown."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .rounds import AGREEMENT


def environment(command: str) -> dict[str, Any]:
    """What a reader must know to measure again."""
    root = Path(__file__).resolve().parents[2]
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": asked.stdout.strip() or "unknown",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def unsteady(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ratios that a repeated run would not agree with."""
    return [
        f"{row['part']}, {row['method']}, {row.get('budget', '')}, batch {row['batch']}: {name} may be "
        f"{value['repeat']:.0%} apart"
        for row in rows
        for name, value in row.items()
        if isinstance(value, Mapping) and value.get("repeat", 0.0) > AGREEMENT
    ]


def milliseconds(spread: Mapping[str, float]) -> str:
    """Median, and the range without the outer tenths."""
    return f"{1e3 * spread['median']:.0f} ({1e3 * spread['p10']:.0f}-{1e3 * spread['p90']:.0f})"


def times(ratio: Mapping[str, float]) -> str:
    """A ratio; marked where a repeated run would not agree."""
    return f"{ratio['median']:.2f}" + ("" if ratio.get("repeat", 0.0) <= AGREEMENT else " ~")


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f}"


Column = tuple[str, Callable[[Mapping[str, Any]], str]]

# of what is compared with its oracle and with plain transformers
_AGAINST_BOTH: list[Column] = [
    ("ms (p10-p90)", lambda row: milliseconds(row["seconds"])),
    ("oracle", lambda row: milliseconds(row["oracle_seconds"])),
    ("eta", lambda row: times(row["eta"])),
    ("times plain", lambda row: times(row["over_plain"])),
    ("MiB", lambda row: mebibytes(row["bytes"])),
]
FIRST_TOKEN: list[Column] = [
    ("method", lambda row: row["method"]),
    ("budget", lambda row: str(row["budget"])),
    ("batch", lambda row: str(row["batch"])),
    ("dtype", lambda row: row["dtype"]),
    ("tokens", lambda row: f"{row['kept']} of {row['reserved']}"),
    *_AGAINST_BOTH,
    ("plain MiB", lambda row: mebibytes(row["plain_bytes"])),
]
TRAINING: list[Column] = [
    ("method", lambda row: row["method"]),
    ("step", lambda row: row["step"]),
    ("budget", lambda row: str(row["budget"])),
    ("batch", lambda row: str(row["batch"])),
    ("vocabulary", lambda row: str(row["vocabulary"])),
    ("tokens", lambda row: f"{row['kept']} of {row['reserved']}"),
    *_AGAINST_BOTH,
    ("oracle MiB", lambda row: mebibytes(row["oracle_bytes"])),
    ("plain MiB", lambda row: mebibytes(row["plain_bytes"])),
    # times as fast as without compression, and as a share of that what products alone would give
    ("by products", lambda row: f"{row['by_products']:.2f}" if "by_products" in row else ""),
    ("share of it", lambda row: times(row["of_products"]) if "of_products" in row else ""),
]
ROUTER_STEP: list[Column] = [
    ("decoder layers", lambda row: str(row["layers"])),
    ("tower's share", lambda row: f"{row['tower_share']:.0%}"),
    ("straightforward", lambda row: milliseconds(row["straightforward_seconds"])),
    ("ours", lambda row: milliseconds(row["seconds"])),
    ("times faster", lambda row: times(row["over_straightforward"])),
    ("by products", lambda row: f"{row['by_products']:.2f}"),
    ("MiB", lambda row: mebibytes(row["bytes"])),
    ("straightforward MiB", lambda row: mebibytes(row["straightforward_bytes"])),
]
TOWER: list[Column] = [
    ("tower", lambda row: row["tower"]),
    ("ms (p10-p90)", lambda row: milliseconds(row["seconds"])),
    ("times stock", lambda row: times(row["to_stock"])),
    ("largest difference", lambda row: f"{row['apart']:.0e}"),
    ("MiB", lambda row: mebibytes(row["bytes"])),
]
COLUMNS = {"first token": FIRST_TOKEN, "training": TRAINING, "router step": ROUTER_STEP, "tower": TOWER}


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['method']}, {row['budget']}, batch {row['batch']}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tables of Markdown, one for each part; and a line for each row without figures."""
    written = []
    for part, columns in COLUMNS.items():
        own = [row for row in rows if row["part"] == part]
        measured = [row for row in own if "left_out" not in row]
        if measured:
            lines = [[name for name, _ in columns], ["---"] * len(columns)]
            lines += [[cell(row) for _, cell in columns] for row in measured]
            written.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        notes = [f"- {_named(row)}: {row['left_out']}" for row in own if "left_out" in row]
        notes += [
            f"- {_named(row)}: the router takes {times(row['router_to_its_products'])} times its matrix products"
            for row in own
            if "router_to_its_products" in row
        ]
        if notes:
            written.append("\n".join(notes))
    return "\n\n".join(written)


def write(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """`path` as JSON, and the same with `.md`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    heading = ", ".join(f"{name} {value}" for name, value in about.items() if name != "command")
    text = f"`{about['command']}`\n\n{heading}\n\n{table(rows)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
