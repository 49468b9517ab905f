"""An image with its tiles, their cells and a legend on a sheet of paper."""

import colorsys
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..methods.drawing import PAPER, Colour, Drawing, Swatch, Tile
from ..models.tiling_vtc import TileLayout

_INK = (40, 40, 40)
_MARGIN = 14
# share of white over what has no token of its own
_VEIL = 0.6
# share of its colour over a cell that is filled
_TINT = 0.45
# and of the line between two cells that are not
_LINE = 0.45


class _Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int


# beside a picture of its tiles, what stands for the tile that shows all of it
_WHOLE_VIEW = "whole image, one more tile"


def compose(
    image: Image.Image,
    layout: TileLayout,
    drawing: Drawing,
    title: str | None,
    max_side: int,
    caption: Sequence[str] = (),
) -> Image.Image:
    """Draw an image, enlarged or reduced to `max_side` pixels, with its tiles; the whole view stands to the right.

    Args:
        caption (`Sequence[str]`): lines below all, which are broken where the sheet ends.
    """
    scale = max_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # enlarged pixels stay visible as such
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    font = ImageFont.load_default(max(11, max_side // 40))
    line = math.ceil(1.5 * font.size)
    top = _MARGIN + (line if title else 0)

    panels = {False: (image.resize((width, height), resample), _Box(_MARGIN, top, _MARGIN + width, top + height))}
    whole, right = _index_of_whole_view(layout), _MARGIN + width
    if whole is not None:
        small = image.resize((max(1, round(width * 0.4)), max(1, round(height * 0.4))), Image.Resampling.LANCZOS)
        left = _MARGIN + width + _MARGIN
        panels[True] = (small, _Box(left, top, left + small.width, top + small.height))
        right = max(left + small.width, left + math.ceil(font.getlength(_WHOLE_VIEW)))

    texts = [text for _, text in drawing.legend] + ([title] if title else [])
    right = max([right, *(_MARGIN + line + math.ceil(font.getlength(text)) for text in texts)])
    caption = [part for text in caption for part in _broken(text, right - _MARGIN, font)]
    # of a flat image the label of the whole view may be the lowest
    bottom = max(top + height, panels[True][1].bottom + line if whole is not None else 0)
    lines = len(drawing.legend) + len(caption)
    sheet = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN + line * lines), PAPER)
    for panel, box in panels.values():
        sheet.paste(panel, box[:2])
    for tile_idx, tile in enumerate(drawing.tiles):
        _, panel = panels[tile_idx == whole]
        own = [side * (panel.right - panel.left) / image.width for side in layout.boxes[tile_idx]]
        left, upper, right, lower = map(round, own)
        box = _Box(panel.left + left, panel.top + upper, panel.left + right, panel.top + lower)
        _draw_tile(sheet, tile, box, panel, font)
    _write(sheet, title, [*drawing.legend, *((None, text) for text in caption)], bottom, font, line)
    if whole is not None:
        place = (panels[True][1].left, panels[True][1].bottom + line // 2)
        ImageDraw.Draw(sheet).text(place, _WHOLE_VIEW, fill=_INK, font=font, anchor="lm")
    return sheet


def _broken(text: str, width: float, font: Any) -> list[str]:
    """A text in lines of at most `width` pixels; a word that is longer than a line is cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            # by bisection, since a file name can be very long
            first, last = 1, len(word)
            while last - first > 1:
                middle = (first + last) // 2
                first, last = (middle, last) if font.getlength(word[:middle]) <= width else (first, middle)
            lines += [word[:first]]
            word = word[first:]
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return [each for each in lines if each]


def _index_of_whole_view(layout: TileLayout) -> int | None:
    """Position of the tile that shows the whole image beside the grid, None if the grid is all there is."""
    rows, columns = layout.grid
    if layout.num_tiles == rows * columns:
        return None
    image = (0.0, 0.0, float(layout.image_size[1]), float(layout.image_size[0]))
    # first or last, depending on the tiling
    return 0 if layout.boxes[0] == image else layout.num_tiles - 1


def _draw_tile(sheet: Image.Image, tile: Tile, box: _Box, panel: _Box, font: Any) -> None:
    """Draw the part of a tile that lies within its panel; the rest is padding, which no one sees."""
    seen = _Box(*map(max, box[:2], panel[:2]), *map(min, box[2:], panel[2:]))
    if seen.right <= seen.left or seen.bottom <= seen.top:
        return
    pixels = np.asarray(sheet.crop(seen), dtype=np.float32)
    if tile.veiled:
        pixels = _blend(pixels, PAPER, _VEIL)
    if tile.cells is not None:
        pixels = _with_cells(pixels, tile, box, seen)
    sheet.paste(Image.fromarray(pixels.round().astype(np.uint8)), seen[:2])
    pen = ImageDraw.Draw(sheet)
    frame = max(2, min(seen.right - seen.left, seen.bottom - seen.top) // 60)
    # inside of the tile, so that the frames of neighbours do not cover each other
    pen.rectangle((*seen[:2], seen.right - 1, seen.bottom - 1), outline=tile.colour, width=frame)
    if tile.label is not None:
        _label(pen, tile.label, seen, tile.colour, font)


def _with_cells(pixels: np.ndarray, tile: Tile, box: _Box, seen: _Box) -> np.ndarray:
    # the token of every pixel that is seen; a border of none catches what the cells do not cover
    cells = np.pad(tile.cells, ((0, 1), (0, 1)), constant_values=-1)
    rows, columns = (
        np.minimum(np.arange(first - start, last - start) * count / (covered * (end - start)), count).astype(int)
        for first, last, start, end, count, covered in (
            (seen.top, seen.bottom, box.top, box.bottom, tile.cells.shape[0], tile.covered[0]),
            (seen.left, seen.right, box.left, box.right, tile.cells.shape[1], tile.covered[1]),
        )
    )
    tokens = cells[rows][:, columns]
    nothing = tokens[..., None] < 0
    if tile.filled:
        palette = np.array([_hue(token) for token in range(int(cells.max()) + 1)] or [PAPER], dtype=np.float32)
        pixels = np.where(nothing, pixels, _blend(pixels, palette[tokens.clip(min=0)], _TINT))
    pixels = np.where(nothing, _blend(pixels, PAPER, _VEIL), pixels)
    edges = np.zeros(tokens.shape, dtype=bool)
    edges[1:] |= tokens[1:] != tokens[:-1]
    edges[:, 1:] |= tokens[:, 1:] != tokens[:, :-1]
    line = PAPER if tile.filled else _blend(pixels, tile.colour, _LINE)
    return np.where(edges[..., None], line, pixels)


def _blend(pixels: np.ndarray, colour: Any, share: float) -> np.ndarray:
    return pixels * (1 - share) + np.asarray(colour, dtype=np.float32) * share


def _hue(index: int) -> Colour:
    """Colours of which neighbours in the list are far apart, however many are asked for."""
    golden = (index * 0.618034) % 1
    channels = colorsys.hsv_to_rgb(golden, (0.85, 0.55)[index // 2 % 2], (0.95, 0.7)[index % 2])
    return tuple(round(255 * channel) for channel in channels)


def _label(pen: ImageDraw.ImageDraw, text: str, box: _Box, colour: Colour, font: Any) -> None:
    width, height = math.ceil(font.getlength(text)) + 6, math.ceil(1.25 * font.size)
    if width > box.right - box.left or height > box.bottom - box.top:
        return
    pen.rectangle((*box[:2], box.left + width, box.top + height), fill=colour)
    pen.text((box.left + 3, box.top + height // 2), text, fill=PAPER, font=font, anchor="lm")


def _write(
    sheet: Image.Image, title: str | None, lines: Sequence[tuple[Swatch, str]], bottom: int, font: Any, line: int
) -> None:
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_MARGIN, _MARGIN + line // 2 - 2), title, fill=_INK, font=font, anchor="lm")
    for index, (swatch, text) in enumerate(lines):
        middle = bottom + _MARGIN // 2 + line * index + line // 2
        if swatch is not None:
            half = font.size // 2
            _draw_swatch(pen, swatch, _Box(_MARGIN, middle - half, _MARGIN + 2 * half, middle + half))
        pen.text((_MARGIN + line if swatch else _MARGIN, middle), text, fill=_INK, font=font, anchor="lm")


def _draw_swatch(pen: ImageDraw.ImageDraw, swatch: Swatch, box: _Box) -> None:
    if swatch == PAPER:
        pen.rectangle(box, outline=_INK)
    elif swatch == "many":
        # as the cells of a tile: tinted, a bar each
        bars = 3
        for index in range(bars):
            left, right = (box.left + (box.right - box.left) * place // bars for place in (index, index + 1))
            pen.rectangle((left, box.top, right, box.bottom), fill=_hue(index))
    else:
        pen.rectangle(box, fill=swatch)
