"""What a built file is made of, and the name that follows from it."""

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = ("80", "90", "100", "120")

# the LibTorch stable ABI as of torch 2.10: one file serves that and every later version, and every Python
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
TORCH_FLAGS = (_STABLE_ABI,)
# kernels of a CPU are built for each of these, and the best that the machine knows is chosen when a file is loaded
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    # GCC 12 finds an uninitialised variable in its own header of these
    "avx512": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ),
}
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "--compiler-options=-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas=-warn-spills",
)

_FILES = {
    "cpu": ("checks.h", "cpu_kernels.h", "cpu_kernels.cpp", "bind_cpu.cpp"),
    "cuda": (
        "checks.h",
        "cuda/assign_segment_mean.cu",
        "cuda/bind_cuda.cpp",
        "cuda/launchers.h",
        "cuda/pool_pyramid.cu",
        "cuda/segment_mean.cu",
        "cuda/unshuffle_layernorm.cu",
        "cuda/vtc_cuda.h",
        "cuda/vtc_math.h",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """One file to build: kernels of one kind of device.

    Args:
        kind (`str`): `"cpu"` or `"cuda"`.
        architectures (`tuple[str, ...]`): compute capabilities without the dot, for CUDA.
    """

    kind: str
    architectures: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Path, ...]:
        return tuple(SOURCES / name for name in _FILES[self.kind])

    @property
    def instruction_sets(self) -> dict[str, tuple[str, ...]]:
        """Compiler flags by name, of those that this machine's compiler knows."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return INSTRUCTION_SETS if x86 else {"baseline": ()}

    @property
    def source_hash(self) -> str:
        """Of the sources alone: a file with another one was built from other code."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.relative_to(SOURCES).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    @property
    def build_hash(self) -> str:
        """Of everything else that the result depends on; torch and Python are not among it.

        The compiler counts by the name that was asked for, so that a built file is found where it is gone.
        """
        flags = (*CXX_FLAGS, *TORCH_FLAGS, *(NVCC_FLAGS if self.kind == "cuda" else ()), *self.architectures)
        flags = (*flags, *(flag for each in self.instruction_sets.values() for flag in each))
        machine = (platform.system(), platform.machine(), *platform.libc_ver())
        return hashlib.sha256("\0".join((compiler_command(), *flags, *machine)).encode()).hexdigest()[:8]

    @property
    def file_name(self) -> str:
        return f"hf_vtc_{self.kind}-{self.source_hash}-{self.build_hash}.so"


def default_recipe(kind: str) -> Recipe:
    """What `python -m hf_vtc.ops.build` makes of a kind."""
    return Recipe(kind, ARCHITECTURES if kind == "cuda" else ())


def compiler_command() -> str:
    """The C++ compiler that is asked for: `CXX`, or `c++`."""
    return os.environ.get("CXX") or "c++"
