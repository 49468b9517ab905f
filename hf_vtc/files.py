"""Folders and small files that nobody has vouched for: read without following them anywhere, replaced as a whole."""

import ctypes
import errno
import json
import logging
import os
import shutil
import stat
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    # Windows: what a killed run left behind is not told from what a running one builds, and stays
    fcntl = None

__all__ = ["blaming", "locked", "read_json", "read_text", "replacing_folder", "require_own_files"]

logger = logging.getLogger(__name__)

# far above what any tokenizer or index has
_MOST_TEXT_BYTES = 256 * 2**20
# what `convert` and `export` write; anything else in a folder is somebody's, and the folder is not replaced
_WRITTEN = (
    "README.md",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*_vtc.py",
    "configuration_*.py",
    "modeling_*.py",
)
# the only folder in a model's folder that transformers writes to, and reads
_TEMPLATES = "additional_chat_templates"
_BUILD_PREFIX = ".vtc_build_"
# flags of `renameat2`
_ONTO_NOTHING, _EXCHANGE = 1, 2
_AT_FDCWD = -100


def read_text(file: Path) -> str:
    """Read an ordinary file of UTF-8 text.

    Raises:
        ValueError: it is a pipe, a device or a folder, which would be waited for, too large, or no UTF-8.
        FileNotFoundError: it does not exist.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} must be an ordinary file, but is {_kind_of(mode)}. Replace it by a file.")
    with file.open("rb") as stream:
        content = stream.read(_MOST_TEXT_BYTES + 1)
    if len(content) > _MOST_TEXT_BYTES:
        raise ValueError(f"{file} has more than {_MOST_TEXT_BYTES // 2**20} MiB, too much for text. Replace it.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid UTF-8 ({error}). Download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file holds something else, or is none.
        FileNotFoundError: it does not exist.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
    # numbers of thousands of digits are a ValueError of their own, nesting without end a RecursionError
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def require_own_files(folder: Path) -> None:
    """Refuse a model's folder that makes its readers look elsewhere, or wait.

    Links may stay inside of the folder, or be those of a snapshot in the cache of the Hub.

    Raises:
        ValueError: a link leads out of the folder, or an entry is a pipe, a device or a socket.
        FileNotFoundError: there is no such folder.
    """
    root = folder.resolve()
    templates = folder / _TEMPLATES
    inside = sorted(templates.iterdir()) if templates.is_dir() and not templates.is_symlink() else []
    for path in [*sorted(folder.iterdir()), *inside]:
        if path.is_symlink() and not _stays_in(path, root):
            raise ValueError(
                f"{path} is a link that leads out of its folder, to {os.readlink(path)!r}, and is not followed. Put "
                "the file itself there."
            )
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path} must be an ordinary file, but is {_kind_of(mode)}. Remove it.")


@contextmanager
def blaming(folder: str | os.PathLike) -> Iterator[None]:
    """Name the folder whose settings fail deep inside of a library, which they do with errors of every kind.

    Raises:
        ValueError: in place of an error that does not speak to users.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and _comes_from_here(error):
            raise
        raise ValueError(
            f"The files of {os.fspath(folder)} cannot be those of a model ({type(error).__name__}: {error}). Check "
            "config.json and the files beside it, or download them again."
        ) from error


@contextmanager
def replacing_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder that becomes `folder` when the block succeeds and vanishes when it does not.

    What is there already is replaced in one step, after success only, and only if it could have been written by
    `convert` or `export`. What a killed run has left beside `folder` is removed by the next one.

    Args:
        folder (`Path`): the destination. Missing parents are created.
        overwrite (`bool`): replace an existing model folder.

    Raises:
        FileExistsError: `folder` is not empty and `overwrite` is False, or it holds something that is no part of a
            model, or it has appeared meanwhile.
    """
    was_there = _require_replaceable(folder, overwrite)
    created = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _build_folder(folder.parent) as build:
            partial = build / "new"
            partial.mkdir()
            yield partial
            if overwrite and folder.exists():
                _replace(partial, folder)
            else:
                _move(partial, folder, onto_empty=was_there)
    finally:
        if not folder.exists():
            for parent in created:
                with suppress(OSError):
                    parent.rmdir()


def _comes_from_here(error: Exception) -> bool:
    """Whether code of this package has raised an error, so that its message names rule, value and remedy."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__")).partition(".")[0] == __name__.partition(".")[0]


