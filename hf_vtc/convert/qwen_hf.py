"""Qwen2.5-VL and Qwen3-VL in transformers (`model_type` `qwen2_5_vl` and `qwen3_vl`): bases whose tower sees grids."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from ..methods import Record
from ..models.host_vtc import GRID_BASES, require_base
from .internvl_hf import require_object
from .layout import Layout
from .plan import Plan, Renamed, Source, is_tied
from .targets import plan_base, targets_of

_PREFIXES = (
    (re.compile(r"^(model\.)?visual\."), "model.vision_tower."),
    # files of Qwen2.5-VL keep the names that the decoder had before it moved
    (
        re.compile(r"^model\.(language_model\.)?(?=embed_tokens\.|layers\.|norm\.|rotary_emb\.)"),
        "model.language_model.",
    ),
    (re.compile(r"^lm_head\."), "lm_head."),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") in GRID_BASES


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become."""
    return targets_of(config["model_type"])


def rename(name: str) -> Renamed | None:
    """Map a name of a file or of a model in memory to ours, None for a name that this layout does not have."""
    for old, new in _PREFIXES:
        if old.match(name):
            return Renamed((old.sub(new, name, count=1),))
    return None


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of a Qwen2.5-VL or Qwen3-VL model of transformers; a rename, no tensor changes.

    Args:
        source (`Source`): the checkpoint, or the config and the tensors of a model in memory.
        target (`Record`): what it becomes.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a setting that has no counterpart here.
    """
    config, stored = source.config, source.stored
    base = config["model_type"]
    require_base(base, CONFIG_MAPPING)
    require_object(config, "vision_config")
    # old files have the decoder's fields beside the others
    parts = CONFIG_MAPPING[base].from_dict(dict(config))
    head = "lm_head.weight" if "lm_head.weight" in stored else None
    embeddings = next((name for name in stored if name.endswith("embed_tokens.weight")), "")
    tied = is_tied(source, config.get("text_config") or {}, head, embeddings)
    parts.text_config.tie_word_embeddings = tied
    return plan_base(
        target,
        overrides,
        layout=f"{base} of transformers",
        fields={
            "vision_config": parts.vision_config,
            "text_config": parts.text_config,
            "image_token_id": source.image_token_id,
            "downsample_ratio": 1.0,
            "tie_word_embeddings": tied,
        },
        rename=rename,
        processor=None,
        ignored={head: "equal to the input embeddings"} if tied and head else {},
        notes=["Images only: a prompt with a video is refused."],
    )


LAYOUT = Layout(
    title="Qwen2.5-VL and Qwen3-VL of transformers (`model_type` 'qwen2_5_vl', 'qwen3_vl')",
    image_token="<|image_pad|>",
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
    model_classes=("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
)
