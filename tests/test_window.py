"""The window of proven versions: one place that says it, and everything that repeats it."""

import configparser
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from hf_vtc import answers, cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def window():
    """`window_vtc.py` loaded from its file, as the command line does; nothing of the package is imported for it."""
    path = ROOT / "hf_vtc" / "models" / "window_vtc.py"
    spec = importlib.util.spec_from_file_location("window_vtc_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        return CliRunner().invoke(cli.app, ["estimate", "owner/name", "--num-tiles", "1", *options])

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
