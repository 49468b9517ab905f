"""What is said where transformers is newer than what the code was proven on."""

import os
import subprocess
import sys

import pytest
import transformers
from factories import tiny_model

from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER
from hf_vtc.models.window_vtc import NEWEST_PROVEN, note_on_newer, release_of

pytestmark = pytest.mark.window

PRETENDED = "5.999.0"
# the version is read when the config of a model is imported, so a process can pretend to have another
LOADING = """
import sys
import transformers.models.auto
version, folder = sys.argv[1:]
if folder:
    sys.modules["hf_vtc"] = None
# some versions replace their module while its parts are imported
from transformers import AutoModel, ProcessorMixin
import transformers
transformers.__version__ = sys.modules["transformers"].__version__ = version
if folder:
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
else:
    import hf_vtc
"""


def lines_about_the_window(version, folder=""):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOADING, version, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "proven on" in line]


def test_import_says_in_one_line_that_transformers_is_newer():
    (line,) = lines_about_the_window(PRETENDED)
    assert PRETENDED in line and NEWEST_PROVEN in line and "pip install" in line


def test_import_says_nothing_within_the_window():
    assert release_of(transformers.__version__) <= release_of(NEWEST_PROVEN)
    assert note_on_newer(transformers.__version__) is None
    assert lines_about_the_window(transformers.__version__) == []


@pytest.mark.skipif(not REMOTE_CODE_FROM_FOLDER, reason="remote code from a folder needs transformers >= 5.11")
def test_an_exported_folder_says_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "exported"
    tiny_model("vico").save_pretrained(folder)
    (line,) = lines_about_the_window(PRETENDED, folder)
    assert PRETENDED in line and NEWEST_PROVEN in line
    assert lines_about_the_window(transformers.__version__, folder) == []
