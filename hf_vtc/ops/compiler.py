"""Compile and link one file of kernels."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .files import OpsUnavailable
from .recipe import (
    CXX_FLAGS,
    NVCC_FLAGS,
    SOURCES,
    TORCH_FLAGS,
    Recipe,
    compiler_command,
)

# a compiler that hangs must not hold the lock for ever
_TIMEOUT_SECONDS = 900
_TORCH = Path(torch.__file__).parent


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command line, or None."""
    command = shlex.split(compiler_command())
    return command if command and shutil.which(command[0]) else None


def find_nvcc() -> str | None:
    """nvcc of `CUDA_HOME`, of `PATH`, or of NVIDIA's Python packages beside torch."""
    home = os.environ.get("CUDA_HOME")
    beside = sorted((_TORCH.parent / "nvidia").glob("cu*/bin"))
    folders = ([str(Path(home) / "bin")] if home else []) + os.environ.get("PATH", "").split(os.pathsep)
    return shutil.which("nvcc", path=os.pathsep.join([*folders, *map(str, beside)]))


def require_tools(recipe: Recipe) -> None:
    """Raise OpsUnavailable, which names what is missing, if this machine cannot build it."""
    if find_compiler() is None:
        raise OpsUnavailable(f"there is no C++ compiler {compiler_command()!r}; install g++, or set CXX")
    if recipe.kind == "cuda" and find_nvcc() is None:
        raise OpsUnavailable("there is no nvcc; install the CUDA toolkit, or set CUDA_HOME")
    if not (_TORCH / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise OpsUnavailable("this torch comes without the headers of its stable ABI")


def _run(command: Sequence[str]) -> str:
    """Run one command, and return what it said, or raise a RuntimeError with it."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"`{command[0]}` did not finish in {_TIMEOUT_SECONDS} s") from error
    if result.returncode != 0:
        raise RuntimeError(f"`{shlex.join(command)}` failed with status {result.returncode}:\n{result.stdout}")
    return result.stdout


def _run_all(commands: Sequence[Sequence[str]]) -> str:
    """Run commands side by side, `MAX_JOBS` at a time."""
    jobs = int(os.environ.get("MAX_JOBS") or min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return "".join(pool.map(_run, commands))


def _glue(compiler: Sequence[str], source: Path, target: Path, extra: Sequence[str], include: Path) -> list[str]:
    """Compile a file that includes torch; its headers are not ours to warn about."""
    headers = ["-isystem", str(include)]
    return [*compiler, *CXX_FLAGS, *TORCH_FLAGS, *extra, *headers, "-c", str(source), "-o", str(target)]


def _link(compiler: Sequence[str], objects: Sequence[Path], folders: Sequence[Path], libraries: Sequence[str]) -> list:
    places = [f"-L{folder}" for folder in folders]
    # what is missing shall be found now, not when the file is loaded; the libraries are in the process by then
    return ["-shared", "-Wl,--no-undefined", *map(str, objects), *places, *libraries]


def _build_cpu(recipe: Recipe, folder: Path, strict: Sequence[str]) -> Path:
    compiler = find_compiler()
    extra = [*(["-DVTC_X86"] if "avx2" in recipe.instruction_sets else []), *strict]
    objects = [folder / "bind_cpu.o"]
    commands = [_glue(compiler, SOURCES / "bind_cpu.cpp", objects[0], extra, _TORCH / "include")]
    for name, flags in recipe.instruction_sets.items():
        objects.append(folder / f"cpu_kernels_{name}.o")
        table = f"-DVTC_TABLE=kernels_{name}"
        source = str(SOURCES / "cpu_kernels.cpp")
        commands.append([*compiler, *CXX_FLAGS, *extra, *flags, table, "-c", source, "-o", str(objects[-1])])
    _run_all(commands)
    target = folder / recipe.file_name
    link = _link(compiler, objects, [_TORCH / "lib"], ["-ltorch_cpu"])
    _run([*compiler, *link, "-o", str(target)])
    return target


def _build_cuda(recipe: Recipe, folder: Path, strict: bool) -> Path:
    compiler, nvcc = find_compiler(), find_nvcc()
    # from the file that a link or a wrapper leads to
    toolkit = Path(_run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]).split("#$ _HERE_=")[1].split()[0]).parent
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in recipe.architectures]
    newest = max(recipe.architectures, key=int)
    # devices to come compile this for themselves
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    errors = ["-Werror", "all-warnings"] if strict else []
    host = ["-ccbin", compiler[0]]
    kernels = [source for source in recipe.sources if source.suffix == ".cu"]
    objects = [folder / f"{source.stem}.o" for source in kernels]
    commands = [
        [nvcc, *NVCC_FLAGS, *errors, *host, *targets, "-c", str(source), "-o", str(target)]
        for source, target in zip(kernels, objects, strict=True)
    ]
    objects.append(folder / "bind_cuda.o")
    glue = SOURCES / "cuda" / "bind_cuda.cpp"
    extra = ["-Werror"] if strict else []
    commands.append(_glue(compiler, glue, objects[-1], extra, _TORCH / "include"))
    _run_all(commands)

    folders = [_TORCH / "lib", *(toolkit / name for name in ("lib64", "lib") if (toolkit / name).is_dir())]
    if not (_TORCH / "lib" / "libtorch_cuda.so").is_file():
        folders.insert(0, _stub(compiler, folder))
    target = folder / recipe.file_name
    libraries = ["-ltorch_cpu", "-ltorch_cuda", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    _run([*compiler, *_link(compiler, objects, folders, libraries), "-o", str(target)])
    return target


def _stub(compiler: Sequence[str], folder: Path) -> Path:
    """A libtorch_cuda.so with the one function that we take from the real one, for a torch without CUDA."""
    source, home = folder / "stub.c", folder / "stub"
    home.mkdir()
    source.write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream);\n"
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
    )
    flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c"]
    _run([*compiler, *flags, str(source), "-o", str(home / "libtorch_cuda.so")])
    return home


def build(recipe: Recipe, folder: Path, strict: bool = False) -> Path:
    """Compile and link one file into a folder, and return its path.

    Args:
        recipe (`Recipe`): what to build.
        folder (`Path`): exists; objects end up there too.
        strict (`bool`): warnings are errors, that of registers that spill among them.

    Raises:
        OpsUnavailable: a compiler is missing.
        RuntimeError: a compiler failed.
    """
    require_tools(recipe)
    if recipe.kind == "cuda":
        return _build_cuda(recipe, folder, strict)
    return _build_cpu(recipe, folder, ["-Werror"] if strict else [])
