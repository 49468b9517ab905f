"""The layout of InternVL in transformers (repositories named `-HF`, `model_type` `internvl`): a base without Flash."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..methods import Record
from .layout import Layout
from .plan import Plan, ProcessorSettings, Renamed, Source, architecture_fields, is_tied
from .targets import plan_base, targets_of

# files of 4.52 and later keep the names that the model had before its parts moved under `model`, and 5.5 mixes both
_OLD_PREFIXES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\.(model\.)?"), "model.language_model."),
    (re.compile(r"^vision_tower\."), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
)
_PREFIXES = ("lm_head.", "model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "internvl"


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become."""
    return targets_of("internvl")


def rename(name: str) -> Renamed | None:
    """Map a name of a file or of a model in memory to ours, None for a name that this layout does not have."""
    for old, new in _OLD_PREFIXES:
        if old.match(name):
            return Renamed((old.sub(new, name),))
    return Renamed((name,)) if name.startswith(_PREFIXES) else None


def head_name(stored: Mapping[str, Any]) -> str | None:
    """Name of the head's weight in a checkpoint, None if there is none."""
    return next((name for name in ("lm_head.weight", "language_model.lm_head.weight") if name in stored), None)


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of a base InternVL model of transformers.

    Args:
        source (`Source`): the checkpoint, or the config and the tensors of a model in memory.
        target (`Record`): what it becomes.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a setting that has no counterpart here.
    """
    config, stored = source.config, source.stored
    text = require_object(config, "text_config")
    head = head_name(stored)
    embeddings = next((name for name in stored if name.endswith("embed_tokens.weight")), "")
    tied = is_tied(source, text, head, embeddings)
    vision_config = CONFIG_MAPPING["internvl_vision"](**architecture_fields(require_object(config, "vision_config")))
    return plan_base(
        target,
        overrides,
        layout="base InternVL of transformers",
        fields={
            "vision_config": vision_config,
            # the decoder of InternVLConfig where a file leaves it out
            "text_config": decoder_config(text, "qwen2", tied),
            "image_token_id": source.image_token_id,
            "vision_feature_layer": one_layer(config.get("vision_feature_layer", -1)),
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
            "projector_hidden_act": config.get("projector_hidden_act", "gelu"),
            "downsample_ratio": config.get("downsample_ratio", 0.5),
            "ps_version": "v2",
            "tie_word_embeddings": tied,
        },
        rename=rename,
        # transformers' processor always adds the whole view
        processor=ProcessorSettings(
            images={
                "tiling": "dynamic",
                "size": vision_config.image_size[0],
                "min_tiles": source.image_processor.get("min_patches", 1),
                "max_tiles": source.image_processor.get("max_patches", 12),
                "use_thumbnail": True,
            }
        ),
        ignored={head: "equal to the input embeddings"} if tied and head else {},
        notes=[],
    )


def require_object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A sub-config of `config.json`."""
    if not isinstance(config.get(name), dict):
        raise ValueError(f"config.json needs `{name}`, a JSON object. Download it again.")
    return config[name]


def decoder_config(fields: Mapping[str, Any], default_type: str, tied: bool) -> PretrainedConfig:
    """`text_config` of a checkpoint as the config of a decoder, without the settings of old versions."""
    model_type = fields.get("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"`text_config` has `model_type` {model_type!r}, unknown to this transformers. Upgrade it.")
    return CONFIG_MAPPING[model_type](**architecture_fields(fields), tie_word_embeddings=tied)


def one_layer(layer: int | list[int]) -> int:
    """The layer of the tower that a checkpoint reads, which must be one."""
    if not isinstance(layer, int):
        raise ValueError(
            f"`vision_feature_layer` must be one layer, got {layer}: features of several layers have no counterpart "
            "here. Use a base that reads one."
        )
    return layer


LAYOUT = Layout(
    title="InternVL of transformers, `-HF` (`model_type` 'internvl')",
    image_token="<IMG_CONTEXT>",
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
    model_classes=("InternVLForConditionalGeneration",),
)
