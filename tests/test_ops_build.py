"""The builder and the loader of compiled ops: caches, locks, missing and failing compilers, edited sources, modes."""

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from hf_vtc.ops import build, library, recipe
from hf_vtc.ops.files import place
from hf_vtc.ops.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]

# says that it ran, and makes a file of what it is asked for: a whole build costs no time
COMPILER = """#!/bin/sh
echo "$@" >> {log}
{extra}
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && echo made > "$2"
    shift
done
"""

# uses hf_vtc.ops as a copy beside weights does, without the rest of the package
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_hf_vtc_ops", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
sys.modules["_hf_vtc_ops"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["_hf_vtc_ops"])
from _hf_vtc_ops.library import build_once
from _hf_vtc_ops.recipe import Recipe
print(build_once(Recipe("cpu")))
"""


class Cache:
    """An empty cache, and a compiler that keeps a log."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder / "cache"
        self.log = folder / "log"
        self.compiler = folder / "compiler"
        self.write_compiler()
        monkeypatch.setenv("CXX", str(self.compiler))
        monkeypatch.setenv("HF_VTC_OPS_DIR", str(self.folder))
        monkeypatch.setenv("HF_VTC_OPS", "auto")
        self.loaded: list[str] = []
        monkeypatch.setattr(torch.ops, "load_library", self.loaded.append)

    def write_compiler(self, extra: str = "") -> None:
        self.compiler.write_text(COMPILER.format(log=self.log, extra=extra))
        self.compiler.chmod(self.compiler.stat().st_mode | stat.S_IXUSR)

    @property
    def num_runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*") if path.suffix != ".lock")


def put_built(target: Path, content: str) -> None:
    """A file that passes for built."""

    def write(folder: Path) -> Path:
        (folder / "made").write_text(content)
        return folder / "made"

    place(write, target)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    return Cache(tmp_path, monkeypatch)


def test_the_first_use_builds_and_the_second_finds(cache, caplog):
    with caplog.at_level(logging.INFO, "hf_vtc.ops"):
        first = library.load("cpu")
        runs = cache.num_runs
        assert library.load("cpu") == first
    assert first == cache.folder / Recipe("cpu").file_name
    assert cache.num_runs == runs > 0
    assert cache.loaded == [str(first)] * 2
    assert cache.files == [first.name]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == [
        "Building hf_vtc's compiled ops for cpu",
        "hf_vtc ops on cpu: compiled",
        "hf_vtc ops on cpu: compiled",
    ]


def test_a_built_file_needs_no_compiler(cache):
    built = library.load("cpu")
    cache.compiler.unlink()
    assert library.load("cpu") == built


def test_without_a_compiler_the_reference_runs_silently(cache, caplog, recwarn):
    cache.compiler.unlink()
    with caplog.at_level(logging.INFO, "hf_vtc.ops"):
        assert library.load("cpu") is None
    assert "plain PyTorch, since there is no C++ compiler" in caplog.text
    assert not recwarn.list and not cache.loaded and not cache.folder.exists()


def test_require_says_what_is_missing(cache, monkeypatch):
    monkeypatch.setenv("HF_VTC_OPS", "require")
    cache.compiler.unlink()
    with pytest.raises(RuntimeError, match="HF_VTC_OPS=require.*no C\\+\\+ compiler"):
        library.load("cpu")


def test_off_neither_builds_nor_loads(cache, monkeypatch):
    monkeypatch.setenv("HF_VTC_OPS", "off")
    assert library.load("cpu") is None
    assert cache.num_runs == 0 and not cache.loaded


@pytest.mark.parametrize("may_build", [True, False])
def test_prebuilt_and_remote_copies_never_start_a_compiler(cache, monkeypatch, may_build):
    monkeypatch.setenv("HF_VTC_OPS", "prebuilt" if may_build else "auto")
    assert library.load("cpu", may_build=may_build) is None
    assert cache.num_runs == 0
    library.build_once(Recipe("cpu"))
    assert library.load("cpu", may_build=may_build) == cache.folder / Recipe("cpu").file_name


