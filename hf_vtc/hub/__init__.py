"""Checkpoint folders that carry their own code: written whole, proven in a clean process, pushed as one commit."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from . import proof
from .card import card_beside, complete_card
from .proof import check
from .upload import full_name, upload

__all__ = ["check", "export", "push"]

# of one file of weights: a download that breaks then costs little
_MAX_SHARD_SIZE = "5GB"


def export(
    model: PreTrainedModel | str | os.PathLike,
    processor: ProcessorMixin | str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    *,
    card: ModelCard | str | os.PathLike | None = None,
    base_model: str | None = None,
    license: str | None = None,
    max_shard_size: int | str = _MAX_SHARD_SIZE,
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a folder that loads with `trust_remote_code=True` where hf_vtc is not installed.

    It holds safetensors weights, config with `auto_map`, processor files, the source files that these need, and a
    model card. It is built beside its destination and moved there last: after an error nothing has changed.

    Args:
        model: the model, or the path or repository it is loaded from; `export(path, folder)` is the short form of
            `export(path, None, folder)`.
        processor: its processor; None loads it from where the model comes from.
        folder: destination.
        card: a `ModelCard`, its text, or its path (a string without a line break is a path). Text and metadata are
            kept, absent metadata added. Default: the `README.md` beside the weights if `model` is a folder that has
            one, otherwise a card written from the config, with a table of what compression can save.
        base_model (`str`, *optional*): repository that the weights come from, such as `"liuhaotian/llava-v1.5-7b"`;
            replaces what the card says.
        license (`str`, *optional*): identifier of the weights' licence, as the Hub lists them; replaces what the card
            says. The code is under Apache-2.0 in any case.
        max_shard_size (`int` or `str`): bytes of one file of weights, also as `"2GB"` or `"500MB"`.
        check (`bool`): whether to prove the folder with `check` before it appears.
        overwrite (`bool`): whether to replace a model folder that is there already.

    Returns:
        The path of `folder`.

    Raises:
        FileExistsError: `folder` is not empty and `overwrite` is False, or it does not look like a model folder.
        ValueError: `model` is not a model of hf_vtc, or no processor is given.
        RuntimeError: the folder does not pass `check`.
    """
    model, processor, folder = _arguments_of(model, processor, folder)
    folder = Path(folder).absolute()
    _require_free(folder, overwrite)
    card = card_beside(model) if card is None else card
    model, processor = _load(model, processor)
    card = complete_card(card, model, processor, folder.name, base_model, license)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(folder) as partial:
        _write(model, processor, partial, card, max_shard_size)
        if check:
            proof.check(partial)
    return folder


def push(
    model: PreTrainedModel | str | os.PathLike,
    processor: ProcessorMixin | str | os.PathLike | None = None,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model, processor and code",
    token: str | bool | None = None,
    card: ModelCard | str | os.PathLike | None = None,
    base_model: str | None = None,
    license: str | None = None,
    max_shard_size: int | str = _MAX_SHARD_SIZE,
    check: bool = True,
) -> str:
    """Export to a temporary folder, create the repository if needed, and upload everything as one commit.

    Files of an earlier upload that loading would read beside the new ones (other shards, an adapter, another
    tokenizer) are removed in the same commit; what else the repository holds stays.

    Args:
        model, processor, card, base_model, license, max_shard_size, check: as for `export`; `push(path, repo_id)` is
            the short form. The temporary folder needs room for the weights; `TMPDIR` says where it is.
        repo_id (`str`): `"name"` or `"organisation/name"` on the Hub.
        private (`bool`, *optional*): visibility of a new repository; None leaves it to the organisation's default.
            True also refuses to write to a repository that is public.
        revision (`str`, *optional*): branch to commit to, made from the main branch if it does not exist. Default:
            the main branch.
        commit_message (`str`): first line of the commit.
        token (`str` or `bool`, *optional*): access token; None uses the stored one.

    Returns:
        Address of the repository's files at the new commit. Its last part is what `revision` of `from_pretrained`
        takes to get exactly this upload.

    Raises:
        ValueError: as `export`; or `repo_id` is no name, or `private` is True and the repository is public.
        huggingface_hub.errors.HfHubHTTPError: the network or the rights forbid it, or somebody else has committed
            meanwhile. The branch is then as it was.
    """
    model, processor, repo_id = _arguments_of(model, processor, repo_id)
    api = HfApi(token=token)
    repo_id = full_name(api, str(repo_id))
    card = card_beside(model) if card is None else card
    model, processor = _load(model, processor)
    card = complete_card(card, model, processor, repo_id, base_model, license)
    with tempfile.TemporaryDirectory(prefix="hf_vtc_push_") as scratch:
        folder = export(
            model,
            processor,
            Path(scratch) / repo_id.split("/")[-1],
            card=card,
            max_shard_size=max_shard_size,
            check=check,
        )
        return upload(api, folder, repo_id, private, revision, commit_message)


def _arguments_of(source, processor, target):
    """Resolve the short form `(path, target)` and refuse what cannot be exported."""
    if target is None:
        processor, target = None, processor
    if not isinstance(target, str | os.PathLike):
        raise ValueError(
            f"The destination must be a path or the name of a repository, got {type(target).__name__}. Call it with "
            "`(model, processor, destination)` or, to load both from one place, `(path, destination)`."
        )
    if isinstance(source, str | os.PathLike):
        return source, source if processor is None else processor, target
    if not isinstance(source, PreTrainedModel):
        raise ValueError(
            f"`model` must be a transformers model or a path, got {type(source).__name__}. Merge an adapter first: "
            "`model = model.merge_and_unload()`."
        )
    if not source.config.model_type.startswith("vtc_"):
        raise ValueError(
            f"`model` must be one of hf_vtc, got model type {source.config.model_type!r}. Make one with "
            "`hf_vtc.convert.from_base` or `hf_vtc.convert.load_official`."
        )
    if processor is None:
        raise ValueError("`processor` is needed beside a loaded model. Pass a `VtcProcessor`, or the path of one.")
    return source, processor, target


def _load(model, processor) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load what was given as a path with the installed classes, whose code is what gets written."""
    if isinstance(model, str | os.PathLike):
        model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        if not model.config.model_type.startswith("vtc_"):
            raise ValueError(
                f"`model` must be one of hf_vtc, got model type {model.config.model_type!r}. Convert an official "
                "checkpoint first: `hf_vtc.convert.load_official`."
            )
    if isinstance(processor, str | os.PathLike):
        processor = AutoProcessor.from_pretrained(processor)
    return model, processor


def _require_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is there already. Pass `overwrite=True` to replace it.")
    if not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} has no `config.json`, so it is no model folder and is left alone.")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` if the block succeeds and vanishes if it does not."""
    # beside the destination, since a rename to another file system would be a copy
    scratch = Path(tempfile.mkdtemp(prefix="vtc_export_", dir=folder.parent))
    partial, previous = scratch / "new", scratch / "previous"
    try:
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(previous)
        try:
            partial.rename(folder)
        except OSError:
            if previous.exists():
                previous.rename(folder)
            raise
    finally:
        # a previous folder that could not be put back is the only copy
        if folder.exists() or not previous.exists():
            shutil.rmtree(scratch, ignore_errors=True)


def _write(
    model: PreTrainedModel, processor: ProcessorMixin, folder: Path, card: ModelCard, max_shard_size: int | str
) -> None:
    model.save_pretrained(folder, save_code=True, max_shard_size=max_shard_size)
    processor.save_pretrained(folder, save_code=True)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
