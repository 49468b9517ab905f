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


def sanitizer_library() -> str | None:
    """Path of libasan.so of this g++, or None where either is missing."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def run_sanitized(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run `script` with the sanitizers' library in the process before Python is."""
    return run_script(script, *arguments, LD_PRELOAD=sanitizer_library(), ASAN_OPTIONS=OPTIONS, **environment)


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
