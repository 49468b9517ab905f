"""The CUDA kernels, executed on the CPU by `ops/hostsim.h` under the address and undefined behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ops.cases import CASES

from hf_vtc.ops.recipe import Recipe

HERE = Path(__file__).resolve().parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# fibers are no leak, and change stacks on purpose
SANITIZER_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0"


def sanitizer_library() -> str | None:
    """Path of libasan.so of this g++, or None where either is missing."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sanitizer_library() is None, reason="needs g++ with its address sanitizer"),
]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """The .cu files compiled as C++ for the simulator."""
    target = tmp_path_factory.mktemp("simulated") / "kernels.so"
    kernels = [str(source) for source in Recipe("cuda").sources if source.suffix == ".cu"]
    flags = ["-std=c++17", "-O0", "-g1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-DVTC_HOSTSIM", *SANITIZERS]
    command = ["g++", "-x", "c++", *flags, "-I", str(HERE / "ops"), *kernels, "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def simulate(library: Path, task: str, reverse: bool) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE / "ops"))),
        "LD_PRELOAD": sanitizer_library(),
        "ASAN_OPTIONS": SANITIZER_OPTIONS,
        "VTC_SIM_REVERSE": str(int(reverse)),
        "HF_VTC_OPS": "off",
    }
    command = [sys.executable, str(HERE / "ops" / "simulate.py"), str(library), task]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
@pytest.mark.parametrize("op", ["segment_mean", "unshuffle_layernorm", "pool_pyramid", "assign_segment_mean"])
def test_kernels_match_the_reference_in_float64(simulated, op, reverse):
    result = simulate(simulated, op, reverse)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    # the simulator ends a process that it finds a fault in, so that silence would prove nothing
    assert result.stdout == f"{sum(case.name.startswith(op) for case in CASES)} cases agree\n"


def test_an_index_out_of_range_traps(simulated):
    result = simulate(simulated, "trap", reverse=False)
    assert result.returncode != 0
    assert "hostsim: trap" in result.stderr
