"""Which built files run (those of this user or of root that nobody else can write, whole), and how they are made."""

import ast
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hf_vtc.ops import files, library
from hf_vtc.ops.recipe import Recipe

OPS = Path(files.__file__).parent
STRANGER = 12345

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def built(tmp_path, monkeypatch) -> Path:
    """What passes for a built file in a cache of its own; loading it is only written down."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_VTC_OPS_DIR", str(folder))
    monkeypatch.setenv("HF_VTC_OPS", "auto")
    monkeypatch.setattr(library, "build", make)
    monkeypatch.setattr(library, "require_tools", lambda recipe: None)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "_lib")
    loaded.clear()
    return library.build_once(Recipe("cpu"))


loaded: list[str] = []


def make(recipe: Recipe, folder: Path) -> Path:
    """Stands in for compilers."""
    path = folder / recipe.file_name
    path.write_bytes(b"built" * 5000)
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def cut_inside(path: Path) -> None:
    # the end is as it should be
    content = path.read_bytes()
    path.write_bytes(content[:100] + content[200:])


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, -1)


DAMAGES = [
    pytest.param(truncate, "its digest is not at its end", id="truncated"),
    pytest.param(lambda path: os.truncate(path, 0), "its digest is not at its end", id="empty"),
    pytest.param(lambda path: os.truncate(path, 20), "its digest is not at its end", id="less than a seal"),
    pytest.param(flip, "its digest is another", id="one bit"),
    pytest.param(append, "its digest is not at its end", id="one byte more"),
    pytest.param(cut_inside, "24900 bytes instead of 25000", id="shorter"),
    pytest.param(lambda path: path.write_bytes(b"\x7fELF" * 100), "its digest is not at its end", id="another file"),
    pytest.param(lambda path: path.chmod(0o666), "others can write to it; run `chmod go-w", id="written by others"),
    pytest.param(lambda path: path.chmod(0o664), "others can write to it; run `chmod go-w", id="written by its group"),
    pytest.param(replace_by_fifo, "no ordinary file", id="a FIFO"),
    pytest.param(replace_by_link, "cannot be read", id="a link"),
    pytest.param(replace_by_dangling_link, "cannot be read", id="a dangling link"),
    pytest.param(give_away, f"it belongs to user {STRANGER}", id="a stranger's", marks=only_root),
]


@pytest.mark.parametrize(("damage", "fault"), DAMAGES)
def test_what_must_not_run_is_named_and_built_again(built, damage, fault, caplog):
    assert files.fault_of(built) is None
    damage(built)
    assert fault in files.fault_of(built)
    with caplog.at_level(logging.WARNING, "hf_vtc.ops"):
        assert library.load("cpu") == built
    assert fault in caplog.text and "Building hf_vtc's compiled ops" in caplog.text
    assert loaded == [str(built)] and files.fault_of(built) is None and not built.is_symlink()


@pytest.mark.parametrize(("damage", "fault"), DAMAGES)
def test_what_must_not_run_is_not_loaded_where_nothing_is_built(built, damage, fault, caplog):
    damage(built)
    before = built.lstat()
    with caplog.at_level(logging.INFO, "hf_vtc.ops"):
        assert library.load("cpu", may_build=False) is None
    assert fault in caplog.text and "no built file that may run" in caplog.text
    assert not loaded and built.lstat() == before


def test_what_came_damaged_with_the_package_gives_way_to_the_cache(built, caplog):
    library.PREBUILT.mkdir()
    shipped = library.PREBUILT / built.name
    shutil.copy(built, shipped)
    assert library.load("cpu") == shipped
    truncate(shipped)
    with caplog.at_level(logging.WARNING, "hf_vtc.ops"):
        assert library.load("cpu") == built
    assert str(shipped) in caplog.text


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param(lambda folder: folder.chmod(0o777), "others can write to its folder", id="all"),
        pytest.param(lambda folder: folder.chmod(0o775), "others can write to its folder", id="group"),
        pytest.param(give_away, f"belongs to user {STRANGER}", id="owner", marks=only_root),
    ],
)
@pytest.mark.parametrize("empty", [False, True], ids=["with a file", "empty"])
def test_nothing_is_loaded_from_or_built_into_a_folder_of_others(built, change, fault, empty):
    if empty:
        built.unlink()
    change(built.parent)
    with pytest.warns(RuntimeWarning, match=f"{fault}.*HF_VTC_OPS_DIR"):
        assert library.load("cpu") is None
    assert not loaded
    assert sorted(path.name for path in built.parent.iterdir()) == [built.name, f"{built.name}.lock"][empty:]


def test_a_folder_like_tmp_serves(built):
    built.parent.chmod(0o1777)
    assert library.load("cpu") == built
    truncate(built)
    assert library.load("cpu") == built


def test_what_is_made_is_for_its_user(built):
    assert built.parent.stat().st_mode & 0o777 == 0o700
    assert built.with_name(f"{built.name}.lock").stat().st_mode & 0o777 == 0o600


def test_a_generous_umask_gives_nobody_else_the_right_to_write(built):
    truncate(built)
    before = os.umask(0o002)
    try:
        assert library.load("cpu") == built
    finally:
        os.umask(before)
    assert built.stat().st_mode & 0o022 == 0


def lock_by_fifo(lock: Path, target: Path) -> None:
    os.mkfifo(lock)


def lock_by_link(lock: Path, target: Path) -> None:
    lock.symlink_to(target)


def lock_by_folder(lock: Path, target: Path) -> None:
    lock.mkdir()


@pytest.mark.parametrize("plant", [lock_by_fifo, lock_by_link, lock_by_folder])
@pytest.mark.timeout(30)
def test_a_planted_lock_neither_hangs_nor_leads_away(built, tmp_path, plant):
    lock = built.with_name(f"{built.name}.lock")
    built.unlink(), lock.unlink()
    target = tmp_path / "outside"
    plant(lock, target)
    with pytest.warns(RuntimeWarning, match="lock"):
        assert library.load("cpu") is None
    assert not target.exists() and not loaded


@only_root
def test_the_lock_of_a_stranger_is_not_waited_for(built):
    import fcntl

    lock = built.with_name(f"{built.name}.lock")
    built.unlink()
    os.chown(lock, STRANGER, -1)
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(RuntimeWarning, match="must be an ordinary file of this user"):
            assert library.load("cpu") is None


def test_a_file_is_on_the_disk_before_it_has_its_name(built, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    built.unlink()
    library.build_once(Recipe("cpu"))
    # the file, its name, the folder
    assert steps == ["fsync", "replace", "fsync"]


def test_a_damaged_file_is_built_once_by_those_who_meet_it(built, monkeypatch):
    truncate(built)
    runs = []
    monkeypatch.setattr(library, "build", lambda *arguments: (runs.append(1), make(*arguments))[1])
    threads = [threading.Thread(target=library.build_once, args=(Recipe("cpu"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(runs) == 1 and files.fault_of(built) is None


LOAD = """
from hf_vtc.models.kernels_vtc import load_kernels
print(load_kernels("cpu"))
"""


def test_a_truncated_library_does_not_end_the_process(compiled_cpu, tmp_path):
    """Mapping it would: a page beyond the end of the file is a bus error."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    shutil.copy(compiled_cpu, folder)
    environment = {"PYTHONPATH": str(OPS.parents[1]), "HF_VTC_OPS_DIR": str(folder), "HF_VTC_OPS": "prebuilt"}

    def load() -> subprocess.CompletedProcess:
        environ = {**os.environ, **environment}
        return subprocess.run([sys.executable, "-c", LOAD], env=environ, capture_output=True, text=True)

    assert load().stdout == "True\n"
    truncate(folder / compiled_cpu.name)
    result = load()
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr
    assert "is damaged" in result.stderr


def test_modules_of_ops_import_in_one_direction():
    imports = {}
    for path in OPS.glob("*.py"):
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imports[path.stem] = {node.module for node in found if node.level == 1}
    while imports:
        free = {name for name, needed in imports.items() if not needed & imports.keys()}
        assert free, f"a circle of imports: {imports}"
        imports = {name: needed for name, needed in imports.items() if name not in free}
