"""What the workers share: where they run, what they write down, and how they measure.

`python -m gpu_proof_parts.work PART --records FILE --end CLOCK [--dry]` is one worker. Every fact is a line of JSON in
the file of records as soon as it is known.
"""

import argparse
import faulthandler
import gc
import importlib
import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import PARTS
from .runner import TRACEBACK_SECONDS

Result = TypeVar("Result")
_ROOT = Path(__file__).resolve().parents[2]


class Proof:
    """The hand of a part: its device, the time that is left, and the book that it writes into."""

    def __init__(self, records: Path | None, end: float, dry: bool):
        self.records, self.dry, self.end = records, dry, end
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.wrong = self.checked = 0

    @property
    def left(self) -> float:
        """Seconds until this worker is killed."""
        return self.end - time.monotonic()

    def _write(self, record: dict[str, Any]) -> None:
        # results are published, and where things lie on this machine is nobody's business
        line = json.dumps(record, default=str).replace(f"{_ROOT}/", "").replace(f"{sys.prefix}/", "") + "\n"
        # one write, so that several processes can share the file
        descriptor = os.open(self.records, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def record(self, table: str, name: str, ok: bool | None = None, **figures: Any) -> None:
        """A row of a table; `ok` says whether a check holds, None that nothing was checked."""
        if ok is not None:
            self.checked += 1
            self.wrong += not ok
        self._write({"row": {"table": table, "name": name, "ok": ok, **figures}})

    def skip(self, table: str, name: str, reason: str, **figures: Any) -> None:
        """A row for what was not measured, and why."""
        self.record(table, name, not_run=reason, **figures)

    def attempt(self, table: str, name: str, work: Callable[[], Result], needs: float = 0.0) -> Result | None:
        """Do some work of which others do not depend; why it failed becomes a row, and the part goes on.

        Args:
            table, name (`str`): of the row that says why, if there is no result.
            work (`Callable`): the work.
            needs (`float`): seconds it takes at least; with fewer left it is not begun.
        """
        if not self.dry and self.left < needs:
            return self.skip(table, name, f"{self.left:.0f} s were left, which is too little")
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.record(table, name, ok=False, error=reason_of(error))
            return None
        finally:
            free()

    def headline(self, text: str = "") -> None:
        """One sentence for docs/gpu.md, how many checks held so far comes first; the last one counts."""
        held = f"{self.checked - self.wrong} of {self.checked} checks hold" if self.checked else ""
        self._write({"headline": "; ".join(each for each in (held, text) if each)})

    def machine(self, **facts: Any) -> None:
        """Facts about the machine, for the head of the results."""
        self._write({"machine": facts})

    def reason(self, text: str) -> None:
        """Why the part failed."""
        self._write({"reason": text})

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
        """Median wall time of a call, with all that it leaves to the device."""
        taken = []
        for turn in range(warmup + repeats):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            if turn >= warmup:
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def peak_gib(self, work: Callable[[], Any]) -> tuple[float, float]:
        """GiB of device memory at the peak of a call, and before it; zero on a CPU."""
        free()
        if self.device.type != "cuda":
            work()
            return 0.0, 0.0
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.synchronize()
        return round(torch.cuda.max_memory_allocated() / 2**30, 2), round(before / 2**30, 2)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            # a kernel that failed has left the device unusable for this process
            traceback.print_exc()


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def facts_of(proof: Proof) -> dict[str, Any]:
    """Device, driver and versions."""
    import transformers

    facts = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
    }
    if proof.device.type == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts |= {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_gib": round(found.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    else:
        facts["device"] = "CPU"
    return facts


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: nobody would read what it writes."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=[part.letter for part in PARTS])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--end", type=float, required=True, help="on the monotonic clock, which all processes share")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    _end_with_parent()
    end = options.end - TRACEBACK_SECONDS
    faulthandler.dump_traceback_later(max(0.1, end - time.monotonic()))
    proof = Proof(options.records, end, options.dry)
    module = next(part.module for part in PARTS if part.letter == options.part)
    try:
        if not options.dry and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU; --dry runs everything on the CPU")
        proof.machine(**facts_of(proof))
        importlib.import_module(f"{__package__}.{module}").run(proof)
    except BaseException as error:
        traceback.print_exc()
        proof.reason(reason_of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
