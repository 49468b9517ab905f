"""Running a script of this folder in a process with the address and undefined behaviour sanitizers of g++."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# fibers are no leak, and change stacks on purpose; what asks for too much memory gets none, as elsewhere
OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"


def _library(name: str) -> str | None:
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def sanitizer_library() -> str | None:
    """Path of libasan.so of this g++, or None where either is missing."""
    return _library("libasan.so")


def run_sanitized(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run `script` with the sanitizers' library in the process before Python is.

    With that of C++, since the sanitizers look for what throws exceptions when they start, and Python itself has none.
    """
    preloaded = f"{sanitizer_library()} {_library('libstdc++.so.6')}"
    return run_script(script, *arguments, LD_PRELOAD=preloaded, ASAN_OPTIONS=OPTIONS, **environment)


def run_script(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run `script` with the package and the tests on its path, and no compiled ops but those it loads."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE.parents[1]), str(HERE.parent))),
        "HF_VTC_OPS": "off",
        **environment,
    }
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
