"""Run parts one after the other, each in a process of its own and within its time box, and write down what is known.

`results.json` and `results.md` are replaced as a whole after every part, and every few seconds while one runs, so that
a run that is cut off anywhere leaves all that was measured until then.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .report import as_markdown

# between two looks at a running part, and between two results files while it runs
_POLL_SECONDS, _WRITE_SECONDS = 0.2, 5.0
# a worker says where it hangs this long before it is killed
TRACEBACK_SECONDS = 2.0


class Stopped(BaseException):
    """The run was asked to end by a signal."""


class Results:
    """What is known of a run, and the folder that it is written to."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder = folder
        self.content: dict[str, Any] = {**facts, "parts": []}
        folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        """Replace both files, each as a whole or not at all."""
        for name, text in (
            ("results.json", json.dumps(self.content, indent=1) + "\n"),
            ("results.md", as_markdown(self.content)),
        ):
            scratch = self.folder / f".{name}"
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, self.folder / name)


def read_records(file: Path) -> list[dict[str, Any]]:
    """Records that a worker has written so far; the last line may be half of one."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def take_in(entry: dict[str, Any], records: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Sort a worker's records into a part's entry, and into the facts about the machine."""
    entry["rows"] = [record["row"] for record in records if "row" in record]
    for record in records:
        if "machine" in record:
            machine.update(record["machine"])
        for name in ("headline", "reason"):
            if name in record:
                entry[name] = record[name]


def run_parts(
    parts: Sequence[Any],
    command_of: Callable[[Any, Path, float], list[str]],
    results: Results,
    scale: float = 1.0,
    environment: dict[str, str] | None = None,
) -> bool:
    """Run parts in turn; returns whether every one ended by itself without an error.

    A box is a part's own seconds plus those that earlier parts have left over, so that all together never take longer
    than the sum of `seconds * scale`.

    Args:
        parts: with `letter`, `title` and `seconds`.
        command_of: command of a part, given the file for its records and the end of its box on the monotonic clock.
        results (`Results`): where entries go.
        scale (`float`): of all boxes.
        environment: of the workers.
    """
    log = results.folder / "log.txt"
    log.write_bytes(b"")
    entries = [{"part": part.letter, "title": part.title, "status": "not started", "rows": []} for part in parts]
    results.content["parts"] = entries
    results.write()
    saved = 0.0
    with _stopped_by_signals():
        for part, entry in zip(parts, entries, strict=True):
            box = part.seconds * scale + saved
            taken = _run_one(part, entry, command_of, box, results, log, environment)
            saved = max(0.0, box - taken)
    return all(entry["status"] == "done" for entry in entries)


def _run_one(part, entry, command_of, box, results, log, environment) -> float:
    """Run one part, fill in its entry, and return the seconds it took."""
    records = results.folder / f"part_{part.letter}.jsonl"
    records.unlink(missing_ok=True)
    machine = results.content.setdefault("machine", {})
    start = last_written = time.monotonic()
    entry |= {"status": "running", "box_seconds": round(box, 1)}
    results.write()
    with log.open("ab") as output:
        output.write(f"\n===== part {part.letter}: {part.title}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            command_of(part, records, start + box),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # so that what it starts can be ended with it
            start_new_session=True,
        )
    try:
        while process.poll() is None and time.monotonic() - start < box:
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - last_written > _WRITE_SECONDS:
                last_written = time.monotonic()
                take_in(entry, read_records(records), machine)
                results.write()
        status = process.poll()
    except Stopped:
        entry |= {"status": "stopped", "reason": "the run was stopped from outside"}
        raise
    finally:
        _end(process)
        seconds = time.monotonic() - start
        entry["seconds"] = round(seconds, 1)
        take_in(entry, read_records(records), machine)
        if entry["status"] == "running":
            entry |= _outcome(status, box, entry, _tail(log, begin))
        results.write()
        records.unlink(missing_ok=True)
    _say(f"part {part.letter}: {entry['status']} in {seconds:.0f} s; {entry.get('headline') or entry.get('reason')}")
    return seconds


def _outcome(status: int | None, box: float, entry: dict[str, Any], tail: str) -> dict[str, Any]:
    if status == 0:
        return {"status": "done"}
    if status is None:
        where = f" It was in {tail}." if tail else ""
        return {"status": "killed", "reason": f"killed at its time box of {box:.0f} s.{where}"}
    # a worker that can says why; one that crashed cannot
    return {"status": "failed", "reason": entry.get("reason") or f"ended with status {status}: {tail}"}


def _tail(log: Path, begin: int) -> str:
    """Where a worker was when its time was up, or else the last line that it printed."""
    with log.open("rb") as output:
        output.seek(begin)
        lines = output.read().decode(errors="replace").splitlines()
    # the main thread comes last, its innermost frame first
    heads = [number for number, line in enumerate(lines) if line.endswith("(most recent call first):")]
    frames = [lines[number + 1].strip() for number in heads if number + 1 < len(lines)]
    if frames:
        return frames[-1]
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1][-300:] if lines else ""


def _end(process: subprocess.Popen) -> None:
    """Kill a worker and all that it started, if it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


class _stopped_by_signals:
    """Within it, SIGTERM and SIGINT raise `Stopped`, so that workers are ended and results written."""

    def __enter__(self) -> None:
        def stop(number: int, frame: Any) -> None:
            raise Stopped

        self.before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
