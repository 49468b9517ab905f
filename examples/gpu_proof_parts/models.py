"""The five methods at the shapes of their published 7B and 8B models, with random weights that are made on the device.

What weights say does not change the time. A dry run has the same models in miniature.
"""

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from hf_vtc.methods import record_named
from hf_vtc.methods.shapes import CLIP_L_336, CONVNEXT_L_1536, INTERN_VIT_300M, QWEN3_8B, VICUNA_7B

METHODS = ("vico", "avg_llava", "llavolta", "vistog", "convllava")
# a text token before the images that is none of the decoder's special ones, and the placeholder
_FIRST_TEXT_ID, IMAGE_TOKEN_ID = 10, 9

_TINY_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Shape(NamedTuple):
    """One method at one size.

    Args:
        vision, text (`dict`): fields of tower and decoder.
        fields (`dict`): of the method's config.
        side (`int`): of a tile in pixels.
        num_tiles (`int`): per image.
        reserved (`int`): placeholders per image.
        tiles_per_side (`int`): of an image whose size goes along with its pixels, else 0.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    fields: dict[str, Any]
    side: int
    num_tiles: int
    reserved: int
    tiles_per_side: int = 0


def _joined(side: int) -> int:
    """Placeholders of a square image of 2 x 2 tiles and a base tile, with a newline per row, as in LLaVA-NeXT."""
    return side * side + 2 * side * (2 * side + 1)


FULL = {
    "vico": Shape(INTERN_VIT_300M, QWEN3_8B, {}, 448, 7, 7 * 256),
    "avg_llava": Shape(
        CLIP_L_336,
        VICUNA_7B,
        {"vision_feature_layer": -2, "image_grid_pinpoints": [[672, 672]]},
        336,
        5,
        _joined(24),
        2,
    ),
    "llavolta": Shape(
        CLIP_L_336,
        VICUNA_7B,
        {"vision_feature_layer": -2, "compress_layer_idx": 2, "compress_stride": 8},
        336,
        1,
        576,
    ),
    "vistog": Shape(CLIP_L_336, VICUNA_7B, {"num_semantic_tokens": 64}, 336, 1, 576),
    "convllava": Shape(CONVNEXT_L_1536, VICUNA_7B, {}, 1536, 1, 576, 1),
}
_TINY_CLIP = {**CLIP_L_336, **_TINY_TOWER, "num_hidden_layers": 3, "image_size": 32, "patch_size": 4}
TINY = {
    "vico": FULL["vico"]._replace(
        vision={**INTERN_VIT_300M, **_TINY_TOWER, "image_size": [32, 32], "patch_size": [4, 4]},
        text={**QWEN3_8B, **_TINY_DECODER, "num_key_value_heads": 2, "head_dim": 8},
        fields={"router_num_heads": 4},
        side=32,
        num_tiles=3,
        reserved=3 * 16,
    ),
    "avg_llava": FULL["avg_llava"]._replace(
        vision=_TINY_CLIP,
        text={**VICUNA_7B, **_TINY_DECODER},
        fields={"vision_feature_layer": -2, "image_grid_pinpoints": [[64, 64]], "router_num_heads": 4},
        side=32,
        reserved=_joined(8),
    ),
    "llavolta": FULL["llavolta"]._replace(
        vision=_TINY_CLIP, text={**VICUNA_7B, **_TINY_DECODER}, side=32, reserved=64
    ),
    "vistog": FULL["vistog"]._replace(
        vision=_TINY_CLIP,
        text={**VICUNA_7B, **_TINY_DECODER},
        fields={"num_semantic_tokens": 4},
        side=32,
        reserved=64,
    ),
    "convllava": FULL["convllava"]._replace(
        vision={**CONVNEXT_L_1536, "hidden_sizes": [8, 8, 12, 16, 32], "depths": [1] * 5, "image_size": 128},
        text={**VICUNA_7B, **_TINY_DECODER},
        side=128,
        reserved=4,
    ),
}


def shape_of(method: str, dry: bool) -> Shape:
    return (TINY if dry else FULL)[method]


def config_of(method: str, dry: bool, num_layers: int | None = None) -> PretrainedConfig:
    """The config of a method; `num_layers` cuts its decoder."""
    shape = shape_of(method, dry)
    text = dict(shape.text)
    if num_layers is not None:
        text["num_hidden_layers"] = min(num_layers, text["num_hidden_layers"])
    return record_named(method).config(
        vision_config=dict(shape.vision),
        text_config=text,
        image_token_id=IMAGE_TOKEN_ID,
        **shape.fields,
    )


def build(
    method: str,
    device: torch.device,
    dtype: torch.dtype,
    dry: bool,
    num_layers: int | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """A random model in eval mode, made where it runs; its answers have no end, so that their length is given."""
    torch.manual_seed(0)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config_of(method, dry, num_layers), dtype=dtype, **chosen)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().to(device)


def inputs_of(
    method: str, dry: bool, batch_size: int, device: torch.device, dtype: torch.dtype, num_text_tokens: int = 64
) -> dict[str, torch.Tensor]:
    """Prompts of one image, with half of the text before it and half behind."""
    shape = shape_of(method, dry)
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, num_text_tokens)
    text = torch.randint(_FIRST_TEXT_ID, shape.text["vocab_size"], size, generator=generator)
    image = torch.full((batch_size, shape.reserved), IMAGE_TOKEN_ID)
    before = num_text_tokens // 2
    input_ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    num_tiles = batch_size * shape.num_tiles
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(num_tiles, 3, shape.side, shape.side, generator=generator).to(dtype),
    }
    if shape.num_tiles > 1:
        inputs["num_tiles"] = torch.full((batch_size,), shape.num_tiles)
    if shape.tiles_per_side:
        inputs["image_sizes"] = torch.full((batch_size, 2), shape.tiles_per_side * shape.side)
    return {name: value.to(device) for name, value in inputs.items()}


def training_batch(inputs: dict[str, torch.Tensor], num_answer_tokens: int = 16) -> dict[str, torch.Tensor]:
    """The same prompts whose last tokens are an answer."""
    labels = inputs["input_ids"].clone()
    labels[:, :-num_answer_tokens] = -100
    return {**inputs, "labels": labels}