def test_an_unknown_mode_is_refused(cache, monkeypatch):
    monkeypatch.setenv("HF_VTC_OPS", "yes")
    with pytest.raises(ValueError, match="auto, off, prebuilt, require, got 'yes'"):
        library.load("cpu")


def test_a_cache_that_cannot_be_written_gives_one_warning_and_the_reference(cache, monkeypatch, tmp_path):
    # a folder below a file cannot be made, not even by root
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_VTC_OPS_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="in plain PyTorch") as caught:
        assert library.load("cpu") is None
    assert len(caught) == 1 and cache.num_runs == 0


def test_a_read_only_cache_is_read(cache):
    built = library.build_once(Recipe("cpu"))
    cache.folder.chmod(0o555)
    built.with_name(f"{built.name}.lock").chmod(0o444)
    try:
        assert library.load("cpu") == built
    finally:
        cache.folder.chmod(0o755)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache):
    cache.write_compiler("echo 'no space for registers' >&2; exit 3")
    with pytest.warns(RuntimeWarning, match="failed with status 3:\nno space for registers"):
        assert library.load("cpu") is None
    assert cache.files == []
    cache.write_compiler()
    assert library.load("cpu") is not None


def test_a_file_that_does_not_load_gives_a_warning_and_the_reference(cache, monkeypatch):
    def refuse(path: str) -> None:
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    with pytest.warns(RuntimeWarning, match="undefined symbol"):
        assert library.load("cpu") is None


def processes(count: int) -> list[subprocess.Popen]:
    folder = ROOT / "hf_vtc" / "ops"
    command = [sys.executable, "-c", LOAD, str(folder)]
    return [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)]


def test_processes_that_build_at_once_build_once(cache):
    cache.write_compiler("sleep 0.5")
    started = processes(3)
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * 3, outputs
    paths = {output for output, _ in outputs}
    assert paths == {f"{cache.folder / Recipe('cpu').file_name}\n"}
    # of one build: an object per source and instruction set, and the link
    assert cache.num_runs == 2 + len(Recipe("cpu").instruction_sets)
    assert sum("Building" in errors for _, errors in outputs) == 1


def test_the_lock_of_a_builder_that_died_holds_nobody_up(cache):
    cache.write_compiler("exec sleep 300")
    (process,) = processes(1)
    while not cache.num_runs:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    locks = list(cache.folder.glob("*.lock"))
    assert len(locks) == 1
    cache.write_compiler()
    built = library.load("cpu")
    # what the dead one left is gone as well
    assert cache.files == [built.name]


def test_an_edited_source_is_another_file(cache, monkeypatch, tmp_path):
    sources = tmp_path / "csrc"
    shutil.copytree(recipe.SOURCES, sources)
    monkeypatch.setattr(recipe, "SOURCES", sources)
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "_lib")
    old = Recipe("cpu").file_name
    put_built(library.PREBUILT / old, "shipped")
    assert library.find_built(Recipe("cpu")) == library.PREBUILT / old
    built = library.build_once(Recipe("cpu"))

    source = sources / "cpu_kernels.cpp"
    source.write_text(source.read_text() + "// edited\n")
    assert Recipe("cpu").file_name != old
    # neither what was shipped nor what was cached comes from these sources
    assert library.find_built(Recipe("cpu")) is None
    assert library.load("cpu") != built
    assert cache.files == sorted([old, Recipe("cpu").file_name])


@pytest.mark.parametrize("changed", ["CXX", "flags", "machine"])
def test_what_the_result_depends_on_is_in_its_name(cache, monkeypatch, changed):
    before = Recipe("cpu").file_name
    if changed == "CXX":
        monkeypatch.setenv("CXX", "another")
    elif changed == "flags":
        monkeypatch.setattr(recipe, "CXX_FLAGS", (*recipe.CXX_FLAGS, "-g"))
    else:
        monkeypatch.setattr(recipe.platform, "machine", lambda: "riscv64")
    assert Recipe("cpu").file_name != before
    assert Recipe("cuda", ("80",)).file_name != Recipe("cuda", ("90",)).file_name


