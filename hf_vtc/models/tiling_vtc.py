"""How images of a given size are cut into square tiles: arithmetic on sizes, without a pixel.

The field `tiling` names one of four ways:

- `"single"`: the whole image resized to one square tile.
- `"pad"`: LLaVA 1.5, the image centred on a square of the mean colour, then resized to one tile.
- `"anyres"`: LLaVA-NeXT, the best of `image_grid_pinpoints`, black padding; the whole image comes first.
- `"dynamic"`: InternVL, the grid of at most `max_tiles` tiles with the closest aspect ratio; the thumbnail comes last.

Sources: haotian-liu/LLaVA `llava/mm_utils.py` (pad, anyres); OpenGVLab/InternVL `dynamic_preprocess` at
2410d1dbf208f0e799459aff9376e5747dbf41a2 (dynamic).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

TILINGS = ("single", "pad", "anyres", "dynamic")


class TileLayout(NamedTuple):
    """How one image is cut, known from its size alone. Sizes are (height, width) in pixels.

    Args:
        image_size (`tuple[int, int]`): the upright original.
        resized_size (`tuple[int, int]`): the whole image after its resize, without padding.
        offset (`tuple[int, int]`): (top, left) of the image on its padded canvas; in original pixels for `"pad"`,
            which pads before the resize, in resized pixels for `"anyres"`, which pads after it.
        grid (`tuple[int, int]`): (rows, columns) of tiles, the whole view not counted.
        boxes (`tuple[tuple[float, float, float, float], ...]`): (left, top, right, bottom) of every tile in
            original pixels, in the order of `pixel_values`; reaches beyond the image where a tile holds padding.
    """

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int]
    grid: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float], ...]

    @property
    def num_tiles(self) -> int:
        """Tiles of this image, the whole view included."""
        return len(self.boxes)


@dataclass(frozen=True)
class TilingSettings:
    """The fields of `VtcImageProcessor` for one call, checked.

    Raises:
        ValueError: a field is outside of its range.
    """

    tiling: str
    size: dict[str, int]
    resample: int
    image_mean: Sequence[float]
    image_std: Sequence[float]
    do_rescale: bool
    do_normalize: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    image_grid_pinpoints: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if self.tiling not in TILINGS:
            raise ValueError(f"`tiling` must be one of {', '.join(TILINGS)}, got {self.tiling!r}.")
        if self.tile_size < 1:
            raise ValueError(f"`size` must be a positive number of pixels, got {self.tile_size}.")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(
                f"`min_tiles` and `max_tiles` must satisfy 1 <= min_tiles <= max_tiles, got {self.min_tiles} and "
                f"{self.max_tiles}."
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"`{name}` needs one value per colour channel (3), got {getattr(self, name)}.")
        if self.tiling == "anyres":
            self._check_pinpoints()

    def _check_pinpoints(self) -> None:
        sides = [side for pair in self.image_grid_pinpoints for side in pair]
        if not sides or any(side < self.tile_size or side % self.tile_size for side in sides):
            raise ValueError(
                f"`image_grid_pinpoints` must be (height, width) pairs in multiples of `size` ({self.tile_size}), got "
                f"{list(self.image_grid_pinpoints)}."
            )

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.size["height"]

    def layout(self, height: int, width: int) -> TileLayout:
        """Layout of an image of this size in pixels."""
        if height < 1 or width < 1:
            raise ValueError(f"An image needs at least one pixel per side, got height {height} and width {width}.")
        if self.tiling == "single":
            return single_layout(height, width, self.tile_size)
        if self.tiling == "pad":
            return pad_layout(height, width, self.tile_size)
        if self.tiling == "anyres":
            pinpoints = tuple((int(pair[0]), int(pair[1])) for pair in self.image_grid_pinpoints)
            return anyres_layout(height, width, self.tile_size, pinpoints)
        return dynamic_layout(height, width, self.tile_size, self.min_tiles, self.max_tiles, self.use_thumbnail)


def single_layout(height: int, width: int, tile_size: int) -> TileLayout:
    """The whole image is one tile; the aspect ratio is not kept."""
    whole = (0.0, 0.0, float(width), float(height))
    return TileLayout((height, width), (tile_size, tile_size), (0, 0), (1, 1), (whole,))


def pad_layout(height: int, width: int, tile_size: int) -> TileLayout:
    """The image centred on a square, which is one tile. Odd padding puts the extra line right or below."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    box = (float(-left), float(-top), float(side - left), float(side - top))
    return TileLayout((height, width), (tile_size, tile_size), (top, left), (1, 1), (box,))


