"""Tiny tokenizers, processors, models and batches that tests share: built in memory, no network."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from random_images import AnyresImages, GridImages, SizedImages, TiledImages, draw_int
from stock_models import (
    PlainConvllava,
    stock_internvl,
    stock_llava,
    stock_llava_next,
    stock_onevision,
    stock_qwen,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from hf_vtc.methods import record_named, record_of
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import VtcProcessor
from hf_vtc.models.tiling_vtc import TilingSettings

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
# the placeholder of videos, whose name the tiny tokenizer does not know
VIDEO_TOKEN_ID = 301
# 256 bytes, some merges, then the special tokens
VOCAB_SIZE = 272


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens; the image placeholder has the last id."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for first, second in ("th", "he", "in", "er", "an", "re", "at", "on", "is", "ou"):
        merges.append((first, second))
        vocab[first + second] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
    )


def tiny_processor(method: str = "vico", **overrides: Any) -> VtcProcessor:
    """Processor of a method's tiny model; `overrides` are fields of the image processor or of the processor."""
    fields = {**TINY[method].processor, **overrides}
    images = {name: fields.pop(name) for name in list(fields) if name in TilingSettings.__dataclass_fields__}
    return VtcProcessor(VtcImageProcessor(**images), tiny_tokenizer(), **fields)


_VISION = {
    "model_type": "internvl_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_bias": True,
    "image_size": [32, 32],
    "patch_size": [4, 4],
}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# a visual token of 16 pixels, so that images can be small
_CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [8, 8, 12, 16, 32],
    "depths": [1, 1, 2, 1, 1],
    "image_size": 48,
    "patch_size": 1,
    # every block matters
    "layer_scale_init_value": 0.5,
}
_TEXT = {
    "model_type": "qwen3",
    "vocab_size": 520,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    # not the default, which the two spellings of this setting must not lose
    "rope_theta": 500000.0,
}