def test_every_source_is_in_the_recipe():
    listed = {source for kind in ("cpu", "cuda") for source in Recipe(kind).sources}
    assert listed == {path for path in recipe.SOURCES.rglob("*") if path.is_file()}


def test_a_file_for_all_architectures_serves_this_one(cache):
    everything = recipe.default_recipe("cuda")
    put_built(cache.folder / everything.file_name, "built")
    assert library.find_built(Recipe("cuda", ("90",))) == cache.folder / everything.file_name


def test_a_cuda_library_does_not_disturb_a_torch_without_cuda(cache, compiled_cpu, monkeypatch):
    # no file that a linker would accept: loading it would fail
    put_built(cache.folder / recipe.default_recipe("cuda").file_name, "not a library")
    script = (
        "import torch\n"
        "from hf_vtc.models.ops_vtc import compiled_ops, segment_mean\n"
        "with compiled_ops(True):\n"
        "    print(segment_mean(torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([0, 2])).tolist())\n"
    )
    shutil.copy(compiled_cpu, cache.folder / Recipe("cpu").file_name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout == "[[1.0, 1.0, 1.0]]\n", result.stderr
    assert cache.num_runs == 0


def test_importing_the_package_builds_nothing(cache, run_python):
    run_python("import hf_vtc, hf_vtc.models.ops_vtc, hf_vtc.ops.build", installed=True)
    assert cache.num_runs == 0


def test_the_command_line_builds_into_a_folder(cache, tmp_path, capsys):
    assert build.main(["--kind", "cpu", "--out", str(tmp_path / "out")]) == 0
    target = tmp_path / "out" / Recipe("cpu").file_name
    assert target.is_file()
    assert capsys.readouterr().out == f"cpu: {target}\n"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_command_line_says_what_failed(cache, capsys):
    cache.write_compiler("echo 'wrong' >&2; exit 1")
    assert build.main(["--kind", "cpu", "--compile-only"]) == 1
    assert "wrong" in capsys.readouterr().err
    assert cache.files == []


def test_compile_only_makes_warnings_errors(cache):
    assert build.main(["--kind", "cpu", "--compile-only"]) == 0
    compiled = [line for line in cache.log.read_text().splitlines() if "-c" in line.split()]
    assert compiled and all("-Werror" in line for line in compiled)


BUILD_WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def wheel_of(folder: Path, **environment: str) -> tuple[str, set[str]]:
    """File name and contents of a wheel of this repository, built in a copy without isolation."""
    source, target = folder / "source", folder / "wheel"
    for name in ("hf_vtc", "hf_vtc_cli"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_lib"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("examples", "model_cards"):
        (source / name).symlink_to(ROOT / name)
    target.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", BUILD_WHEEL, str(target)],
        cwd=source,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


def test_a_plain_wheel_is_pure_python_and_brings_the_sources(cache, tmp_path):
    # torch fails if it is imported
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    name, files = wheel_of(tmp_path, PYTHONPATH=str(tmp_path))
    assert name.endswith("-py3-none-any.whl")
    sources = {f"hf_vtc/ops/{path.relative_to(recipe.SOURCES.parent)}" for path in Recipe("cpu").sources}
    assert sources <= files
    assert not [file for file in files if file.endswith(".so")]
    assert cache.num_runs == 0


def test_a_wheel_with_kernels_is_for_this_platform_and_any_python(cache, tmp_path):
    name, files = wheel_of(tmp_path, HF_VTC_BUILD_OPS="1")
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    # whoever installs it finds them by their sources
    built = [file for file in files if file.endswith(".so")]
    assert built == [f"hf_vtc/ops/_lib/{Recipe('cpu').file_name}"]
    assert cache.num_runs > 0
