"""How images of a given size are cut into tiles: arithmetic on sizes, without a pixel.

The field `tiling` names one of seven ways, all but the last two with square tiles:

- `"single"`: the whole image resized to one square tile.
- `"pad"`: LLaVA 1.5, the image centred on a square of the mean colour, then resized to one tile.
- `"anyres"`: LLaVA-NeXT, the best of `image_grid_pinpoints`, black padding; the whole image comes first. With
  `max_map_tiles` LLaVA-OneVision, where an image that shares its prompt with others is cut as for `"pad"`.
- `"dynamic"`: InternVL, the grid of at most `max_tiles` tiles with the closest aspect ratio; the thumbnail comes last.
- `"crop"`: CLIP, the short side resized to the tile, the middle of the long one.
- `"keep_aspect"`: ConvLLaVA at any aspect ratio, the short side resized to `size`, one tile of the whole image.
- `"patches"`: Qwen2.5-VL and Qwen3-VL, the whole image near its own size, as a grid of patches.

Sources: haotian-liu/LLaVA `llava/mm_utils.py` (pad, anyres); transformers' `CLIPImageProcessor` (crop; keep_aspect is
the same without its centre crop, arXiv 2405.15738 section 4.3); OpenGVLab/InternVL `dynamic_preprocess` at
2410d1dbf208f0e799459aff9376e5747dbf41a2 (dynamic).
"""

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .grids_vtc import size_of_grid

TILINGS = ("single", "pad", "anyres", "dynamic", "crop", "keep_aspect", "patches")
UNPAD_RULES = ("token_grid", "true_aspect")
# what transformers' InternVL, its LLaVA and the original repositories call some of our arguments
_NAMES_ELSEWHERE = {
    "max_patches": "max_tiles",
    "max_num": "max_tiles",
    "max_dynamic_patch": "max_tiles",
    "min_patches": "min_tiles",
    "min_num": "min_tiles",
    "min_dynamic_patch": "min_tiles",
    "dynamic_image_size": "tiling",
    "image_aspect_ratio": "tiling",
    "input_size": "size",
    "image_size": "size",
    "crop_size": "size",
    "grid_pinpoints": "image_grid_pinpoints",
    "num_additional_image_tokens": "image_seq_length",
    "budget": "vtc_budget",
}


