"""From published checkpoints to models of hf_vtc.

`load_official` gives a model in memory, `from_base` turns an uncompressed model into a compressing one, and `convert`
streams a folder into a folder without ever holding the model. A layout is one file of this package, with a `Layout`
that is one entry of `LAYOUTS`.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..files import blaming, replacing_folder
from .checkpoint import (
    LAYOUTS,
    build_model,
    check_overrides,
    open_checkpoint,
    refuse_base,
    refuse_tower,
    target_of,
)
from .plan import Source, fresh_tensors, match
from .shards import num_bytes
from .writing import ConversionReport, write_model

__all__ = ["LAYOUTS", "ConversionReport", "convert", "from_base", "load_official"]

logger = logging.get_logger(__name__)


def load_official(
    folder: str | os.PathLike,
    method: str | None = None,
    image_token_id: int | None = None,
    dtype: torch.dtype | str | None = None,
    vision_tower: str | os.PathLike | None = None,
) -> PreTrainedModel:
    """Load a checkpoint in a published layout as a model of hf_vtc, in eval mode, on the CPU.

    A base checkpoint gives a model whose new parts are freshly initialised (seed them by `torch.manual_seed`).

    Args:
        folder (`str` or `os.PathLike`): checkpoint folder, or the id of a repository on the Hub.
        method (`str`, *optional*): such as `"vico"`; needed only if the layout fits several.
        image_token_id (`int`, *optional*): id of the placeholder. Default: what the folder says; where an official
            LLaVA vocabulary has none, the next free id. It lies beyond the embeddings then, and no row is added: an
            image needs none, and a row of the head would take its share of every softmax.
        dtype (`torch.dtype` or `str`, *optional*): of the parameters. Default: as stored.
        vision_tower (`str` or `os.PathLike`, *optional*): folder or repository of a tower that is not part of the
            checkpoint. Default: what config.json names, inside of the folder, beside it or on the Hub.

    Raises:
        ValueError: the layout is unknown, the id of the placeholder is, or tensors are missing or do not fit.
        FileNotFoundError: the folder or a shard is missing.
    """
    dtype = _checked_dtype(dtype)
    checkpoint = open_checkpoint(folder, method, image_token_id, vision_tower)
    plan = checkpoint.plan({})
    for note in plan.notes:
        logger.warning("%s: %s", checkpoint.folder, note)
    return checkpoint.load(plan, dtype)


def from_base(
    model_or_path: PreTrainedModel | str | os.PathLike,
    method: str,
    *,
    image_token_id: int | None = None,
    dtype: torch.dtype | str | None = None,
    vision_tower: str | os.PathLike | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Turn an uncompressed model into one of `method`; what the base lacks is initialised, the rest is copied.

    With `vtc_budget="full"` the result computes exactly what the base computes. Nothing is shared with the base.

    Args:
        model_or_path (`PreTrainedModel`, `str` or `os.PathLike`): an InternVL, LLaVA, LLaVA-NeXT, LLaVA-OneVision,
            Qwen2.5-VL, Qwen3-VL or Qwen3.5 model of transformers, a checkpoint folder (of transformers or official),
            or the id of a repository on the Hub.
        method (`str`): such as `"vico"`.
        image_token_id (`int`, *optional*): id of the placeholder, where an official folder has no tokenizer.
        dtype (`torch.dtype` or `str`, *optional*): of the parameters. Default: that of the base.
        vision_tower (`str` or `os.PathLike`, *optional*): of a folder without its tower, as in `load_official`.
        **config_overrides: fields of the new config. For `"vico"`, `flash_mode` is False unless given, since a fresh
            router knows nothing.

    Returns:
        The model in eval mode, on the device of the base.

    Raises:
        ValueError: the base is compressed already, does not fit the method, or a field is unknown.
    """
    if isinstance(model_or_path, PreTrainedModel):
        refuse_tower(vision_tower, type(model_or_path).__name__)
        if dtype is None:
            dtype = model_or_path.dtype
        return _from_model(model_or_path, method, image_token_id, _checked_dtype(dtype), config_overrides)
    checkpoint = open_checkpoint(model_or_path, method, image_token_id, vision_tower)
    plan = checkpoint.plan(config_overrides)
    if not plan.is_base:
        raise ValueError(
            f"{checkpoint.folder} is compressed already ({plan.layout}). Use `load_official` for it, or give an "
            "uncompressed base."
        )
    return checkpoint.load(plan, _checked_dtype(dtype))


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    method: str | None = None,
    *,
    image_token_id: int | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "2GB",
    overwrite: bool = False,
    save_code: bool = True,
    vision_tower: str | os.PathLike | None = None,
    **config_overrides: Any,
) -> ConversionReport:
    """Convert a published checkpoint folder to a folder that `from_pretrained` loads.

    Shards are read and written one after the other, so that memory holds about one shard of the source, never the
    model; a written shard has at most `max_shard_size`, and never parts of two shards of the source. Everything is
    checked before the first weight is read. The destination appears at the end as a whole: a failure or an
    interruption leaves nothing behind, and an existing destination as it was.

    Args:
        src (`str` or `os.PathLike`): checkpoint folder, or the id of a repository on the Hub.
        dst (`str` or `os.PathLike`): folder to write.
        method (`str`, *optional*): such as `"vico"`; needed only if the layout fits several.
        image_token_id (`int`, *optional*): id of the placeholder, as in `load_official`.
        dtype (`torch.dtype` or `str`, *optional*): of the written floating tensors. Default: as stored.
        max_shard_size (`int` or `str`): bytes of one file, also as `"2GB"` or `"500MB"`.
        overwrite (`bool`): replace an existing model folder.
        save_code (`bool`): copy the model's source files beside the weights, for `trust_remote_code=True`.
        vision_tower (`str` or `os.PathLike`, *optional*): of a folder without its tower, as in `load_official`.
        **config_overrides: fields of the new config that replace those of the source.

    Returns:
        The report. Without a tokenizer in the source no processor is written, and its notes say so.

    Raises:
        FileExistsError: `dst` is not empty and `overwrite` is False, or it holds something that no conversion or
            export writes, or it has appeared meanwhile.
        FileNotFoundError: the source or a shard is missing.
        ValueError: layout, placeholder id, tensors or config fields, as in `load_official`.
    """
    dst = Path(dst).absolute()
    dtype, max_shard_size = _checked_dtype(dtype), num_bytes(max_shard_size)
    with replacing_folder(dst, overwrite) as partial:
        checkpoint = open_checkpoint(src, method, image_token_id, vision_tower)
        if dst.resolve() == checkpoint.folder.resolve():
            raise ValueError(f"`src` and `dst` are both {dst}. Choose another destination.")
        with blaming(checkpoint.folder):
            plan = checkpoint.plan(config_overrides)
            return write_model(checkpoint, plan, partial, dst, dtype, max_shard_size, save_code)


