"""Find, build once and load the compiled kernels of a kind of device."""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .recipe import Recipe, default_recipe

logger = logging.getLogger("hf_vtc.ops")

MODES = ("auto", "off", "prebuilt", "require")
PREBUILT = Path(__file__).parent / "_lib"


class OpsUnavailable(Exception):
    """There is no built file and none can be made, which is no fault: the message says what is missing."""


def mode() -> str:
    """What `HF_VTC_OPS` asks for.

    Raises:
        ValueError: it is none of `MODES`.
    """
    chosen = os.environ.get("HF_VTC_OPS") or "auto"
    if chosen not in MODES:
        raise ValueError(f"HF_VTC_OPS must be one of {', '.join(MODES)}, got {chosen!r}. Unset it for `auto`.")
    return chosen


def cache_folder() -> Path:
    """Where built files lie: `HF_VTC_OPS_DIR`, else `hf_vtc/ops` in the user's cache."""
    own = os.environ.get("HF_VTC_OPS_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_vtc" / "ops"


def recipe_for(kind: str) -> Recipe:
    """What to build for the devices of this machine."""
    if kind == "cpu":
        return Recipe("cpu")
    devices = range(torch.cuda.device_count())
    found = {"".join(map(str, torch.cuda.get_device_capability(device))) for device in devices}
    return Recipe("cuda", tuple(sorted(found, key=int)))


def find_built(recipe: Recipe) -> Path | None:
    """A built file of these very sources: one that came with the package, else one in the cache."""
    # it was built elsewhere, perhaps by another compiler
    shipped = sorted(PREBUILT.glob(f"hf_vtc_{recipe.kind}-{recipe.source_hash}-*.so"))
    # the builder's own default is more architectures than this machine has
    cached = [cache_folder() / each.file_name for each in (recipe, default_recipe(recipe.kind))]
    return next((path for path in (*shipped, *cached) if path.is_file()), None)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for other processes that build the same file; the kernel frees the lock of one that dies."""
    # absent on Windows, where nothing is built
    import fcntl

    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_once(recipe: Recipe) -> Path:
    """The built file in the cache, made if it is not there; processes that ask at once build it once.

    Raises:
        OpsUnavailable: this machine has no compiler for it.
        OSError: the cache cannot be written.
        RuntimeError: the compiler failed; the message holds what it said.
    """
    from .build import build, require_tools

    require_tools(recipe)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / recipe.file_name
    with _locked(folder / f"{recipe.file_name}.lock"):
        if not target.is_file():
            logger.warning(
                "Building hf_vtc's compiled ops for %s, once for this machine; it takes some seconds. HF_VTC_OPS=off "
                "or =prebuilt prevents it.",
                recipe.kind,
            )
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
                built = build(recipe, Path(scratch))
                # a reader sees the whole file or none
                os.replace(built, target)
    return target


def _obtain(kind: str, may_build: bool) -> Path:
    recipe = recipe_for(kind)
    built = find_built(recipe)
    if built is not None:
        return built
    if not may_build or mode() == "prebuilt":
        raise OpsUnavailable("no built file was found, and none may be built here (`python -m hf_vtc.ops.build` does)")
    if sys.platform != "linux":
        raise OpsUnavailable(f"they are built on Linux only, not on {sys.platform}")
    return build_once(recipe)


def load(kind: str, may_build: bool = True) -> Path | None:
    """Load the kernels for a kind of device into this process; one log line says which path runs.

    Args:
        kind (`str`): `"cpu"` or `"cuda"`.
        may_build (`bool`): whether a compiler may be started, if `HF_VTC_OPS` allows it.

    Returns:
        The file that was loaded, or None where the reference runs.

    Raises:
        RuntimeError: `HF_VTC_OPS=require`, and there is no such file.
    """
    chosen = mode()
    if chosen == "off":
        logger.info("hf_vtc ops on %s: plain PyTorch (HF_VTC_OPS=off)", kind)
        return None
    try:
        path = _obtain(kind, may_build)
        torch.ops.load_library(str(path))
    except (OpsUnavailable, OSError, RuntimeError) as error:
        if chosen == "require":
            raise RuntimeError(
                f"HF_VTC_OPS=require, but the compiled ops for {kind} cannot be had: {error}. Set HF_VTC_OPS=auto to "
                "run the reference instead."
            ) from error
        if isinstance(error, OpsUnavailable):
            logger.info("hf_vtc ops on %s: plain PyTorch, since %s", kind, error)
        else:
            warnings.warn(
                f"hf_vtc runs its ops for {kind} in plain PyTorch, since the compiled ones cannot be had: {error}. "
                "HF_VTC_OPS=off silences this.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    logger.info("hf_vtc ops on %s: compiled, %s", kind, path)
    return path
