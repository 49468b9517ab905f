"""What one call asks for, and what a compressor answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .budget_vtc import Budget
from .packing_vtc import placeholder_runs, to_host


@dataclass
class VisionInputs:
    """What the caller said about the images of one call; shapes are those of `VtcModel.forward`."""

    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    num_tiles: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    vtc_budget: Budget | Sequence[Budget] = None
    router_decisions: torch.Tensor | None = None

    @property
    def given(self) -> bool:
        return self.pixel_values is not None or self.image_features is not None


@dataclass
class HostPrompt:
    """The prompt of one call on the CPU: what decisions and plans are made from."""

    placeholder_mask: torch.Tensor  # (B, L) bool
    attention_mask: torch.Tensor  # (B, L)
    num_tiles: torch.Tensor | None  # (num_images,)
    image_sizes: torch.Tensor | None  # (num_images, 2)
    router_decisions: torch.Tensor | None


class Prompt:
    """One call's prompt, on the device until `to_host` is called once."""

    def __init__(
        self,
        inputs_embeds: torch.Tensor,
        placeholder_mask: torch.Tensor,
        attention_mask: torch.Tensor | None,
        vision: VisionInputs,
    ):
        self.inputs_embeds = inputs_embeds
        self.placeholder_mask = placeholder_mask
        self.attention_mask = torch.ones_like(placeholder_mask) if attention_mask is None else attention_mask
        self.vision = vision
        self.host: HostPrompt | None = None

    def to_host(self, *scores: torch.Tensor) -> list[torch.Tensor]:
        """Fetch the prompt's layout and a router's scores in the one transfer of this call (C6).

        Returns the scores on the CPU; the layout is in `self.host` from then on.
        """
        optional = (self.vision.num_tiles, self.vision.image_sizes, self.vision.router_decisions)
        present = [tensor for tensor in optional if tensor is not None]
        placeholders, mask, *rest = to_host(self.placeholder_mask, self.attention_mask, *present, *scores)
        fetched = iter(rest)
        tiles, sizes, decisions = (None if tensor is None else next(fetched) for tensor in optional)
        self.host = HostPrompt(placeholders, mask, tiles, sizes, decisions)
        return list(fetched)


@dataclass
class VisualTokens:
    """What `compress` gives back: the kept visual tokens, and which of each block's placeholders they fill.

    `embeds` `(num_kept.sum(), D)` in prompt order; `num_reserved`, `num_kept` `(num_blocks,)` and `blocks_per_image`
    `(num_images,)` on the CPU. `slots` `(num_kept.sum(),)`, on the CPU: the placeholders of its block that the kept
    tokens fill, rising; the first ones if None. `position_shifts` `(num_kept.sum(),)`: if given, every token keeps the
    position that it has in the full-length prompt, visual tokens that of their placeholder plus this.
    `shortened_in_decoder`: `embeds` are all `num_reserved.sum()` tokens, and `decode` makes them `num_kept`.
    """

    embeds: torch.Tensor
    num_reserved: torch.LongTensor
    num_kept: torch.LongTensor
    blocks_per_image: torch.LongTensor
    router_logits: torch.Tensor | None = None
    router_decisions: torch.Tensor | None = None
    slots: torch.LongTensor | None = None
    position_shifts: torch.Tensor | None = None
    shortened_in_decoder: bool = False

    @property
    def per_image(self) -> torch.LongTensor:
        """Kept visual tokens of each image, `(num_images,)`."""
        image = torch.repeat_interleave(torch.arange(len(self.blocks_per_image)), self.blocks_per_image)
        return torch.zeros_like(self.blocks_per_image).index_add(0, image, self.num_kept)


def tiles_of_images(host: HostPrompt, num_tiles: int, tokens_per_tile: int) -> list[int]:
    """Tiles of each image, in prompt order; without `num_tiles` from the processor a run of placeholders is an image.

    Raises:
        ValueError: they do not add up to the `num_tiles` tiles that were given.
    """
    if host.num_tiles is None:
        tiles_per_image = [-(-length // tokens_per_tile) for _, length in placeholder_runs(host.placeholder_mask)]
    else:
        tiles_per_image = host.num_tiles.tolist()
    if sum(tiles_per_image) != num_tiles:
        raise ValueError(
            f"Image features and image tokens do not match: the prompts need {sum(tiles_per_image)} tiles of "
            f"{tokens_per_tile} placeholders, but {num_tiles} tiles were given. Pass `pixel_values` and `num_tiles` "
            "of the same images, in prompt order, and `input_ids` from the same call of the processor."
        )
    return tiles_per_image
