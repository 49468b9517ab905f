"""What was kept of a video, drawn on a picture of each of its frames."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig

from ..methods import record_of
from ..methods.drawing import Kept
from ..models.grids_vtc import FRAMES_OF_PATCH
from ..models.tiling_vtc import TileLayout
from ..models.video_processing_vtc import VideoSettings, frames_of
from .canvas import compose


def frames_with_tokens(
    video: Any,
    output: Any,
    input_ids: torch.LongTensor,
    processor: Any,
    config: PretrainedConfig,
    max_side: int = 240,
) -> list[Image.Image]:
    """A picture for each frame, which is what one temporal patch holds, with the visual tokens that are left of it.

    Args:
        video: the frames that the processor showed.
        output: what `forward` gave for one prompt that shows this video and nothing else.
        input_ids (`torch.LongTensor` of shape `(1, L)`): the prompt.
        processor: the `VtcProcessor` that wrote it.
        config (`PretrainedConfig`): of the model.
        max_side (`int`): longer side of a drawn frame in pixels.

    Raises:
        ValueError: the output is none of such a prompt, or of other frames.
    """
    if processor.video is None or output.num_visual_tokens is None or len(output.num_visual_tokens) != 1:
        raise ValueError("A filmstrip needs the output of one prompt that shows a single video, and its processor.")
    frames, settings = frames_of(video, 0), VideoSettings.from_dict(processor.video)
    if settings.as_tiles:
        raise ValueError(f"A filmstrip draws grids of patches, which frames of {settings.base} are not.")
    stride, (height, width) = processor.image_processor.token_stride, (frames[0].height, frames[0].width)
    size = settings.frame_size(len(frames), height, width, stride)
    grid, num_patches = (size[0] // stride, size[1] // stride), -(-len(frames) // FRAMES_OF_PATCH)
    placeholders = (input_ids[0] == config.video_token_id).cpu()
    if int(placeholders.sum()) != num_patches * grid[0] * grid[1]:
        raise ValueError(
            f"The prompt holds {int(placeholders.sum())} placeholders of a video, but these {len(frames)} frames need "
            f"{num_patches * grid[0] * grid[1]}. Give the frames that were shown, and the prompt with all of them."
        )
    kept = output.kept_mask[0].cpu()[placeholders].unflatten(0, (num_patches, -1))
    layout = TileLayout((height, width), size, (0, 0), (1, 1), ((0.0, 0.0, float(width), float(height)),), grid)
    draw = record_of(config).need("draw", "`filmstrip`")
    decisions, pictures = output.router_decisions, []
    counts, shared = _shared_counts(kept.sum(1).tolist())
    for idx, (count, num_frames) in enumerate(zip(counts, shared)):
        if decisions is not None:
            # one for each frame, or one for each of its tokens
            (part,) = decisions.unflatten(0, (num_patches, -1))[idx : idx + 1]
        seen = SimpleNamespace(num_visual_tokens=[count], router_decisions=None if decisions is None else part)
        drawing = draw(Kept(layout, seen, config, 0, None, None, num_frames))
        pictures.append(compose(frames[idx * FRAMES_OF_PATCH], layout, drawing, f"frame {idx + 1}", max_side))
    return pictures


def _shared_counts(counts: list[int]) -> tuple[list[int], list[int]]:
    """Tokens of each frame, of one without any those of the next that has some, and how many frames have these."""
    own, shared, waiting = [], [], 0
    for count in counts:
        waiting += 1
        if count > 0:
            own += [count] * waiting
            shared += [waiting] * waiting
            waiting = 0
    return own, shared
