"""From an image and its layout to pixels: crops, resizing, rescaling and normalising, on PIL and numpy alone."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .grids_vtc import patches_of
from .tiling_vtc import TileLayout, TilingSettings


def cut(image: Image.Image, layout: TileLayout, settings: TilingSettings) -> list[Image.Image]:
    """The tiles of an image, in the order of its layout."""
    size = settings.tile_size
    if settings.tiling == "pad":
        image = _on_square(image, layout, settings.image_mean)
    if settings.tiling in ("single", "pad"):
        return [resized(image, (size, size), settings.resample)]
    if settings.tiling in ("crop", "keep_aspect"):
        return [_short_side_resized(image, layout, settings)]
    canvas = resized(image, layout.resized_size[::-1], settings.resample)
    rows, columns = layout.grid
    if settings.tiling == "anyres":
        whole, canvas = canvas, Image.new("RGB", (columns * size, rows * size))
        canvas.paste(whole, layout.offset[::-1])
    tiles = [
        canvas.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    if layout.num_tiles > len(tiles):
        whole = resized(image, (size, size), settings.resample)
        tiles = [whole, *tiles] if settings.tiling == "anyres" else [*tiles, whole]
    return tiles


def as_patches(
    images: list[Image.Image], layouts: list[TileLayout], settings: TilingSettings
) -> dict[str, np.ndarray]:
    """Normalised patches of images, one after the other, and the grid of each, for towers that see grids."""
    merge, patches, grids = settings.token_stride // settings.patch_size, [], []
    for image, layout in zip(images, layouts):
        height, width = layout.resized_size
        pixels = normalized([resized(image, (width, height), settings.resample)], settings)[0]
        patches.append(patches_of(pixels, settings.patch_size, merge))
        grids.append((1, height // settings.patch_size, width // settings.patch_size))
    return {"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids, dtype=np.int64)}


def resized(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """The image at `size`, (width, height), with the pixels of Pillow 13 on every version of Pillow.

    A resize is two passes with 8-bit pixels between them, so their order shows. Pillow resizes the width first until
    12.3, and from 13.0 on the height first if it shrinks by more than twice as much; here each pass is asked for by
    itself.
    """
    width, height = size
    lost_rows, lost_columns = image.height - height, image.width - width
    height_first = lost_rows > max(0, 2 * lost_columns)
    between = (image.width, height) if height_first else (width, image.height)
    return image.resize(between, resample).resize(size, resample)


def _on_square(image: Image.Image, layout: TileLayout, mean: Sequence[float]) -> Image.Image:
    side = max(layout.image_size)
    # truncation, not rounding, as in the original
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, layout.offset[::-1])
    return square


def _short_side_resized(image: Image.Image, layout: TileLayout, settings: TilingSettings) -> Image.Image:
    height, width = layout.resized_size
    shrunk = resized(image, (width, height), settings.resample)
    if settings.tiling == "keep_aspect":
        return shrunk
    top, left = -layout.offset[0], -layout.offset[1]
    return shrunk.crop((left, top, left + settings.tile_size, top + settings.tile_size))


def stacked(tiles: list[Image.Image], settings: TilingSettings) -> np.ndarray:
    """`(T, 3, H, W)` normalised pixels; tiles of different sizes get zeros on the right and at the bottom."""
    height, width = max(tile.height for tile in tiles), max(tile.width for tile in tiles)
    if all(tile.size == (width, height) for tile in tiles):
        return normalized(tiles, settings)
    pixels = np.zeros((len(tiles), 3, height, width), dtype=np.float32)
    for padded, tile in zip(pixels, tiles):
        padded[:, : tile.height, : tile.width] = normalized([tile], settings)[0]
    return pixels


def normalized(tiles: list[Image.Image], settings: TilingSettings) -> np.ndarray:
    """Values `(T, 3, H, W)` of images of one size, rescaled and normalised as the settings say."""
    # (T, S, S, 3) bytes -> (T, 3, S, S); every step in float32, as torchvision's ToTensor and Normalize do
    pixels = np.stack([np.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2).astype(np.float32, order="C")
    if settings.do_rescale:
        pixels /= np.float32(255)
    if settings.do_normalize:
        pixels -= np.asarray(settings.image_mean, dtype=np.float32).reshape(3, 1, 1)
        pixels /= np.asarray(settings.image_std, dtype=np.float32).reshape(3, 1, 1)
    return pixels
