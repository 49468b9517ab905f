"""Prove on a GPU what CI cannot: one command, eight minutes, no network.

    python examples/gpu_proof.py --minutes 8 --out outputs/gpu               # everything, most important first
    python examples/gpu_proof.py --parts a,g --out outputs/gpu               # some parts
    python examples/gpu_proof.py --dry --out outputs/dry                     # the same code on a CPU, tiny
    python examples/gpu_proof.py --wheels outputs/wheels --out outputs/gpu   # with what gpu_proof_wheels.py packed

Each part runs in a process of its own and is killed at its time box, so that none can hang the run. DIR/results.json
and DIR/results.md are written after every part and while one runs: a run that is cut off still counts. DIR/log.txt has
all that was printed. A results.json that is copied to docs/results appears in docs/gpu.md (gpu_proof_table.py).

Needs Python 3.10, torch 2.10 with CUDA and what hf_vtc needs; nvcc for the ops, and compute-sanitizer and ncu for part
g, from the PATH or the CUDA toolkit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_proof_parts import PARTS, Part
from gpu_proof_parts.runner import Results, Stopped, run_parts

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
DEFAULT_MINUTES = 8.0
# of a dry run nothing is cut short: a CPU may be slow and shared
DRY_BOX_SECONDS = 300.0
_INSTALL_SECONDS = 60


def output_of(*command: str) -> str:
    """What a command prints, or nothing if it cannot be run."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What can be said of a run before it begins."""
    commit = options.commit or output_of("git", "rev-parse", "HEAD") or "unknown"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no").splitlines()
    machine = {}
    # a driver that several GPUs share is named once per GPU
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    if driver and not options.dry:
        machine["driver"] = driver[0]
    return {
        "command": " ".join(["python", "examples/gpu_proof.py", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "changed_files": changed,
        "dry": options.dry,
        "minutes": options.minutes,
        "machine": machine,
    }


def chosen_parts(letters: str | None) -> list[Part]:
    """The parts of a list such as `a,c`, in their own order.

    Raises:
        ValueError: one does not exist.
    """
    if letters is None:
        return list(PARTS)
    asked = [letter.strip() for letter in letters.split(",")]
    unknown = sorted(set(asked) - {part.letter for part in PARTS})
    if unknown:
        raise ValueError(f"`--parts` must be some of {', '.join(part.letter for part in PARTS)}, got {letters!r}.")
    return [part for part in PARTS if part.letter in asked]


def worker_environment(scratch: Path, site: Path | None) -> dict[str, str]:
    """Where workers find the code and put what they build."""
    paths = [site, EXAMPLES, ROOT, ROOT / "tests", os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # ops that one part builds are there for the next
    environment.setdefault("HF_VTC_OPS_DIR", str(scratch / "ops"))
    return environment


def install(wheels: Path, site: Path) -> str | None:
    """Unpack wheels into a folder of their own, so that nothing of the machine is changed; returns what went wrong."""
    files = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    try:
        result = subprocess.run(
            [*command, "--target", str(site), *files], capture_output=True, text=True, timeout=_INSTALL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if result.returncode == 0 else result.stderr.strip()[-500:]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and log")
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="all time boxes grow or shrink with it")
    parser.add_argument("--parts", help="only these, as in a,c")
    parser.add_argument("--dry", action="store_true", help="everything on the CPU at tiny sizes")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="packages that the machine lacks")
    parser.add_argument("--commit", help="recorded where the working tree comes without its history")
    options = parser.parse_args(arguments)
    try:
        options.chosen = chosen_parts(options.parts)
    except ValueError as error:
        parser.error(str(error))
    if options.wheels and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels} holds no wheels; examples/gpu_proof_wheels.py makes them")
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    return options


def main() -> int:
    options = parse_arguments()
    results = Results(options.out, facts(options))
    with tempfile.TemporaryDirectory(prefix="gpu_proof-") as folder:
        scratch = Path(folder)
        site = None
        if options.wheels:
            site = scratch / "site"
            failure = install(options.wheels, site)
            # parts may do with what the machine has
            results.content["machine"]["wheels"] = failure or [file.name for file in options.wheels.glob("*.whl")]

        def command_of(part: Part, records: Path, end: float) -> list[str]:
            command = [sys.executable, "-m", "gpu_proof_parts.work", part.letter, "--records", str(records.resolve())]
            return [*command, "--end", f"{end:.1f}", *(["--dry"] if options.dry else [])]

        chosen, scale = options.chosen, options.minutes / DEFAULT_MINUTES
        if options.dry:
            chosen, scale = [part._replace(seconds=DRY_BOX_SECONDS) for part in chosen], 1.0
        try:
            complete = run_parts(chosen, command_of, results, scale, worker_environment(scratch, site))
        except Stopped:
            sys.stderr.write(f"stopped; what was measured until then is in {options.out}\n")
            return 143
    sys.stdout.write(f"wrote {options.out / 'results.md'}\n")
    wrong = [row for part in results.content["parts"] for row in part["rows"] if row.get("ok") is False]
    return 0 if complete and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
