"""What was kept, drawn on the image. Pillow only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import ProcessorMixin

from .models.image_processing_vtc import VtcImageProcessor
from .models.tiling_vtc import TileLayout

__all__ = ["overlay", "stack"]

# Okabe-Ito: told apart by readers with any colour vision
FULL_COLOUR = (0, 114, 178)
COMPRESSED_COLOUR = (213, 94, 0)
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)
_MARGIN = 14
# share of white over a compressed tile
_VEIL = 0.6


@dataclass
class TileView:
    """One tile as it is drawn: pixels (left, top, right, bottom) of the picture, and the visual tokens it keeps."""

    box: tuple[int, int, int, int]
    compressed: bool
    num_tokens: int | None


def overlay(
    image: Any,
    output: Any,
    processor: Any = None,
    *,
    num_tiles: Sequence[int] | torch.Tensor | None = None,
    image_idx: int = 0,
    tokens_per_tile: tuple[int, int] | None = None,
    title: str | None = None,
    max_side: int = 640,
) -> Image.Image:
    """Draw which tiles of an image kept all of their visual tokens, and which were compressed.

    A full tile is shown as it is, in a blue frame; a compressed one under a veil, in an orange frame, with a grid of
    as many cells as it has tokens left. The whole view, where there is one, stands to the right.

    Args:
        image: path, URL, PIL image, array or tensor; whatever the image processor takes.
        output: what `forward` gave, or `router_decisions` alone: one truth value per tile, True = compressed.
        processor: the `VtcProcessor` or `VtcImageProcessor` that cut the image. Default: InternVL's 448 pixel tiles.
        num_tiles (`(num_images,)`, *optional*): as the processor gave it; needed if the call had several images.
        image_idx (`int`): which image of the call this is.
        tokens_per_tile (`tuple[int, int]`, *optional*): visual tokens of a full and of a compressed tile. Default:
            what a `VtcProcessor` and the counts in `output` say; without them no numbers are drawn.
        title (`str`, *optional*): a line above the picture.
        max_side (`int`): longer side of the drawn image in pixels; small images are enlarged to it.

    Returns:
        An RGB picture.

    Raises:
        ValueError: the decisions do not fit the tiles of this image, or `output` holds no decisions per tile.
    """
    cutter = processor.image_processor if isinstance(processor, ProcessorMixin) else processor or VtcImageProcessor()
    picture = cutter.fetch_images(image)
    layout = cutter.get_tile_layout(picture.height, picture.width)
    decisions = _decisions_of(output)
    counts = [len(decisions)] if num_tiles is None else [int(count) for count in num_tiles]
    if sum(counts) != len(decisions) or not 0 <= image_idx < len(counts) or counts[image_idx] != layout.num_tiles:
        raise ValueError(
            f"Image {image_idx} of {picture.height} x {picture.width} pixels has {layout.num_tiles} tiles, but the "
            f"decisions are for {counts} tiles per image ({len(decisions)} together). Pass the `processor` that cut "
            "the images, and its `num_tiles` if there are several."
        )
    first = sum(counts[:image_idx])
    own = decisions[first : first + counts[image_idx]]
    if tokens_per_tile is None:
        tokens_per_tile = _tokens_per_tile(output, processor, own, image_idx)
    return _draw(picture, layout, own, tokens_per_tile, title, max_side)


def stack(pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Arrange pictures in rows, from the top left, on white."""
    if not pictures or not all(pictures):
        raise ValueError("`pictures` must hold at least one picture per row.")
    heights = [max(picture.height for picture in row) for row in pictures]
    width = max(sum(picture.width for picture in row) for row in pictures)
    sheet = Image.new("RGB", (width, sum(heights)), _PAPER)
    top = 0
    for row, height in zip(pictures, heights):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width
        top += height
    return sheet


def _decisions_of(output: Any) -> list[bool]:
    decisions = output
    if not isinstance(output, (torch.Tensor, list, tuple)):
        decisions = output.router_decisions
    if decisions is None:
        raise ValueError("`output` holds no `router_decisions`. Pass the output of a forward with images.")
    decisions = torch.as_tensor(decisions)
    if decisions.dtype != torch.bool or decisions.ndim != 1:
        raise ValueError(
            f"`output` must hold one truth value per tile, got {decisions.dtype} of shape {tuple(decisions.shape)}. "
            "Only methods that decide by tile can be drawn."
        )
    return decisions.tolist()


def _tokens_per_tile(output: Any, processor: Any, own: list[bool], image_idx: int) -> tuple[int | None, int | None]:
    """Visual tokens of a full and of a compressed tile, None where nothing says so."""
    if not isinstance(processor, ProcessorMixin):
        return None, None
    full = processor.image_seq_length
    if isinstance(output, (torch.Tensor, list, tuple)):
        return full, None
    compressed = sum(own)
    kept = int(output.num_visual_tokens[image_idx]) - full * (len(own) - compressed)
    return full, kept // compressed if compressed else None


