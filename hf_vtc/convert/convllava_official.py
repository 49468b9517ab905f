"""The official layouts of ConvLLaVA: language model with projector and ConvNeXt in two folders, or all in one file.

Upstream: alibaba/conv-llava@3e7ae57 (`llava/model/multimodal_encoder/convnext_encoder.py`). `mm_vision_tower` names
the tower's folder or repository, whose `config.json` and `preprocessor_config.json` are needed in any case: nothing
else says the stages or the resolution. Its weights have the names of `ConvNextModel` there, and stand under
`model.vision_tower.vision_tower.` where the checkpoint is one file. Key names and shapes are facts of the published
files.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..methods import Record, convllava
from . import llava_official
from .plan import Plan, ProcessorSettings, Renamed, Source, architecture_fields

_TOWER = "model.vision_tower.vision_tower."
# of the pooled vector, which ConvLLaVA does not read; upstream does not save it
_POOLED_NORM = f"{_TOWER}layernorm."


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    if not llava_official.matches(config):
        return False
    # a local folder may have any name, but no other code writes this field of its trainer
    return "convnext" in str(config["mm_vision_tower"]).lower() or "tune_entire_model" in config


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become."""
    return {convllava.RECORD.name: convllava.RECORD}


def tower_name(config: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """Folder or repository of the tower; its small files are needed even where its weights are not."""
    return config["mm_vision_tower"]


def rename(name: str) -> Renamed | None:
    """Map one official name to ours, None for a name that this layout does not have."""
    if name.startswith(_TOWER):
        return Renamed((f"model.vision_tower.{name.removeprefix(_TOWER)}",))
    return llava_official.rename(name)


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of an official checkpoint.

    Args:
        source (`Source`): the checkpoint.
        target (`Record`): what it becomes, ConvLLaVA.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a tower, projector, decoder or setting that has no counterpart here.
    """
    config = source.config
    if source.tower.get("model_type") != "convnext":
        raise ValueError(
            f"The vision tower {config['mm_vision_tower']!r} must be a ConvNeXt, got `model_type` "
            f"{source.tower.get('model_type')!r}. Give the folder of the ConvNeXt as `vision_tower`."
        )
    text, ignored = llava_official.decoder_of(source)
    images = image_settings(source)
    vision = target.config({**architecture_fields(source.tower), "image_size": images["size"]}).vision_config
    fields = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": source.image_token_id,
        "tie_word_embeddings": text.tie_word_embeddings,
        **llava_official.feature_fields(config, vision),
    }
    new_config = target.config(**fields | overrides)
    pooled_norm = [name for name in source.stored if name.startswith(_POOLED_NORM)]
    return Plan(
        layout="official ConvLLaVA",
        config=new_config,
        model_class=target.head,
        rename=rename,
        processor=ProcessorSettings(
            images={**images, "token_stride": new_config.token_stride},
            fields=llava_official.prompt_fields(source, text, "stride"),
        ),
        ignored=ignored | dict.fromkeys(pooled_norm, "ConvLLaVA reads no pooled vector"),
        notes=["Images are padded to squares as in training; `tiling='keep_aspect'` is the paper's other way."],
    )


def image_settings(source: Source) -> dict[str, Any]:
    """How the original code prepares images; the resolution is that of the tower's image processor."""
    settings, ratio = source.image_processor, source.config.get("image_aspect_ratio")
    if ratio == "anyres":
        raise ValueError("`image_aspect_ratio` 'anyres' does not work with ConvLLaVA's tower. Set it to 'pad'.")
    size = settings.get("size", source.tower.get("image_size"))
    if isinstance(size, Mapping):
        size = size["shortest_edge"] if "shortest_edge" in size else size["height"]
    return {"tiling": "pad" if ratio == "pad" else "crop", "size": size, **llava_official.normalization(source)}


LAYOUT = replace(
    llava_official.LAYOUT,
    title="official ConvLLaVA (`mm_vision_tower` names a ConvNeXt in config.json)",
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
    tower_name=tower_name,
)
