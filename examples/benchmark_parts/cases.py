"""The five methods at one size each, with random weights, and the plain transformers model with the same weights.

Two of them on Qwen's bases too, by names such as "llavolta on qwen3_vl".

What weights say does not change the time. "100m" has a decoder of 100 M parameters and the shapes of the records,
"small" one of 10 M and images of a quarter of the pixels, "tiny" is for tests of the benchmark itself.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from hf_vtc.methods import record_named
from hf_vtc.methods.shapes import Shape
from hf_vtc.report.shapes import inputs_of_shape

METHODS = ("vico", "avg_llava", "llavolta", "vistog", "convllava")
ON_GRIDS = tuple(f"{method} on {base}" for base in ("qwen3_vl", "qwen2_5_vl") for method in ("llavolta", "avg_llava"))
SIZES = ("tiny", "small", "100m")
# the placeholder; `inputs_of_shape` draws text behind it
_IMAGE_TOKEN_ID = 9


@dataclass(frozen=True)
class _Size:
    """What differs between sizes: fields of decoder and towers, pixels of tiles, grids, and groups of VisToG."""

    decoder: Mapping[str, Any]
    tower: Mapping[str, Any]
    conv: Mapping[str, Any]
    clip_side: int
    joined_side: int
    intern_side: int
    conv_side: int
    # rows and columns of visual tokens
    grid: tuple[int, int]
    num_groups: int


@dataclass(frozen=True)
class _Images:
    """What a size makes of a method's images: fields of its tower, pixels, how they are cut, fields of its config."""

    vision: Mapping[str, Any]
    size: tuple[int, int]
    tiling: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)


_SIZES = {
    "100m": _Size({}, {}, {}, 336, 168, 448, 1536, (21, 28), 64),
    "small": _Size(
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        {"hidden_sizes": [12, 24, 48, 96, 128], "depths": [1, 1, 3, 1, 1]},
        168,
        112,
        224,
        768,
        (10, 14),
        16,
    ),
    "tiny": _Size(
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"hidden_sizes": [8, 8, 12, 16, 32], "depths": [1, 1, 1, 1, 1]},
        56,
        56,
        112,
        256,
        (4, 6),
        4,
    ),
}


def _tiles_and_thumbnail(given: _Size) -> _Images:
    side = given.intern_side
    return _Images(given.tower | {"image_size": [side, side]}, (side, 2 * side), {"size": side})


def _joined_tiles(given: _Size) -> _Images:
    # as released: LLaVA-NeXT's tiles, here two and the whole image, joined to a map with a newline after each row
    side = given.joined_side
    pinpoints = [[side, 2 * side], [2 * side, side]]
    tiling = {"tiling": "anyres", "image_grid_pinpoints": pinpoints, "size": side}
    fields = {"image_grid_pinpoints": pinpoints, "router_attention": "tiles", "unpad_rule": "token_grid"}
    return _Images(given.tower | {"image_size": side}, (side, 2 * side), tiling, fields)


def _one_tile(given: _Size) -> _Images:
    side = given.clip_side
    return _Images(given.tower | {"image_size": side}, (side, side), {"size": side})


def _groups_of_one_tile(given: _Size) -> _Images:
    return replace(_one_tile(given), fields={"num_semantic_tokens": given.num_groups})


def _whole_image(given: _Size) -> _Images:
    side = given.conv_side
    return _Images(given.conv | {"image_size": side}, (side, side), {"size": side})


_IMAGES = {
    "vico": _tiles_and_thumbnail,
    "avg_llava": _joined_tiles,
    "llavolta": _one_tile,
    "vistog": _groups_of_one_tile,
    "convllava": _whole_image,
}


