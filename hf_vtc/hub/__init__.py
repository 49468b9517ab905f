"""Checkpoint folders that carry their own code: written whole, proven in a clean process, pushed as one commit."""

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedModel, ProcessorMixin

from ..convert.shards import num_bytes
from ..files import blaming, replacing_folder
from ..methods import find_record
from . import proof
from .card import card_beside, complete_card
from .proof import check
from .source import load_model, load_processor
from .upload import full_name, require_writable, upload

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

    The code is always that of the installed hf_vtc: exporting a folder that an older one has exported refreshes it.
    Code that lies in a source folder is not run, and no link out of it is followed.

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
        overwrite (`bool`): whether to replace a model folder that is there already. A folder that holds anything
            that no export writes is never replaced.

    Returns:
        The path of `folder`.

    Raises:
        FileExistsError: `folder` is not empty and `overwrite` is False, or it holds something that no export writes,
            or it has appeared meanwhile.
        ValueError: `model` is not a model of hf_vtc or not fit to be read, or no processor is given.
        RuntimeError: the folder does not pass `check`.
    """
    model, processor, folder = _arguments_of(model, processor, folder)
    folder, max_shard_size = Path(folder).absolute(), num_bytes(max_shard_size)
    with replacing_folder(folder, overwrite) as partial:
        from_files = blaming(model) if isinstance(model, str | os.PathLike) else nullcontext()
        model, processor, card = _resolved(model, processor, card, folder.name, base_model, license)
        with from_files:
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
        ValueError: as `export`; or `repo_id` is no name, or the token may not write there, or `private` is True and
            the repository is public. All that is found out before anything is loaded.
        huggingface_hub.errors.HfHubHTTPError: the network or the rights forbid it, or somebody else has committed
            meanwhile. The branch is then as it was.
    """
    model, processor, repo_id = _arguments_of(model, processor, repo_id)
    max_shard_size = num_bytes(max_shard_size)
    api = HfApi(token=token)
    repo_id = full_name(api, str(repo_id))
    # before minutes go into loading and proving
    require_writable(api, repo_id, private)
    model, processor, card = _resolved(model, processor, card, repo_id, base_model, license)
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
    if find_record(source.config) is None:
        raise ValueError(
            f"`model` must be one of hf_vtc, got model type {source.config.model_type!r}. Make one with "
            "`hf_vtc.convert.from_base` or `hf_vtc.convert.load_official`."
        )
    if processor is None:
        raise ValueError("`processor` is needed beside a loaded model. Pass a `VtcProcessor`, or the path of one.")
    return source, processor, target


def _resolved(model, processor, card, title, base_model, license) -> tuple[PreTrainedModel, ProcessorMixin, ModelCard]:
    """Model, processor and card, from wherever they come."""
    beside = model
    if isinstance(model, str | os.PathLike):
        model = load_model(model)
    if isinstance(processor, str | os.PathLike):
        processor = load_processor(processor)
    card = card_beside(beside) if card is None else card
    return model, processor, complete_card(card, model, processor, title, base_model, license)


def _write(
    model: PreTrainedModel, processor: ProcessorMixin, folder: Path, card: ModelCard, max_shard_size: int | str
) -> None:
    model.save_pretrained(folder, save_code=True, max_shard_size=max_shard_size)
    processor.save_pretrained(folder, save_code=True)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
