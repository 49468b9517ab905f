"""Models whose parameters are spread over processes: what they gather together, and batches that ask for all of it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..methods import record_of
from ..models.grids_vtc import black_image
from .checkpoints import CheckpointTrainer
from .losses import IGNORE_INDEX

T = TypeVar("T")
# what holds the images of a batch, and its videos
PIXELS = ("pixel_values", "pixel_values_videos")


def shows_images(inputs: dict[str, Any]) -> bool:
    """Whether a batch has images or videos, as pixels."""
    return any(inputs.get(name) is not None for name in PIXELS)


def black_tile(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs of the smallest prompt with an image: the placeholders of one black tile."""
    config = model.config
    if config.grid_base is not None:
        ids = torch.full((1, config.image_seq_length), config.image_token_id, device=model.device)
        black = black_image(config)
        black["pixel_values"] = black["pixel_values"].to(model.device, model.dtype)
        return {"input_ids": ids, **black}
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    ids = torch.full((1, config.image_seq_length), config.image_token_id, device=model.device)
    channels = config.vision_config.num_channels
    pixel_values = torch.zeros(1, channels, height, width, device=model.device, dtype=model.dtype)
    return {"input_ids": ids, "pixel_values": pixel_values, "num_tiles": torch.ones(1, dtype=torch.long)}


def with_black_tile(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch of text with one more row, a black tile without labels: losses are those of the text.

    Args:
        model ([`PreTrainedModel`]): our own model, not a wrapper.
        inputs (`dict`): a batch without images, `input_ids` `(B, L)` and what belongs to them.
    """
    tile = black_tile(model)
    placeholders, ids = tile.pop("input_ids"), inputs["input_ids"]
    length = max(placeholders.shape[1], ids.shape[1])

    def stacked(text: torch.Tensor, row: torch.Tensor, value: int) -> torch.Tensor:
        padded = [nn.functional.pad(each, (length - each.shape[1], 0), value=value) for each in (text, row)]
        return torch.cat(padded)

    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    rows = {
        "input_ids": stacked(ids, placeholders, 0),
        "attention_mask": stacked(mask, torch.ones_like(placeholders), 0),
    }
    if "labels" in inputs:
        nothing = torch.full_like(placeholders, IGNORE_INDEX)
        rows["labels"] = stacked(inputs["labels"], nothing, IGNORE_INDEX)
    return {**inputs, **rows, **tile}


def sharded_units(model: PreTrainedModel) -> list[str]:
    """Classes of the modules that FSDP gathers one by one; the rest of a model is gathered once for a forward pass.

    Every process must run modules of these classes in the same order.

    Args:
        model ([`PreTrainedModel`]): our own model, not a wrapper.
    """
    names = set(model._no_split_modules)
    sharding = record_of(model.config).need("sharding", "FSDP")
    return sorted(names - sharding.left_out(model))


class ShardedTrainer(CheckpointTrainer):
    """A `Trainer` for models of hf_vtc whose parameters may be spread over processes. Abstract.

    Raises:
        ValueError: the model cannot train so.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            units = sharded_units(self.unwrap(self.model))
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = units
        sharded_by_zero = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        if sharded_by_zero and (problem := record_of(self.model.config).need("sharding", "ZeRO-3").zero3_problem):
            raise ValueError(problem)

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters of the model are spread over processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def unwrap(self, model: nn.Module) -> PreTrainedModel:
        """Our own model inside the wrappers of accelerate and PEFT."""
        # accelerate looks for compiled ones among all modules, at every call
        if not isinstance(model, PreTrainedModel | PeftModel):
            model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def place_reference(self, reference_model: PreTrainedModel) -> PreTrainedModel:
        """Freeze a reference model, switch its dropout off and put it on this process's device, whole."""
        reference_model = reference_model.requires_grad_(False).eval()
        # accelerate would leave it where it is if the policy is sharded
        return self.accelerator.prepare_model(reference_model, device_placement=True, evaluation_mode=True)

    def in_forward(self, model: nn.Module, function: Callable[[], T]) -> T:
        """Call a function that uses parts of a model, in place of the model's `forward` if it is sharded.

        Sharded parameters are whole only while the wrapper's own forward pass runs.

        Args:
            model (`nn.Module`): wrapped or not.
            function (`Callable`): without arguments; what it returns is returned.
        """
        if not self.is_sharded:
            return function()
        own = self.unwrap(model)
        replaced = vars(own).get("forward")
        own.forward = lambda: function()
        try:
            return model()
        finally:
            del own.forward
            if replaced is not None:
                own.forward = replaced

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.is_sharded and not {*PIXELS, "image_features"} & inputs.keys():
            inputs = with_black_tile(self.unwrap(self.model), inputs)
        return inputs
