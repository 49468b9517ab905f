"""What records need to say what is drawn of a method: an image with its tiles, and how each tile looks."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..models.grids_vtc import scaled_down
from ..models.tiling_vtc import TileLayout, joined_order, unpadded_grids

Colour = tuple[int, int, int]
# what stands before a line of a legend: a colour, several for tiles that are `filled`, or nothing
Swatch = Colour | Literal["many"] | None
PAPER = (255, 255, 255)
# Okabe-Ito: told apart by readers with any colour vision
FULL_COLOUR = (0, 114, 178)
COMPRESSED_COLOUR = (213, 94, 0)


@dataclass
class Tile:
    """How one tile is drawn.

    Args:
        colour (`Colour`): of the frame.
        cells (`np.ndarray` of shape `(rows, columns)`, *optional*): which visual token each cell belongs to, -1 for
            none. Lines separate the cells of different tokens.
        label (`str`, *optional*): in the corner.
        veiled (`bool`): under white.
        filled (`bool`): every token of `cells` in a colour of its own.
        covered (`tuple[float, float]`): share of the tile's height and width that `cells` cover, from the top left.
    """

    colour: Colour
    cells: np.ndarray | None = None
    label: str | None = None
    veiled: bool = False
    filled: bool = False
    covered: tuple[float, float] = (1.0, 1.0)


class Drawing(NamedTuple):
    """The tiles of an image in the order of its layout, and lines of (swatch, text)."""

    tiles: list[Tile]
    legend: list[tuple[Swatch, str]]


@dataclass
class Kept:
    """One image of a call; fields are the arguments of `overlay`.

    `num_frames`: of a video, that have the tokens of this one in common.
    """

    layout: TileLayout
    output: Any
    config: Any
    image_idx: int
    num_tiles: list[int] | None
    tokens_per_tile: tuple[int, int] | None
    num_frames: int = 1

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
                f"per image ({len(decisions)} together). Pass the `processor` that cut the images, and if there are "
                "several the `num_tiles` that it gives with `return_layout=True`."
            )
        first = sum(counts[:idx])
        return decisions[first : first + own]

    def check_image(self, num_images: int) -> None:
        """Raise unless the image is one of `num_images`."""
        if not 0 <= self.image_idx < num_images:
            raise ValueError(f"`image_idx` must be from 0 to {num_images - 1}, got {self.image_idx}.")


def colour_of(compressed: bool) -> Colour:
    return COMPRESSED_COLOUR if compressed else FULL_COLOUR


def kept_line(kept: int, reserved: int) -> tuple[None, str]:
    return None, f"kept {kept} of {reserved} visual tokens ({reserved / kept:.2f} x fewer)"


def cells_of(sources: torch.Tensor, tokens: torch.Tensor, num_tiles: int, grid: tuple[int, int]) -> list[np.ndarray]:
    """Cells of every tile: `sources` are indices into all cells (-1 for none), `tokens` what stands there."""
    cells = torch.full((num_tiles * grid[0] * grid[1],), -1)
    cells[sources[sources >= 0]] = tokens[sources >= 0]
    return list(cells.reshape(num_tiles, *grid).numpy())


class TokenMap(NamedTuple):
    """Where the visual tokens of an image stand.

    Args:
        order (`torch.LongTensor` of shape `(num_tokens,)`): which cell, tile by tile, each token is; -1 for a newline.
            Of a map that is scaled down, the cell in its middle.
        nearest (`torch.LongTensor` of shape `(num_cells,)`): the cell of `order` that stands for each cell.
    """

    order: torch.LongTensor
    nearest: torch.LongTensor
    num_tiles: int
    grid: tuple[int, int]

    def cells_of(self, sources: torch.Tensor, tokens: torch.Tensor) -> list[np.ndarray]:
        """`cells_of` this image, with every cell of a scaled map in the colour of its nearest token."""
        cells = torch.from_numpy(np.stack(cells_of(sources, tokens, self.num_tiles, self.grid)))
        return list(cells.flatten()[self.nearest].reshape(self.num_tiles, *self.grid).numpy())


def token_map(layout: TileLayout, grid: tuple[int, int], rule: str | None) -> TokenMap:
    """Where the visual tokens of an image stand.

    Args:
        grid (`tuple[int, int]`): (rows, columns) of tokens in a tile.
        rule (`str`, *optional*): how padding is cut off where tiles are joined to a map; None: they are not.
    """
    per_tile = grid[0] * grid[1]
    nearest = torch.arange(layout.num_tiles * per_tile)
    if rule is None or layout.num_tiles == 1:
        newlines = int(layout.max_map_tiles is not None)
        return TokenMap(F.pad(nearest, (0, newlines), value=-1), nearest, layout.num_tiles, grid)
    size, tiles = torch.tensor([layout.image_size]), torch.tensor([layout.grid])
    kept = unpadded_grids(size, tiles, grid, rule)
    (scaled,) = scaled_down(kept, grid, layout.max_map_tiles).tolist()
    (kept,) = kept.tolist()
    order = joined_order(layout.grid, grid, tuple(kept))
    if scaled != kept:
        content = order[per_tile:].unflatten(0, (kept[0], kept[1] + 1))[:, :-1]
        rows, columns = (_middles(*sides) for sides in zip(kept, scaled))
        own = content[rows][:, columns]
        rows, columns = (_middles(*sides) for sides in zip(scaled, kept))
        nearest[content.flatten()] = own[rows][:, columns].flatten()
        order = torch.cat([order[:per_tile], F.pad(own, (0, 1), value=-1).flatten()])
    return TokenMap(order, nearest, layout.num_tiles, grid)


def _middles(length: int, count: int) -> torch.LongTensor:
    """Of `length` equal places in a line those in which the middles of `count` equal parts lie."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)
