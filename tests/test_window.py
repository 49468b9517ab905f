"""The window of proven versions: one place that says it, and everything that repeats it."""

import configparser
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_vtc_cli import answers
from hf_vtc_cli.app import app

ROOT = Path(__file__).resolve().parents[1]


def module_of(path):
    """A file as a module by itself; nothing of the package is imported for it."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_alone", ROOT / path)
    # dataclasses look their module up
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def window():
    return module_of("hf_vtc/models/window_vtc.py")


@pytest.fixture(scope="module")
def rows():
    """The program that measures the window, `tests/window/run.py`."""
    return module_of("tests/window/run.py")


@pytest.fixture(scope="module")
def check():
    """What it runs inside of each environment, `tests/window/check.py`."""
    return module_of("tests/window/check.py")


@pytest.fixture(scope="module")
def stored(rows):
    return load_file(rows.EXPECTED)


def test_a_newer_minor_is_named_with_the_remedy(window, monkeypatch):
    monkeypatch.setattr(window, "NEWEST_PROVEN", "5.24")
    note = window.note_on_newer("5.25.0")
    assert "5.25.0" in note and "5.24" in note and note.endswith('pip install "transformers<5.25"')
    # a development version is of the minor that it becomes, and a new major is newer than any minor
    assert window.note_on_newer("5.25.0.dev0") and window.note_on_newer("6.0.0rc1")


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.9.0", "5.24.0", "5.24.7", "5.24.0.dev0"])
def test_proven_versions_have_no_note(window, monkeypatch, version):
    monkeypatch.setattr(window, "NEWEST_PROVEN", "5.24")
    assert window.note_on_newer(version) is None


def test_a_version_without_numbers_is_refused(window):
    with pytest.raises(ValueError, match="'main'"):
        window.release_of("main")


def test_setup_bounds_transformers_by_the_window(window):
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    required = settings["options"]["install_requires"].split()
    bounds = f"transformers>={window.OLDEST_PROVEN},<{window.first_unproven()}"
    assert bounds in required


def test_the_window_needs_the_standard_library_alone():
    text = (ROOT / "hf_vtc" / "models" / "window_vtc.py").read_text(encoding="utf-8")
    imported = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
    assert imported and set(imported) <= sys.stdlib_module_names


@pytest.fixture
def failing(monkeypatch):
    """`hf-vtc estimate` on a transformers of some version, where reading the config raises some error."""

    def run(version, error, *options):
        def config_of(path):
            # errors of the host come out of its own code
            if error is HOST_ERROR:
                transformers.AutoConfig.for_model("no such type")
            raise error

        monkeypatch.setattr(transformers, "__version__", version)
        monkeypatch.setattr(answers, "config_of", config_of)
        return CliRunner().invoke(app, ["estimate", "owner/name", "--num-tiles", "1", *options])

    return run


HOST_ERROR = "a ValueError of transformers"
IMPORT_ERROR = ImportError("cannot import name 'Gone' from 'transformers.utils'", name="transformers.utils")


@pytest.mark.parametrize("error", [TypeError("no argument 'cache'"), AttributeError("x"), IMPORT_ERROR, HOST_ERROR])
def test_a_failure_on_a_newer_host_is_one_line_with_the_remedy(failing, error):
    result = failing("99.1.0", error)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and "99.1.0" in result.stderr and "pip install" in result.stderr
    # whoever looks for the reason sees all of it
    assert not isinstance(failing("99.1.0", error, "--debug").exception, SystemExit)


@pytest.mark.parametrize("error", [ValueError("bad"), FileNotFoundError("bad"), ImportError("bad", name="matplotlib")])
def test_what_has_nothing_to_do_with_the_host_keeps_its_message(failing, error):
    result = failing("99.1.0", error)
    assert (result.exit_code, result.stderr) == (2, "Error: bad\n")


def test_a_fault_on_a_proven_host_stays_a_traceback(failing, window):
    error = TypeError("ours")
    assert failing(window.OLDEST_PROVEN, error).exception is error
    assert "pip install" not in failing(window.OLDEST_PROVEN, HOST_ERROR).stderr


def test_rows_reach_from_the_oldest_to_the_smallest_versions(rows, window):
    found = rows.all_rows()
    assert f"transformers=={window.OLDEST_PROVEN}" in found[window.OLDEST_PROVEN].pins
    # what setup.cfg bounds is what the newest row takes
    assert found["newest"].pins == ()
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    required = settings["options"]["install_requires"].split()
    floors = [f"torch=={found['floors'].torch}", *found["floors"].pins]
    assert len(floors) == len(required)
    assert all(line.split(",")[0] == pin.replace("==", ">=") for line, pin in zip(sorted(required), sorted(floors)))
    # every Python that the classifiers claim has a row
    claimed = re.findall(r"Python :: (3\.\d+)", settings["metadata"]["classifiers"])
    assert {row.python for row in found.values()} == set(claimed)


def test_rows_are_chosen_by_name(rows):
    assert [row.name for row in rows.chosen_rows(["floors", "5.23.0"])] == ["floors", "5.23.0"]
    assert rows.chosen_rows(["5.99.1"])[0].pins == ("transformers==5.99.1",)
    assert [row.name for row in rows.chosen_rows([])] == list(rows.all_rows())
    with pytest.raises(SystemExit, match="'ceilings'"):
        rows.chosen_rows(["ceilings"])


def test_a_step_that_fails_is_a_fault_of_its_row_alone(rows, tmp_path, monkeypatch):
    class Environment:
        def __init__(self, row, folder):
            self.log = folder / "log"

        def install(self, wheel):
            return {"transformers": "5.23.0"}

        def demo(self, scratch):
            raise rows.StepFailed("crashed")

        def checkpoints(self, *arguments):
            return "0"

        exported = tests = None

    monkeypatch.setattr(rows, "Environment", Environment)
    result = rows.measure(rows.Row("newest"), tmp_path, tmp_path, ("demo", "checkpoints"), tmp_path)
    assert result.cells == {"demo": "**fails**", "checkpoints": "0"}
    assert len(result.faults) == 1 and "newest, demo: crashed" in result.faults[0]


def test_answers_that_differ_are_named(check, stored):
    assert check.differences(stored, stored) == (0.0, [])
    name = "vico-tiny auto"
    ids, logits = stored[f"{name} ids"].clone(), stored[f"{name} logits"].clone()
    ids[0, 0] += 1
    logits[0, 0, 0] += 0.5
    largest, wrong = check.differences(stored | {f"{name} ids": ids, f"{name} logits": logits}, stored)
    assert wrong == [f"{name} ids"] and abs(largest - 0.5) < 1e-6
    logits[0, 0, 0] = float("nan")
    assert check.differences(stored | {f"{name} logits": logits}, stored)[0] == float("inf")
    fewer = {key: value for key, value in stored.items() if key != f"{name} ids"}
    assert check.differences(fewer, stored)[1] == [f"{name} ids"]


@pytest.mark.window
def test_shipped_checkpoints_answer_as_stored(check, stored):
    folders = check.checkpoints(ROOT / "model_cards")
    found = {name: value for folder in folders for name, value in check.answers(folder, remote=False).items()}
    largest, wrong = check.differences(found, stored)
    assert len(folders) == 5 and not wrong
    # as for other stored numbers, since another processor may have made them; `run.py` holds them to 1e-5
    assert largest < 1e-4
