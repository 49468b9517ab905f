"""What each method keeps, as a drawing: one pure function per method, chosen by `config.model_type`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..models.modeling_compressors_llavolta import consecutive_windows, square_windows, strided_picks
from ..models.tiling_vtc import TileLayout, joined_order, unpadded_grids
from .canvas import Drawing, Tile

# Okabe-Ito: told apart by readers with any colour vision
FULL_COLOUR = (0, 114, 178)
COMPRESSED_COLOUR = (213, 94, 0)


@dataclass
class Kept:
    """One image of a call; fields are the arguments of `overlay`."""

    layout: TileLayout
    output: Any
    config: Any
    image_idx: int
    num_tiles: list[int] | None
    tokens_per_tile: tuple[int, int] | None

    @property
    def num_tokens(self) -> int | None:
        """Visual tokens that the image keeps; None if only decisions are known."""
        if isinstance(self.output, (torch.Tensor, list, tuple)):
            return None
        counts = self.output.num_visual_tokens
        if counts is None:
            raise ValueError("`output` holds no `num_visual_tokens`. Pass the output of a forward with images.")
        self.check_image(len(counts))
        return int(counts[self.image_idx])

    def decisions(self, what: str, dtype: torch.dtype, ndim: int) -> torch.Tensor:
        """The method's decisions on the CPU, of all images.

        Args:
            what (`str`): what each of them is, for the error message.
        """
        decisions = self.output
        if not isinstance(self.output, (torch.Tensor, list, tuple)):
            decisions = self.output.router_decisions
        if decisions is None:
            raise ValueError("`output` holds no `router_decisions`. Pass the output of a forward with images.")
        decisions = torch.as_tensor(decisions).cpu()
        if decisions.dtype != dtype or decisions.ndim != ndim:
            raise ValueError(
                f"`output` must hold {what}, got {decisions.dtype} of shape {tuple(decisions.shape)}. Pass "
                "`config=model.config` of the model that gave it."
            )
        return decisions

    def own_tiles(self, decisions: torch.Tensor) -> torch.Tensor:
        """Decisions about the tiles of this image."""
        counts = [len(decisions)] if self.num_tiles is None else self.num_tiles
        own, idx = self.layout.num_tiles, self.image_idx
        if sum(counts) != len(decisions) or not 0 <= idx < len(counts) or counts[idx] != own:
            height, width = self.layout.image_size
            raise ValueError(
                f"Image {idx} of {height} x {width} pixels has {own} tiles, but the decisions are for {counts} tiles "
                f"per image ({len(decisions)} together). Pass the `processor` that cut the images, and its "
                "`num_tiles` if there are several."
            )
        first = sum(counts[:idx])
        return decisions[first : first + own]

    def check_image(self, num_images: int) -> None:
        """Raise unless the image is one of `num_images`."""
        if not 0 <= self.image_idx < num_images:
            raise ValueError(f"`image_idx` must be from 0 to {num_images - 1}, got {self.image_idx}.")


def _colour(compressed: bool) -> tuple[int, int, int]:
    return COMPRESSED_COLOUR if compressed else FULL_COLOUR


def _kept_line(kept: int, reserved: int) -> tuple[None, str]:
    return None, f"kept {kept} of {reserved} visual tokens ({reserved / kept:.2f} x fewer)"


def _cells(sources: torch.Tensor, tokens: torch.Tensor, num_tiles: int, grid: tuple[int, int]) -> list[np.ndarray]:
    """Cells of every tile: `sources` are indices into all cells (-1 for none), `tokens` what stands there."""
    cells = torch.full((num_tiles * grid[0] * grid[1],), -1)
    cells[sources[sources >= 0]] = tokens[sources >= 0]
    return list(cells.reshape(num_tiles, *grid).numpy())


def _sequence(layout: TileLayout, grid: tuple[int, int], rule: str | None) -> torch.Tensor:
    """Which cell of an image, tile by tile, each of its visual tokens is; -1 for a newline.

    Args:
        grid (`tuple[int, int]`): (rows, columns) of tokens in a tile.
        rule (`str`, *optional*): how padding is cut off where tiles are joined to a map; None: they are not.
    """
    if rule is None or layout.num_tiles == 1:
        return torch.arange(layout.num_tiles * grid[0] * grid[1])
    size, tiles = torch.tensor([layout.image_size]), torch.tensor([layout.grid])
    (kept,) = unpadded_grids(size, tiles, grid, rule).tolist()
    return joined_order(layout.grid, grid, tuple(kept))


def vico(kept: Kept) -> Drawing:
    """Full tiles as they are, compressed ones veiled under the grid of what they keep."""
    own = kept.own_tiles(kept.decisions("one truth value per tile", torch.bool, 1)).tolist()
    full, small = kept.tokens_per_tile or (None, None)
    if kept.config is not None:
        full, small = kept.config.image_seq_length, kept.config.compressed_seq_length
    grid = math.isqrt(small) if small else 4
    tiles = []
    for compressed in own:
        count = small if compressed else full
        label = None if count is None else str(count)
        cells = np.arange(grid**2).reshape(grid, grid) if compressed else None
        tiles.append(Tile(_colour(compressed), cells, label, veiled=compressed))
    legend = []
    for compressed, name, each in ((False, "full", full), (True, "compressed", small)):
        count = own.count(compressed)
        tokens = f", {each} visual tokens each" if each is not None and count else ""
        legend.append((_colour(compressed), f"{name}: {count} of {len(own)} tiles{tokens}"))
    if full is not None and small is not None:
        legend.append(_kept_line(full * own.count(False) + small * own.count(True), full * len(own)))
    return Drawing(tiles, legend)


def avg_llava(kept: Kept) -> Drawing:
    """Every tile under the grid of the granularity that the image got."""
    config, layout = kept.config, kept.layout
    decisions = kept.decisions("one granularity per image", torch.long, 1)
    kept.check_image(len(decisions))
    granularity_idx, scales = int(decisions[kept.image_idx]), config.vis_token_granularity
    rule = config.unpad_rule if config.mm_patch_merge_type == "spatial_unpad" else None
    grids = config.granularity_grids
    order, finest = (_sequence(layout, grid, rule) for grid in (grids[granularity_idx], grids[-1]))
    cells = _cells(order, order, layout.num_tiles, grids[granularity_idx])
    compressed = granularity_idx < len(scales) - 1
    colour, label = _colour(compressed), str(scales[granularity_idx])
    rows, columns = grids[granularity_idx]
    legend = [
        (colour, f"{scales[granularity_idx]} tokens per tile ({rows} x {columns}), of {', '.join(map(str, scales))}"),
        _kept_line(len(order), len(finest)),
    ]
    return Drawing([Tile(colour, each, label) for each in cells], legend)


def llavolta(kept: Kept) -> Drawing:
    """The patches that become one token, in a colour of their own."""
    config, layout, count = kept.config, kept.layout, kept.num_tokens
    side = math.isqrt(config.image_seq_length)
    rule = config.unpad_rule if config.mm_patch_merge_type == "spatial_unpad" else None
    order = _sequence(layout, (side, side), rule)
    strides = (stride for stride in range(1, len(order) + 1) if config.kept_tokens(len(order), stride) == count)
    stride = next(strides)
    windows = {
        "avgpool1d": lambda: consecutive_windows(len(order), stride),
        "uniform": lambda: strided_picks(len(order), stride),
        "avgpool2d": lambda: square_windows(len(order), stride, side),
    }
    # the other compressors choose by content, of which the output says nothing
    known = config.compressor in windows
    members = windows[config.compressor]() if known else torch.arange(len(order))[:, None]
    tokens = torch.arange(len(members)).repeat_interleave(members.shape[1])
    cells = _cells(order[members.flatten()], tokens, layout.num_tiles, (side, side))
    compressed = stride > 1
    layer_idx = config.compress_layer_idx
    where = f"before layer {layer_idx}" if layer_idx >= 0 else "before the decoder"
    legend = [
        (_colour(compressed), f"{config.compressor} by {stride} {where}" if compressed else "no compression"),
        _kept_line(count, len(order)),
    ]
    return Drawing([Tile(_colour(compressed), each, filled=known and compressed) for each in cells], legend)


def vistog(kept: Kept) -> Drawing:
    """The semantic groups of every tile as a segmentation; a tile that stays whole under the grid of its patches."""
    config = kept.config
    own = kept.own_tiles(kept.decisions("the group of each patch of each tile", torch.long, 2))
    side, tiles = math.isqrt(own.shape[1]), []
    for groups in own:
        grouped = bool((groups >= 0).all())
        cells = groups if grouped else torch.arange(len(groups))
        count = config.num_semantic_tokens if grouped else len(groups)
        tiles.append(Tile(_colour(grouped), cells.reshape(side, side).numpy(), str(count), filled=grouped))
    num_grouped = int((own >= 0).all(1).sum())
    used = [len(groups.unique()) for groups in own if groups[0] >= 0]
    fewest = f", at least {min(used)} of them with patches" if used else ""
    total = num_grouped * config.num_semantic_tokens + (len(own) - num_grouped) * own.shape[1]
    legend = [
        (
            _colour(num_grouped > 0),
            f"{num_grouped} of {len(own)} tiles in {config.num_semantic_tokens} semantic groups{fewest}",
        ),
        _kept_line(total, own.numel()),
    ]
    return Drawing(tiles, legend)


def convllava(kept: Kept) -> Drawing:
    """The grid of tokens over the image that the tower sees; pixels at the end that fill no token are veiled."""
    layout, count, stride = kept.layout, kept.num_tokens, kept.config.token_stride
    rows, columns = layout.token_grid or (0, 0)
    if rows * columns != count:
        raise ValueError(
            f"An image of {layout.image_size[0]} x {layout.image_size[1]} pixels has {rows} x {columns} visual tokens "
            f"by its processor, but {count} by the output. Pass the `processor` that cut the images."
        )
    left, top, right, bottom = layout.boxes[0]
    # of the resized image the tower sees what lies in the tile
    seen = [
        resized * min(1.0, length / whole)
        for resized, length, whole in zip(layout.resized_size, (bottom - top, right - left), layout.image_size)
    ]
    covered = (rows * stride / seen[0], columns * stride / seen[1])
    legend = [(FULL_COLOUR, f"{rows} x {columns} = {count} visual tokens, one per {stride} x {stride} pixels seen")]
    return Drawing([Tile(FULL_COLOUR, np.arange(count).reshape(rows, columns), str(count), covered=covered)], legend)


DRAWINGS: dict[str, Callable[[Kept], Drawing]] = {
    "vtc_vico": vico,
    "vtc_avg_llava": avg_llava,
    "vtc_llavolta": llavolta,
    "vtc_vistog": vistog,
    "vtc_convllava": convllava,
}
