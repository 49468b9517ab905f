"""Prompts with videos: the part of the processor that writes their placeholders, see `processing_vtc.py`."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from .grids_vtc import FRAMES_OF_PATCH
from .host_vtc import counts_seconds
from .image_sizes_vtc import sizes_of_tiled_videos
from .prompt_vtc import BY_SCORES, budgets_per_image
from .tiling_vtc import refuse_unknown
from .video_processing_vtc import (
    Clip,
    VideoSettings,
    clip_of,
    frames_of,
    metadata_of_videos,
    patches_of_video,
    placeholders_of_clip,
    videos_by_row,
)
from .videos_vtc import levels_of_frames

# of a call that shows videos, to processors that take them
VIDEO_ARGUMENTS = frozenset(("video_metadata", "do_sample_frames", "fps", "num_frames"))


def image_argument(name: str, kwargs: dict[str, Any]) -> Any:
    """An argument of a call that concerns images, given by itself or in their dictionary."""
    return kwargs.get(name, (kwargs.get("images_kwargs") or {}).get(name))


class VideoPrompts:
    """What a processor does about videos; `video` are the fields of [`VideoSettings`], None where it takes none.

    Abstract: the processor has `image_processor`, `image_token`, `video_token` and `model_config` besides.
    """

    def with_videos(
        self, text: Any, videos: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Text with the placeholders of its videos written, model inputs of these, and what is left of `kwargs`."""
        kwargs, nested = dict(kwargs), dict(kwargs.get("videos_kwargs") or {})
        refuse_unknown(nested, VIDEO_ARGUMENTS, "`videos_kwargs` of `VtcProcessor`")
        asked = nested | {name: kwargs.pop(name) for name in VIDEO_ARGUMENTS if name in kwargs}
        kwargs.pop("videos_kwargs", None)
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        counts = [sample.count(self.video_token) if isinstance(sample, str) else 0 for sample in texts]
        flat, rows = ([], None) if videos is None else videos_by_row(videos)
        if not flat:
            told = [name for name, value in asked.items() if value is not None]
            if told:
                raise ValueError(f"`{told[0]}` says how videos are shown, of which none were given. Leave it out.")
            if any(counts):
                raise ValueError(
                    f"Sample {next(idx for idx, count in enumerate(counts) if count)} has a placeholder of a video "
                    f"({self.video_token}), but no `videos` were given."
                )
            return text, {}, kwargs
        if text is None:
            raise ValueError("`videos` need `text`, which says where they are.")
        if kwargs.get("return_text_replacement_offsets"):
            raise ValueError(
                "`return_assistant_tokens_mask` does not know where videos are. Leave it out: "
                "`hf_vtc.data.VtcCollator` makes labels of conversations with videos."
            )
        if sum(counts) != len(flat) or rows is not None and rows != counts:
            raise ValueError(
                f"The samples have {counts} placeholders of videos ({self.video_token}), but "
                f"{len(flat) if rows is None else rows} videos were given. Give each video one placeholder in the "
                "text, or one content item in the chat."
            )
        num_images = sum(sample.count(self.image_token) for sample in texts)
        budgets = self._budgets_of_kinds(kwargs, num_images, len(flat))
        inputs, replacements = self.videos_and_placeholders(
            flat, budgets, image_argument("input_data_format", kwargs), **asked
        )
        remaining = iter(replacements)
        texts = [self.with_written_videos(sample, remaining) for sample in texts]
        return_tensors = kwargs.get("return_tensors")
        for group in ("text_kwargs", "common_kwargs"):
            return_tensors = return_tensors or (kwargs.get(group) or {}).get("return_tensors")
        return texts, dict(BatchFeature(inputs, tensor_type=return_tensors)), kwargs

    def _budgets_of_kinds(self, kwargs: dict[str, Any], num_images: int, num_videos: int) -> list[Any] | None:
        """The budget of each video; those of images are left in `kwargs`. None where the largest count is reserved."""
        budget = image_argument("vtc_budget", kwargs)
        if budget is None:
            return None
        budgets = budgets_per_image(budget, num_images + num_videos)
        if "vtc_budget" not in kwargs:
            kwargs["images_kwargs"] = dict(kwargs["images_kwargs"])
        place = kwargs if "vtc_budget" in kwargs else kwargs["images_kwargs"]
        place["vtc_budget"] = budgets[:num_images] or None
        return budgets[num_images:]

    def videos_and_placeholders(
        self, videos: Sequence[Any], budgets: Sequence[Any] | None = None, data_format: str | None = None, **asked: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """Model inputs of the videos of a call, and what the placeholder of each becomes in the prompt.

        Args:
            videos (`Sequence`): of each its frames.
            budgets (`Sequence`, *optional*): of each, for as many placeholders as enter the language model at it.
            data_format (`str`, *optional*): of arrays, `"channels_first"` or `"channels_last"`.
            **asked: `video_metadata`, and fields of `VideoSettings` for this call.
        """
        frames = [frames_of(video, idx, data_format) for idx, video in enumerate(videos)]
        shapes = [(len(own), own[0].height, own[0].width) for own in frames]
        clips, sizes, replacements = self.written_videos(shapes, budgets, **asked)
        pixels = self.image_processor.settings()
        patches = [
            patches_of_video([own[idx] for idx in clip.shown], size, pixels)
            for own, clip, size in zip(frames, clips, sizes)
        ]
        grids = [self._grid_of_video(clip, size) for clip, size in zip(clips, sizes)]
        inputs = {
            "pixel_values_videos": np.concatenate(patches),
            "video_grid_thw": np.array(grids, dtype=np.int64),
        }
        if counts_seconds(self.video["base"]):
            inputs["second_per_grid_ts"] = [clip.seconds_between_patches for clip in clips]
        return inputs, replacements

    def written_videos(
        self, shapes: Sequence[tuple[int, int, int]], budgets: Sequence[Any] | None = None, **asked: Any
    ) -> tuple[list[Clip], list[tuple[int, int]], list[str]]:
        """Which frames of videos are shown, their size in pixels, and what becomes of their placeholders.

        Args:
            shapes (`Sequence`): (frames, height, width) of each video.
            budgets, **asked: as in `videos_and_placeholders`.
        """
        metadata = metadata_of_videos(asked.pop("video_metadata", None), len(shapes))
        settings = VideoSettings.from_dict(self.video).asked(asked)
        stride = self.image_processor.settings().tile_size if settings.as_tiles else self.image_processor.token_stride
        clips, sizes, written = [], [], []
        for idx, ((num_frames, height, width), own) in enumerate(zip(shapes, metadata)):
            clip = clip_of(num_frames, own, settings, idx)
            size = settings.frame_size(len(clip.shown), height, width, stride)
            budget = None if budgets is None else budgets[idx]
            grid = self._grid_of_video(clip, size)
            written.append(self._written_video(clip, grid, settings, idx, budget))
            clips.append(clip)
            sizes.append(size)
        return clips, sizes, written

    def _grid_of_video(self, clip: Clip, size: tuple[int, int]) -> list[int]:
        if VideoSettings.from_dict(self.video).as_tiles:
            return [len(clip.shown), 1, 1]
        return [-(-len(clip.shown) // FRAMES_OF_PATCH), *(side // self.image_processor.patch_size for side in size)]

    def _written_video(self, clip: Clip, grid: list[int], settings: VideoSettings, video_idx: int, budget: Any) -> str:
        """What a video of this grid becomes in a prompt, with the tokens around it."""
        num_frames, newlines = grid[0], [1] * settings.as_tiles
        written = [self._tokens_of_frame(grid, settings)] * num_frames
        if budget is not None:
            config = self.model_config
            counts = self._levels_of_frame(grid, written[0], settings)
            if config.frame_split != "uniform" and budget not in ("auto", "full"):
                raise ValueError(
                    f"`frame_split={config.frame_split!r}` looks at the frames of a video to split a number of "
                    "tokens, which the model does alone. Leave `vtc_budget` out of the processor's call."
                )
            if budget == "auto":
                levels = [config.own_level(counts, video_idx)] * num_frames
            else:
                levels = levels_of_frames(
                    budget, counts, num_frames, None, video_idx, config.frames_joined, len(newlines)
                )
            if BY_SCORES in levels:
                raise ValueError(
                    f"`vtc_budget='auto'` lets {config.model_type} decide from the pixels of video {video_idx}, which "
                    "the processor cannot know. Leave `vtc_budget` out of its call, or give a number of tokens, a "
                    "share of them or 'full'."
                )
            if any(levels):
                config.check_exact()
            written = [counts[config.level_entering(level)] for level in levels]
        return placeholders_of_clip(clip.times, written + newlines, settings)

    def _tokens_of_frame(self, grid: list[int], settings: VideoSettings) -> int:
        """Visual tokens of a frame without compression."""
        if settings.as_tiles:
            return (-(-math.isqrt(self.image_seq_length) // 2)) ** 2
        return grid[1] * grid[2] // (self.image_processor.token_stride // self.image_processor.patch_size) ** 2

    def _levels_of_frame(self, grid: list[int], reserved: int, settings: VideoSettings) -> Sequence[int]:
        """`levels` of the model for a frame of `reserved` tokens.

        Raises:
            ValueError: the model is another one, whose frames have other tokens.
        """
        config = self.model_config
        if settings.as_tiles:
            sizes = sizes_of_tiled_videos(config, [1])
        else:
            sizes = config.sizes_of(None, torch.tensor([grid[1:]]) * self.image_processor.patch_size)
        counts = config.levels(sizes)[0]
        if counts[0] != reserved:
            raise ValueError(
                f"The model of `model_config` needs {counts[0]} placeholders for a frame without compression, but "
                f"this processor reserves {reserved}: they belong to different models. Set `processor.model_config = "
                "model.config` of the model that is run."
            )
        return counts

    def with_written_videos(self, sample: str, replacements: Iterator[str]) -> str:
        """A text in which each placeholder of a video, with the tokens around it, is the next of `replacements`."""
        bare = self.bare_videos(sample)
        return re.sub(re.escape(self.video_token), lambda _: next(replacements), bare)

    def bare_videos(self, sample: str) -> str:
        """A text without the tokens that a chat template writes around the placeholder of a video."""
        if self.video is None:
            return sample
        around = self.video["start_token"] + self.video_token + self.video["end_token"]
        return sample.replace(around, self.video_token)
