"""Models and processors of hf_vtc from folders that nobody has vouched for.

A folder is looked at before transformers reads it: links and pipes, the index, and whether its settings ask for no
more than its weights. The installed classes load it; code that lies beside the weights is never run.
"""

import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..convert.plan import require_plausible
from ..convert.shards import CheckpointReader
from ..files import blaming, read_json, require_own_files
from ..methods import find_record


def load_model(path: str | os.PathLike, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """The model of a folder or a repository of the Hub, on the CPU.

    Raises:
        ValueError: it is no model of hf_vtc, or not fit to be read, or weights are missing.
        OSError: there is none.
    """
    if Path(path).is_dir():
        require_own_files(Path(path))
    with blaming(path):
        _require_model_of_ours(path)
        if Path(path).is_dir():
            _require_weights_for(path)
            if (Path(path) / "generation_config.json").is_file():
                # transformers goes on without one that it cannot read, and what it says is lost
                GenerationConfig.from_dict(read_json(Path(path) / "generation_config.json"))
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    absent = sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])])
    if absent:
        raise ValueError(
            f"The weights of {os.fspath(path)} lack {len(absent)} tensors of the model, or have them in another "
            f"shape: {', '.join(absent[:5])}. Download them again."
        )
    return model


def load_processor(path: str | os.PathLike) -> ProcessorMixin:
    """The processor of a folder or a repository of the Hub.

    Raises:
        ValueError: its files are not fit to be read.
        OSError: there is none.
    """
    if Path(path).is_dir():
        require_own_files(Path(path))
    with blaming(path):
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)


def _require_model_of_ours(path: str | os.PathLike) -> None:
    config, _ = PretrainedConfig.get_config_dict(path)
    if find_record(config) is None:
        raise ValueError(
            f"`model` must be one of hf_vtc, got model type {config.get('model_type')!r}. Convert an official "
            "checkpoint first: `hf_vtc.convert.load_official`."
        )


def _require_weights_for(folder: str | os.PathLike) -> None:
    """Refuse settings that ask for more than there is: transformers would make it up, however large."""
    stored = CheckpointReader(Path(folder)).tensors
    config, _ = PretrainedConfig.get_config_dict(folder)
    require_plausible(config, len(stored), folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    tied = set(skeleton._tied_weights_keys) if config.tie_word_embeddings else set()
    asked = sum(tensor.numel() for name, tensor in skeleton.named_parameters() if name not in tied)
    found = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
    if asked > found:
        raise ValueError(
            f"config.json of {os.fspath(folder)} asks for {asked:,} parameters, but the weights hold {found:,}. Check "
            "that both belong together."
        )