class TileLayout(NamedTuple):
    """How one image is cut, known from its size alone. Sizes are (height, width) in pixels.

    Args:
        image_size (`tuple[int, int]`): the upright original.
        resized_size (`tuple[int, int]`): the whole image after its resize, without padding.
        offset (`tuple[int, int]`): (top, left) of the image on its padded canvas; in original pixels for `"pad"`,
            which pads before the resize, in resized pixels for `"anyres"`, which pads after it. Negative for `"crop"`.
        grid (`tuple[int, int]`): (rows, columns) of tiles, the whole view not counted.
        boxes (`tuple[tuple[float, float, float, float], ...]`): (left, top, right, bottom) of every tile in
            original pixels, in the order of `pixel_values`; reaches beyond the image where a tile holds padding.
        token_grid (`tuple[int, int]`, *optional*): (rows, columns) of visual tokens, where `token_stride` gives them.
        max_map_tiles (`int`, *optional*): tiles' worth of tokens above which the image's map is scaled down.
    """

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int]
    grid: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float], ...]
    token_grid: tuple[int, int] | None = None
    max_map_tiles: int | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles of this image, the whole view included."""
        return len(self.boxes)


class ImageSizes(NamedTuple):
    """Tiles and pixels of the images of one call, on the CPU: what their token counts follow from.

    Args:
        num_tiles (`torch.LongTensor` of shape `(num_images,)`, *optional*): None for a tower that sees whole images.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): (height, width) in pixels.
        grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): (rows, columns) of tiles that are joined to
            a map; None where tiles follow each other as they are.
        tokens (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): (rows, columns) of visual tokens, for a
            tower that sees every image as a grid of its own.
        frames (`torch.LongTensor` of shape `(num_images,)`, *optional*): visual tokens of what belongs to a video that
            is shown as tiles, a frame or the newline behind it; 0 for images.
    """

    num_tiles: torch.LongTensor | None
    image_sizes: torch.LongTensor | None
    grids: torch.LongTensor | None
    tokens: torch.LongTensor | None = None
    frames: torch.LongTensor | None = None

    def __len__(self) -> int:
        return len(self.image_sizes if self.num_tiles is None else self.num_tiles)

    def kept(self, tokens: tuple[int, int], rule: str) -> torch.LongTensor:
        """`unpadded_grids` of the maps, for tiles of (rows, columns) `tokens`."""
        return unpadded_grids(self.image_sizes, self.grids, tokens, rule)


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
    token_stride: int | None
    patch_size: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_map_tiles: int | None = None

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
        if self.max_map_tiles is not None and (self.max_map_tiles < 1 or self.tiling not in ("anyres", "pad")):
            raise ValueError(
                f"`max_map_tiles` must be a positive number of tiles and needs `tiling='anyres'`, got "
                f"{self.max_map_tiles} and {self.tiling!r}."
            )
        self._check_patches()
        self._check_token_stride()

    def of_image(self, alone: bool) -> "TilingSettings":
        """These settings for an image that is alone in its prompt, or shares it with others."""
        return self if alone or self.max_map_tiles is None else replace(self, tiling="pad")

    def _check_patches(self) -> None:
        names = ("patch_size", "min_pixels", "max_pixels")
        if self.tiling != "patches":
            for name in names:
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` needs `tiling='patches'`, got {self.tiling!r}. Leave it out.")
            return
        for name in (*names, "token_stride"):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise ValueError(f"`tiling='patches'` needs a positive `{name}` in pixels, got {getattr(self, name)}.")
        if self.token_stride % self.patch_size:
            raise ValueError(
                f"`token_stride` must be a multiple of `patch_size`, got {self.token_stride} and {self.patch_size}."
            )
        if not max(self.min_pixels, self.token_stride**2) <= self.max_pixels:
            raise ValueError(
                f"`max_pixels` must hold `min_pixels` and a visual token of {self.token_stride}^2 pixels, got "
                f"{self.min_pixels} and {self.max_pixels}."
            )

    def _check_token_stride(self) -> None:
        if self.token_stride is None:
            if self.tiling == "keep_aspect":
                raise ValueError(
                    "`token_stride` must be given for `tiling='keep_aspect'`: the side in pixels of one visual token, "
                    "such as 64."
                )
        elif self.tiling == "patches":
            return
        elif self.tiling in ("anyres", "dynamic"):
            raise ValueError(f"`token_stride` needs a tiling with one tile per image, got {self.tiling!r}.")
        elif self.token_stride < 1:
            raise ValueError(f"`token_stride` must be a positive number of pixels, got {self.token_stride}.")
        elif self.token_stride > self.tile_size:
            raise ValueError(
                f"`size` must be at least {self.token_stride} pixels, the side of one visual token (`token_stride`), "
                f"got {self.tile_size}."
            )

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

    def processed_size(self, layout: TileLayout) -> tuple[int, int]:
        """(height, width) in pixels of every tile of an image."""
        whole = self.tiling in ("keep_aspect", "patches")
        return layout.resized_size if whole else (self.tile_size, self.tile_size)

    def layout(self, height: int, width: int) -> TileLayout:
        """Layout of an image of this size in pixels."""
        if height < 1 or width < 1:
            raise ValueError(f"An image needs at least one pixel per side, got height {height} and width {width}.")
        if self.tiling == "patches":
            return patches_layout(height, width, self.token_stride, self.min_pixels, self.max_pixels)
        one_tile = {
            "single": single_layout,
            "pad": pad_layout,
            "crop": crop_layout,
            "keep_aspect": keep_aspect_layout,
        }
        if self.tiling in one_tile:
            layout = one_tile[self.tiling](height, width, self.tile_size)
            if self.token_stride is not None:
                rows, columns = (side // self.token_stride for side in self.processed_size(layout))
                layout = layout._replace(token_grid=(rows, columns))
            return layout._replace(max_map_tiles=self.max_map_tiles)
        if self.tiling == "anyres":
            pinpoints = tuple((int(pair[0]), int(pair[1])) for pair in self.image_grid_pinpoints)
            layout = anyres_layout(height, width, self.tile_size, pinpoints)
            return layout._replace(max_map_tiles=self.max_map_tiles)
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


def crop_layout(height: int, width: int, tile_size: int) -> TileLayout:
    """The middle of the image with its short side resized to one tile; what sticks out of the long one is cut off."""
    resized = _short_side_resized(height, width, tile_size)
    top, left = (resized[0] - tile_size) // 2, (resized[1] - tile_size) // 2
    boxes = _grid_boxes((height, width), resized, (-top, -left), (1, 1), tile_size)
    return TileLayout((height, width), resized, (-top, -left), (1, 1), boxes)


def keep_aspect_layout(height: int, width: int, size: int) -> TileLayout:
    """The whole image with its short side resized to `size` pixels: a tile as long as it needs to be."""
    whole = (0.0, 0.0, float(width), float(height))
    return TileLayout((height, width), _short_side_resized(height, width, size), (0, 0), (1, 1), (whole,))


def patches_layout(height: int, width: int, token_stride: int, min_pixels: int, max_pixels: int) -> TileLayout:
    """The whole image resized to sides of whole visual tokens, near its own size where the limits in pixels allow."""
    whole = (0.0, 0.0, float(width), float(height))
    resized = size_of_grid(height, width, token_stride, min_pixels, max_pixels)
    tokens = (resized[0] // token_stride, resized[1] // token_stride)
    return TileLayout((height, width), resized, (0, 0), (1, 1), (whole,), tokens)


def _short_side_resized(height: int, width: int, size: int) -> tuple[int, int]:
    # truncated, as in the original
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def anyres_layout(height: int, width: int, tile_size: int, pinpoints: Sequence[tuple[int, int]]) -> TileLayout:
    """LLaVA-NeXT: scale to fit the best pinpoint, centre on it, cut into tiles; the whole image is tile 0."""
    (best,) = best_canvases(torch.tensor([[height, width]]), pinpoints).tolist()
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


def best_canvases(image_sizes: torch.Tensor, pinpoints: Sequence[Sequence[int]]) -> torch.LongTensor:
    """The pinpoint of each image under `"anyres"`, on the device of `image_sizes`.

    It shows the most pixels of the image (an upscaled pixel is not a new one), then wastes the least; the first of
    equals wins.

    Args:
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): (height, width) in pixels.
        pinpoints (`Sequence[Sequence[int]]`): (height, width) in pixels.

    Returns:
        `(num_images, 2)`, (height, width).

    Source: haotian-liu/LLaVA `select_best_resolution`, whose double precision decides near-ties.
    """
    canvases = torch.tensor([tuple(pair) for pair in pinpoints], device=image_sizes.device)
    heights, widths = image_sizes.double()[:, None].unbind(-1)  # (num_images, 1)
    scale = torch.minimum(canvases[:, 1] / widths, canvases[:, 0] / heights)
    shown = (widths * scale).long() * (heights * scale).long()
    shown = torch.minimum(shown, image_sizes.prod(-1, keepdim=True))
    # shown pixels first, then the smaller canvas; no canvas has more than 2^31 pixels
    rank = shown * 2**31 - canvases.prod(-1)
    return canvases[rank.argmax(-1)]


def unpadded_grids(
    image_sizes: torch.Tensor, grids: torch.Tensor, tokens: tuple[int, int], rule: str
) -> torch.LongTensor:
    """Rows and columns of tokens that are left of an `"anyres"` image's map when its padding is cut off both ends.

    Args:
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): (height, width) in pixels.
        grids (`torch.LongTensor` of shape `(num_images, 2)`): (rows, columns) of tiles.
        tokens (`tuple[int, int]`): (rows, columns) of tokens in a tile; of G kinds of tiles at once, two tensors
            `(G, 1)`.
        rule (`str`): `"token_grid"` compares the aspect ratio of the image with that of the map in tokens, in double
            precision, as AVG-LLaVA does: where tokens are not square, that cuts content away. `"true_aspect"` compares
            it with that of the canvas and is exact; on square tokens it is transformers' LLaVA-NeXT.

    Returns:
        `(num_images, 2)`, or `(G, num_images, 2)`: (rows, columns), 0 for an image so long and thin that
        nothing is left. As much is cut at one end as at the other, so that a row or column of padding may stay.

    Source: DeepLearnXMU/AVG-LLaVA@3685bc8 `llava_arch.py` `unpad_image`.
    """
    heights, widths = image_sizes.unbind(-1)
    tile_rows, tile_columns = grids.unbind(-1)
    rows, columns = tile_rows * tokens[0], tile_columns * tokens[1]
    if rule == "token_grid":
        wide = widths.double() / heights > columns.double() / rows
        # the order of these operations decides what is truncated
        content_rows = (heights * (columns.double() / widths)).long()
        content_columns = (widths * (rows.double() / heights)).long()
    else:
        wide = widths * tile_rows > heights * tile_columns
        content_rows = heights * tile_columns * rows // (widths * tile_rows)
        content_columns = widths * tile_rows * columns // (heights * tile_columns)
    kept_rows = torch.where(wide, rows - (rows - content_rows) // 2 * 2, rows)
    kept_columns = torch.where(wide, columns, columns - (columns - content_columns) // 2 * 2)
    return torch.stack([kept_rows, kept_columns], dim=-1)


def stacked_grids(grids: Sequence[tuple[int, int]]) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Rows and columns `(G, 1)` of G token grids, for `unpadded_grids` of all of them at once."""
    # on the CPU also where a model is being built on another device
    rows, columns = torch.tensor(grids, device="cpu").T[..., None]
    return rows, columns


