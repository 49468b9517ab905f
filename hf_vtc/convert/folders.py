"""Where a checkpoint and its tower lie: folders here, or repositories on the Hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

# what a conversion reads of a repository on the Hub: small files, and the first kind of weights that there is
_HUB_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_HUB_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def local_folder(folder: str | os.PathLike, with_weights: bool = True) -> Path:
    """A folder as it is, or what a conversion needs of a repository on the Hub.

    Args:
        folder (`str` or `os.PathLike`): a folder, or `"owner/name"` of a repository.
        with_weights (`bool`): False for its small files alone, if it must be fetched.

    Raises:
        FileNotFoundError: it is neither here nor on the Hub.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file. Give the folder that holds config.json and the weights.")
    if len(path.parts) != 2 or path.is_absolute():
        raise FileNotFoundError(f"{path} does not exist. Give a checkpoint folder, or 'owner/name' of the Hub.")
    try:
        for weights in _HUB_WEIGHTS if with_weights else ("*.json",):
            snapshot = Path(snapshot_download(os.fspath(folder), allow_patterns=[*_HUB_SMALL_FILES, weights]))
            if any(snapshot.glob(weights)):
                break
        return snapshot
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{path} is no folder here, and the Hub did not deliver it ({type(error).__name__}: {error}). Check the "
            "path."
        ) from error


def tower_folder(name: str, folder: Path, given: str | os.PathLike | None, has_tower: bool) -> Path:
    """The folder of a tower of its own.

    Args:
        name (`str`): what `config.json` of the checkpoint calls it.
        folder (`Path`): of the checkpoint.
        given (`str` or `os.PathLike`, *optional*): folder or repository that the caller names instead.
        has_tower (`bool`): whether the weights of the tower are part of the checkpoint.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    if given is not None:
        return local_folder(given, with_weights=not has_tower)
    # a file from a stranger must not make us read anywhere: inside of its folder, beside it, or the Hub
    inside = folder / name
    if inside.is_dir() and inside.resolve().is_relative_to(folder.resolve()):
        return inside
    beside = folder.parent / Path(name).name
    if Path(name).name not in ("", "..") and beside.is_dir():
        return beside
    reason = "it is neither inside of the folder nor beside it."
    if not Path(name).is_absolute() and len(Path(name).parts) == 2 and ".." not in Path(name).parts:
        try:
            return local_folder(name, with_weights=not has_tower)
        except FileNotFoundError as error:
            reason = str(error)
    raise FileNotFoundError(
        f"config.json of {folder} names the vision tower {name!r}, which is needed: {reason} Give its folder or "
        "repository as `vision_tower` (`hf-vtc convert --vision-tower`)."
    )
