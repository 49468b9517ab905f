"""A published checkpoint whose layout is known: what it says, what it can become, and its tensors as a stream."""

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..files import blaming, read_json, require_own_files
from ..methods import RECORDS, Record, record_named
from ..methods.names import is_method
from ..models.configuration_vtc import VtcConfig
from ..models.image_processing_vtc import write_json
from . import avg_llava_official, convllava_official, internvl_hf, internvl_official, llava_hf, llava_official, qwen_hf
from .assets import (
    build_processor,
    chat_template_of,
    find_image_token_id,
    generation_settings,
    image_processor_settings,
    load_tokenizer,
    video_processor_settings,
)
from .folders import local_folder, tower_folder
from .layout import Layout
from .plan import Plan, Renamed, Source, fresh_tensors, match, require_plausible
from .refused import REFUSED_BASES
from .shards import CheckpointReader

logger = logging.get_logger(__name__)

# the first layout that matches counts, so a special one stands before the one that it specialises
LAYOUTS: tuple[Layout, ...] = (
    internvl_official.LAYOUT,
    internvl_hf.LAYOUT,
    avg_llava_official.LAYOUT,
    convllava_official.LAYOUT,
    llava_official.LAYOUT,
    llava_hf.LAYOUT,
    qwen_hf.LAYOUT,
)


# names of a tower that lies in a folder of its own, as if it were part of the checkpoint
_TOWER_PREFIX = "model.vision_tower.vision_tower."


@dataclass
class Checkpoint:
    """A folder whose layout is known; small files and headers are read, weights are not."""

    folder: Path
    layout: Layout
    method: str
    target: Record
    config: dict[str, Any]
    reader: CheckpointReader
    tokenizer: Any
    image_token_id: int
    # of a tower in a folder of its own
    tower: dict[str, Any]
    image_processor: dict[str, Any]

    def plan(self, overrides: Mapping[str, Any]) -> Plan:
        check_overrides(overrides, self.target.config)
        source = Source(
            self.config,
            self.reader.tensors,
            self.image_token_id,
            self.reader.equal,
            self.image_processor,
            self.tower,
            chat_template=chat_template_of(self.folder),
            video_processor=video_processor_settings(self.folder),
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
        state = {name: tensor.clone() for name, tensor in streamed(self.reader, matched.used, dtype)}
        model = build_model(plan, state | dict(fresh_tensors(matched, dtype)), dtype)
        if matched.unused or matched.missing:
            logger.warning("%s: not used: %s; missing: %s", self.folder, matched.unused, matched.missing)
        model.generation_config = generation_config
        return model

    def write_assets(self, plan: Plan, folder: Path, save_code: bool) -> None:
        settings = generation_settings(self.folder, plan.config.text_config, self.tokenizer)
        # what nobody could load fails here; the rest is written as it stands, since transformers would not save it all
        GenerationConfig(**settings)
        write_json(folder / "generation_config.json", settings)
        if self.tokenizer is None:
            return
        build_processor(self.tokenizer, plan).save_pretrained(folder, save_code=save_code)


def open_checkpoint(
    folder: str | os.PathLike, method: str | None, image_token_id: int | None, vision_tower: str | os.PathLike | None
) -> Checkpoint:
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
        targets = layout.methods(config, reader.tensors)
        method, target = target_of(targets, folder, method, config.get("model_type"))
        name = layout.tower_name(config, reader.tensors)
        tower, image_processor = {}, image_processor_settings(folder)
        if name is None:
            refuse_tower(vision_tower, folder)
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
    return Checkpoint(folder, layout, method, target, config, reader, tokenizer, token_id, tower, image_processor)


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


def refuse_tower(vision_tower: str | os.PathLike | None, source: Path | str) -> None:
    if vision_tower is not None:
        raise ValueError(f"`vision_tower` is of no use for {source}, which has its tower. Leave it out.")


def refuse_base(model_type: str | None, source: Path | str) -> None:
    """Raise a ValueError for a base of transformers that no method fits."""
    if model_type in REFUSED_BASES:
        raise ValueError(
            f"{source} is a model of type {model_type!r}, which no method fits yet: {REFUSED_BASES[model_type]}. "
            "docs/bases.md of hf_vtc says which bases there are."
        )


def _layout_of(config: Mapping[str, Any], folder: Path) -> Layout:
    found = next((layout for layout in LAYOUTS if layout.matches(config)), None)
    if found is None:
        if is_method(config.get("model_type")):
            raise ValueError(f"{folder} is a model of hf_vtc already. Load it by `from_pretrained`.")
        refuse_base(config.get("model_type"), folder)
        raise ValueError(
            f"{folder} has an unknown layout: `model_type` {config.get('model_type')!r}, architectures "
            f"{config.get('architectures')}. Supported: {'; '.join(layout.title for layout in LAYOUTS)}."
        )
    return found


def target_of(
    targets: Mapping[str, Record], source: Path | str, method: str | None, base: str | None
) -> tuple[str, Record]:
    """What a checkpoint of the `model_type` `base` becomes, where one thing is possible or the caller has said it."""
    names = ", ".join(sorted(targets))
    if method is None and len(targets) > 1:
        raise ValueError(f"{source} fits several methods. Give `method`, one of {names}.")
    if method is not None and method not in targets:
        if method in (record.name for record in RECORDS.values()):
            record_named(method).need("base", "conversion")
            reason = record_named(method).config.refused_bases.get(base)
            if reason is not None:
                raise ValueError(
                    f"{method} does not fit {base}: {reason}. `method` must be one of {names} for {source}."
                )
        raise ValueError(f"`method` must be one of {names} for {source}, got {method!r}.")
    method = method or next(iter(targets))
    return method, targets[method]


def build_model(plan: Plan, state: dict[str, torch.Tensor], dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """A model in eval mode from a complete state dict."""
    model, info = plan.model_class.from_pretrained(
        None, config=plan.config, state_dict=state, dtype=dtype, output_loading_info=True, **kwargs
    )
    missing = set(info["missing_keys"]) - set(model._tied_weights_keys)
    assert not missing and not info["unexpected_keys"], (missing, info["unexpected_keys"])
    return model.eval()


def streamed(
    reader: CheckpointReader, used: Mapping[str, Renamed], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The new tensors that come from the source, shard by shard."""
    for name, tensor in reader.read(used):
        renamed = used[name]
        for new, part in zip(renamed.names, renamed.transform(tensor), strict=True):
            yield new, part.to(dtype) if part.is_floating_point() else part


def check_overrides(overrides: Mapping[str, Any], config_class: type[VtcConfig]) -> None:
    known = {name for owner in (config_class, VtcConfig) for name in inspect.signature(owner.__init__).parameters}
    known -= {"self", "kwargs", "vision_config", "text_config", "image_token_id", "tie_word_embeddings"}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise ValueError(f"Unknown config fields: {', '.join(unknown)}. Known are {', '.join(sorted(known))}.")
