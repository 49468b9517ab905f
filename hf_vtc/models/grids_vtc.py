"""Images as grids of visual tokens, each of its own size: their sizes, patches, positions and windows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# patches of Qwen's towers hold two frames, which are the same of an image
FRAMES_OF_PATCH = 2
# of the sides of an image, above which the published processors refuse it
_LONGEST = 200


def size_of_grid(
    height: int,
    width: int,
    stride: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    frames_shrunk: int = 1,
) -> tuple[int, int]:
    """(height, width) in pixels to which an image is resized: multiples of `stride` near its own size and shape.

    Args:
        height, width (`int`): of the image, in pixels.
        stride (`int`): side of one visual token, in pixels.
        min_pixels, max_pixels (`int`): of the resized image, where its shape allows; of all frames of a video.
        num_frames (`int`): of a video, for which the limits are.
        frames_shrunk (`int`): of a video, by which it is shrunk where it is beyond them.

    Raises:
        ValueError: the image is too long and thin.

    Source: `smart_resize` of Qwen's processors, whose double precision decides what is rounded.
    """
    if max(height, width) > _LONGEST * min(height, width):
        raise ValueError(
            f"An image may be {_LONGEST} times as long as wide at most, got {height} x {width} pixels (height x "
            "width). Crop it first."
        )
    rows, columns = round(height / stride), round(width / stride)
    num_pixels = num_frames * rows * columns * stride**2
    if num_pixels > max_pixels:
        shrunk = math.sqrt(frames_shrunk * height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrunk / stride)) for side in (height, width))
    elif num_pixels < min_pixels:
        grown = math.sqrt(min_pixels / (frames_shrunk * height * width))
        rows, columns = (math.ceil(side * grown / stride) for side in (height, width))
    return rows * stride, columns * stride


def patches_of(pixels: np.ndarray, patch_size: int, merge: int) -> np.ndarray:
    """Patches of an image in the order in which the tower's connector merges them.

    Args:
        pixels (`np.ndarray` of shape `(3, H, W)`): sides are multiples of `patch_size * merge`.
        patch_size (`int`): side of a patch, in pixels.
        merge (`int`): side of what becomes one visual token, in patches.

    Returns:
        `(H / patch_size * W / patch_size, 3 * 2 * patch_size^2)`: the patches of one visual token follow each other.
    """
    return patches_of_frames(np.stack([pixels] * FRAMES_OF_PATCH), patch_size, merge)


def patches_of_frames(pixels: np.ndarray, patch_size: int, merge: int) -> np.ndarray:
    """Patches of the frames of a video, `FRAMES_OF_PATCH` of which share a patch, one time after the other.

    Args:
        pixels (`np.ndarray` of shape `(F, 3, H, W)`): as many frames as fill patches.
        patch_size, merge (`int`): as in `patches_of`.

    Returns:
        `(F / 2 * H / patch_size * W / patch_size, 3 * 2 * patch_size^2)`.
    """
    frames, channels, height, width = pixels.shape
    times, rows, columns = frames // FRAMES_OF_PATCH, height // (patch_size * merge), width // (patch_size * merge)
    shape = (times, FRAMES_OF_PATCH, channels, rows, merge, patch_size, columns, merge, patch_size)
    patches = pixels.reshape(shape).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(times * rows * columns * merge**2, -1)


def halved_grids(side: int) -> list[tuple[int, int]]:
    """(rows, columns) of a square grid whose columns and rows are halved in turns, as far as that goes.

    An even side is halved while it stays whole; half of an odd one, as of LLaVA-OneVision's 27, is rounded up.
    """
    grids = [(side, side)]
    while True:
        rows, columns = grids[-1]
        longer = columns if rows == columns else rows
        if longer == 1 or longer % 2 and side % 2 == 0:
            return grids
        half = -(-longer // 2)
        grids.append((rows, half) if rows == columns else (half, columns))


def pooled_grid(side: int, scale: int) -> tuple[int, int]:
    """(rows, columns) that `scale` tokens form, as one of `halved_grids`.

    Args:
        side (`int`): of the grid.
        scale (`int`): tokens that remain.

    Raises:
        ValueError: halving does not lead there.
    """
    found = [grid for grid in halved_grids(side) if grid[0] * grid[1] == scale]
    if not found:
        scales = ", ".join(str(rows * columns) for rows, columns in halved_grids(side))
        raise ValueError(
            f"A granularity of {scale} tokens cannot be reached by halving columns and rows of a {side} x {side} grid "
            f"in turns. Use some of {scales}."
        )
    return found[0]


def halved_window(side: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(high, wide) of what becomes one token of `grid`, one of `halved_grids`."""
    halvings = halved_grids(side).index(grid)
    return 2 ** (halvings // 2), 2 ** (halvings - halvings // 2)


def grid_windows(
    length: int, columns: int, high: int, wide: int, num_frames: int = 1
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Windows of `high` x `wide` tokens of one grid, row by row; those at its edges have the members that are there.

    Args:
        length (`int`): tokens, a multiple of `columns`.
        num_frames (`int`): grids of `length` tokens that follow each other, at the same place in all of which the
            members of a window are.

    Returns:
        Members of all windows, one after the other and each in order of place, and how many each has.
    """
    places = torch.arange(length)
    window = (places // columns // high * -(-columns // wide) + places % columns // wide).repeat(num_frames)
    return torch.argsort(window, stable=True), torch.bincount(window)


def windows_of_images(
    grids: Sequence[Sequence[int]], windows: Sequence[tuple[int, int]]
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """`grid_windows` of images that follow each other, each of (rows, columns) and with its (high, wide) windows."""
    members, widths, start = [], [], 0
    for (rows, columns), window in zip(grids, windows, strict=True):
        own, counts = grid_windows(rows * columns, columns, *window)
        members.append(own + start)
        widths.append(counts)
        start += rows * columns
    return torch.cat(members), torch.cat(widths)


def mean_places(places: torch.LongTensor, members: torch.LongTensor, widths: torch.LongTensor) -> torch.LongTensor:
    """Means `(..., M)` of places `(..., V)` over windows, as `windows_of_images` gives them, rounded down."""
    ends = torch.nn.functional.pad(widths.cumsum(0), (1, 0))
    sums = torch.nn.functional.pad(places[..., members].cumsum(-1), (1, 0))
    return sums[..., ends].diff(dim=-1) // widths


def grid_positions(
    placeholder_mask: torch.Tensor,
    attention_mask: torch.Tensor,
    grids: torch.LongTensor,
    windows: Sequence[tuple[int, int]] | None = None,
    times: torch.LongTensor | None = None,
    steps: torch.LongTensor | None = None,
) -> torch.LongTensor:
    """Positions `(3, B, L)` in time, height and width, as Qwen2.5-VL and Qwen3-VL count them; padding has 0.

    Text stands at one number on all axes. An image begins where text would: its tokens have the time of that place,
    and their row and column are added to it. Behind it text goes on at the longer side of the grid.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): where visual tokens are.
        attention_mask (`torch.Tensor` of shape `(B, L)`): 0 = padding.
        grids (`torch.LongTensor` of shape `(num_images, 2)`): (rows, columns) of the visual tokens of each image, in
            prompt order.
        windows (`Sequence[tuple[int, int]]`, *optional*): (high, wide) of each image, if its placeholders are those of
            windows of its grid; each stands at the mean of its members on each axis, rounded down.
        times (`torch.LongTensor` of shape `(num_images,)`, *optional*): how far each is behind the place where it
            begins, in time. Default: not at all.
        steps (`torch.LongTensor` of shape `(num_images,)`, *optional*): how far what follows each image is from where
            that began. Default: the longer side of its grid.

    Source: `get_rope_index` of transformers 4.57.6, for images and for frames of videos that text sets apart.
    """
    real, counts = attention_mask.bool(), grids.prod(-1)
    ends = counts.cumsum(0)
    places = torch.arange(int(counts.sum())) - torch.repeat_interleave(ends - counts, counts)
    columns = torch.repeat_interleave(grids[:, 1], counts)
    times = torch.zeros_like(counts) if times is None else times
    within = torch.stack([torch.repeat_interleave(times, counts), places // columns, places % columns])
    if windows is not None:
        within = mean_places(within, *windows_of_images(grids.tolist(), windows))
        ends = (-(-grids // torch.tensor(windows))).prod(-1).cumsum(0)
    # how far the next token is
    behind = torch.zeros_like(within[0])
    behind[ends - 1] = grids.amax(-1) if steps is None else steps
    steps = (real & ~placeholder_mask).long()
    steps[placeholder_mask] = behind
    positions = ((steps.cumsum(1) - steps) * real).repeat(3, 1, 1)
    positions[:, placeholder_mask] += within
    return positions


def scaled_down(kept: torch.LongTensor, tokens: tuple[Any, Any], max_map_tiles: int | None) -> torch.LongTensor:
    """Rows and columns of maps of which none has much more tokens than `max_map_tiles` tiles.

    Args:
        kept (`torch.LongTensor` of shape `(..., 2)`): (rows, columns), as `unpadded_grids` gives them.
        tokens: as there.
        max_map_tiles (`int`, *optional*): None for no limit.

    Source: transformers' LLaVA-OneVision, `pack_image_features`, whose double precision decides what is rounded.
    """
    if max_map_tiles is None:
        return kept
    ratio = (kept.prod(-1).double() / (max_map_tiles * tokens[0] * tokens[1])).sqrt()[..., None]
    # of coarse maps that are long and thin a row stays, which is less than one of the original's
    smaller = torch.div(kept.double(), ratio, rounding_mode="floor").long().clamp(min=1)
    return torch.where(ratio > 1.1, smaller, kept)


def scaled_map(tokens: torch.Tensor, per_tile: int, kept: tuple[int, int], scaled: tuple[int, int]) -> torch.Tensor:
    """The tokens of an image whose map has (rows, columns) `kept`, with one of `scaled` by bilinear interpolation.

    Args:
        tokens (`torch.Tensor` of shape `(per_tile + rows * (columns + 1), D)`): those of the whole view, then the map
            with a newline at the end of each row.
        per_tile (`int`): tokens of the whole view.

    Source: transformers' LLaVA-OneVision, `pack_image_features`.
    """
    whole, rows = tokens[:per_tile], tokens[per_tile:].unflatten(0, (kept[0], kept[1] + 1))
    # in the order of memory of the original, by which half precision rounds
    content = rows[:, :-1].permute(2, 0, 1)[None].contiguous()
    content = torch.nn.functional.interpolate(content, scaled, mode="bilinear")[0].permute(1, 2, 0)
    return torch.cat([whole, torch.cat([content, rows[: scaled[0], -1:]], dim=1).flatten(0, 1)])


def pooled_frames(tokens: torch.Tensor, grid: tuple[int, int], pooled: tuple[int, int]) -> torch.Tensor:
    """Visual tokens `(T, rows * columns, D)` of frames as fewer, by bilinear interpolation.

    Args:
        grid, pooled: (rows, columns) before and behind it.

    Source: transformers' LLaVA-OneVision, `apply_pooling`.
    """
    # in the order of memory of the original, by which half precision rounds
    maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
    return torch.nn.functional.interpolate(maps, pooled, mode="bilinear").flatten(2).transpose(1, 2)


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