def tiny_config(method: str, **overrides):
    """A configuration of some 10^5 parameters; `overrides` are fields of the method's config."""
    placeholder = {"image_token_id": tiny_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")}
    record = record_named(method.partition(" on ")[0])
    return record.config(**copy.deepcopy(placeholder | TINY[method].config) | overrides)


def tiny_model(method: str, seed: int = 0, **overrides):
    """A random model in eval mode whose logits are far from ties and whose router is undecided."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny_config(method, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # the usual 0.02 leaves such small models almost constant
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5 if parameter.ndim == 2 else 0.3)
        model.lm_head.weight.mul_(0.5)
        # an answer with a placeholder could not be fed back as a prompt
        model.lm_head.weight[list(model.config.placeholder_ids)] = 0
    return model


def video_processor(method: str, **fields: Any) -> VtcProcessor:
    """Processor of a tiny model such as `"llavolta on qwen3_vl"` that takes videos; `fields` are of their settings.

    The tiny tokenizer knows no placeholder of videos: a token that no text of the tests has stands for it.
    """
    tokens = {"token": "<|im_start|>", "start_token": "<img>", "end_token": "</img>"}
    base = method.partition(" on ")[2]
    # of frames that are tiles there are none
    limits = {} if base == "llava_onevision" else {"min_pixels": 128, "max_pixels": 2048}
    video = {"base": base, **limits, **tokens} | fields
    return tiny_processor(method, video=video, image_start_token=None, image_end_token=None)


def tiny_pair(method: str, **overrides: Any) -> tuple[nn.Module, VtcProcessor]:
    """A tiny model and its processor, which take videos where the base does; `overrides` are fields of its config."""
    if not tiny_config(method).takes_videos:
        return tiny_model(method, **overrides), tiny_processor(method)
    processor = video_processor(method)
    return tiny_model(method, video_token_id=processor.video_token_id, **overrides), processor


def uncompressed(model):
    """The stock transformers model with the same weights."""
    return _tiny_of(model.config).stock(model).eval()


def stock_inputs(stock, batch) -> dict[str, torch.Tensor]:
    """What the stock model takes of a batch."""
    taken = inspect.signature(stock.forward).parameters
    types = {}
    if "mm_token_type_ids" in taken:
        types["mm_token_type_ids"] = (batch["input_ids"] == stock.config.image_token_id).int()
    if "batch_num_images" in taken and "pixel_values" in batch:
        types["batch_num_images"] = torch.tensor([len(images) for _, images in batch.rows if images])
    return types | {name: value for name, value in batch.items() if name in taken}


@dataclass
class Tiny:
    """What tests need of a method.

    `config`: fields of its config. `processor`: fields of `VtcImageProcessor` and `VtcProcessor` that fit it.
    `budgets`: two that every image can meet; the first compresses if the method can. `stock`: the stock model with the
    same weights. `images`: how random ones are drawn. `scored`: which of `"auto"` and `"some"` budgets only scores can
    meet.
    """

    config: dict[str, Any]
    processor: dict[str, Any]
    stock: Callable[[nn.Module], nn.Module]
    budgets: tuple = (0.4, 0.6)
    images: TiledImages | SizedImages = field(default_factory=TiledImages)
    scored: tuple[str, ...] = ()


_QWEN3_VL = {
    "video_token_id": VIDEO_TOKEN_ID,
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
    "text_config": {
        **_TEXT,
        "model_type": "qwen3_vl_text",
        "num_hidden_layers": 3,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
    },
}
_QWEN2_5_VL = {
    "video_token_id": VIDEO_TOKEN_ID,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        # a window of 2 x 2 visual tokens, so that images have several
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "text_config": {
        **{name: value for name, value in _TEXT.items() if name != "head_dim"},
        "model_type": "qwen2_5_vl_text",
        "num_hidden_layers": 3,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
    },
}
_QWEN3_5 = {
    "vision_config": {
        **{name: value for name, value in _QWEN3_VL["vision_config"].items() if name != "deepstack_visual_indexes"},
        "model_type": "qwen3_5_vision",
    },
    "text_config": {
        **_TEXT,
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        # all of the head's 8 frequencies are rotated, as in the others
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
    },
}
_PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
_PINPOINTS_OF_27 = [[rows // 32 * 27, columns // 32 * 27] for rows, columns in _PINPOINTS]
_DYNAMIC = {"tiling": "dynamic", "size": 32, "max_tiles": 4, "image_seq_length": 16}

TINY = {
    "vico": Tiny(
        {
            "vision_config": _VISION,
            "text_config": _TEXT,
            "flash_relative_threshold": 0.3,
            "flash_absolute_threshold": 0.2,
        },
        _DYNAMIC,
        stock_internvl,
        scored=("auto", "some"),
    ),
    "vistog": Tiny(
        {"vision_config": _CLIP, "text_config": _TEXT, "num_semantic_tokens": 4},
        _DYNAMIC,
        stock_llava,
    ),
    "avg_llava": Tiny(
        {
            "vision_config": _CLIP,
            "text_config": _TEXT,
            "vision_feature_layer": -2,
            "image_grid_pinpoints": _PINPOINTS,
            "filtered_text_num": 8,
            "router_num_heads": 4,
        },
        {
            "tiling": "anyres",
            "size": 32,
            "image_grid_pinpoints": _PINPOINTS,
            "image_seq_length": 16,
            "count_rule": "unpad_true_aspect",
        },
        stock_llava_next,
        (0.3, 0.6),
        AnyresImages(),
        scored=("auto",),
    ),
    "convllava": Tiny(
        {"vision_config": _CONVNEXT, "text_config": _TEXT},
        {"tiling": "keep_aspect", "size": 48, "token_stride": 16, "image_seq_length": 9, "count_rule": "stride"},
        PlainConvllava,
        (1.0, "auto"),
        SizedImages(),
    ),
    "llavolta": Tiny(
        {
            "vision_config": _CLIP,
            # a layer before the compressor and two behind it
            "text_config": {**_TEXT, "num_hidden_layers": 3},
            "vision_feature_layer": -2,
            "compress_layer_idx": 1,
            "compress_stride": 4,
        },
        _DYNAMIC,
        stock_llava,
        (0.3, 0.6),
    ),
}
TINY |= {
    "visionzip": Tiny(
        {"vision_config": _VISION, "text_config": _TEXT, "downsample_ratio": 0.5}, _DYNAMIC, stock_internvl
    ),
    "cdpruner": Tiny(
        {"vision_config": _CLIP, "text_config": _TEXT, "vision_feature_layer": -2},
        _DYNAMIC,
        stock_llava,
        scored=("auto", "some"),
    ),
}
METHODS = tuple(TINY)
_PATCHES = {
    "tiling": "patches",
    "patch_size": 4,
    "token_stride": 8,
    "min_pixels": 256,
    "max_pixels": 1024,
    "count_rule": "stride",
}
_ON_GRIDS = {
    "llavolta": ({"compress_layer_idx": 1, "compress_stride": 4}, (0.5, 0.75), ()),
    "avg_llava": ({"filtered_text_num": 8, "router_num_heads": 4}, (0.5, 0.75), ("auto",)),
}
TINY |= {
    f"{method} on {base}": Tiny({**fields, **own}, _PATCHES, stock_qwen, budgets, GridImages(), scored)
    for method, (own, budgets, scored) in _ON_GRIDS.items()
    for base, fields in {"qwen3_vl": _QWEN3_VL, "qwen2_5_vl": _QWEN2_5_VL}.items()
}
if "qwen3_5" in CONFIG_MAPPING:
    # of transformers 5.2
    TINY["llavolta on qwen3_5"] = Tiny(
        {**_QWEN3_5, "compress_layer_idx": 0, "compress_stride": 4}, _PATCHES, stock_qwen, (0.5, 0.75), GridImages()
    )
TINY |= {
    f"cdpruner on {base}": Tiny(fields, _PATCHES, stock_qwen, (0.5, 0.75), GridImages(), ("auto", "some"))
    for base, fields in {"qwen3_vl": _QWEN3_VL, "qwen2_5_vl": _QWEN2_5_VL}.items()
}
TINY["cdpruner on llava_next"] = Tiny(
    {"vision_config": _CLIP, "text_config": _TEXT, "vision_feature_layer": -2}
    | {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": _PINPOINTS},
    {},
    stock_llava_next,
    images=AnyresImages(),
    scored=("auto", "some"),
)
# 3 x 3 tokens and a rest, as 27 x 27 of 384 pixels; maps of two tiles at most, so that small images are scaled down
_ONEVISION = {
    "vision_config": {**_CLIP, "model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 27},
    "text_config": {**_TEXT, "num_hidden_layers": 3},
    "vision_feature_select_strategy": "full",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": _PINPOINTS_OF_27,
    "max_map_tiles": 2,
}
_JOINED = {
    "tiling": "anyres",
    "size": 27,
    "image_grid_pinpoints": _PINPOINTS_OF_27,
    "max_map_tiles": 2,
    "image_seq_length": 9,
    "count_rule": "unpad_true_aspect",
}
_ON_ONEVISION = {
    "llavolta": ({"compress_layer_idx": 1, "compress_stride": 4}, (0.3, 0.6), ()),
    "avg_llava": ({"filtered_text_num": 8, "router_num_heads": 4}, (0.3, 0.6), ("auto",)),
    "cdpruner": ({}, (0.4, 0.6), ("auto", "some")),
}
TINY |= {
    f"{method} on llava_onevision": Tiny(
        {**_ONEVISION, **own}, _JOINED, stock_onevision, budgets, AnyresImages(), scored
    )
    for method, (own, budgets, scored) in _ON_ONEVISION.items()
}
CONTRACTED = tuple(TINY)


def _tiny_of(config) -> Tiny:
    name = record_of(config).name
    joined = "llava_next" if config.max_map_tiles is None else "llava_onevision"
    base = joined if config.mm_patch_merge_type == "spatial_unpad" else config.grid_base
    return TINY.get(f"{name} on {base}", TINY[name])


def images_of(config) -> TiledImages | SizedImages:
    return _tiny_of(config).images


def scored_budgets_of(config) -> tuple[str, ...]:
    return _tiny_of(config).scored


def budgets_of(config) -> tuple:
    return _tiny_of(config).budgets


class RandomBatch(dict):
    """Model inputs; `rows[i]` is row `i` alone: its token ids and the vision inputs of its images."""

    def __init__(self, config, rows: list[tuple[list[int], list[dict]]], padding_side: str):
        length = max(len(ids) for ids, _ in rows)
        ids, mask = [], []
        for row, _ in rows:
            pad, real = [0] * (length - len(row)), [1] * len(row)
            ids.append(pad + row if padding_side == "left" else row + pad)
            mask.append(pad + real if padding_side == "left" else real + pad)
        super().__init__(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        images = [image for _, row_images in rows for image in row_images]
        if images:
            self.update(images_of(config).collate(images))
        self.config, self.rows, self.padding_side = config, rows, padding_side


def random_batch(config, generator, num_rows=None, images_per_row=None, padding_side=None) -> RandomBatch:
    """Model inputs: 1-5 rows, 0-3 images a row, random sizes and text, padded on one side."""
    if images_per_row is None:
        images_per_row = [draw_int(0, 3, generator) for _ in range(num_rows or draw_int(1, 5, generator))]
        if num_rows is not None:
            # whoever fixes the number of rows wants an image among them
            images_per_row[0] = max(images_per_row[0], 1)
    padding_side = padding_side or ("left", "right")[draw_int(0, 1, generator)]
    rows = []
    for num_images in images_per_row:
        row, images = _text(draw_int(2, 6, generator), generator), []
        for _ in range(num_images):
            image, reserved = images_of(config).draw(config, generator, num_images == 1)
            images.append(image)
            row += [*images_of(config).opening, *[config.image_token_id] * reserved]
            row += _text(draw_int(1, 5, generator), generator)
        rows.append((row + _text(draw_int(2, 6, generator), generator), images))
    return RandomBatch(config, rows, padding_side)


def _text(length: int, generator) -> list[int]:
    return torch.randint(1, 200, (length,), generator=generator).tolist()


def row_of(batch: RandomBatch, row: int) -> RandomBatch:
    """One row of a batch, without padding and with its own images only."""
    return RandomBatch(batch.config, [batch.rows[row]], batch.padding_side)


def image_for_estimate(config, batch) -> dict:
    """Arguments of `estimate` for the only image of a batch."""
    if config.model_type == "vtc_convllava":
        height, width = batch["image_sizes"][0].tolist()
        processor = VtcImageProcessor("keep_aspect", min(height, width), token_stride=config.token_stride)
        return {"image_size": (height, width), "image_processor": processor}
    if "image_sizes" in batch:
        return {"image_size": tuple(batch["image_sizes"][0].tolist())}
    return {"num_tiles": int(batch["num_tiles"][0])}