def _from_model(
    model: PreTrainedModel,
    method: str,
    image_token_id: int | None,
    dtype: torch.dtype,
    overrides: Mapping[str, Any],
) -> PreTrainedModel:
    config = model.config.to_dict()
    layout = next((layout for layout in LAYOUTS if layout.model_classes and layout.matches(config)), None)
    if layout is None or model.get_output_embeddings() is None:
        refuse_base(config["model_type"], type(model).__name__)
        classes = [name for each in LAYOUTS for name in each.model_classes]
        raise ValueError(
            f"The base must be one of {', '.join(classes)}, got {type(model).__name__}. Load it by "
            "`AutoModelForImageTextToText`."
        )
    state = model.state_dict()
    method, target = target_of(layout.methods(config, state), type(model).__name__, method, config.get("model_type"))
    check_overrides(overrides, target.config)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    token_id = layout.stored_image_token_id(config) if image_token_id is None else image_token_id
    source = Source(
        config,
        state,
        token_id,
        lambda first, second: torch.equal(state[first], state[second]),
        tied=head is embeddings,
    )
    plan = layout.plan(source, target, overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    matched = match(plan, shapes, type(model).__name__, on_disk=False)
    # copied, so that training the one does not move the other
    copied = {
        new: tensor.detach().to("cpu", dtype, copy=True)
        for name, renamed in matched.used.items()
        for new, tensor in zip(renamed.names, renamed.transform(state[name]), strict=True)
    }
    attention = {name: getattr(model.config, name)._attn_implementation for name in ("text_config", "vision_config")}
    result = build_model(plan, copied | dict(fresh_tensors(matched, dtype)), dtype, attn_implementation=attention)
    # not in the state dict, and `model.to(dtype)` rounds them: rotary frequencies, for one
    for name, buffer in model.named_buffers():
        owner, _, leaf = plan.rename(name).names[0].rpartition(".")
        setattr(result.get_submodule(owner), leaf, buffer.detach().to("cpu", copy=True))
    # with what transformers 4.57 notes of it beside its fields, and asks for in `generate`
    result.generation_config = copy.deepcopy(model.generation_config)
    return result.to(model.device)


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ValueError(f"`dtype` must be a floating dtype such as 'bfloat16', got {dtype!r}.")
