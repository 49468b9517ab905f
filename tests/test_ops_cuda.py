"""The CUDA kernels and their binding, executed on the CPU by `ops/hostsim.h` under the sanitizers of g++."""

import subprocess
from pathlib import Path

import pytest
import torch
from ops.cases import CASES
from ops.hostile import unexpected
from ops.sanitizers import FLAGS, run_sanitized, sanitizer_library

from hf_vtc.ops.recipe import TORCH_FLAGS, Recipe

HERE = Path(__file__).resolve().parent
INCLUDES = ("-I", str(HERE / "ops"), "-isystem", str(Path(torch.__file__).parent / "include"))
LIBRARIES = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sanitizer_library() is None, reason="needs g++ with its address sanitizer"),
]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """The .cu files and their binding compiled as C++ for the simulator, for tensors on the CPU."""
    target = tmp_path_factory.mktemp("simulated") / "kernels.so"
    sources = [str(source) for source in Recipe("cuda").sources if source.suffix in (".cu", ".cpp")]
    flags = ["-std=c++17", "-O0", "-g1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-DVTC_HOSTSIM", *TORCH_FLAGS]
    command = ["g++", "-x", "c++", *flags, *FLAGS, *INCLUDES, *sources, "-x", "none", *LIBRARIES, "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def simulate(library: Path, task: str, reverse: bool) -> subprocess.CompletedProcess:
    return run_sanitized("simulate.py", library, task, VTC_SIM_REVERSE=str(int(reverse)))


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


@pytest.mark.timeout(1800)
def test_no_argument_leads_the_binding_or_a_kernel_astray(simulated):
    result = run_sanitized("hostile.py", simulated)
    assert result.returncode == 0, result.stderr[-4000:]
    assert not unexpected(result.stdout, traps=True)
