"""`hf_vtc.hub` and folders of strangers: what export reads and runs, what the proof sees, and cards and versions."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import factories
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc import hub
from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER
from hf_vtc.hub import proof
from hf_vtc.models.window_vtc import NEWEST_PROVEN, OLDEST_PROVEN

needs_remote_code_from_folder = pytest.mark.skipif(
    not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11"
)
SECRET = "nobody may read this"


@pytest.fixture
def exported(tmp_path) -> Path:
    return hub.export(
        factories.tiny_model("vico"), factories.tiny_processor("vico"), tmp_path / "exported", check=False
    )


def aged(folder: Path, trap: Path) -> Path:
    """The folder as an older hf_vtc might have left it: other files of code, which leave a mark when they run."""
    for file in folder.glob("*.py"):
        file.write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\nraise ImportError('too old')\n")
    (folder / "compressor_old_vtc.py").write_text("import long_gone\n")
    for file in folder.glob("*config.json"):
        values = json.loads(file.read_text())
        for part in (values, values.get("image_processor", {})):
            if "auto_map" in part:
                part["auto_map"] = {
                    key: f"compressor_old_vtc.{name.split('.')[1]}" for key, name in part["auto_map"].items()
                }
            part.pop("transformers_version", None)
        file.write_text(json.dumps(values))
    return folder


def code_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.py")}


@pytest.mark.window
def test_exporting_an_exported_folder_refreshes_its_code_and_runs_none_of_it(exported, tmp_path):
    new_code = code_of(exported)
    expected = AutoModelForImageTextToText.from_pretrained(exported).state_dict()
    old = aged(exported, tmp_path / "sprung")
    folder = hub.export(old, tmp_path / "new", check=REMOTE_CODE_FROM_FOLDER)
    assert code_of(folder) == new_code
    assert not (tmp_path / "sprung").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_vico.VicoForConditionalGeneration"
    weights = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    assert AutoProcessor.from_pretrained(folder).image_token
    # in its own place too
    hub.export(old, old, check=False, overwrite=True)
    assert code_of(old) == new_code and not (tmp_path / "sprung").exists()


@pytest.mark.window
def test_a_card_says_on_which_versions_the_code_was_proven(exported, tmp_path):
    sentence = f"proven on transformers {OLDEST_PROVEN} to {NEWEST_PROVEN}"
    card = exported / "README.md"
    assert card.read_text().count(sentence) == 1
    page = (Path(__file__).resolve().parents[1] / "docs" / "window.md").read_text(encoding="utf-8")
    assert sentence.capitalize() in page.replace("Proven", "Proven", 1)
    assert ModelCard.load(card).data["code_proven_on"] == f"transformers {OLDEST_PROVEN} - {NEWEST_PROVEN}"
    # the sentence of another version is replaced, a card from before it was written gets one
    text = card.read_text()
    line = next(line for line in text.splitlines() if sentence in line)
    for older in (text.replace(sentence, "proven on transformers 4.0 to 4.1"), text.replace(f"{line}\n\n", "")):
        assert older != text and sentence not in older
        card.write_text(older)
        folder = hub.export(exported, tmp_path / "new", check=False, overwrite=True)
        assert (folder / "README.md").read_text() == text


def test_the_card_of_somebody_else_keeps_its_text(exported, tmp_path):
    (exported / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nText.\n")
    folder = hub.export(exported, tmp_path / "new", check=False)
    written = ModelCard.load(folder / "README.md")
    assert written.text.strip() == "# Mine\n\nText."
    assert written.data["code_proven_on"] == f"transformers {OLDEST_PROVEN} - {NEWEST_PROVEN}"


@pytest.mark.parametrize("name", ("README.md", "chat_template.jinja", "config.json", "model.safetensors"))
def test_export_and_push_follow_no_link_out_of_a_folder(exported, tmp_path, name):
    (tmp_path / "secret").write_text(SECRET)
    (exported / name).unlink(missing_ok=True)
    (exported / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of its folder"):
        hub.export(exported, tmp_path / "new", check=False)
    assert not (tmp_path / "new").exists()
    # as the processor of a model in memory, or as a folder to prove
    if name != "model.safetensors":
        with pytest.raises(ValueError, match="leads out of its folder"):
            hub.export(factories.tiny_model("vico"), exported, tmp_path / "new", check=False)
    if REMOTE_CODE_FROM_FOLDER:
        with pytest.raises(ValueError, match="leads out of its folder"):
            hub.check(exported)


def test_a_card_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "card.md")
    parts = factories.tiny_model("vico"), factories.tiny_processor("vico")
    with pytest.raises(ValueError, match="card.md must be an ordinary file, but is a pipe"):
        hub.export(*parts, tmp_path / "new", card=tmp_path / "card.md", check=False)


def test_missing_weights_are_not_made_up(exported, tmp_path):
    weights = load_file(exported / "model.safetensors")
    dropped = "model.router.gate.weight"
    del weights[dropped]
    # as many numbers as before, so that their sum says nothing
    weights["model.other"] = torch.zeros(10_000)
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 tensors of the model.*{re.escape(dropped)}"):
        hub.export(exported, tmp_path / "new", check=False)


@pytest.mark.parametrize("content", ("", "{", "[]", '{"max_new_tokens": 5', "\xff"))
def test_generation_settings_are_not_lost_in_silence(exported, tmp_path, content):
    (exported / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="generation_config.json"):
        hub.export(exported, tmp_path / "new", check=False)


def test_an_index_cannot_name_files_elsewhere(exported, tmp_path):
    shutil.move(exported / "model.safetensors", tmp_path / "outside.safetensors")
    weight_map = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), "../outside.safetensors")
    (exported / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match="must name files of that folder"):
        hub.export(exported, tmp_path / "new", check=False)


def prelude(folder: Path, lines: str) -> None:
    """Let the code of a folder begin with other lines."""
    file = folder / "modeling_vico.py"
    file.write_text(f"{lines}\n{file.read_text()}")


@needs_remote_code_from_folder
def test_the_proof_has_no_tokens_in_its_environment(exported, tmp_path, monkeypatch):
    secrets = {
        "HF_TOKEN": "hf_1",
        "HUGGING_FACE_HUB_TOKEN": "hf_2",
        "WANDB_API_KEY": "3",
        "AWS_SECRET_ACCESS_KEY": "4",
        "GITHUB_TOKEN": "5",
        "OMP_SECRET": "6",
        "TORCH_TOKEN": "7",
        "SOMETHING_ELSE": "8",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    seen = tmp_path / "seen.json"
    prelude(
        exported, f"import json, os; json.dump([dict(os.environ), os.path.expanduser('~')], open({str(seen)!r}, 'w'))"
    )
    hub.check(exported)
    environment, home = json.loads(seen.read_text())
    assert not secrets.keys() & environment.keys()
    assert environment["PATH"] == os.environ["PATH"] and environment["HF_VTC_OPS"] == "off"
    assert "hf_vtc_check_" in home and "hf_vtc_check_" in environment["HF_HOME"]


@needs_remote_code_from_folder
def test_the_proof_ends_in_time_with_all_that_it_has_started(exported, tmp_path):
    started = tmp_path / "started"
    prelude(
        exported,
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n",
    )
    before = time.monotonic()
    with pytest.raises(RuntimeError, match="was still computing after 30 s"):
        hub.check(exported, timeout=30)
    assert time.monotonic() - before < 60
    pid = int(started.read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        # gone, or a zombie that nobody has waited for
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the folder's code started is still running")


@needs_remote_code_from_folder
def test_the_proof_repeats_the_end_of_a_long_error_output(exported):
    prelude(exported, "import sys; sys.stderr.write('x' * 10_000_000); raise RuntimeError('the reason')")
    with pytest.raises(RuntimeError, match="the reason") as error:
        hub.check(exported)
    assert len(str(error.value)) < 2 * proof._ERROR_TAIL