def _on_grid(base: str, shape: Shape, given: _Size) -> Shape:
    """A shape with the tower and the decoder of one of Qwen's bases in place of its own, and one image of a grid."""
    tower, text = {**shape.vision, **given.tower}, dict(shape.text)
    depth, patch = tower["num_hidden_layers"], _PATCHES_OF_GRIDS[base]
    vision = {
        "model_type": base,
        "depth": depth,
        "num_heads": tower["num_attention_heads"],
        "out_hidden_size": text["hidden_size"],
        "patch_size": patch,
        **{name: tower[name] for name in ("hidden_size", "intermediate_size")},
    }
    half_of_head = text["hidden_size"] // text["num_attention_heads"] // 2
    height_and_width = 2 * [half_of_head * 5 // 16]
    rope = {"rope_type": "default", "mrope_section": [half_of_head - sum(height_and_width), *height_and_width]}
    if base == "qwen3_vl":
        vision["deepstack_visual_indexes"] = [depth // 4, depth // 2, depth - 1]
        text["head_dim"], rope["mrope_interleaved"] = 2 * half_of_head, True
    else:
        vision["fullatt_block_indexes"] = [depth - 1]
    stride, (rows, columns) = 2 * patch, given.grid
    tiling = {"tiling": "patches", "patch_size": patch, "token_stride": stride}
    limits = {"min_pixels": stride**2, "max_pixels": rows * columns * stride**2}
    return replace(
        shape,
        vision=vision,
        text={**text, "model_type": f"{base}_text", "rope_scaling": rope},
        fields={},
        tiling=tiling | limits,
        image_size=(rows * stride, columns * stride),
    )


# sides of the patches of the released towers
_PATCHES_OF_GRIDS = {"qwen3_vl": 16, "qwen2_5_vl": 14}


def shape_of(case: str, size: str, vocab_size: int | None = None) -> Shape:
    """The shape of a case, of `METHODS` or `ON_GRIDS`, at a size; `vocab_size` replaces that of the decoder."""
    method, _, base = case.partition(" on ")
    given, shape = _SIZES[size], record_named(method).shapes["100m"]
    heads, images = given.decoder.get("num_attention_heads"), _IMAGES[method](given)
    text = {**shape.text, **given.decoder, **({"num_key_value_heads": heads} if heads else {})}
    if vocab_size is not None:
        text["vocab_size"] = vocab_size
    if base:
        return _on_grid(base, replace(shape, text=text), given)
    # pinpoints decide how images are cut where there are any
    tiling = images.tiling if "tiling" in images.tiling else {**shape.tiling, **images.tiling}
    return replace(
        shape,
        vision={**shape.vision, **images.vision},
        text=text,
        fields={**shape.fields, **images.fields},
        tiling=tiling,
        image_size=images.size,
    )


def takes(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], budget: Any) -> bool:
    """Whether a model can meet a budget."""
    try:
        model.count_visual_tokens(**inputs, vtc_budget=budget)
    except ValueError:
        return False
    return True


def build(case: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A random model in eval mode; its answers have no end of their own."""
    torch.manual_seed(0)
    config = record_named(case.partition(" on ")[0]).config(image_token_id=_IMAGE_TOKEN_ID, **shape.config())
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval().to(device)


def prompts(
    model: PreTrainedModel, shape: Shape, batch_size: int, num_text_tokens: int = 64, images_per_row: int = 1
) -> dict[str, torch.Tensor]:
    """Rows of text with images of noise in the middle, as the processor gives them."""
    inputs = inputs_of_shape(model, shape, batch_size * images_per_row, num_text_tokens)
    if images_per_row == 1:
        return inputs
    before = num_text_tokens // 2
    ids = inputs["input_ids"].unflatten(0, (batch_size, images_per_row))
    images = ids[:, :, before : ids.shape[-1] - (num_text_tokens - before)].flatten(1)
    inputs["input_ids"] = torch.cat([ids[:, 0, :before], images, ids[:, 0, -(num_text_tokens - before) :]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def labelled(inputs: Mapping[str, torch.Tensor], num_answer_tokens: int = 16) -> dict[str, torch.Tensor]:
    """The same prompts, whose last tokens are an answer."""
    labels = inputs["input_ids"].clone()
    labels[:, :-num_answer_tokens] = -100
    return {**inputs, "labels": labels}


def plain_of(model: PreTrainedModel) -> nn.Module:
    """The uncompressed model of transformers with the same weights, in memory of its own."""
    # the tests hold every method against it, and know which it is
    tests = str(Path(__file__).resolve().parents[2] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from factories import uncompressed

    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with model.device:
            plain = uncompressed(model)
    finally:
        torch.set_default_dtype(before)
    if isinstance(plain, PreTrainedModel):
        plain.generation_config = model.generation_config
    return plain.to(model.device).eval()


def inputs_of_plain(plain: nn.Module, inputs: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, Any]:
    """What the plain model takes of these inputs; its tiles stand in a block for each image."""
    from factories import stock_inputs

    joined = model.config.mm_patch_merge_type == "spatial_unpad"
    taken = stock_inputs(plain, inputs)
    if model.config.sees_tiles and not joined:
        # LLaVA 1.5 of transformers takes sizes for towers of another kind
        taken.pop("image_sizes", None)
    if joined:
        taken["pixel_values"] = inputs["pixel_values"].unflatten(0, (len(inputs["num_tiles"]), -1))
    return taken
