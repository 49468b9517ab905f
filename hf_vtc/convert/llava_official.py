"""The original layout of LLaVA-1.5, LLaVA-NeXT and what was trained with their code, LLaVolta included.

Upstream: haotian-liu/LLaVA@c121f04 (`llava/model/llava_arch.py`, `multimodal_encoder/clip_encoder.py`),
Beckschen/LLaVolta@31ec151, which adds nothing to the format. The tower may be part of the checkpoint or lie in the
folder that `mm_vision_tower` names; its config always does. Key names and shapes are facts of the published files.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..methods import Record
from ..models.chat_templates_vtc import chat_template_for
from .layout import Layout
from .plan import Plan, ProcessorSettings, Renamed, Source, architecture_fields, is_tied
from .targets import plan_base, targets_of

IMAGE_TOKEN = "<image>"

# architectures, and `model_type` of files that name none
_DECODERS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
# towers whose weights are in most published checkpoints, so that their own repositories are not needed
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}
# part of a model with both towers -> the config of the image tower alone
_TOWER_TYPES = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
}
_PREFIXES = (
    (re.compile(r"^model\.vision_tower\.vision_tower\.vision_model\."), "model.vision_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(?=(embed_tokens|layers|norm)\.)"), "model.language_model."),
    (re.compile(r"^(?=model\.image_newline$|lm_head\.)"), ""),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return "mm_vision_tower" in config and "mm_projector_type" in config


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become."""
    return targets_of("llava_next" if config.get("mm_patch_merge_type") == "spatial_unpad" else "llava")


def stored_image_token_id(config: Mapping[str, Any]) -> int | None:
    """None: the original code has no token for an image, but the number -200."""
    return None


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embeddings, none of which is the placeholder's."""
    return config["vocab_size"]


