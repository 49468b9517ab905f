"""Sizes of models without weights: what records need to say how large their method's models are.

What weights say changes neither costs nor times, so that a shape is enough to estimate and to measure both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
INTERN_VIT_300M = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": True,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
CONVNEXT_L_1536 = {
    "model_type": "convnext",
    "hidden_sizes": [192, 384, 768, 1536, 3072],
    "depths": [3, 3, 27, 3, 6],
    "image_size": 1536,
    "patch_size": 4,
}
VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
VICUNA_13B = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
QWEN3_4B = {**QWEN3_8B, "hidden_size": 2560, "intermediate_size": 9728}
QWEN3_1_7B = {
    **QWEN3_8B,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
QWEN3_0_6B = {**QWEN3_1_7B, "hidden_size": 1024, "intermediate_size": 3072}

# small enough for two CPU cores, and large enough that tokens cost more than what is done once per call
_SMALL_DECODER = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
}
_SMALL_WIDTH = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
_SMALL_CLIP = {**CLIP_L_336, **_SMALL_WIDTH}
_SMALL_INTERN_VIT = {**INTERN_VIT_300M, **_SMALL_WIDTH}
_SMALL_CONVNEXT = {**CONVNEXT_L_1536, "hidden_sizes": [24, 48, 96, 192, 256], "depths": [2, 2, 6, 2, 2]}


@dataclass(frozen=True)
class Shape:
    """A model without weights, and an image that it is usually asked about.

    Args:
        vision, text (`Mapping`): content of its `vision_config` and `text_config`.
        image_size (`tuple[int, int]`): (height, width) in pixels.
        fields (`Mapping`): other fields of its config.
        tiling (`Mapping`): how its images are cut, arguments of `VtcImageProcessor`.
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    image_size: tuple[int, int]
    fields: Mapping[str, Any] = field(default_factory=dict)
    tiling: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Fields of its config, in objects of its own."""
        return {"vision_config": dict(self.vision), "text_config": dict(self.text), **self.fields}


def of_llava(fields: Mapping[str, Any] | None = None) -> dict[str, Shape]:
    """Shapes of a method on LLaVA 1.5; `fields` are those of its config that differ from their defaults."""
    tiling, fields = {"tiling": "pad", "size": 336}, {"vision_feature_layer": -2, **(fields or {})}
    return {
        "7b": Shape(CLIP_L_336, VICUNA_7B, (336, 336), fields, tiling),
        "100m": Shape(_SMALL_CLIP, _SMALL_DECODER, (336, 336), fields, tiling),
    }


def of_internvl(small: Mapping[str, Any] | None = None) -> dict[str, Shape]:
    """Shapes of a method on InternVL3.5; `small` has fields of the method's config at 0.1 B."""
    tiling = {"tiling": "dynamic", "size": 448}
    sizes = {"1b": QWEN3_0_6B, "2b": QWEN3_1_7B, "4b": QWEN3_4B, "8b": QWEN3_8B}
    shapes = {name: Shape(INTERN_VIT_300M, text, (896, 1344), {}, tiling) for name, text in sizes.items()}
    # two tiles and a thumbnail, 768 visual tokens
    shapes["100m"] = Shape(_SMALL_INTERN_VIT, _SMALL_DECODER, (448, 896), small or {}, tiling)
    return shapes


def of_convnext() -> dict[str, Shape]:
    """Shapes of a method whose tower sees whole images of 1536 pixels."""
    tiling = {"tiling": "keep_aspect", "size": 1536, "token_stride": 64}
    return {
        "7b": Shape(CONVNEXT_L_1536, VICUNA_7B, (1536, 1536), {}, tiling),
        "100m": Shape(_SMALL_CONVNEXT, _SMALL_DECODER, (1536, 1536), {}, tiling),
    }


_LLAVA = {"model_type": "llava", "vision_feature_layer": -2, "image_seq_length": 576}
_INTERNVL = {"model_type": "internvl", "downsample_ratio": 0.5, "image_seq_length": 256}
# (height, width), as transformers writes them
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

BASE_SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape(CLIP_L_336, VICUNA_7B, (336, 336), _LLAVA),
    "llava-1.5-13b": Shape(CLIP_L_336, VICUNA_13B, (336, 336), _LLAVA),
    "llava-next-7b": Shape(
        CLIP_L_336,
        VICUNA_7B,
        (672, 672),
        {**_LLAVA, "model_type": "llava_next", "image_grid_pinpoints": _PINPOINTS},
    ),
    "internvl3.5-1b": Shape(INTERN_VIT_300M, QWEN3_0_6B, (896, 1344), _INTERNVL),
    "internvl3.5-2b": Shape(INTERN_VIT_300M, QWEN3_1_7B, (896, 1344), _INTERNVL),
    "internvl3.5-4b": Shape(INTERN_VIT_300M, QWEN3_4B, (896, 1344), _INTERNVL),
    "internvl3.5-8b": Shape(INTERN_VIT_300M, QWEN3_8B, (896, 1344), _INTERNVL),
}
"""Uncompressed models of others, by name."""
