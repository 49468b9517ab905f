"""What was kept, drawn on the image. Pillow only."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig, ProcessorMixin

from ..methods import record_of, vico
from ..methods.drawing import COMPRESSED_COLOUR, FULL_COLOUR, PAPER, Kept
from ..models.image_processing_vtc import VtcImageProcessor
from .canvas import compose
from .frames import frames_with_tokens

__all__ = ["COMPRESSED_COLOUR", "FULL_COLOUR", "filmstrip", "overlay", "stack"]

# frames that stand side by side
_FRAMES_PER_ROW = 4


def overlay(
    image: Any,
    output: Any,
    processor: Any = None,
    *,
    config: PretrainedConfig | None = None,
    num_tiles: Sequence[int] | torch.Tensor | None = None,
    image_idx: int = 0,
    tokens_per_tile: tuple[int, int] | None = None,
    title: str | None = None,
    caption: Sequence[str] = (),
    max_side: int = 640,
) -> Image.Image:
    """Draw which visual tokens the language model sees of an image; a grid has a cell per token.

    ViCO: tiles as they are, or veiled under a grid of what they keep. AVG-LLaVA: the grid of the chosen granularity,
    veiled where the map is cut. LLaVolta: the patches that become one token. VisToG: the semantic groups as a
    segmentation. ConvLLaVA: the grid of its tokens. The whole view, where there is one, stands to the right. A legend
    says what colours and cells mean, and how many tokens stay.

    Args:
        image: path, URL, PIL image, array or tensor; whatever the image processor takes.
        output: what `forward` gave, or for ViCO `router_decisions` alone: one truth value per tile, True = compressed.
        processor: the `VtcProcessor` or `VtcImageProcessor` that cut the image. Default: InternVL's 448 pixel tiles.
        config: `model.config`. Default: the output is ViCO's.
        num_tiles (`(num_images,)`, *optional*): as the processor gives it with `return_layout=True`; needed if the
            call had several images and the method decides by tile, or the base is LLaVA-OneVision.
        image_idx (`int`): which image of the call this is.
        tokens_per_tile (`tuple[int, int]`, *optional*): for ViCO without a `config`, visual tokens of a full and of a
            compressed tile; without them no numbers are drawn.
        title (`str`, *optional*): a line above the picture.
        caption (`Sequence[str]`): lines below it, such as question and answer, broken where the picture ends.
        max_side (`int`): longer side of the drawn image in pixels; small images are enlarged to it.

    Returns:
        An RGB picture.

    Raises:
        ValueError: the decisions do not fit this image, `output` does not hold what the method decides, or nothing is
            known about drawing this method.
    """
    cutter = processor.image_processor if isinstance(processor, ProcessorMixin) else processor or VtcImageProcessor()
    picture = cutter.fetch_images(image)
    counts = None if num_tiles is None else [int(count) for count in num_tiles]
    layout = cutter.get_tile_layout(picture.height, picture.width, _is_alone(cutter, output, counts, image_idx))
    record = vico.RECORD if config is None else record_of(config)
    draw = record.need("draw", "`overlay`")
    kept = Kept(layout, output, config, image_idx, counts, tokens_per_tile)
    return compose(picture, layout, draw(kept), title, max_side, caption)


def _is_alone(cutter: VtcImageProcessor, output: Any, num_tiles: list[int] | None, image_idx: int) -> bool:
    """Whether an image was cut as one that is alone in its prompt."""
    if cutter.max_map_tiles is None:
        return True
    if num_tiles is not None:
        return num_tiles[image_idx] > 1
    if not isinstance(output, (torch.Tensor, list, tuple)) and len(output.num_visual_tokens) > 1:
        raise ValueError(
            "`num_tiles` must be given for a call with several images: with `max_map_tiles` an image is cut otherwise "
            "beside others in its prompt. Pass what the processor returned."
        )
    return True


def filmstrip(
    video: Any,
    output: Any,
    input_ids: torch.LongTensor,
    processor: Any,
    *,
    config: PretrainedConfig,
    max_side: int = 240,
) -> Image.Image:
    """Draw which visual tokens the language model sees of a video, frame by frame, as `overlay` does of an image.

    A frame is what one temporal patch holds, two pictures, of which the first is shown.

    Args:
        video: the frames that were shown: all that were given to the processor, unless it sampled them.
        output: what `forward` gave for one prompt that shows this video and nothing else.
        input_ids (`torch.LongTensor` of shape `(1, L)`): the prompt.
        processor: the `VtcProcessor` that wrote it.
        config: `model.config`.
        max_side (`int`): longer side of a drawn frame in pixels.

    Returns:
        An RGB picture.

    Raises:
        ValueError: the output is none of such a prompt, or of other frames.
    """
    pictures = frames_with_tokens(video, output, input_ids, processor, config, max_side)
    rows = [pictures[first : first + _FRAMES_PER_ROW] for first in range(0, len(pictures), _FRAMES_PER_ROW)]
    return stack(rows)


def stack(pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Arrange pictures in rows, from the top left, on white."""
    if not pictures or not all(pictures):
        raise ValueError("`pictures` must hold at least one picture per row.")
    heights = [max(picture.height for picture in row) for row in pictures]
    width = max(sum(picture.width for picture in row) for row in pictures)
    sheet = Image.new("RGB", (width, sum(heights)), PAPER)
    top = 0
    for row, height in zip(pictures, heights):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width
        top += height
    return sheet
