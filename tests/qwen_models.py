"""Tiny models of LLaVolta on Qwen's bases, and prompts with videos, which their tests share."""

from dataclasses import dataclass

import torch
from factories import random_batch, tiny_model
from random_images import draw_int
from stock_models import VISION_START

from hf_vtc.models.host_vtc import GRID_BASES
from hf_vtc.models.prompt_vtc import VisionInputs

# those whose decoder has keys and values in every layer
BASES = tuple(base for base in GRID_BASES if base != "qwen3_5")


def model_of(base, layer_idx=1, compressor="avgpool1d", stride=4):
    name = f"llavolta on {base}"
    return tiny_model(name, compress_layer_idx=layer_idx, compressor=compressor, compress_stride=stride)


def batch_of(model, seed, **kwargs):
    return random_batch(model.config, torch.Generator().manual_seed(seed), **kwargs)


_VISION_END = 302


@dataclass
class VideoRow:
    """A prompt of images and videos as these bases write it, and the tensors of each, in prompt order."""

    ids: list[int]
    images: list[tuple[torch.Tensor, tuple[int, int, int]]]
    videos: list[tuple[torch.Tensor, tuple[int, int, int]]]


def video_row(model, items, generator, text=4):
    """A row that shows `items`, "image" or "video", with text around each; adjacent where `text` is 0."""
    config = model.config
    merge, width = config.vision_config.spatial_merge_size, 3 * 2 * config.vision_config.patch_size**2

    def words(most):
        return torch.randint(1, 200, (draw_int(min(1, most), most, generator),), generator=generator).tolist()

    row = VideoRow(words(4), [], [])
    for kind in items:
        rows, columns = draw_int(2, 3, generator), draw_int(2, 4, generator)
        num_frames = draw_int(2, 4, generator) if kind == "video" else 1
        grid = (num_frames, rows * merge, columns * merge)
        pixels = torch.randn(num_frames * grid[1] * grid[2], width, generator=generator)
        (row.videos if kind == "video" else row.images).append((pixels, grid))
        token_id = config.video_token_id if kind == "video" else config.image_token_id
        if kind == "video" and config.grid_base == "qwen3_vl":
            for _ in range(num_frames):
                # the time of a frame, in words
                row.ids += [*words(3), VISION_START, *[token_id] * (rows * columns), _VISION_END]
        else:
            row.ids += [VISION_START, *[token_id] * (num_frames * rows * columns), _VISION_END]
        row.ids += words(text)
    row.ids += words(4)
    return row


def batch_of_rows(model, rows, padding_side="left", seconds=None):
    """Model inputs of rows as `video_row` gives them; `seconds` between frames of each video, where positions tell."""
    length = max(len(row.ids) for row in rows)
    pads = [[0] * (length - len(row.ids)) for row in rows]
    left = padding_side == "left"
    batch = {
        "input_ids": torch.tensor([pad + row.ids if left else row.ids + pad for pad, row in zip(pads, rows)]),
        "attention_mask": torch.tensor(
            [pad + [1] * len(row.ids) if left else [1] * len(row.ids) + [0] * len(pad) for pad, row in zip(pads, rows)]
        ),
    }
    for name, grids, shown in (
        ("pixel_values", "image_grid_thw", [each for row in rows for each in row.images]),
        ("pixel_values_videos", "video_grid_thw", [each for row in rows for each in row.videos]),
    ):
        if shown:
            batch[name] = torch.cat([pixels for pixels, _ in shown])
            batch[grids] = torch.tensor([grid for _, grid in shown])
    if seconds is not None and model.config.grid_base == "qwen2_5_vl" and "video_grid_thw" in batch:
        batch["second_per_grid_ts"] = torch.tensor([seconds] * len(batch["video_grid_thw"]))
    return batch


def video_batch(model, seed, rows=(("video",), ("image", "video"), ()), padding_side="left", seconds=None, text=4):
    generator = torch.Generator().manual_seed(seed)
    return batch_of_rows(model, [video_row(model, items, generator, text) for items in rows], padding_side, seconds)


def layout_of(model, batch):
    """What the model finds of a batch before its tower runs."""
    own, vision = model.model, VisionInputs(**{name: batch.get(name) for name in VisionInputs.__dataclass_fields__})
    _, mask = own.find_placeholders(batch["input_ids"], None)
    return own.layout_of(
        mask, batch.get("attention_mask"), vision, video_mask=own.find_videos(batch["input_ids"], None)
    )