def _draw(
    image: Image.Image,
    layout: TileLayout,
    decisions: list[bool],
    tokens_per_tile: tuple[int | None, int | None],
    title: str | None,
    max_side: int,
) -> Image.Image:
    scale = max_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # enlarged pixels stay visible as such
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    font = ImageFont.load_default(max(11, max_side // 40))
    line = math.ceil(1.5 * font.size)
    top = _MARGIN + (line if title else 0)

    whole = _index_of_whole_view(layout)
    shown = image.resize((width, height), resample)
    panels = [(shown, (_MARGIN, top))]
    views = []
    for tile_idx, compressed in enumerate(decisions):
        if tile_idx == whole:
            small = image.resize((max(1, round(width * 0.4)), max(1, round(height * 0.4))), Image.Resampling.LANCZOS)
            corner = (_MARGIN + width + _MARGIN, top)
            panels.append((small, corner))
            box = (*corner, corner[0] + small.width, corner[1] + small.height)
        else:
            left, upper, right, lower = (side * scale for side in layout.boxes[tile_idx])
            box = (
                _MARGIN + max(0, round(left)),
                top + max(0, round(upper)),
                _MARGIN + min(width, round(right)),
                top + min(height, round(lower)),
            )
        views.append(TileView(box, compressed, tokens_per_tile[compressed]))

    legend = _legend(decisions, tokens_per_tile)
    texts = [legend_line for _, legend_line in legend] + ([title] if title else [])
    right = max(corner[0] + panel.width for panel, corner in panels)
    right = max([right, *(_MARGIN + line + math.ceil(font.getlength(text)) for text in texts)])
    sheet = Image.new("RGB", (right + _MARGIN, top + height + _MARGIN + line * len(legend)), _PAPER)
    for panel, corner in panels:
        sheet.paste(panel, corner)
    for view in views:
        _draw_tile(sheet, view, font)
    _write(sheet, title, legend, top + height, font, line)
    return sheet


def _index_of_whole_view(layout: TileLayout) -> int | None:
    """Position of the tile that shows the whole image beside the grid, None if the grid is all there is."""
    rows, columns = layout.grid
    if layout.num_tiles == rows * columns:
        return None
    image = (0.0, 0.0, float(layout.image_size[1]), float(layout.image_size[0]))
    # first or last, depending on the tiling
    return 0 if layout.boxes[0] == image else layout.num_tiles - 1


def _draw_tile(sheet: Image.Image, view: TileView, font: Any) -> None:
    left, top, right, bottom = view.box
    if right <= left or bottom <= top:
        # a tile of padding alone
        return
    colour = COMPRESSED_COLOUR if view.compressed else FULL_COLOUR
    if view.compressed:
        below = sheet.crop(view.box)
        veiled = Image.blend(below, Image.new("RGB", below.size, _PAPER), _VEIL)
        cells = math.isqrt(view.num_tokens) if view.num_tokens else 4
        pen = ImageDraw.Draw(veiled)
        for step in range(1, cells):
            x, y = step * veiled.width // cells, step * veiled.height // cells
            pen.line([(x, 0), (x, veiled.height)], fill=_lighter(colour))
            pen.line([(0, y), (veiled.width, y)], fill=_lighter(colour))
        sheet.paste(veiled, (left, top))
    pen = ImageDraw.Draw(sheet)
    frame = max(2, min(right - left, bottom - top) // 60)
    # inside of the tile, so that the frames of neighbours do not cover each other
    pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=frame)
    if view.num_tokens is not None:
        _label(pen, str(view.num_tokens), (left, top), (right, bottom), colour, font)


def _label(pen: ImageDraw.ImageDraw, text: str, corner: Any, opposite: Any, colour: tuple, font: Any) -> None:
    width, height = math.ceil(font.getlength(text)) + 6, math.ceil(1.25 * font.size)
    if width > opposite[0] - corner[0] or height > opposite[1] - corner[1]:
        return
    pen.rectangle((*corner, corner[0] + width, corner[1] + height), fill=colour)
    pen.text((corner[0] + 3, corner[1] + height // 2), text, fill=_PAPER, font=font, anchor="lm")


def _lighter(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple((channel + 2 * 255) // 3 for channel in colour)


def _legend(
    decisions: list[bool], tokens_per_tile: tuple[int | None, int | None]
) -> list[tuple[tuple[int, int, int] | None, str]]:
    """Lines of (colour of the swatch, text)."""
    compressed = sum(decisions)
    lines = []
    for colour, name, count, tokens in (
        (FULL_COLOUR, "full", len(decisions) - compressed, tokens_per_tile[0]),
        (COMPRESSED_COLOUR, "compressed", compressed, tokens_per_tile[1]),
    ):
        each = "" if tokens is None or not count else f", {tokens} visual tokens each"
        lines.append((colour, f"{name}: {count} of {len(decisions)} tiles{each}"))
    full, small = tokens_per_tile
    if full is not None and (small is not None or not compressed):
        kept = full * (len(decisions) - compressed) + (small or 0) * compressed
        reserved = full * len(decisions)
        lines.append((None, f"kept {kept} of {reserved} visual tokens ({reserved / kept:.2f} x fewer)"))
    return lines


def _write(sheet: Image.Image, title: str | None, legend: Sequence[Any], bottom: int, font: Any, line: int) -> None:
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_MARGIN, _MARGIN + line // 2 - 2), title, fill=_INK, font=font, anchor="lm")
    for index, (colour, text) in enumerate(legend):
        middle = bottom + _MARGIN // 2 + line * index + line // 2
        if colour is not None:
            half = font.size // 2
            pen.rectangle((_MARGIN, middle - half, _MARGIN + 2 * half, middle + half), fill=colour)
        pen.text((_MARGIN + line if colour else _MARGIN, middle), text, fill=_INK, font=font, anchor="lm")
