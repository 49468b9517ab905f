"""Models by the name of their shape: for `estimate` without a config, and for `bench` with random weights."""

from collections.abc import Mapping
from typing import Any

import psutil
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..methods.record import RECORDS, Record
from ..methods.shapes import BASE_SHAPES, Shape
from ..models.image_processing_vtc import VtcImageProcessor
from .render import binary_bytes

# a text token that is none of the special ones of any decoder here, and a placeholder that has a row of its own
_FIRST_TEXT_ID, _IMAGE_TOKEN_ID = 10, 9


def shapes_of_methods() -> dict[str, tuple[Record, Shape]]:
    """Shapes of compressing models, with the record of their method, by name such as `vico-8b`."""
    return {
        f"{record.name.replace('_', '-')}-{size}": (record, shape)
        for record in sorted(RECORDS.values(), key=lambda record: record.name)
        for size, shape in record.shapes.items()
    }


def shape_names() -> list[str]:
    """Every shape that `config_of_shape` knows."""
    return [*BASE_SHAPES, *shapes_of_methods()]


def config_of_shape(name: str) -> tuple[dict[str, Any], Shape]:
    """The content of a `config.json` of a shape, and the shape.

    Raises:
        ValueError: there is no shape of that name.
    """
    own = shapes_of_methods()
    if name in own:
        return _config(*own[name]).to_dict(), own[name][1]
    if name in BASE_SHAPES:
        return BASE_SHAPES[name].config(), BASE_SHAPES[name]
    raise ValueError(f"`shape` must be one of {', '.join(shape_names())}, got {name!r}.")


def image_processor_of_shape(shape: Shape) -> VtcImageProcessor | None:
    """What cuts images for a shape, None where its config says it."""
    return VtcImageProcessor(**shape.tiling) if shape.tiling else None


def model_of_shape(name: str, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, Shape]:
    """A compressing model of a shape in eval mode, with random weights that are made on its device.

    Raises:
        ValueError: there is no shape of that name, or its model does not compress.
        MemoryError: it does not fit into this machine.
    """
    own = shapes_of_methods()
    if name not in own:
        what = "does not compress, so that there is nothing to measure" if name in BASE_SHAPES else "is no shape"
        raise ValueError(f"{name!r} {what}. Give one of {', '.join(own)}.")
    torch.manual_seed(0)
    record, shape = own[name]
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(_config(record, shape), dtype=dtype)
    _require_memory(name, skeleton.num_parameters() * dtype.itemsize, device)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(_config(record, shape), dtype=dtype)
    # answers have no end of their own
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval().to(device), shape


def inputs_of_shape(
    model: PreTrainedModel, shape: Shape, batch_size: int = 1, num_text_tokens: int = 64
) -> dict[str, torch.Tensor]:
    """Prompts of one image of noise each, with half of the text before it and half behind."""
    generator = torch.Generator().manual_seed(0)
    height, width = shape.image_size
    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(noise.numpy())
    vision = VtcImageProcessor(**shape.tiling)(images=[picture] * batch_size, return_tensors="pt")
    num_tiles = vision.get("num_tiles", torch.ones(batch_size, dtype=torch.long))
    grids = vision.get("image_grid_thw")
    image_sizes = vision["image_sizes"] if grids is None else model.config.sizes_of_grids(grids)
    sizes = model.config.sizes_of(num_tiles, image_sizes)
    (reserved,) = set(model.config.reserved_tokens(sizes).tolist())
    text_ids = (_FIRST_TEXT_ID, model.config.text_config.vocab_size)
    text = torch.randint(*text_ids, (batch_size, num_text_tokens), generator=generator)
    image = torch.full((batch_size, reserved), _IMAGE_TOKEN_ID)
    before = num_text_tokens // 2
    input_ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **vision}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


def _config(record: Record, shape: Shape) -> Any:
    fields: Mapping[str, Any] = {"image_token_id": _IMAGE_TOKEN_ID, **shape.config()}
    return record.config(**fields)


def _require_memory(name: str, num_bytes: int, device: torch.device) -> None:
    """Refuse a model that does not fit: a system that runs out of memory ends programs without a word."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        # accelerate, which is required, brings it
        free = psutil.virtual_memory().available
    else:
        return
    if num_bytes > free:
        raise MemoryError(
            f"The weights of {name} take {binary_bytes(num_bytes)}, but {device.type} has {binary_bytes(free)} free. "
            "Take a smaller shape, 16 bits a value, or another device."
        )
