"""Videos of records: frames that are images, or files, which PyAV decodes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .images import ImageReader

# frames that are decoded of a second, and of a whole file
FRAMES_PER_SECOND = 2.0
MOST_FRAMES = 64
# PIL's limit for an image
MAX_FRAME_PIXELS = 89_478_485
_FEWEST_FRAMES = 4
# FFmpeg knows more, among them playlists and scripts that name other files
_FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "flv", "ogg", "asf", "gif")
# keys of a mapping that is a video
_KEYS = ("frames", "path", "fps")


@dataclass
class Video:
    """Frames of a video, and what is known of their time.

    `metadata` are those that processors take as `video_metadata`.
    """

    frames: list[Any]
    metadata: dict[str, Any] = field(default_factory=dict)


def read_video(
    path: str | os.PathLike,
    fps: float = FRAMES_PER_SECOND,
    max_frames: int = MOST_FRAMES,
    max_pixels: int = MAX_FRAME_PIXELS,
) -> Video:
    """Decode evenly spaced frames of a video file, from its first to its last one.

    Args:
        path (`str` or `os.PathLike`): of a file; playlists, which name other files, are refused.
        fps (`float`): frames to decode of each second, but at least 4 of all.
        max_frames (`int`): most frames to decode.
        max_pixels (`int`): height times width of the largest frame that is decoded.

    Returns:
        [`Video`], whose `frames` and `metadata` are `videos` and `video_metadata` of a processor.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: the file holds no video that can be decoded.
    """
    if not fps > 0 or max_frames < 1:
        raise ValueError(f"`fps` and `max_frames` must be positive, got {fps} and {max_frames}.")
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Files of videos are decoded by PyAV, which is not installed: `pip install 'hf-vtc[video]'`. Or give "
            "frames as images."
        ) from error
    try:
        if not os.path.isfile(path):
            raise ValueError("it is no ordinary file")
        with _opened(av, path) as container:
            stream = _pictures_of(container, max_pixels)
            rate, total = stream.average_rate, stream.frames or sum(1 for _ in container.decode(stream))
        wanted = _evenly_spaced(total, None if rate is None else float(rate), fps, max_frames)
        with _opened(av, path) as container:
            decoded = enumerate(container.decode(_pictures_of(container, max_pixels)))
            found = {idx: frame.to_image() for idx, frame in decoded if idx in wanted}
        if not found:
            raise ValueError("it has no frame")
    # FFmpeg reports damage by errors of many kinds
    except (ValueError, OSError, av.FFmpegError) as error:
        raise ValueError(f"Video {ascii(Path(path).name)} cannot be decoded ({error}).") from error
    indices = sorted(found)
    # a file may have fewer frames than it says
    metadata = {"total_num_frames": total if len(found) == len(wanted) else indices[-1] + 1, "frames_indices": indices}
    if rate is not None:
        metadata["fps"] = float(rate)
    return Video([found[idx] for idx in indices], metadata)


@contextmanager
def _opened(av: Any, path: str | os.PathLike) -> Iterator[Any]:
    """A container whose file names no other one, whatever a stranger wrote into it."""
    with open(path, "rb") as file, av.open(file, options={"format_whitelist": ",".join(_FORMATS)}) as container:
        yield container


def _pictures_of(container: Any, max_pixels: int) -> Any:
    if not container.streams.video:
        raise ValueError("it has no pictures")
    stream = container.streams.video[0]
    if stream.width * stream.height > max_pixels:
        raise ValueError(f"its frames have {stream.height} x {stream.width} pixels, more than {max_pixels}")
    return stream


def _evenly_spaced(total: int, rate: float | None, fps: float, max_frames: int) -> set[int]:
    count = max_frames if rate is None else max(int(total / rate * fps), _FEWEST_FRAMES)
    places = np.linspace(0, max(total - 1, 0), max(min(count, max_frames, total), 1))
    return set(places.round().astype(int).tolist())


def video_of(source: Any, reader: ImageReader | None = None) -> Video:
    """What a record names as a video: a file, a list of frames, or a mapping of one of these and `fps`.

    Args:
        source: of the record.
        reader ([`ImageReader`], *optional*): opens frames, and says which files may be opened. Default: frames stay as
            they are, and any file may.

    Raises:
        ValueError: it is none of these, or may not be opened.
    """
    if isinstance(source, Video):
        return source
    fps = None
    if isinstance(source, Mapping):
        more = [key for key, value in source.items() if key not in _KEYS and value is not None]
        if more:
            raise ValueError(f"A video has {more[0]!r}, which is not read. Its keys are {', '.join(_KEYS)}.")
        fps = source.get("fps")
        given = [source[key] for key in ("frames", "path") if source.get(key) is not None]
        if len(given) != 1:
            raise ValueError("A video needs `frames` or the `path` of a file, and one of them only.")
        source = given[0]
    if isinstance(source, (str, os.PathLike)):
        if fps is not None:
            raise ValueError("`fps` is that of given frames; the file of a video says its own. Leave it out.")
        if reader is None:
            return read_video(source)
        return read_video(reader.inside(os.fspath(source)), max_pixels=reader.max_image_pixels)
    frames = list(source) if isinstance(source, (list, tuple)) or getattr(source, "ndim", 0) == 4 else []
    if not frames:
        raise ValueError(f"A video must be a path, a list of frames or a mapping, got {type(source).__name__}.")
    metadata = {} if fps is None else {"fps": fps}
    return Video(frames if reader is None else [reader.read(frame) for frame in frames], metadata)


def telling_frames(video: Video) -> list[Any]:
    """The decoded frames by which a video is known: those of one colour, with which many begin and end, say nothing
    of which video it is, unless there are no others."""
    telling = [frame for frame in video.frames if any(low != high for low, high in frame.getextrema())]
    return telling or list(video.frames)


def metadata_of(videos: Sequence[Video]) -> list[dict[str, Any]]:
    """What processors take as `video_metadata`."""
    return [dict(video.metadata) for video in videos]
