"""From published checkpoints to models of hf_vtc.

`load_official` gives a model in memory, `from_base` turns an uncompressed model into a compressing one, and `convert`
streams a folder into a folder without ever holding the model. A layout is one file of this package, with a `Layout`
that is one entry of `LAYOUTS`.
"""

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..files import blaming, read_json, replacing_folder, require_own_files
from ..models.configuration_vtc import VtcConfig
from ..models.image_processing_vtc import write_json
from . import avg_llava_official, convllava_official, internvl_hf, internvl_official, llava_hf, llava_official
from .assets import (
    build_processor,
    chat_template_of,
    find_image_token_id,
    generation_settings,
    image_processor_settings,
    load_tokenizer,
)
from .folders import local_folder, tower_folder
from .layout import Layout
from .plan import Plan, Renamed, Source, fresh_tensors, match, require_plausible
from .shards import CheckpointReader, ShardWriter, num_bytes
from .targets import Target

__all__ = ["LAYOUTS", "ConversionReport", "convert", "from_base", "load_official"]

logger = logging.get_logger(__name__)

# the first layout that matches counts, so a special one stands before the one that it specialises
LAYOUTS: tuple[Layout, ...] = (
    internvl_official.LAYOUT,
    internvl_hf.LAYOUT,
    avg_llava_official.LAYOUT,
    convllava_official.LAYOUT,
    llava_official.LAYOUT,
    llava_hf.LAYOUT,
)

# names of a tower that lies in a folder of its own, as if it were part of the checkpoint
_TOWER_PREFIX = "model.vision_tower.vision_tower."