def _kind_of(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISDIR: "a folder", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")


def _stays_in(link: Path, root: Path) -> bool:
    target = link.resolve()
    if target.is_relative_to(root):
        return True
    # models--owner--name/snapshots/<commit>/file -> ../../blobs/<digest>
    blobs = root.parent.parent / "blobs"
    return root.parent.name == "snapshots" and target.parent == blobs and not blobs.is_symlink()


def _require_replaceable(folder: Path, overwrite: bool) -> bool:
    """Whether a folder is there, which then may be replaced."""
    if not folder.exists() and not folder.is_symlink():
        return False
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder, so it is left alone. Choose another destination.")
    if not any(folder.iterdir()):
        return True
    if not overwrite:
        raise FileExistsError(f"{folder} exists already. Choose another one, or pass `overwrite=True` to replace it.")
    if not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} has no `config.json`, so it is no model folder and is left alone.")
    _require_written(folder, folder)
    return True


def _require_written(content: Path, folder: Path) -> None:
    """Raise a `FileExistsError` if `content`, which is or was `folder`, has what no conversion or export writes."""
    foreign = sorted(path.name for path in content.iterdir() if not _is_written(path))
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise FileExistsError(
            f"{folder} holds {', '.join(foreign[:5])}{more}, which is no part of a model that hf_vtc writes and would "
            "be lost, so the folder is left alone. Move that elsewhere, or choose another destination."
        )


def _is_written(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.name == _TEMPLATES and path.is_dir():
        return all(file.suffix == ".jinja" and file.is_file() and not file.is_symlink() for file in path.iterdir())
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _WRITTEN)


@contextmanager
def _build_folder(parent: Path) -> Iterator[Path]:
    """An empty folder beside the destination, since a rename to another file system would be a copy.

    It is locked while it is in use, so that others see whether a run still builds in it.
    """
    for abandoned in parent.glob(f"{_BUILD_PREFIX}*"):
        _remove_if_abandoned(abandoned)
    while True:
        build = Path(tempfile.mkdtemp(prefix=_BUILD_PREFIX, dir=parent))
        with locked(build, wait=True):
            if not build.exists():
                # taken for abandoned before it was locked
                continue
            try:
                yield build
            finally:
                shutil.rmtree(build, ignore_errors=True)
            return


def _remove_if_abandoned(build: Path) -> None:
    if fcntl is None or build.is_symlink() or not build.is_dir():
        return
    with suppress(OSError), locked(build, wait=False):
        shutil.rmtree(build, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process at the latest.

    Raises:
        OSError: somebody else holds it, and `wait` is False; or this file system has no locks.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            # who builds can do without, since nobody can take the lock from it then
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


def _move(partial: Path, folder: Path, onto_empty: bool) -> None:
    """Put a folder where nothing is, or only the empty folder that was there from the beginning."""
    try:
        if onto_empty:
            partial.rename(folder)
        elif not _renamed(partial, folder, _ONTO_NOTHING):
            # claims the name, which a rename would take from an empty folder
            folder.mkdir()
            partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(
            f"{folder} has appeared meanwhile and is left alone. Choose another destination, or pass "
            "`overwrite=True` to replace it."
        ) from error


def _replace(partial: Path, folder: Path) -> None:
    """Put a folder where a model's folder is, and remove that."""
    _require_replaceable(folder, overwrite=True)
    if _renamed(partial, folder, _EXCHANGE):
        previous = partial
    else:
        # under a name that everybody finds, should the process end between the two steps
        previous = Path(tempfile.mkdtemp(prefix=f"{folder.name}.previous_", dir=folder.parent))
        folder.rename(previous)
        try:
            partial.rename(folder)
        except BaseException:
            previous.rename(folder)
            raise
    try:
        _require_written(previous, folder)
    except FileExistsError:
        # something was put there after the last look
        kept = Path(tempfile.mkdtemp(prefix=f"{folder.name}.previous_", dir=folder.parent))
        previous.rename(kept)
        logger.warning("What %s held is kept in %s.", folder, kept)
        return
    shutil.rmtree(previous, ignore_errors=True)


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """Rename by `renameat2`, in one step; False where the system or the file system does not offer it.

    Raises:
        FileExistsError: `flag` is `_ONTO_NOTHING` and there is something.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        # another system than Linux, or an old one
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(target))
