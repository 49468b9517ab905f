"""How many placeholders an image reserves: one pure function per rule (contract: reserve, then pack)."""

import math
from collections.abc import Callable
from functools import partial

import torch

from .grids_vtc import scaled_down
from .tiling_vtc import TileLayout, unpadded_grids


def tokens_of_tiles(layout: TileLayout, image_seq_length: int) -> int:
    """Reserved placeholders of a method that keeps at most `image_seq_length` tokens of every tile."""
    return layout.num_tiles * image_seq_length


def tokens_of_map(layout: TileLayout, image_seq_length: int, rule: str) -> int:
    """Reserved placeholders of `"anyres"` tiles that become one map without padding: the base tile's, then the map's
    with one newline per row. A tile that is the whole image (`"single"`, `"pad"`) has no map, and a newline where maps
    are scaled down."""
    if layout.num_tiles == 1:
        return image_seq_length + int(layout.max_map_tiles is not None)
    side = math.isqrt(image_seq_length)
    size, grid = torch.tensor([layout.image_size]), torch.tensor([layout.grid])
    kept = unpadded_grids(size, grid, (side, side), rule)
    ((rows, columns),) = scaled_down(kept, (side, side), layout.max_map_tiles).tolist()
    return image_seq_length + rows * (columns + 1)


def tokens_of_stride(layout: TileLayout, image_seq_length: int) -> int:
    """Reserved placeholders of a tower that gives one token for every `token_stride` x `token_stride` pixels.

    Raises:
        ValueError: the image processor has no `token_stride`.
    """
    if layout.token_grid is None:
        raise ValueError("`count_rule='stride'` needs `token_stride` of the image processor, such as 64. Set it.")
    return layout.token_grid[0] * layout.token_grid[1]


# `count_rule` -> reserved placeholders of one image; a method with another rule adds its pure function here
COUNT_RULES: dict[str, Callable[[TileLayout, int], int]] = {
    "tiles": tokens_of_tiles,
    "unpad_token_grid": partial(tokens_of_map, rule="token_grid"),
    "unpad_true_aspect": partial(tokens_of_map, rule="true_aspect"),
    "stride": tokens_of_stride,
}
