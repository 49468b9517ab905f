"""Images as grids of visual tokens, each of its own size: arithmetic on grids, without a pixel."""

from typing import Any

import torch


def grid_positions(
    placeholder_mask: torch.Tensor, attention_mask: torch.Tensor, grids: torch.LongTensor
) -> torch.LongTensor:
    """Positions `(3, B, L)` in time, height and width, as Qwen2.5-VL and Qwen3-VL count them; padding has 0.

    Text stands at one number on all axes. An image begins where text would: its tokens have the time of that place,
    and their row and column are added to it. Behind it text goes on at the longer side of the grid.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): where visual tokens are.
        attention_mask (`torch.Tensor` of shape `(B, L)`): 0 = padding.
        grids (`torch.LongTensor` of shape `(num_images, 2)`): (rows, columns) of the visual tokens of each image, in
            prompt order.

    Source: `get_rope_index` of transformers 4.57.6, for images.
    """
    real, counts = attention_mask.bool(), grids.prod(-1)
    ends = counts.cumsum(0)
    places = torch.arange(int(counts.sum())) - torch.repeat_interleave(ends - counts, counts)
    columns = torch.repeat_interleave(grids[:, 1], counts)
    within = torch.stack([torch.zeros_like(places), places // columns, places % columns])
    # how far the next token is
    behind = torch.zeros_like(places)
    behind[ends - 1] = grids.amax(-1)
    steps = (real & ~placeholder_mask).long()
    steps[placeholder_mask] = behind
    positions = ((steps.cumsum(1) - steps) * real).repeat(3, 1, 1)
    positions[:, placeholder_mask] += within
    return positions


def black_image(config: Any) -> dict[str, torch.Tensor]:
    """Arguments of `forward` for the smallest image, black.

    Args:
        config (`VtcConfig`): of the model.
    """
    vision = config.vision_config
    if config.grid_base is None:
        height, width = config.smallest_image
        return {
            "pixel_values": torch.zeros(1, vision.num_channels, height, width),
            "num_tiles": torch.ones(1, dtype=torch.long),
            "image_sizes": torch.tensor([[height, width]]),
        }
    side = vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(side**2, patch), "image_grid_thw": torch.tensor([[1, side, side]])}
