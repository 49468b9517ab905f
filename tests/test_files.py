"""`hf_vtc.files`: folders that are replaced as a whole or not at all, and reads that go nowhere else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_vtc import files
from hf_vtc.data import load_records
from hf_vtc.files import read_json, read_text, replacing_folder, require_own_files

BUILD = """
import sys, time
from pathlib import Path
from hf_vtc.files import replacing_folder
with replacing_folder(Path(sys.argv[1]), overwrite=True) as partial:
    (partial / "config.json").write_text("new")
    print("building", flush=True)
    time.sleep(600)
"""


def model_folder(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


def write_model(folder: Path, overwrite: bool = False) -> None:
    with replacing_folder(folder, overwrite) as partial:
        (partial / "config.json").write_text("new")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=(True, False), ids=("renameat2", "plain renames"))
def every_system(request, monkeypatch):
    """With the system call of Linux, and where there is none."""
    if not request.param:
        monkeypatch.setattr(files, "_renamed", lambda source, target, flag: False)


@pytest.mark.parametrize("empty", (False, True), ids=("nothing there", "an empty folder there"))
def test_a_folder_appears_as_a_whole(tmp_path, every_system, empty):
    target = tmp_path / "new" / "model"
    if empty:
        target.mkdir(parents=True)
    with replacing_folder(target, overwrite=False) as partial:
        (partial / "config.json").write_text("new")
        assert not target.exists() or names_in(target) == set()
    assert (target / "config.json").read_text() == "new"
    assert names_in(target.parent) == {"model"}


def test_a_failure_leaves_nothing(tmp_path, every_system):
    with pytest.raises(KeyboardInterrupt):
        with replacing_folder(tmp_path / "new" / "model", overwrite=False) as partial:
            (partial / "config.json").write_text("new")
            raise KeyboardInterrupt
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("what", ("folder", "empty folder", "file", "link"))
def test_what_has_appeared_meanwhile_stays(tmp_path, every_system, what):
    target = tmp_path / "model"
    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        with replacing_folder(target, overwrite=False) as partial:
            (partial / "config.json").write_text("new")
            if what == "file":
                target.write_text("theirs")
            elif what == "link":
                target.symlink_to(tmp_path / "nowhere")
            else:
                target.mkdir()
                if what == "folder":
                    (target / "config.json").write_text("theirs")
    assert names_in(tmp_path) == {"model"}
    if what == "folder":
        assert (target / "config.json").read_text() == "theirs"


def test_a_file_that_has_appeared_in_an_empty_folder_stays(tmp_path, every_system):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        with replacing_folder(tmp_path / "model", overwrite=False):
            (tmp_path / "model" / "notes.txt").write_text("theirs")
    assert (tmp_path / "model" / "notes.txt").read_text() == "theirs"


def test_a_model_is_replaced_only_if_told(tmp_path, every_system):
    target = model_folder(tmp_path / "model")
    with pytest.raises(FileExistsError, match="pass `overwrite=True`"):
        write_model(target)
    assert (target / "config.json").read_text() == "old"
    (target / "modeling_old.py").write_text("")
    write_model(target, overwrite=True)
    assert (target / "config.json").read_text() == "new" and names_in(target) == {"config.json"}
    assert names_in(tmp_path) == {"model"}


@pytest.mark.parametrize(
    "name", (".git/HEAD", "checkpoint-500/model.safetensors", "notes.txt", "train.py", "README.md/a", ".gitattributes")
)
def test_what_no_export_writes_is_never_lost(tmp_path, every_system, name):
    target = model_folder(tmp_path / "model")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds {name.split('/')[0]}, which is no part of a model"):
        write_model(target, overwrite=True)
    assert (target / name).read_text() == "mine" and (target / "config.json").read_text() == "old"
    assert names_in(tmp_path) == {"model"}


@pytest.mark.parametrize("name", ("README.md", "model.safetensors"))
def test_a_link_in_a_model_folder_is_never_lost(tmp_path, name):
    target = model_folder(tmp_path / "model")
    (target / name).symlink_to(target / "config.json")
    with pytest.raises(FileExistsError, match=f"holds {name}"):
        write_model(target, overwrite=True)
    assert (target / name).is_symlink()


def test_what_was_put_there_while_a_model_was_built_is_never_lost(tmp_path, every_system):
    target = model_folder(tmp_path / "model")
    with pytest.raises(FileExistsError, match="holds notes.txt"):
        with replacing_folder(target, overwrite=True) as partial:
            (partial / "config.json").write_text("new")
            (target / "notes.txt").write_text("mine")
    assert (target / "notes.txt").read_text() == "mine" and names_in(tmp_path) == {"model"}


def test_what_was_put_there_at_the_last_moment_is_kept_beside(tmp_path, every_system, monkeypatch):
    target, look, looks = model_folder(tmp_path / "model"), files._require_written, []

    def look_and_write(content, folder):
        looks.append(content)
        if len(looks) == 3:
            # begin, before the exchange, and now after it: whoever had the folder open writes into the old one
            (content / "notes.txt").write_text("mine")
        look(content, folder)

    monkeypatch.setattr(files, "_require_written", look_and_write)
    write_model(target, overwrite=True)
    assert (target / "config.json").read_text() == "new"
    (kept,) = tmp_path.glob("model.previous_*")
    assert (kept / "notes.txt").read_text() == "mine" and (kept / "config.json").read_text() == "old"


def test_between_two_renames_the_old_model_has_a_name_that_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_renamed", lambda source, target, flag: False)
    target, rename, seen = model_folder(tmp_path / "model"), Path.rename, []

    def renaming(source, destination):
        if Path(destination) == target:
            seen.extend(path.name for path in tmp_path.iterdir() if (path / "config.json").is_file())
        return rename(source, destination)

    monkeypatch.setattr(Path, "rename", renaming)
    write_model(target, overwrite=True)
    assert len(seen) == 1 and seen[0].startswith("model.previous_")
    assert names_in(tmp_path) == {"model"}


@pytest.fixture
def building(tmp_path):
    """A process that builds over an old model, and takes its time."""
    model_folder(tmp_path / "model")
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path / "model")], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"building\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_run_leaves_the_old_model_and_nothing_for_ever(tmp_path, building):
    assert len(names_in(tmp_path)) == 2
    # whoever else writes here leaves alone what is being built
    write_model(tmp_path / "other")
    assert len(names_in(tmp_path)) == 3
    building.send_signal(signal.SIGKILL)
    building.wait()
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    write_model(tmp_path / "third")
    assert names_in(tmp_path) == {"model", "other", "third"}


def test_a_terminated_command_removes_what_it_builds(tmp_path):
    """`hf-vtc` ends on SIGTERM as on Ctrl-C."""
    script = (
        "import sys, time, threading\n"
        "from hf_vtc_cli import main\n"
        "import hf_vtc_cli.app\n"
        f"hf_vtc_cli.app.app = lambda: exec({BUILD!r})\n"
        "main()\n"
    )
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"building\n"
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stdout.close()
    assert names_in(tmp_path) == set()


def test_other_folders_of_that_name_are_left_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("")
    (tmp_path / ".vtc_build_link").symlink_to(tmp_path / "elsewhere")
    write_model(tmp_path / "model")
    assert (tmp_path / "elsewhere" / "a").is_file() and (tmp_path / ".vtc_build_link").is_symlink()


@pytest.mark.parametrize("read", (read_text, read_json))
def test_what_is_no_file_is_not_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"must be an ordinary file, but is {what}"):
            read(path)


def test_text_without_end_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(ValueError, match="too much for text"):
        read_text(tmp_path / "sparse")


@pytest.mark.parametrize("content", ("[" * 10**6, '{"a":' * 10**6, '{"a": ' + "9" * 5000 + "}", "[]", "null", ""))
def test_json_of_every_kind_is_read_or_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json (is not valid JSON|must hold a JSON object)"):
        read_json(tmp_path / "a.json")


def test_20_mb_of_blanks_take_less_than_a_second(tmp_path):
    blanks = " \n\t\r" * 5_000_000
    (tmp_path / "a.json").write_text("{" + blanks + "}")
    record = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (tmp_path / "records.json").write_text(f"[{blanks}{record}{blanks},{record}]")
    start = time.perf_counter()
    assert read_json(tmp_path / "a.json") == {}
    assert time.perf_counter() - start < 1
    start = time.perf_counter()
    assert len(load_records(tmp_path / "records.json")) == 2
    assert time.perf_counter() - start < 1


def test_links_stay_inside(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "README.md").symlink_to("config.json")
    require_own_files(folder)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="chat_template.jinja is a link that leads out of its folder, to .*secret"):
        require_own_files(folder)


def test_links_of_a_cache_of_the_hub_are_followed_to_its_blobs_only(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    require_own_files(snapshot)
    (tmp_path / "secret").write_text("")
    (blobs / "5678").symlink_to(tmp_path / "secret")
    (snapshot / "README.md").symlink_to("../../blobs/5678")
    with pytest.raises(ValueError, match="README.md is a link that leads out"):
        require_own_files(snapshot)
    (snapshot / "README.md").unlink()
    # a folder of blobs that lies elsewhere itself
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="config.json is a link that leads out"):
        require_own_files(snapshot)


@pytest.mark.parametrize("name", ("model.safetensors", "additional_chat_templates/a.jinja"))
def test_pipes_in_a_model_folder_are_refused(tmp_path, name):
    folder = model_folder(tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="must be an ordinary file, but is a pipe"):
        require_own_files(folder)
