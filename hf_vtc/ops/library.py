"""Find, build once and load the compiled kernels of a kind of device."""

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from .compiler import build, require_tools
from .files import OpsUnavailable, cache_folder, fault_of, only_builder, place
from .recipe import Recipe, default_recipe

logger = logging.getLogger("hf_vtc.ops")

MODES = ("auto", "off", "prebuilt", "require")
PREBUILT = Path(__file__).parent / "_lib"


def mode() -> str:
    """What `HF_VTC_OPS` asks for.

    Raises:
        ValueError: it is none of `MODES`.
    """
    chosen = os.environ.get("HF_VTC_OPS") or "auto"
    if chosen not in MODES:
        raise ValueError(f"HF_VTC_OPS must be one of {', '.join(MODES)}, got {chosen!r}. Unset it for `auto`.")
    return chosen


def recipe_for(kind: str) -> Recipe:
    """What to build for the devices of this machine."""
    if kind == "cpu":
        return Recipe("cpu")
    devices = range(torch.cuda.device_count())
    found = {"".join(map(str, torch.cuda.get_device_capability(device))) for device in devices}
    return Recipe("cuda", tuple(sorted(found, key=int)))


def find_built(recipe: Recipe) -> Path | None:
    """A built file of these very sources that may run: one that came with the package, else one in the cache.

    One that is damaged, or that others could have written, is passed over, and a warning in the log names it.
    """
    # it was built elsewhere, perhaps by another compiler
    shipped = sorted(PREBUILT.glob(f"hf_vtc_{recipe.kind}-{recipe.source_hash}-*.so"))
    # the builder's own default is more architectures than this machine has
    cached = [cache_folder() / each.file_name for each in (recipe, default_recipe(recipe.kind))]
    for path in dict.fromkeys((*shipped, *cached)):
        if not os.path.lexists(path):
            continue
        fault = fault_of(path)
        if fault is None:
            return path
        logger.warning("The built file %s is not used: %s.", path, fault)
    return None


def build_once(recipe: Recipe) -> Path:
    """The built file in the cache, made if it is not there or may not run; processes that ask at once build it once.

    Raises:
        OpsUnavailable: this machine has no compiler for it.
        OSError: the cache cannot be written.
        RuntimeError: the compiler failed, and the message holds what it said; or others can write to the cache.
    """
    require_tools(recipe)
    target = cache_folder() / recipe.file_name
    with only_builder(target):
        if not os.path.lexists(target) or fault_of(target) is not None:
            logger.warning(
                "Building hf_vtc's compiled ops for %s, once for this machine; it takes some seconds. HF_VTC_OPS=off "
                "or =prebuilt prevents it.",
                recipe.kind,
            )
            place(partial(build, recipe), target)
    return target


def _obtain(kind: str, may_build: bool) -> Path:
    recipe = recipe_for(kind)
    built = find_built(recipe)
    if built is not None:
        return built
    if not may_build or mode() == "prebuilt":
        raise OpsUnavailable(
            "no built file that may run was found, and none may be built here (`python -m hf_vtc.ops.build` does)"
        )
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
