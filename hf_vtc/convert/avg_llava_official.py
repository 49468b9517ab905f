"""The layout of the official AVG-LLaVA checkpoints, with a router (`zhibinlan/AVG-LLaVA`) or without (its stage 3).

Upstream: DeepLearnXMU/AVG-LLaVA@3685bc8 (`llava/model/llava_arch.py`, `multimodal_router/builder.py`). It is
LLaVA-NeXT with a router. The weights were trained with attention across tiles, padding measured on the grid of tokens,
and no text for the later images of a sample: the new config says so.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..methods import Record, avg_llava
from . import llava_official
from .plan import Plan, ProcessorSettings, Renamed, Source, in_thirds

# the published config.json does not have it
_FILTERED_TEXT_NUM = 32
_ROUTER = "model.router."
_ROUTER_NAMES = (
    (re.compile(r"^merger\.self_attn\.out_proj\."), "merger.out_proj."),
    (re.compile(r"^merger\.(linear|norm)([12])\."), r"merger.\1_\2."),
    (re.compile(r"^router\.0\."), "linear_1."),
    (re.compile(r"^router\.2\."), "linear_2."),
    (re.compile(r"^(?=voter$|norm\.)"), ""),
)
_FUSED_ATTENTION = re.compile(r"^merger\.self_attn\.in_proj_(weight|bias)$")


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return llava_official.matches(config) and "vis_token_granularity" in config


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become."""
    return {avg_llava.RECORD.name: avg_llava.RECORD}


def rename(name: str) -> Renamed | None:
    """Map one official name to ours, None for a name that this layout does not have."""
    if not name.startswith(_ROUTER):
        return llava_official.rename(name)
    part = name.removeprefix(_ROUTER)
    fused = _FUSED_ATTENTION.match(part)
    if fused:
        return Renamed(tuple(f"{_ROUTER}merger.{each}_proj.{fused[1]}" for each in "qkv"), in_thirds)
    for old, new in _ROUTER_NAMES:
        if old.match(part):
            return Renamed((_ROUTER + old.sub(new, part, count=1),))
    return None


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of an official checkpoint.

    Args:
        source (`Source`): the checkpoint.
        target (`Record`): AVG-LLaVA.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a tower, projector, decoder or setting that has no counterpart here.
    """
    config = source.config
    tower = llava_official.tower_config(source.tower or llava_official.KNOWN_TOWERS[config["mm_vision_tower"]])
    text, ignored = llava_official.decoder_of(source)
    has_router = any(name.startswith(_ROUTER) for name in source.stored)
    fields = {
        "vision_config": tower,
        "text_config": text,
        "image_token_id": source.image_token_id,
        "tie_word_embeddings": text.tie_word_embeddings,
        **llava_official.feature_fields(config, tower),
        **llava_official.anyres_fields(config),
        "vis_token_granularity": list(config["vis_token_granularity"]),
        "router_select": has_router and bool(config.get("router_select", True)),
        "filtered_text_num": config.get("filtered_text_num") or _FILTERED_TEXT_NUM,
        "mm_patch_merge_type": "spatial_unpad",
        "unpad_rule": "token_grid",
        "router_attention": "tiles",
        "router_text": "first_image",
    }
    new_config = target.config(**{**fields, **overrides})
    processor = llava_official.processor_settings(source, tower, text)
    notes = ["The chat template is the one of the authors' evaluation on Vicuna; official files name none."]
    if not has_router:
        notes.append(
            "The checkpoint has no router (stage 3): it is freshly initialised and does not choose "
            "(`router_select=False`). Train it before switching it on."
        )
    return Plan(
        layout="official AVG-LLaVA",
        config=new_config,
        model_class=target.head,
        rename=rename,
        processor=ProcessorSettings(
            processor.images, {**processor.fields, "count_rule": f"unpad_{new_config.unpad_rule}"}
        ),
        ignored=ignored,
        fresh_modules=() if has_router else target.need("base", "conversion").fresh_modules,
        notes=notes,
    )


LAYOUT = replace(
    llava_official.LAYOUT,
    title="official AVG-LLaVA (`vis_token_granularity` in config.json)",
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
)
