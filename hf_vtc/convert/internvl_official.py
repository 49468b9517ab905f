"""The official layout of InternVL3, InternVL3.5 and InternVL3.5-Flash (`model_type` `internvl_chat`).

Upstream: OpenGVLab/InternVL@2410d1d (base part), InternLM/lmdeploy@1263d5c `lmdeploy/pytorch/models/internvl.py`
(second connector and router). Key names and shapes are facts of the published checkpoints.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..methods import Record, vico
from .layout import Layout
from .plan import Plan, ProcessorSettings, Renamed, Source, architecture_fields, in_thirds, is_tied
from .targets import plan_base, targets_of

# parts of a Flash checkpoint that a base checkpoint lacks
FLASH_PREFIXES = ("mlp2.", "pooling_before_gating.", "gating.")

_DECODERS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
}

_VISION_DEFAULTS = {
    "architectures": None,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "dropout": 0.0,
}

_CONNECTOR_LAYERS = {
    "mlp1": ("multi_modal_projector", {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}),
    "mlp2": ("compressed_projector", {"0": "layer_norm", "1": "linear_1", "4": "linear_2", "7": "linear_3"}),
}
_EMBEDDINGS = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.weight": "patch_embeddings.projection.weight",
    "patch_embedding.bias": "patch_embeddings.projection.bias",
}
_VISION_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_GATING_BLOCK = {"0": "linear_1", "3": "linear_2", "5": "norm"}
_GATE = {"0": "gate_norm", "1": "gate"}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "internvl_chat"


def has_flash(config: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a checkpoint claims or holds the parts of a Flash model."""
    return config.get("flash_mode") is not None or any(name.startswith(FLASH_PREFIXES) for name in stored)


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become: a Flash model is a ViCO model already."""
    return {vico.RECORD.name: vico.RECORD} if has_flash(config, stored) else targets_of("internvl")


def rename(name: str) -> Renamed | None:
    """Map one official name to ours.

    Args:
        name (`str`): such as `vision_model.encoder.layers.3.attn.qkv.weight`.

    Returns:
        The new names and the transform, or None for a name that this layout does not have.
    """
    part, _, rest = name.partition(".")
    if part == "language_model":
        return _rename_language_model(rest)
    if part == "vision_model":
        return _rename_vision_model(rest)
    if part in _CONNECTOR_LAYERS:
        module, layers = _CONNECTOR_LAYERS[part]
        layer, _, leaf = rest.partition(".")
        return Renamed((f"model.{module}.{layers[layer]}.{leaf}",)) if layer in layers else None
    if part == "pooling_before_gating":
        return _rename_pooling(rest)
    if part == "gating":
        return _rename_gating(rest)
    return None


def is_dead(name: str) -> bool:
    """Whether one of our names is a weight that exists in official checkpoints and is never used."""
    return re.match(r"model\.router\.(attn|norm)[34]\.", name) is not None


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of an official checkpoint.

    Args:
        source (`Source`): the checkpoint.
        target (`Record`): what it becomes.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a vision tower, decoder or setting that has no counterpart here.
    """
    config, stored = source.config, source.stored
    llm = _required(config, "llm_config")
    head = "language_model.lm_head.weight"
    tied = is_tied(source, llm, head if head in stored else None, "language_model.model.embed_tokens.weight")
    tower = vision_config(_required(config, "vision_config"), config.get("force_image_size"))
    fields = {
        "vision_config": tower,
        "text_config": text_config(llm, tied),
        "image_token_id": source.image_token_id,
        "vision_feature_layer": config.get("select_layer", -1),
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        # the official config class has "v1" where a file says nothing
        "ps_version": config.get("ps_version", "v1"),
        "tie_word_embeddings": tied,
    }
    processor = ProcessorSettings(
        images={
            "tiling": "dynamic",
            "size": tower.image_size[0],
            "min_tiles": config.get("min_dynamic_patch", 1),
            "max_tiles": config.get("max_dynamic_patch", 12) if config.get("dynamic_image_size", True) else 1,
            "use_thumbnail": config.get("use_thumbnail", True),
        }
    )
    ignored = {head: "equal to the input embeddings"} if tied and head in stored else {}
    if has_flash(config, stored):
        return _plan_flash(config, target, overrides, fields, processor, ignored)
    return plan_base(target, overrides, "base InternVL", fields, rename, processor, ignored, notes=[])


def _plan_flash(
    config: Mapping[str, Any],
    target: Record,
    overrides: Mapping[str, Any],
    fields: dict[str, Any],
    processor: ProcessorSettings,
    ignored: dict[str, str],
) -> Plan:
    notes = []
    fields["flash_mode"] = config.get("flash_mode") is None or bool(config["flash_mode"])
    for threshold in ("flash_relative_threshold", "flash_absolute_threshold"):
        if config.get(threshold) is not None:
            fields[threshold] = config[threshold]
        elif threshold not in overrides:
            notes.append(f"`{threshold}` is not in config.json: the default of hf_vtc is used.")
    if config.get("flash_mode") is None and "flash_mode" not in overrides:
        notes.append("`flash_mode` is not in config.json, but the weights of a Flash model are: it is switched on.")
    return Plan(
        layout="InternVL3.5-Flash",
        config=target.config(**{**fields, **overrides}),
        model_class=target.head,
        rename=rename,
        processor=processor,
        ignored=ignored,
        optional=is_dead,
        notes=notes,
    )


