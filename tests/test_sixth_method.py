"""A method is its pair of files, its record, one import and one factory entry: a sixth one is added to a copy of the
package, and the tests of all methods run on it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIXTH = ROOT / "tests" / "sixth_method"
IMPORT = "from . import avg_llava, cdpruner, convllava, llavolta, vico, visionzip, vistog\n"
FACTORY_ENTRY = """TINY["pruning"] = Tiny(
    {"vision_config": _CLIP, "text_config": _TEXT, "vision_feature_layer": -2},
    _DYNAMIC,
    stock_llava,
    scored=("auto", "some"),
)
"""


def replace_once(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def without_record(tmp_path_factory) -> Path:
    """A copy of the repository whose package has a sixth pair of files, and nothing else of it."""
    root = tmp_path_factory.mktemp("sixth")
    generated = shutil.ignore_patterns("__pycache__", "golden", "upstream")
    for name in ("hf_vtc", "hf_vtc_cli", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=generated)
    shutil.copy(ROOT / "pyproject.toml", root)
    for role in ("configuration", "modeling"):
        shutil.copy(SIXTH / f"{role}_pruning.py", root / "hf_vtc" / "models")
    return root


@pytest.fixture(scope="module")
def repository(without_record) -> Path:
    """The same with record, import, factory entry and test."""
    root = without_record.parent / f"{without_record.name}_complete"
    shutil.copytree(without_record, root)
    shutil.copy(SIXTH / "pruning.py", root / "hf_vtc" / "methods")
    replace_once(root / "hf_vtc" / "methods" / "__init__.py", IMPORT, IMPORT.replace("vico", "pruning, vico"))
    replace_once(root / "tests" / "factories.py", "METHODS = tuple(TINY)\n", f"{FACTORY_ENTRY}METHODS = tuple(TINY)\n")
    shutil.copy(SIXTH / "test_modeling_pruning.py", root / "tests")
    return root


def run_in(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        # one process, whatever the tests around this one run in
        env={**os.environ, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_method_without_a_record_fails_at_import(without_record):
    result = run_in(without_record, "-c", "import hf_vtc")
    assert result.returncode == 1
    assert "ImportError: hf_vtc/models has pruning, of which there is no record" in result.stderr


@pytest.mark.parametrize(
    "files",
    [
        # a reference by hand, conversion, `estimate`, `bench`, `overlay`, `run`, export
        "test_modeling_pruning test_auto test_report test_plot test_cli test_hub",
        pytest.param("test_contracts test_contracts_generation test_lora test_remote", marks=pytest.mark.slow),
    ],
)
def test_tests_of_all_methods_pass_on_it(repository, files):
    paths = [f"tests/{name}.py" for name in files.split()]
    result = run_in(repository, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "pruning or factory", *paths)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = {line.split("::")[0] for line in result.stdout.splitlines() if " PASSED" in line}
    assert passed == set(paths)