def refuse_no_pixels(image_sizes: torch.Tensor) -> None:
    """Raise for `image_sizes` `(num_images, 2)` on the CPU with a side of no pixel."""
    if bool((image_sizes < 1).any()):
        raise ValueError(f"`image_sizes` must be at least 1 pixel each, got {image_sizes.tolist()} (height, width).")


def refuse_wrong_tiles(image_sizes: torch.Tensor, grids: torch.Tensor, num_tiles: Sequence[int]) -> None:
    """Raise where an `"anyres"` image of several tiles has others than its size asks for.

    Args:
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): (height, width) in pixels, on the CPU.
        grids (`torch.LongTensor` of shape `(num_images, 2)`): (rows, columns) of tiles.
        num_tiles (`Sequence[int]`): tiles of each image that were given; an image of one has no map.
    """
    for image_idx, given in enumerate(num_tiles):
        if given == 1:
            continue
        size, (rows, columns) = image_sizes[image_idx].tolist(), grids[image_idx].tolist()
        if given != 1 + rows * columns:
            raise ValueError(
                f"Image {image_idx} of {size[0]} x {size[1]} pixels (height x width) needs {rows} x {columns} tiles "
                f"and the base tile, but has {given}. Use an image processor with `tiling='anyres'` and the model's "
                "`image_grid_pinpoints`."
            )