def vision_config(fields: Mapping[str, Any], force_image_size: int | None) -> PretrainedConfig:
    """`vision_config` of InternViT in transformers' words.

    Args:
        fields (`Mapping`): official `vision_config`.
        force_image_size (`int`, *optional*): tile size in pixels; must be that of the position embeddings.
    """
    # values of the official config class, which are those of InternViT-6B, where a file leaves them out
    fields = {**_VISION_DEFAULTS, **fields}
    size = fields["image_size"]
    if force_image_size not in (None, size):
        raise ValueError(
            f"`force_image_size` ({force_image_size}) must equal `vision_config.image_size` ({size}): position "
            "embeddings for another size are not converted. Resize them with the official code first."
        )
    architecture = (fields["architectures"] or ["InternVisionModel"])[0]
    if architecture != "InternVisionModel":
        raise ValueError(f"The vision tower must be an InternVisionModel, got {architecture!r}.")
    return CONFIG_MAPPING["internvl_vision"](
        hidden_size=fields["hidden_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=fields["num_attention_heads"],
        intermediate_size=fields["intermediate_size"],
        attention_bias=fields["qkv_bias"],
        use_qk_norm=fields["qk_normalization"],
        hidden_act=fields["hidden_act"],
        norm_type=fields["norm_type"],
        layer_norm_eps=fields["layer_norm_eps"],
        initializer_range=fields["initializer_range"],
        attention_dropout=fields["attention_dropout"],
        projection_dropout=fields["dropout"],
        num_channels=fields["num_channels"],
        image_size=[size, size],
        patch_size=[fields["patch_size"], fields["patch_size"]],
        # the official tower has no norm after its last block; mean pooling leaves it out here
        use_mean_pooling=True,
    )


def text_config(fields: Mapping[str, Any], tied: bool) -> PretrainedConfig:
    """`llm_config` as the config of a decoder of transformers, without the settings of old versions."""
    architecture = (fields.get("architectures") or [None])[0]
    model_type = _DECODERS.get(architecture, fields.get("model_type"))
    if architecture not in _DECODERS and (architecture is not None or model_type not in _DECODERS.values()):
        raise ValueError(
            f"The language model must be one of {', '.join(_DECODERS)}, got architecture {architecture!r} and "
            f"`model_type` {model_type!r}."
        )
    return CONFIG_MAPPING[model_type](**architecture_fields(fields), tie_word_embeddings=tied)


def _rename_language_model(rest: str) -> Renamed | None:
    if rest.startswith("model."):
        return Renamed((f"model.language_model.{rest.removeprefix('model.')}",))
    return Renamed((rest,)) if rest.startswith("lm_head.") else None


def _rename_vision_model(rest: str) -> Renamed | None:
    if rest.startswith("embeddings."):
        leaf = _EMBEDDINGS.get(rest.removeprefix("embeddings."))
        return Renamed((f"model.vision_tower.embeddings.{leaf}",)) if leaf else None
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?", rest)
    if not found:
        return None
    layer, module, leaf = found[1], found[2], found[3] or ""
    base = f"model.vision_tower.encoder.layer.{layer}"
    if module == "attn.qkv":
        return Renamed(tuple(f"{base}.attention.{proj}_proj{leaf}" for proj in "qkv"), in_thirds)
    return Renamed((f"{base}.{_VISION_LAYER[module]}{leaf}",)) if module in _VISION_LAYER else None


def _rename_pooling(rest: str) -> Renamed | None:
    if rest == "query_token":
        return Renamed(("model.router.query_token",))
    fused = re.fullmatch(r"(attn[1-4])\.in_proj_(weight|bias)", rest)
    if fused:
        return Renamed(tuple(f"model.router.{fused[1]}.{proj}_proj.{fused[2]}" for proj in "qkv"), in_thirds)
    plain = re.fullmatch(r"(attn[1-4]\.out_proj|norm[1-4])\.(weight|bias)", rest)
    return Renamed((f"model.router.{rest}",)) if plain else None


def _rename_gating(rest: str) -> Renamed | None:
    found = re.fullmatch(r"(?:(block[1-4])|gate)\.(\d)\.(weight|bias)", rest)
    if not found:
        return None
    block, layer, leaf = found.groups()
    layers = _GATING_BLOCK if block else _GATE
    if layer not in layers:
        return None
    base = f"model.router.{block}" if block else "model.router"
    return Renamed((f"{base}.{layers[layer]}.{leaf}",))


def _required(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(config.get(name), dict):
        raise ValueError(f"config.json needs `{name}`, a JSON object. Download it again from the official repository.")
    return config[name]


LAYOUT = Layout(
    title="official InternVL3 / InternVL3.5 / InternVL3.5-Flash (`model_type` 'internvl_chat')",
    image_token="<IMG_CONTEXT>",
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
)