def tower_name(config: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """Folder or repository of the tower, None where nothing of it is needed."""
    name = config["mm_vision_tower"]
    return None if name in KNOWN_TOWERS and has_tower(stored) else name


def has_tower(stored: Mapping[str, Any]) -> bool:
    """Whether the tower's weights are part of a checkpoint."""
    return any(name.startswith("model.vision_tower.") for name in stored)


def rename(name: str) -> Renamed | None:
    """Map one official name to ours, None for a name that this layout does not have."""
    for old, new in _PREFIXES:
        if old.match(name):
            return Renamed((old.sub(new, name, count=1),))
    return None


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of an official checkpoint.

    Args:
        source (`Source`): the checkpoint.
        target (`Record`): what it becomes.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a tower, projector, decoder or setting that has no counterpart here.
    """
    config = source.config
    tower = tower_config(source.tower or KNOWN_TOWERS[config["mm_vision_tower"]])
    text, ignored = decoder_of(source)
    return plan_base(
        target,
        overrides,
        layout="official LLaVA",
        fields={
            "vision_config": tower,
            "text_config": text,
            "image_token_id": source.image_token_id,
            "tie_word_embeddings": text.tie_word_embeddings,
            **feature_fields(config, tower),
            **target.need("base", "conversion").official_fields(config, text.num_hidden_layers),
            **merge_fields(anyres_fields(config), "token_grid"),
        },
        rename=rename,
        processor=processor_settings(source, tower, text),
        ignored=ignored,
        notes=["The chat template is chosen by the decoder, since official files name none: check that it fits."],
    )


def tower_config(fields: Mapping[str, Any]) -> PretrainedConfig:
    """`vision_config` from the `config.json` of a tower's own folder, alone or as half of CLIP or SigLIP."""
    model_type = fields.get("model_type")
    if model_type not in _TOWER_TYPES:
        raise ValueError(
            f"The vision tower must be one of {', '.join(_TOWER_TYPES)}, got `model_type` {model_type!r}. Convert "
            "this checkpoint to the layout of transformers first."
        )
    fields = fields.get("vision_config", fields)
    return CONFIG_MAPPING[_TOWER_TYPES[model_type]](**architecture_fields(fields))


def decoder_of(source: Source) -> tuple[PretrainedConfig, dict[str, str]]:
    """The decoder's part of an official `config.json`, which holds everything on one level, and the tensors that its
    tied head makes superfluous, with the reason."""
    config = source.config
    head = "lm_head.weight" if "lm_head.weight" in source.stored else None
    tied = is_tied(source, config, head, "model.embed_tokens.weight")
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if architecture not in _DECODERS:
        raise ValueError(f"The language model must be one of {', '.join(_DECODERS)}, got {architecture!r}.")
    # the settings of towers, projectors and trainers are none of the decoder's
    known = CONFIG_MAPPING[_DECODERS[architecture]]().to_dict().keys() | {"head_dim", "rope_theta", "rope_scaling"}
    fields = {name: value for name, value in config.items() if name in known}
    text = CONFIG_MAPPING[_DECODERS[architecture]](**architecture_fields(fields), tie_word_embeddings=tied)
    return text, {head: "equal to the input embeddings"} if tied and head else {}


def feature_fields(config: Mapping[str, Any], tower: PretrainedConfig) -> dict[str, Any]:
    """Which hidden state of the tower is read, and by which projector."""
    if config["mm_projector_type"] != "mlp2x_gelu":
        raise ValueError(
            f"`mm_projector_type` must be 'mlp2x_gelu', as in LLaVA-1.5, got {config['mm_projector_type']!r}."
        )
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if config.get(name):
            raise ValueError(f"`{name}` has no counterpart here: it wraps images in tokens of LLaVA-1. Unset it.")
    with_class_token = tower.model_type == "clip_vision_model"
    selected = config.get("mm_vision_select_feature", "patch")
    return {
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if with_class_token and selected == "patch" else "full",
        "projector_hidden_act": "gelu",
        "downsample_ratio": 1.0,
    }


def anyres_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Canvases of LLaVA-NeXT, which the original writes as text, (width, height)."""
    merge = config.get("mm_patch_merge_type", "flat")
    if merge == "flat" and config.get("image_aspect_ratio") != "anyres":
        return {}
    if merge != "spatial_unpad":
        raise ValueError(f"`mm_patch_merge_type` must be 'flat' or 'spatial_unpad', got {merge!r}.")
    pinpoints = config["image_grid_pinpoints"]
    if isinstance(pinpoints, str):
        # as Python writes a list of pairs
        pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]"))
    return {"image_grid_pinpoints": [[height, width] for width, height in pinpoints]}


def merge_fields(pinpoints: Mapping[str, Any], unpad_rule: str) -> dict[str, Any]:
    """Config fields of a model that joins the tiles of `anyres_fields`, none where that is empty."""
    return {"mm_patch_merge_type": "spatial_unpad", "unpad_rule": unpad_rule, **pinpoints} if pinpoints else {}


def processor_settings(source: Source, tower: PretrainedConfig, text: PretrainedConfig) -> ProcessorSettings:
    """How the original code prepares images and prompts."""
    config, anyres = source.config, anyres_fields(source.config)
    if not anyres and config.get("image_aspect_ratio") != "pad":
        raise ValueError(
            f"`image_aspect_ratio` must be 'pad' or 'anyres', got {config.get('image_aspect_ratio')!r}: central crops "
            "have no counterpart here."
        )
    return llava_processor(source, tower, text, anyres, "token_grid")


def llava_processor(
    source: Source, tower: PretrainedConfig, text: PretrainedConfig, pinpoints: Mapping[str, Any], unpad_rule: str
) -> ProcessorSettings:
    """One padded tile per image, or with the `pinpoints` of `anyres_fields` the tiles of LLaVA-NeXT."""
    tiling = "anyres" if pinpoints else "pad"
    return ProcessorSettings(
        images={"tiling": tiling, "size": tower.image_size, **normalization(source), **pinpoints},
        fields=prompt_fields(source, text, f"unpad_{unpad_rule}" if pinpoints else "tiles"),
    )


def normalization(source: Source) -> dict[str, Any]:
    """Mean and spread of the pixels, CLIP's where a checkpoint names none."""
    images = source.image_processor
    return {"image_mean": images.get("image_mean", CLIP_MEAN), "image_std": images.get("image_std", CLIP_STD)}


def prompt_fields(source: Source, text: PretrainedConfig, count_rule: str) -> dict[str, Any]:
    """Fields of `VtcProcessor`: an image is its placeholders, with nothing around them."""
    return {
        "image_token": IMAGE_TOKEN,
        "image_start_token": None,
        "image_end_token": None,
        "chat_template": source.chat_template or chat_template_for(text.model_type, IMAGE_TOKEN),
        "count_rule": count_rule,
    }


LAYOUT = Layout(
    title="official LLaVA-1.5 / LLaVA-NeXT / LLaVolta (`mm_projector_type` and `mm_vision_tower` in config.json)",
    image_token=IMAGE_TOKEN,
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
    stored_image_token_id=stored_image_token_id,
    vocab_size=vocab_size,
    tower_name=tower_name,
)
