"""Every test run is offline and deterministic, and leaves nothing outside of temporary folders."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# transformers reads these when it is imported, so they come first
_MODULES = tempfile.TemporaryDirectory(prefix="hf_vtc_modules_")
os.environ["HF_MODULES_CACHE"] = _MODULES.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what is compared bit for bit may not depend on whether this machine has a compiler
os.environ.setdefault("HF_VTC_OPS", "off")

import factories  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from hf_vtc.methods import RECORDS  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
METHOD_NAMES = tuple(record.name for record in RECORDS.values())
# a method on each base that takes videos
ON_VIDEOS = ("llavolta on qwen3_vl", "avg_llava on qwen2_5_vl", "cdpruner on llava_onevision")
# of a copy of the package that has a sixth method, see test_sixth_method.py
collect_ignore = ["sixth_method"]
HIDE_PACKAGE = 'import sys; sys.modules["hf_vtc"] = None\n'


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=METHOD_NAMES)
def method(request: pytest.FixtureRequest) -> str:
    """Name of a method, every method in turn."""
    return request.param


@pytest.fixture(scope="session")
def saved(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny model, its processor and their code; shared, so tests that change it copy it first."""
    return save_tiny(method, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session")
def every_saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Such a folder for each method."""
    parent = tmp_path_factory.mktemp("every_saved")
    return [save_tiny(name, parent) for name in METHOD_NAMES]


def save_tiny(method: str, parent: Path) -> Path:
    folder = parent / f"{method.replace(' ', '_')}-tiny"
    torch.manual_seed(0)
    model, processor = factories.tiny_pair(method)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a script in a new process that has its own cache of dynamic modules, and return what it printed.

    `installed` says whether hf_vtc can be imported there. Further arguments go to `sys.argv`.
    """

    def run(script: str, *arguments: object, installed: bool = False, python: str = sys.executable) -> str:
        folder = tmp_path_factory.mktemp("process")
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(folder / "modules"),
            # the other interpreter of a cross-version test has the package by this path only
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))) if installed else "",
        }
        result = subprocess.run(
            [python, "-c", script if installed else HIDE_PACKAGE + script, *map(str, arguments)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr[-4000:]}"
        return result.stdout

    return run


@pytest.fixture(scope="session")
def compiled_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled ops for CPU, built once for all workers and loaded, whatever `HF_VTC_OPS` says."""
    from hf_vtc.ops import library
    from hf_vtc.ops.recipe import Recipe

    # the parent is the same for all workers of pytest-xdist
    os.environ.setdefault("HF_VTC_OPS_DIR", str(tmp_path_factory.getbasetemp().parent / "hf_vtc_ops"))
    try:
        path = library.find_built(Recipe("cpu")) or library.build_once(Recipe("cpu"))
    except library.OpsUnavailable as missing:
        pytest.skip(f"needs a C++ compiler: {missing}")
    torch.ops.load_library(str(path))
    return path
