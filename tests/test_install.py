"""What an install brings: checkpoints and pages in a wheel, an editable install that is found, and the version."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_vtc

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# bytes of a wheel that docs/quickstart.md promises at most
LARGEST_WHEEL = 12e6


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What a build reads of this repository, in a folder named hf_vtc, as `git clone` makes it."""
    source = tmp_path_factory.mktemp("above") / "hf_vtc"
    leave_out = shutil.ignore_patterns("__pycache__", "_lib", "_shipped")
    for name in ("hf_vtc", "hf_vtc_cli"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("examples", "model_cards"):
        (source / name).symlink_to(ROOT / name)
    return source


@pytest.fixture(scope="module")
def build(clone, tmp_path_factory):
    """Build the clone without isolation, and return the file and a folder where its contents are installed."""
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"builds of this package need setuptools >= 77, this environment has {version}")

    def run(kind: str) -> tuple[Path, Path]:
        target, site = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("site")
        environment = {name: value for name, value in os.environ.items() if name != "HF_VTC_BUILD_OPS"}
        result = subprocess.run(
            [sys.executable, "-c", BUILD, kind, str(target)],
            cwd=clone,
            env={**environment, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        (wheel,) = target.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        return wheel, site

    return run


def python(script: str, site: Path, folder: Path) -> str:
    """Run a script where a build is installed in `site`, started in `folder`."""
    # behind the folder, which comes first, and before this environment, which may have an install of its own
    installed = f"import site, sys; before = list(sys.path); site.addsitedir({str(site)!r})"
    script = f"{installed}; sys.path[1:1] = [path for path in sys.path if path not in before]\n{script}"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(build) -> tuple[Path, Path]:
    return build("build_wheel")


def test_a_wheel_carries_checkpoints_and_pages(wheel):
    file, site = wheel
    assert file.stat().st_size < LARGEST_WHEEL
    shipped = site / "hf_vtc" / "_shipped"
    originals = [ROOT / "examples" / "images" / name for name in ("pages.json", "form_1.png")]
    for folder in sorted((ROOT / "model_cards").glob("*-tiny")):
        originals += [path for path in sorted(folder.iterdir()) if folder.name != "base-tiny"]
    assert len(originals) > 5 * 6
    for path in originals:
        assert (shipped / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    # no command runs the uncompressed base
    assert not (shipped / "model_cards" / "base-tiny").exists()
    assert (site / "hf_vtc" / "py.typed").is_file()
    # a fit reads them
    for name in ("recipes", "presets"):
        files = sorted((ROOT / "hf_vtc" / "fit" / name).glob("*.yaml"))
        assert files
        for path in files:
            assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    # examples and tests are no part of what is installed
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"hf_vtc", "hf_vtc_cli"}


def test_a_wheel_answers_in_an_empty_folder(wheel, tmp_path):
    _, site = wheel
    script = "import sys; sys.argv[1:] = {}; from hf_vtc_cli import main; main()"
    arguments = ["run", "--question", "What is the colour of this form?", "--budget", "auto", "--json"]
    content = json.loads(python(script.format(arguments), site, tmp_path))
    assert Path(content["model"]) == site / "hf_vtc" / "_shipped" / "model_cards" / "vico-tiny"
    assert len(content["results"]) == 4 and (tmp_path / "vtc_run.png").is_file()


def test_an_editable_install_is_found_from_the_folder_above_a_clone(build, clone, tmp_path):
    _, site = build("build_editable")
    script = "import hf_vtc; from hf_vtc import AutoModelForVision2Seq; print(hf_vtc.__file__)"
    for folder in (clone.parent, tmp_path):
        assert Path(python(script, site, folder).strip()) == clone / "hf_vtc" / "__init__.py"
    # it stays where it is, so nothing is copied
    assert not (clone / "hf_vtc" / "_shipped").exists()


def test_the_version_is_printed_without_loading_torch(run_python):
    script = """
import sys
from hf_vtc_cli import main
sys.argv[0] = "hf-vtc"
try:
    main()
except SystemExit as end:
    print("status", end.code, sorted({"torch", "transformers", "hf_vtc"} & set(sys.modules)))
"""
    text = run_python(script, "--version", installed=True)
    assert text.startswith(f"hf_vtc {hf_vtc.__version__}, ") and "status 0 []" in text


def test_every_file_that_names_the_version_names_this_one():
    for name, pattern in (("CITATION.cff", r"^version: (.+)$"), ("CHANGELOG.md", r"^## (\S+)")):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.search(pattern, text, re.MULTILINE)[1] == hf_vtc.__version__, name