def joined_order(grid: tuple[int, int], tokens: tuple[int, int], kept: tuple[int, int]) -> torch.LongTensor:
    """Which token of an `"anyres"` image stands where: the base tile, then the map of the others without padding.

    Args:
        grid (`tuple[int, int]`): (rows, columns) of tiles.
        tokens (`tuple[int, int]`): (rows, columns) of tokens in a tile.
        kept (`tuple[int, int]`): (rows, columns) of tokens of the map that stay, those in its middle.

    Returns:
        Indices into the image's tokens in tile order, base tile first; -1 = newline, at the end of each row, also of
        one without columns.

    Source: haotian-liu/LLaVA `llava_arch.py` `prepare_inputs_labels_for_multimodal`, merge type `spatial_unpad`.
    """
    per_tile = tokens[0] * tokens[1]
    tiles = torch.arange(per_tile, per_tile * (1 + grid[0] * grid[1]))
    whole = tiles.reshape(*grid, *tokens).transpose(1, 2).reshape(grid[0] * tokens[0], grid[1] * tokens[1])
    top, left = (whole.shape[0] - kept[0]) // 2, (whole.shape[1] - kept[1]) // 2
    content = whole[top : top + kept[0], left : left + kept[1]]
    return torch.cat([torch.arange(per_tile), torch.nn.functional.pad(content, (0, 1), value=-1).flatten()])


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


def refuse_unknown(given: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raise for names that are no arguments of `owner`, each with the known name that is meant or nearest."""
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    meant = [(name, meant_name(name, known)) for name in unknown]
    said = ", ".join(f"`{name}`" + (f" (did you mean `{near}`?)" if near else "") for name, near in meant)
    raise ValueError(f"{owner} has no argument {said}. Arguments: {', '.join(sorted(known))}.")


def meant_name(name: str, known: Collection[str], likeness: float = 0.6) -> str | None:
    """The name of `known` that other code calls `name`, or that is spelt most like it, if any is."""
    if _NAMES_ELSEWHERE.get(name) in known:
        return _NAMES_ELSEWHERE[name]
    return next(iter(difflib.get_close_matches(name, sorted(known), 1, likeness)), None)


def refuse_misnamed(given: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raise for names that are almost arguments of `owner`, where a tokenizer's and the host's may stand too."""
    refuse_unknown([name for name in given if meant_name(name, known, likeness=0.85)], known, owner)


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
