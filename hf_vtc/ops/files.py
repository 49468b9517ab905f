"""Where built files lie, which of them may run, and how they come to be there as a whole.

A built file is code that runs in whatever process loads it. So it is loaded only if it is an ordinary file of this
user or of root that nobody else can write, in a folder of which the same holds (or where, as in /tmp, nobody can move
what is not theirs), and if its bytes are those that were built. Their number and digest stand at its end, where they
are replaced together with it and travel with it; whoever maps a library does not read that far. Folders further up are
not looked at: who can exchange those can exchange the user's Python files as well.
"""

import hashlib
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# what it is, how many bytes come before it, and their SHA-256
_SEAL = struct.Struct("<16sQ32s")
_MARK = b"hf_vtc built ops"
_OTHERS_CAN_WRITE = stat.S_IWGRP | stat.S_IWOTH


class OpsUnavailable(Exception):
    """There is no built file and none can be made, which is no fault: the message says what is missing."""


class UntrustedPlace(RuntimeError):
    """Others could exchange what is put there; the message says what to change."""


def cache_folder() -> Path:
    """Where built files lie: `HF_VTC_OPS_DIR`, else `hf_vtc/ops` in the user's cache."""
    own = os.environ.get("HF_VTC_OPS_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_vtc" / "ops"


def fault_of(path: Path) -> str | None:
    """Why a file must not be loaded, or None."""
    try:
        return _fault_of_folder(path.parent) or _fault_of_file(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _fault_of_owner(status: os.stat_result, what: str) -> str | None:
    if status.st_uid not in (os.geteuid(), 0):
        return f"{what} belongs to user {status.st_uid}, neither to this user ({os.geteuid()}) nor to root"
    return None


def _fault_of_folder(folder: Path) -> str | None:
    status = folder.stat()
    fault = _fault_of_owner(status, f"its folder {folder}")
    if fault is None and status.st_mode & _OTHERS_CAN_WRITE and not status.st_mode & stat.S_ISVTX:
        return f"others can write to its folder; run `chmod go-w {folder}`"
    return fault


def _fault_of_file(path: Path) -> str | None:
    # neither through a link, nor waiting for somebody to write into a FIFO
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            return "it is no ordinary file"
        fault = _fault_of_owner(status, "it")
        if fault is not None:
            return fault
        if status.st_mode & _OTHERS_CAN_WRITE:
            return f"others can write to it; run `chmod go-w {path}`"
        size = status.st_size - _SEAL.size
        file.seek(max(size, 0))
        seal = file.read(_SEAL.size + 1)
        if len(seal) != _SEAL.size or seal[: len(_MARK)] != _MARK:
            return "it is damaged: its digest is not at its end"
        _, expected_size, expected_digest = _SEAL.unpack(seal)
        if size != expected_size:
            return f"it is damaged: {size} bytes instead of {expected_size}"
        file.seek(0)
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            # the seal is no part of what it describes
            digest.update(block[: max(size, 0)])
            size -= len(block)
        return None if digest.digest() == expected_digest else "it is damaged: its digest is another"


def _seal(path: Path) -> None:
    """Put size and digest at the end of a file, take away others' right to write, and wait for the disk."""
    with open(path, "r+b") as file:
        content = file.read()
        file.write(_SEAL.pack(_MARK, len(content), hashlib.sha256(content).digest()))
        os.chmod(path, stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~_OTHERS_CAN_WRITE)
        file.flush()
        os.fsync(file.fileno())


def place(make: Callable[[Path], Path], target: Path) -> Path:
    """Let `make` build a file in the folder it is given, and put it at `target`: sealed, and whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_scratch_prefix(target)) as scratch:
        built = make(Path(scratch))
        _seal(built)
        os.replace(built, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return target


def _scratch_prefix(target: Path) -> str:
    return f"build-{target.stem}-"


@contextmanager
def only_builder(target: Path) -> Iterator[None]:
    """Wait for other processes that build the same file of the cache; the kernel frees the lock of one that dies.

    Raises:
        UntrustedPlace: others can write to the folder, or the lock is not this user's own file.
        OSError: the folder or the lock cannot be made.
    """
    # absent on Windows, where nothing is built
    import fcntl

    folder, path = target.parent, target.with_name(f"{target.name}.lock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    fault = _fault_of_folder(folder)
    if fault is not None:
        raise UntrustedPlace(f"nothing is built into {folder}: {fault}, or set HF_VTC_OPS_DIR to a folder of your own")
    # a FIFO that is opened for both directions does not wait either
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(lock)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise UntrustedPlace(f"{path} must be an ordinary file of this user; remove it")
        fcntl.flock(lock, fcntl.LOCK_EX)
        # what builders left that were killed: whoever holds the lock is the only one
        for left in folder.glob(f"{_scratch_prefix(target)}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(lock)