def anyres_layout(height: int, width: int, tile_size: int, pinpoints: Sequence[tuple[int, int]]) -> TileLayout:
    """LLaVA-NeXT: scale to fit the best pinpoint, centre on it, cut into tiles; the whole image is tile 0.

    The best pinpoint shows the most pixels of the image (an upscaled pixel is not a new one), then wastes the least;
    the first of equals wins.
    """
    best, best_rank = pinpoints[0], (-1, 0)
    for target_height, target_width in pinpoints:
        scale = min(target_width / width, target_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        rank = (shown, shown - target_height * target_width)
        if rank > best_rank:
            best, best_rank = (target_height, target_width), rank
    scale_width, scale_height = best[1] / width, best[0] / height
    if scale_width < scale_height:
        resized = (min(math.ceil(height * scale_width), best[0]), best[1])
    else:
        resized = (best[0], min(math.ceil(width * scale_height), best[1]))
    offset = ((best[0] - resized[0]) // 2, (best[1] - resized[1]) // 2)
    grid = (best[0] // tile_size, best[1] // tile_size)
    whole = (0.0, 0.0, float(width), float(height))
    boxes = (whole, *_grid_boxes((height, width), resized, offset, grid, tile_size))
    return TileLayout((height, width), resized, offset, grid, boxes)


def dynamic_layout(
    height: int, width: int, tile_size: int, min_tiles: int, max_tiles: int, use_thumbnail: bool
) -> TileLayout:
    """InternVL: the grid with the closest aspect ratio, and the whole image last if there is more than one tile.

    Grids are tried by rising tile count. On an exact tie the later one wins if the image has more than half as many
    pixels as that grid shows, so that small images are not blown up to many tiles.
    """
    best, best_difference = (1, 1), math.inf
    for rows, columns in _grids(min_tiles, max_tiles):
        difference = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * rows * columns
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = (rows, columns), difference
    rows, columns = best
    resized = (rows * tile_size, columns * tile_size)
    boxes = _grid_boxes((height, width), resized, (0, 0), best, tile_size)
    if use_thumbnail and len(boxes) > 1:
        boxes = (*boxes, (0.0, 0.0, float(width), float(height)))
    return TileLayout((height, width), resized, (0, 0), best, boxes)


@lru_cache(maxsize=32)
def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    # the original sorts a set by tile count alone; with `min_tiles` 1 no two grids of one count can ever tie, so the
    # order among them is free
    sides = range(1, max_tiles + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if min_tiles <= rows * columns <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _grid_boxes(
    image_size: tuple[int, int],
    resized_size: tuple[int, int],
    offset: tuple[int, int],
    grid: tuple[int, int],
    tile_size: int,
) -> tuple[tuple[float, float, float, float], ...]:
    # original pixels per resized pixel
    step_y, step_x = image_size[0] / resized_size[0], image_size[1] / resized_size[1]
    boxes = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, left = row * tile_size - offset[0], column * tile_size - offset[1]
            boxes.append((left * step_x, top * step_y, (left + tile_size) * step_x, (top + tile_size) * step_y))
    return tuple(boxes)


def square_size(size: Any) -> dict[str, int]:
    """`size` as transformers writes it, from an int or from any of its dictionaries for a square."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    size = {key: value for key, value in dict(size).items() if value is not None}
    if set(size) == {"shortest_edge"}:
        size = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"`size` is the side of a square tile, an int or {{'height': S, 'width': S}}, got {size}.")
    return size
