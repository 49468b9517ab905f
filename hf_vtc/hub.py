"""Checkpoint folders that carry their own code: written whole, proven in a clean process, pushed as one commit."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from . import models  # noqa: F401  registers the installed classes that `check` compares with
from .auto import REMOTE_CODE_FROM_FOLDER

_TAGS = ("vtc", "vision-token-compression", "custom_code")
_AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "AutoImageProcessor",
)
_PROBE_FILE = "probe.safetensors"
# characters of the clean process's error output that are worth repeating
_ERROR_TAIL = 3000


def export(
    model: PreTrainedModel | str | os.PathLike,
    processor: ProcessorMixin | str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    *,
    card: ModelCard | str | os.PathLike | None = None,
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
            one, otherwise a card written from the config.
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
    if card is None:
        card = _card_beside(model)
    model, processor = _load(model, processor)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(folder) as partial:
        _write(model, processor, partial, card, title=folder.name)
        if check:
            _check(partial)
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
    check: bool = True,
) -> str:
    """Export to a temporary folder, create the repository if needed, and upload everything as one commit.

    Args:
        model, processor, card, check: as for `export`; `push(path, repo_id)` is the short form.
        repo_id (`str`): `"name"` or `"organisation/name"` on the Hub.
        private (`bool`, *optional*): visibility of a new repository; None leaves it to the organisation's default.
        revision (`str`, *optional*): branch to commit to, created if it does not exist. Default: the main branch.
        commit_message (`str`): first line of the commit.
        token (`str` or `bool`, *optional*): access token; None uses the stored one.

    Returns:
        Address of the repository's files at the new commit.

    Raises:
        As `export`, and the errors of huggingface_hub for what the network or the rights forbid.
    """
    model, processor, repo_id = _arguments_of(model, processor, repo_id)
    with tempfile.TemporaryDirectory(prefix="hf_vtc_push_") as scratch:
        folder = export(model, processor, Path(scratch) / str(repo_id).split("/")[-1], card=card, check=check)
        api = HfApi(token=token)
        repository = api.create_repo(str(repo_id), private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return f"{repository}/tree/{commit.oid}"


def check(folder: str | os.PathLike) -> None:
    """Prove that a folder is complete: without hf_vtc its own code computes what the installed classes compute.

    A new process, in which hf_vtc cannot be imported and the Hub is offline, loads model and processor with
    `trust_remote_code=True`, encodes a fixed prompt with two images and computes logits for the budgets `"auto"` and
    `"full"`. Inputs and logits must be equal bit for bit. Both sides run on the CPU.

    Raises:
        RuntimeError: something is missing, does not load, or differs; the message says what.
    """
    folder = Path(folder)
    if not REMOTE_CODE_FROM_FOLDER:
        raise RuntimeError(
            "Remote code from a local folder needs transformers >= 5.11 (from the Hub, older ones load it too). "
            "Upgrade transformers, or pass `check=False`."
        )
    _require_complete(folder)
    with tempfile.TemporaryDirectory(prefix="hf_vtc_check_") as scratch:
        remote = _probe_in_clean_process(folder, Path(scratch))
        installed = _probe(str(folder), trust_remote_code=False)
    for name, expected in installed.items():
        if name not in remote:
            raise RuntimeError(f"The code in {folder} gives no {name!r}, the installed hf_vtc does. Export it again.")
        if not torch.equal(remote[name], expected):
            raise RuntimeError(
                f"The code in {folder} and the installed hf_vtc give different {name!r} for the same input. The "
                "folder holds other code than this version: export it again."
            )


# `export` has an argument of that name
_check = check


def _probe(folder: str, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Inputs and logits of a fixed prompt with two images; its source also runs alone, so it imports for itself."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype="auto", output_loading_info=True
    )
    absent = sorted(loading["missing_keys"]) + sorted(loading["mismatched_keys"])
    if absent:
        raise RuntimeError(f"The weights of {folder} lack {len(absent)} tensors of the model: {absent[:5]}.")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)

    # squares, since they give the fewest tiles; a pattern that needs no random generator
    pixels = bytes(index * index // 97 % 256 for index in range(64 * 64 * 3))
    images = [Image.frombytes("RGB", (64, 64), pixels), Image.frombytes("RGB", (64, 64), pixels[::-1])]
    text = f"{processor.image_token}\n{processor.image_token}\nWhat is different?"
    inputs = processor(images=images, text=[text], return_tensors="pt").to(model.dtype)
    results = {name: value.contiguous() for name, value in inputs.items()}
    for budget in ("auto", "full"):
        with torch.no_grad():
            results[f"logits of budget {budget}"] = model(**inputs, vtc_budget=budget).logits.contiguous()
    return results


def _probe_in_clean_process(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    script = "\n".join(
        (
            "import sys",
            'sys.modules["hf_vtc"] = None',
            "import torch",
            "from safetensors.torch import save_file",
            f"torch.set_num_threads({torch.get_num_threads()})",
            inspect.getsource(_probe),
            f"save_file(_probe({str(folder.absolute())!r}, trust_remote_code=True), {_PROBE_FILE!r})",
        )
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"{folder} does not work in a process without hf_vtc (exit status {result.returncode}). Its error output "
            f"ends with:\n{result.stderr[-_ERROR_TAIL:]}"
        )
    return load_file(scratch / _PROBE_FILE)


def _require_complete(folder: Path) -> None:
    """Raise a RuntimeError unless weights are there and `auto_map` names an existing file for every auto class."""
    auto_map = {}
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        auto_map.update(_auto_map_in(folder / name))
    missing = [key for key in _AUTO_CLASSES if key not in auto_map]
    if missing:
        raise RuntimeError(
            f"`auto_map` of {folder} lacks {missing}. Save model and processor with `save_code=True`, or use "
            "`hf_vtc.hub.export`."
        )
    files = {f"{auto_map[key].split('.')[0]}.py" for key in _AUTO_CLASSES}
    absent = sorted(name for name in files if not (folder / name).is_file())
    if absent:
        raise RuntimeError(f"`auto_map` of {folder} names files that are not there: {absent}. Export it again.")
    if not any(folder.glob("*.safetensors")):
        raise RuntimeError(f"{folder} holds no safetensors weights. Export it again.")


def _auto_map_in(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    # transformers 5 nests the image processor inside of the processor's file
    nested = values.get("image_processor", {})
    return {**values.get("auto_map", {}), **nested.get("auto_map", {})}


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


def _write(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, card, title: str) -> None:
    model.save_pretrained(folder, save_code=True)
    processor.save_pretrained(folder, save_code=True)
    (folder / "README.md").write_text(str(_complete_card(card, model, title)), encoding="utf-8")


def _card_beside(model) -> Path | None:
    if isinstance(model, str | os.PathLike) and (Path(model) / "README.md").is_file():
        return Path(model) / "README.md"
    return None


def _complete_card(card: ModelCard | str | os.PathLike | None, model: PreTrainedModel, title: str) -> ModelCard:
    """The given card, or a new one, with the metadata that the Hub needs."""
    if card is None:
        card = _card_text(model, title)
    elif isinstance(card, os.PathLike) or (isinstance(card, str) and "\n" not in card):
        card = Path(card).read_text(encoding="utf-8")
    card = ModelCard(str(card))
    card.data.library_name = card.data.library_name or "transformers"
    card.data.pipeline_tag = card.data.pipeline_tag or "image-text-to-text"
    method = model.config.model_type.removeprefix("vtc_")
    card.data.tags = list(dict.fromkeys((*(card.data.tags or ()), *_TAGS, method)))
    return card


def _card_text(model: PreTrainedModel, title: str) -> str:
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
library_name: transformers
---

# {title}

A vision-language model with vision-token compression (`{config.model_type}`) and {parameters / 1e6:,.1f} million
parameters: up to {config.image_seq_length} visual tokens per tile, fewer where the model or the caller decides so.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{title}"  # this repository, or a folder that holds its files
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
image = {{"type": "image", "url": "page.png"}}
messages = [{{"role": "user", "content": [image, {{"type": "text", "text": "What is shown?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=32, vtc_budget="auto")
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

`vtc_budget` is `"auto"` (the method's own decision), `"full"` (no compression), a share of the reserved tokens such as
`0.5`, or the largest number of visual tokens per image. The code that runs is in this repository; the same code, with
training, LoRA and measurements, is the Python package `hf_vtc`.
"""
