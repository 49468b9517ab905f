"""Videos to patches and prompts, on PIL and numpy alone, as the processors of Qwen2.5-VL and Qwen3-VL make them.

A video is a list of frames. Which of them are shown, how large, and what a prompt says of their time follows from
published settings; pixels become values as those of images do. Sources: `Qwen2VLVideoProcessor`,
`Qwen3VLVideoProcessor` and `Qwen3VLProcessor` of transformers 4.57.6, whose prompts later releases wrap in one more
pair of markers; resizing is Pillow's, where theirs is torchvision's, which rounds otherwise.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .grids_vtc import FRAMES_OF_PATCH, patches_of_frames, size_of_grid
from .host_vtc import GRID_BASES, counts_seconds
from .image_loading_vtc import flattened, load_images
from .pixels_vtc import normalized, resized
from .tiling_vtc import TilingSettings, refuse_unknown

logger = logging.get_logger(__name__)

# frames per second of a video about which nothing is said
_FPS_UNSAID = 24.0
# the base whose frames are tiles, all of one size
_TILED = "llava_onevision"
_METADATA = ("fps", "total_num_frames", "frames_indices", "duration", "width", "height", "video_backend")


@dataclass(frozen=True)
class VideoSettings:
    """How a base takes videos; written to `processor_config.json`.

    Args:
        base (`str`): `"qwen2_5_vl"`, whose limits in pixels are those of a frame, and whose positions know the time;
            `"qwen3_vl"`, whose limits are those of all frames together, and whose prompts say the time; or
            `"llava_onevision"`, whose frames are tiles, and of whose time nobody knows.
        token (`str`): the placeholder of a video.
        start_token, end_token (`str`): around a video, and around each frame where prompts say the time.
        min_pixels, max_pixels (`int`): between which the size is left alone; None where frames are tiles.
        do_sample_frames (`bool`): whether frames are sampled, or all shown.
        fps (`float`, *optional*): frames to sample of each second.
        num_frames (`int`, *optional*): frames to sample, in place of `fps`.
        min_frames, max_frames (`int`): fewest and most frames that `fps` may ask for.

    Raises:
        ValueError: a field is outside of its range.
    """

    base: str
    min_pixels: int | None = None
    max_pixels: int | None = None
    token: str = "<|video_pad|>"
    start_token: str = "<|vision_start|>"
    end_token: str = "<|vision_end|>"
    do_sample_frames: bool = False
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        if self.base not in (*GRID_BASES, _TILED):
            raise ValueError(
                f"`base` of `video` must be one of {', '.join((*GRID_BASES, _TILED))}, got {self.base!r}."
            )
        limits = self.min_pixels, self.max_pixels
        if self.as_tiles:
            fields = type(self).__dataclass_fields__
            for name in ("min_pixels", "max_pixels", "min_frames", "max_frames"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"`{name}` of `video` is of no use for {self.base}. Leave it out.")
        elif None in limits or not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"`video` must have 1 <= min_pixels <= max_pixels, got {limits[0]} and {limits[1]}.")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"`video` must have 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}."
            )
        for name in ("fps", "num_frames"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` of sampled frames must be positive, got {value}.")
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("`fps` and `num_frames` both say how many frames are sampled. Give one of them.")

    @property
    def writes_time(self) -> bool:
        """Whether prompts say the time of each frame, each in its own run of placeholders."""
        return not self.as_tiles and not counts_seconds(self.base)

    @property
    def as_tiles(self) -> bool:
        """Whether every frame is a tile."""
        return self.base == _TILED

    @property
    def frames_of_patch(self) -> int:
        """Pictures that one frame of the model shows."""
        return 1 if self.as_tiles else FRAMES_OF_PATCH

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "VideoSettings":
        """Settings from a file, none of whose fields is left unread."""
        refuse_unknown(fields, cls.__dataclass_fields__, "`video` of `VtcProcessor`")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def asked(self, fields: Mapping[str, Any]) -> "VideoSettings":
        """These settings with those of a call, in which `fps` and `num_frames` replace each other."""
        given = {name: value for name, value in fields.items() if value is not None}
        instead = {"fps": "num_frames", "num_frames": "fps"}
        neither = {instead[name]: None for name in instead if name in given and instead[name] not in given}
        return type(self)(**{**asdict(self), **neither, **given})

    def sampled(self, total: int, fps: float | None) -> list[int]:
        """Which frames of a video of `total` frames are shown.

        Args:
            total (`int`): frames.
            fps (`float`, *optional*): of them in a second, None if nobody knows.

        Raises:
            ValueError: `fps` frames are to be sampled of an unknown second, or more frames than there are.
        """
        if not self.do_sample_frames:
            return list(range(total))
        if self.num_frames is None and self.fps is None:
            raise ValueError(
                "`do_sample_frames=True` needs `fps` or `num_frames`. Give one, or `do_sample_frames=False`."
            )
        return self._spread(total, fps) if self.writes_time else self._stepped(total, fps)

    def _spread(self, total: int, fps: float | None) -> list[int]:
        """Frames from the first to the last one, as Qwen3-VL samples them."""
        count = self.num_frames
        if count is None:
            count = int(total / (_FPS_UNSAID if fps is None else fps) * self.fps)
            count = min(max(count, self.min_frames), self.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int).tolist()

    def _stepped(self, total: int, fps: float | None) -> list[int]:
        """Frames at equal steps from the first one, as many as fill patches, as Qwen2.5-VL samples them, or any number
        of tiles."""
        patch = self.frames_of_patch
        if self.num_frames is not None:
            count = round(self.num_frames / patch) * patch
        elif fps is None:
            raise ValueError(
                "`fps` frames cannot be sampled of a video that does not say how many it has in a second. Give "
                "`video_metadata` with its `fps`, or `num_frames`."
            )
        elif self.as_tiles:
            count = max(1, int(total / fps * self.fps))
        else:
            most = math.floor(min(self.max_frames, total) / patch) * patch
            count = math.floor(min(max(total / fps * self.fps, self.min_frames), most, total) / patch) * patch
        if not 0 < count <= total:
            raise ValueError(
                f"`num_frames` cannot be {count} of a video of {total} frames. Ask for {patch} to {total}, or give "
                "more frames."
            )
        if self.as_tiles:
            return [idx * total // count for idx in range(count)]
        # steps in the precision of the source
        return torch.arange(0, total, total / count).int().tolist()

    def frame_size(self, num_frames: int, height: int, width: int, stride: int) -> tuple[int, int]:
        """(height, width) in pixels to which frames are resized, multiples of `stride`, the side of a visual token, or
        of a tile."""
        if self.as_tiles:
            return stride, stride
        if not self.writes_time:
            return size_of_grid(height, width, stride, self.min_pixels, self.max_pixels)
        if num_frames < FRAMES_OF_PATCH:
            raise ValueError(f"A video of {self.base} needs at least {FRAMES_OF_PATCH} frames, got {num_frames}.")
        if height < stride or width < stride:
            scale = max(stride / height, stride / width)
            height, width = int(height * scale), int(width * scale)
        # rounded as the source rounds it, which is not as patches are filled
        counted = round(num_frames / FRAMES_OF_PATCH) * FRAMES_OF_PATCH
        return size_of_grid(height, width, stride, self.min_pixels, self.max_pixels, counted, num_frames)


class Clip(NamedTuple):
    """Which frames of a video are shown, and when.

    `shown`: their places among those given. `indices`: among all `total` frames of the video that they are of, `fps`
    of which are a second, None if nobody said.
    """

    shown: list[int]
    indices: list[int]
    fps: float | None
    total: int

    @property
    def seconds_between_patches(self) -> float:
        """Seconds from one patch in time to the next."""
        fps = _FPS_UNSAID if self.fps is None else len(self.indices) / self.total * self.fps
        return FRAMES_OF_PATCH / fps

    @property
    def times(self) -> list[float]:
        """Seconds of the middle of each patch in time."""
        indices = [*self.indices, *self.indices[-1:] * (-len(self.indices) % FRAMES_OF_PATCH)]
        seconds = [idx / (_FPS_UNSAID if self.fps is None else self.fps) for idx in indices]
        return [
            (seconds[first] + seconds[first + FRAMES_OF_PATCH - 1]) / 2
            for first in range(0, len(seconds), FRAMES_OF_PATCH)
        ]


def videos_by_row(videos: Any) -> tuple[list[Any], list[int] | None]:
    """Videos of a call in order, and how many belong to each row if the caller gave rows.

    Args:
        videos: a video, which is a list of frames or an array with four dimensions; a list of videos; or a list of
            such lists, one for each row.
    """
    if _is_video(videos):
        return [videos], None
    if not isinstance(videos, (list, tuple)) and getattr(videos, "ndim", None) != 5:
        raise ValueError(
            f"`videos` must be a list of frames, an array of four dimensions, or lists of these, got "
            f"{type(videos).__name__}. Decode files first: `hf_vtc.data.read_video`."
        )
    entries = list(videos)
    if all(_is_video(each) for each in entries):
        return entries, None
    rows = [[] if row is None else [row] if _is_video(row) else list(row) for row in entries]
    return [video for row in rows for video in row], [len(row) for row in rows]


def _is_video(value: Any) -> bool:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 4
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_frame(each) for each in value)


def _is_frame(value: Any) -> bool:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim in (2, 3)
    return isinstance(value, (Image.Image, str, os.PathLike))


def metadata_of_videos(video_metadata: Any, num_videos: int) -> list[Mapping[str, Any]]:
    """What is said of each video: `fps`, `total_num_frames`, `frames_indices`; nothing for None."""
    if video_metadata is None:
        return [{}] * num_videos
    entries = [video_metadata] if isinstance(video_metadata, Mapping) else list(video_metadata)
    if entries and isinstance(entries[0], (list, tuple)):
        entries = [each for row in entries for each in row]
    if len(entries) != num_videos:
        raise ValueError(f"`video_metadata` needs one entry per video: {num_videos} videos, {len(entries)} entries.")
    for entry in entries:
        refuse_unknown(entry, _METADATA, "`video_metadata`")
    return [{name: entry[name] for name in entry if entry[name] is not None} for entry in entries]


def frames_of(video: Any, video_idx: int, data_format: str | None = None) -> list[Image.Image]:
    """The frames of a video, loaded as images are.

    Args:
        video: its frames, as `videos_by_row` knows them.
        video_idx (`int`): which video of the call, for messages.
        data_format (`str`, *optional*): of arrays, as for images.

    Raises:
        OSError: a frame cannot be read; a file of a video is none.
        ValueError: frames have different sizes.
    """
    try:
        # one by one, since arrays of few colours and pixels could be read in two ways
        frames = flattened(load_images([*video], f"videos[{video_idx}]", data_format))
    except OSError as error:
        raise type(error)(
            f"{error} A video is a list of frames: `hf_vtc.data.read_video` decodes its file."
        ) from error
    sizes = {(frame.height, frame.width) for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"Frames of video {video_idx} must have one size, got {sorted(sizes)} (height x width).")
    return frames


def clip_of(num_frames: int, metadata: Mapping[str, Any], settings: VideoSettings, video_idx: int) -> Clip:
    """Which frames of a video are shown, from how many were given and what is said of them.

    Args:
        metadata (`Mapping`): as `metadata_of_videos` gives it.
        settings ([`VideoSettings`]): of this call.
        video_idx (`int`): which video of the call, for messages.

    Raises:
        ValueError: frames are not those that the metadata speak of, or cannot be sampled.
    """
    fps, indices = metadata.get("fps"), metadata.get("frames_indices")
    if fps is None and not settings.as_tiles:
        logger.warning_once(
            f"Nobody says how many frames a second of a video has, and {_FPS_UNSAID:.0f} are assumed, by which the "
            "model knows the time of each. Give `video_metadata` with `fps`."
        )
    elif fps is not None and not fps > 0:
        raise ValueError(f"`fps` of video {video_idx} must be positive, got {fps}.")
    total = int(metadata.get("total_num_frames", num_frames))
    if indices is not None:
        indices = [int(idx) for idx in indices]
    if indices is not None and len(indices) == num_frames != total:
        # sampled before
        return Clip(list(range(num_frames)), indices, fps, total)
    if total != num_frames:
        raise ValueError(
            f"`video_metadata` of video {video_idx} speaks of {total} frames, but {num_frames} were given. If they "
            "were sampled, say which by `frames_indices`."
        )
    shown = settings.sampled(total, fps)
    return Clip(shown, shown if indices is None else [indices[idx] for idx in shown], fps, total)


def patches_of_video(frames: Sequence[Image.Image], size: tuple[int, int], pixels: TilingSettings) -> np.ndarray:
    """Normalised patches of the frames that are shown, at `size`, (height, width) in pixels.

    Args:
        pixels ([`TilingSettings`]): of the image processor; where its `tiling` is not `"patches"`, frames are tiles.
    """
    shown = [resized(frame, size[::-1], pixels.resample) for frame in frames]
    if pixels.tiling != "patches":
        return normalized(shown, pixels)
    shown += shown[-1:] * (-len(shown) % FRAMES_OF_PATCH)
    return patches_of_frames(normalized(shown, pixels), pixels.patch_size, pixels.token_stride // pixels.patch_size)


def placeholders_of_clip(times: Sequence[float], num_written: Sequence[int], settings: VideoSettings) -> str:
    """What the placeholder of a video, with the tokens around it, becomes in a prompt.

    Args:
        times (`Sequence[float]`): seconds of each frame, a patch in time.
        num_written (`Sequence[int]`): placeholders of each, and of what stands behind them.
    """
    if not settings.writes_time:
        return settings.start_token + settings.token * sum(num_written) + settings.end_token
    return "".join(
        f"<{time:.1f} seconds>{settings.start_token}{settings.token * count}{settings.end_token}"
        for time, count in zip(times, num_written, strict=True)
    )