@dataclass
class ConversionReport:
    """What `convert` did.

    Args:
        source (`Path`): the folder that was read.
        destination (`Path`): the folder that was written.
        layout (`str`): layout of the source.
        method (`str`): method of the result.
        dtype (`torch.dtype`): of the written floating tensors.
        num_copied (`int`): source tensors that were carried over.
        missing_keys (`list[str]`): tensors (new names) that the source should have had; none of them is needed.
        unused_keys (`list[str]`): tensors (source names) that have no place in the result.
        fresh_keys (`list[str]`): tensors (new names) that were initialised, because the source has no such part.
        num_fresh_parameters (`int`): numbers in `fresh_keys`.
        num_bytes (`int`): size of the written tensors.
        has_processor (`bool`): whether tokenizer and processor were written too.
        notes (`list[str]`): what the caller should know.
    """

    source: Path
    destination: Path
    layout: str
    method: str
    dtype: torch.dtype
    num_copied: int
    missing_keys: list[str]
    unused_keys: list[str]
    fresh_keys: list[str]
    num_fresh_parameters: int
    num_bytes: int
    has_processor: bool
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The report in words, a line per fact."""
        lines = [
            f"{self.layout} -> {self.method}: {self.destination}",
            f"copied: {self.num_copied} tensors; written: {self.num_bytes / 1e6:,.1f} MB of weights",
        ]
        if self.fresh_keys:
            lines.append(f"initialised: {len(self.fresh_keys)} tensors, {self.num_fresh_parameters:,} parameters")
        if self.missing_keys:
            lines.append(f"missing in the source, never used: {', '.join(self.missing_keys)}")
        if self.unused_keys:
            lines.append(f"not used: {', '.join(self.unused_keys)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


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
    checkpoint = _open(folder, method, image_token_id, vision_tower)
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
        model_or_path (`PreTrainedModel`, `str` or `os.PathLike`): an InternVL, LLaVA or LLaVA-NeXT model of
            transformers, a checkpoint folder (of transformers or official), or the id of a repository on the Hub.
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
        _refuse_tower(vision_tower, type(model_or_path).__name__)
        if dtype is None:
            dtype = model_or_path.dtype
        return _from_model(model_or_path, method, image_token_id, _checked_dtype(dtype), config_overrides)
    checkpoint = _open(model_or_path, method, image_token_id, vision_tower)
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
        checkpoint = _open(src, method, image_token_id, vision_tower)
        if dst.resolve() == checkpoint.folder.resolve():
            raise ValueError(f"`src` and `dst` are both {dst}. Choose another destination.")
        with blaming(checkpoint.folder):
            plan = checkpoint.plan(config_overrides)
            matched = match(plan, checkpoint.shapes(), str(checkpoint.folder))
            dtype = dtype or checkpoint.reader.main_dtype()

            writer = ShardWriter(partial, max_shard_size)
            for names in checkpoint.reader.by_shard(matched.used):
                _copy_shard(checkpoint.reader, writer, {name: matched.used[name] for name in names}, dtype)
            num_fresh = 0
            for name, tensor in fresh_tensors(matched, dtype):
                num_fresh += tensor.numel()
                writer.add(name, tensor)
            writer.close()
            _write_config(plan, matched.skeleton, dtype, partial, save_code)
            checkpoint.write_assets(plan, partial, save_code)
    notes = list(plan.notes)
    if checkpoint.tokenizer is None:
        notes.append("The source has no tokenizer: the model alone was written, without a processor.")
    return ConversionReport(
        source=checkpoint.folder,
        destination=dst,
        layout=plan.layout,
        method=checkpoint.method,
        dtype=dtype,
        num_copied=len(matched.used),
        missing_keys=matched.missing,
        unused_keys=matched.unused,
        fresh_keys=matched.fresh,
        num_fresh_parameters=num_fresh,
        num_bytes=writer.total_bytes,
        has_processor=checkpoint.tokenizer is not None,
        notes=notes + [f"{name} was left out: {reason}." for name, reason in plan.ignored.items()],
    )


@dataclass
class _Checkpoint:
    """A folder whose layout is known; small files and headers are read, weights are not."""

    folder: Path
    layout: Layout
    method: str
    target: Target
    config: dict[str, Any]
    reader: CheckpointReader
    tokenizer: Any
    image_token_id: int
    # of a tower in a folder of its own
    tower: dict[str, Any]
    image_processor: dict[str, Any]

    def plan(self, overrides: Mapping[str, Any]) -> Plan:
        _check_overrides(overrides, self.target.config)
        source = Source(
            self.config,
            self.reader.tensors,
            self.image_token_id,
            self.reader.equal,
            self.image_processor,
            self.tower,
            chat_template=chat_template_of(self.folder),
        )
        with blaming(self.folder):
            return self.layout.plan(source, self.target, overrides)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.reader.tensors.items()}

    def load(self, plan: Plan, dtype: torch.dtype | None) -> PreTrainedModel:
        with blaming(self.folder):
            matched = match(plan, self.shapes(), str(self.folder))
            settings = generation_settings(self.folder, plan.config.text_config, self.tokenizer)
            generation_config = GenerationConfig(**settings)
        dtype = dtype or self.reader.main_dtype()
        # copied, since a mapped tensor would lean on the file for as long as the model lives
        state = {name: tensor.clone() for name, tensor in _streamed(self.reader, matched.used, dtype)}
        model = _build(plan, state | dict(fresh_tensors(matched, dtype)), dtype)
        if matched.unused or matched.missing:
            logger.warning("%s: not used: %s; missing: %s", self.folder, matched.unused, matched.missing)
        model.generation_config = generation_config
        return model

    def write_assets(self, plan: Plan, folder: Path, save_code: bool) -> None:
        settings = generation_settings(self.folder, plan.config.text_config, self.tokenizer)
        # what nobody could load fails here; the rest is written as it stands, since transformers would not save it all
        GenerationConfig(**settings)
        write_json(folder / "generation_config.json", settings)
        if self.tokenizer is not None:
            build_processor(self.tokenizer, plan).save_pretrained(folder, save_code=save_code)


def _open(
    folder: str | os.PathLike, method: str | None, image_token_id: int | None, vision_tower: str | os.PathLike | None
) -> _Checkpoint:
    """Find out what a folder is. Raises as the public functions say."""
    folder = local_folder(folder)
    require_own_files(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no checkpoint. Give a model's folder.")
    config = read_json(folder / "config.json")
    with blaming(folder):
        layout = _layout_of(config, folder)
        _refuse_quantised(config, folder)
        reader = CheckpointReader(folder)
        require_plausible(config, len(reader.tensors), folder)
        method, target = _target_of(layout.methods(config, reader.tensors), folder, method)
        name = layout.tower_name(config, reader.tensors)
        tower, image_processor = {}, image_processor_settings(folder)
        if name is None:
            _refuse_tower(vision_tower, folder)
        else:
            tower, settings = _add_tower(reader, name, folder, vision_tower)
            image_processor = settings or image_processor
        tokenizer = load_tokenizer(folder)
        token_id = find_image_token_id(
            tokenizer,
            layout.image_token,
            layout.stored_image_token_id(config),
            image_token_id,
            layout.vocab_size(config),
            folder,
        )
    return _Checkpoint(folder, layout, method, target, config, reader, tokenizer, token_id, tower, image_processor)


def _add_tower(
    reader: CheckpointReader, name: str, folder: Path, given: str | os.PathLike | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` and image settings of a tower in a folder of its own, whose weights `reader` takes in."""
    has_tower = any(stored.startswith(_TOWER_PREFIX) for stored in reader.tensors)
    beside = tower_folder(name, folder, given, has_tower)
    require_own_files(beside)
    config = read_json(beside / "config.json")
    if not has_tower:
        reader.add(CheckpointReader(beside), _TOWER_PREFIX)
    require_plausible(config, len(reader.tensors), beside)
    return config, image_processor_settings(beside)


