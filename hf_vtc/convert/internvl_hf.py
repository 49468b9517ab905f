"""The layout of InternVL in transformers (repositories named `-HF`, `model_type` `internvl`): a base without Flash."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from ..models.configuration_vico import VicoConfig
from ..models.modeling_vico import VicoForConditionalGeneration
from .internvl_official import NEW_MODULES
from .plan import Plan, Renamed, Source, TileSettings, architecture_fields, is_tied

TITLE = "InternVL of transformers, `-HF` (`model_type` 'internvl')"
METHODS = {"vico": VicoConfig}

# files of 4.52 and later keep the names that the model had before its parts moved under `model`
_OLD_PREFIXES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.(model\.)?"), "model.language_model."),
    (re.compile(r"^vision_tower\."), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
)
_PREFIXES = ("lm_head.", "model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "internvl"


def rename(name: str) -> Renamed | None:
    """Map a name of a file or of a model in memory to ours, None for a name that this layout does not have."""
    for old, new in _OLD_PREFIXES:
        if old.match(name):
            return Renamed((old.sub(new, name),))
    return Renamed((name,)) if name.startswith(_PREFIXES) else None


def head_name(stored: Mapping[str, Any]) -> str | None:
    """Name of the head's weight in a checkpoint, None if there is none."""
    return next((name for name in ("lm_head.weight", "language_model.lm_head.weight") if name in stored), None)


def plan(source: Source, overrides: Mapping[str, Any], tied: bool | None = None) -> Plan:
    """Plan the conversion of a base InternVL model of transformers to a ViCO model.

    Args:
        source (`Source`): the checkpoint, or the config and the tensors of a model in memory.
        overrides (`Mapping`): fields of `VicoConfig` that replace those of the file.
        tied (`bool`, *optional*): whether head and embeddings share a weight, read from the files if not given.

    Raises:
        ValueError: a setting that has no counterpart here.
    """
    config, stored = source.config, source.stored
    for name in ("vision_config", "text_config"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"config.json needs `{name}`, a JSON object. Download it again.")
    head = head_name(stored)
    if tied is None:
        prefix = "model.language_model." if "model.language_model.norm.weight" in stored else "language_model.model."
        tied = is_tied(source, config["text_config"], head, f"{prefix}embed_tokens.weight")
    text = config["text_config"]
    # the decoder of InternVLConfig where a file leaves it out
    text_type = text.get("model_type", "qwen2")
    if text_type not in CONFIG_MAPPING:
        raise ValueError(f"`text_config` has `model_type` {text_type!r}, unknown to this transformers. Upgrade it.")
    fields = {
        "vision_config": CONFIG_MAPPING["internvl_vision"](**architecture_fields(config["vision_config"])),
        "text_config": CONFIG_MAPPING[text_type](**architecture_fields(text), tie_word_embeddings=tied),
        "image_token_id": source.image_token_id,
        "vision_feature_layer": config.get("vision_feature_layer", -1),
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        "projector_hidden_act": config.get("projector_hidden_act", "gelu"),
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "ps_version": "v2",
        "tie_word_embeddings": tied,
        "flash_mode": False,
        **overrides,
    }
    if not isinstance(fields["vision_feature_layer"], int):
        raise ValueError(
            f"`vision_feature_layer` must be one layer, got {fields['vision_feature_layer']}: features of several "
            "layers have no counterpart here. Use a base that reads one."
        )
    notes = []
    if not fields["flash_mode"]:
        notes.append(
            "A base checkpoint: the compressed connector and the router are freshly initialised and routing is off "
            "(`flash_mode=False`). Train them before switching it on."
        )
    new_config = VicoConfig(**fields)
    return Plan(
        layout="base InternVL of transformers",
        config=new_config,
        model_class=VicoForConditionalGeneration,
        rename=rename,
        # transformers' processor always adds the whole view
        tiles=TileSettings(
            size=new_config.vision_config.image_size[0],
            min_tiles=source.image_processor.get("min_patches", 1),
            max_tiles=source.image_processor.get("max_patches", 12),
            use_thumbnail=True,
        ),
        ignored={head: "equal to the input embeddings"} if tied and head else {},
        fresh_modules=NEW_MODULES,
        notes=notes,
    )