def _refuse_quantised(config: Mapping[str, Any], folder: Path) -> None:
    for part in (config, *config.values()):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if found:
            name = found.get("quant_method", "unnamed") if isinstance(found, Mapping) else "unnamed"
            raise ValueError(
                f"{folder} is quantised (`quant_method` {name!r} in config.json), which is not read. Convert the "
                "checkpoint that it was made from, and quantise the result."
            )


def _refuse_tower(vision_tower: str | os.PathLike | None, source: Path | str) -> None:
    if vision_tower is not None:
        raise ValueError(f"`vision_tower` is of no use for {source}, which has its tower. Leave it out.")


def _layout_of(config: Mapping[str, Any], folder: Path) -> Layout:
    found = next((layout for layout in LAYOUTS if layout.matches(config)), None)
    if found is None:
        if str(config.get("model_type")).startswith("vtc_"):
            raise ValueError(f"{folder} is a model of hf_vtc already. Load it by `from_pretrained`.")
        raise ValueError(
            f"{folder} has an unknown layout: `model_type` {config.get('model_type')!r}, architectures "
            f"{config.get('architectures')}. Supported: {'; '.join(layout.title for layout in LAYOUTS)}."
        )
    return found


def _target_of(targets: Mapping[str, Target], source: Path | str, method: str | None) -> tuple[str, Target]:
    """What a checkpoint becomes, where only one thing is possible or the caller has said it."""
    names = ", ".join(sorted(targets))
    if method is None and len(targets) > 1:
        raise ValueError(f"{source} fits several methods. Give `method`, one of {names}.")
    if method is not None and method not in targets:
        raise ValueError(f"`method` must be one of {names} for {source}, got {method!r}.")
    method = method or next(iter(targets))
    return method, targets[method]


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
        classes = [name for each in LAYOUTS for name in each.model_classes]
        raise ValueError(
            f"The base must be one of {', '.join(classes)}, got {type(model).__name__}. Load it by "
            "`AutoModelForImageTextToText`."
        )
    state = model.state_dict()
    method, target = _target_of(layout.methods(config, state), type(model).__name__, method)
    _check_overrides(overrides, target.config)
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
    result = _build(plan, copied | dict(fresh_tensors(matched, dtype)), dtype, attn_implementation=attention)
    # not in the state dict, and `model.to(dtype)` rounds them: rotary frequencies, for one
    for name, buffer in model.named_buffers():
        owner, _, leaf = plan.rename(name).names[0].rpartition(".")
        setattr(result.get_submodule(owner), leaf, buffer.detach().to("cpu", copy=True))
    result.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return result.to(model.device)


def _build(plan: Plan, state: dict[str, torch.Tensor], dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """A model in eval mode from a complete state dict."""
    model, info = plan.model_class.from_pretrained(
        None, config=plan.config, state_dict=state, dtype=dtype, output_loading_info=True, **kwargs
    )
    missing = set(info["missing_keys"]) - set(model._tied_weights_keys)
    assert not missing and not info["unexpected_keys"], (missing, info["unexpected_keys"])
    return model.eval()


def _copy_shard(
    reader: CheckpointReader, writer: ShardWriter, used: Mapping[str, Renamed], dtype: torch.dtype
) -> None:
    """Write what comes from one shard; when this returns, nothing leans on its mapped file any more."""
    for name, tensor in _streamed(reader, used, dtype):
        writer.add(name, tensor)
    writer.flush()


def _streamed(
    reader: CheckpointReader, used: Mapping[str, Renamed], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The new tensors that come from the source, shard by shard."""
    for name, tensor in reader.read(used):
        renamed = used[name]
        for new, part in zip(renamed.names, renamed.transform(tensor), strict=True):
            yield new, part.to(dtype) if part.is_floating_point() else part


def _write_config(plan: Plan, skeleton: PreTrainedModel, dtype: torch.dtype, folder: Path, save_code: bool) -> None:
    config = plan.config
    config.architectures = [plan.model_class.__name__]
    config.dtype = dtype
    if save_code:
        config.auto_map = config.remote_code_map()
        custom_object_save(skeleton, folder)
    config.save_pretrained(folder)


def _check_overrides(overrides: Mapping[str, Any], config_class: type[VtcConfig]) -> None:
    known = {name for owner in (config_class, VtcConfig) for name in inspect.signature(owner.__init__).parameters}
    known -= {"self", "kwargs", "vision_config", "text_config", "image_token_id", "tie_word_embeddings"}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise ValueError(f"Unknown config fields: {', '.join(unknown)}. Known are {', '.join(sorted(known))}.")


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ValueError(f"`dtype` must be a floating dtype such as 'bfloat16', got {dtype!r}.")
