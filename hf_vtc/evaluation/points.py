"""What is compared: budgets of the method, and baselines that spend as many visual tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from ..data import RecordError
from ..models.image_sizes_vtc import sizes_of_tiled_videos
from ..models.prompt_vtc import Budget, budgets_per_image
from ..models.video_processing_vtc import VideoSettings
from ..models.videos_vtc import levels_of_frames
from .questions import Question

# shares that a sweep tries if nobody says what is wanted
_SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Point:
    """One way to answer every question.

    Args:
        name (`str`): in files and tables.
        family (`str`): `"method"`, or the name of a baseline.
        budget: of the method's point, whose tokens a baseline spends too.
        beside (`str`): name of the method's point that a baseline stands beside, empty for none.
        draw (`int`): which of several draws by lot.
    """

    name: str
    family: str = "method"
    budget: Budget = None
    beside: str = ""
    draw: int = 0


class Frames(NamedTuple):
    """An image, or a video, whose frames are images of one size to the model: visual tokens of a frame at each of its
    levels, all of them first, how many frames there are, how many have tokens in common where they are compressed, and
    tokens besides, which always stay."""

    levels: Sequence[int]
    num_frames: int = 1
    joined: int = 1
    num_fixed: int = 0

    @property
    def whole(self) -> Sequence[int]:
        """Visual tokens of all frames at each level."""
        if self.num_frames == 1 and not self.num_fixed:
            return self.levels
        reserved, *others = self.levels
        num_windows = -(-self.num_frames // self.joined)
        return [self.num_fixed + self.num_frames * reserved, *(self.num_fixed + num_windows * each for each in others)]


def frames_of(processor: Any, config: PretrainedConfig, questions: Sequence[Question]) -> list[Frames]:
    """What each image and each video of some questions can become.

    Raises:
        RecordError: a video cannot be shown by this processor; the message names the record.
    """
    cutter = processor.image_processor
    placed = [(*size, len(each.image_sizes) == 1) for each in questions for size in each.image_sizes]
    num_tiles = [cutter.get_tile_layout(*place).num_tiles for place in placed]
    told = [cutter.get_model_size(height, width) for height, width, _ in placed]
    sizes = config.sizes_of(torch.tensor(num_tiles, dtype=torch.long), torch.tensor(told).reshape(-1, 2))
    return [*map(Frames, config.levels(sizes)), *_frames_of_videos(processor, config, questions)]


def _frames_of_videos(processor: Any, config: PretrainedConfig, questions: Sequence[Question]) -> list[Frames]:
    found = []
    for question in questions:
        if not question.num_videos:
            continue
        if processor.video is None:
            raise RecordError(f"{question.origin}: the record shows a video, which this model does not take.")
        try:
            clips, sizes, _ = processor.written_videos(
                question.video_shapes, video_metadata=list(question.video_metadata)
            )
        except ValueError as error:
            raise RecordError(f"{question.origin}: {error}") from error
        settings = VideoSettings.from_dict(processor.video)
        if settings.as_tiles:
            # each frame is one, and behind them stands a newline
            levels = [config.levels(sizes_of_tiled_videos(config, [1]))[0]] * len(clips)
        else:
            levels = config.levels(config.sizes_of(None, torch.tensor(sizes)))
        for own, clip in zip(levels, clips, strict=True):
            num_frames = -(-len(clip.shown) // settings.frames_of_patch)
            found.append(Frames(own, num_frames, config.frames_joined, int(settings.as_tiles)))
    return found


def levels_of(processor: Any, config: PretrainedConfig, questions: Sequence[Question]) -> list[Sequence[int]]:
    """Visual tokens of each image and each whole video of some questions, at each level, all of them first."""
    return [each.whole for each in frames_of(processor, config, questions)]


def clipped_budget(budget: Budget, counts: Sequence[int]) -> tuple[Budget, bool]:
    """A budget that an image or video admits, whose tokens at each level are `counts`, and whether it was changed."""
    (checked,) = budgets_per_image(budget, 1)
    if isinstance(checked, str):
        return checked, False
    allowed = math.floor(checked * counts[0] + 1e-6) if isinstance(checked, float) else checked
    return (checked, False) if allowed >= min(counts) else (min(counts), True)


def method_points(
    processor: Any,
    config: PretrainedConfig,
    questions: Sequence[Question],
    budgets: Sequence[Budget] | None,
    clip: bool = False,
) -> list[Point]:
    """The points of a sweep, full length first.

    Args:
        budgets: as `vtc_budget`. Default: full, auto, and those of three shares that every image admits and that do
            not only repeat another point.
        clip (`bool`): whether a budget that is too small for an image becomes the smallest that it admits.

    Raises:
        ValueError: a budget cannot be met by every image; the message says which can.
    """
    frames = frames_of(processor, config, questions)
    if budgets is None:
        return _default_points(config, frames)
    given = list(budgets)
    if not given:
        raise ValueError("`budgets` must name at least one budget, such as ('full', 'auto', 0.5).")
    points = [Point("full", budget="full")]
    for budget in given:
        budgets_per_image(budget, 1)
        if not clip:
            _refuse_unmet(budget, [each.whole for each in frames])
        name = "auto" if budget is None else str(budget)
        if name not in [point.name for point in points]:
            points.append(Point(name, budget="auto" if budget is None else budget))
    return points


def _refuse_unmet(budget: Budget, levels: Sequence[Sequence[int]]) -> None:
    unmet = sum(clipped_budget(budget, counts)[1] for counts in levels)
    if not unmet:
        return
    least = max(map(min, levels))
    share = max(min(counts) / counts[0] for counts in levels)
    share = math.ceil(share * 1e4) / 1e4
    raise ValueError(
        f"`budgets` has {budget!r}, which is too small for {unmet} of {len(levels)} images and videos. All of them "
        f"admit shares from {share} or numbers of tokens from {least}. Choose such a one, or give `clip=True` for the "
        "smallest that each admits."
    )


def _default_points(config: PretrainedConfig, frames: Sequence[Frames]) -> list[Point]:
    points, seen = [], []
    for budget in ("full", "auto", *_SHARES):
        if any(clipped_budget(budget, each.whole)[1] for each in frames):
            continue
        chosen = [
            [config.own_level(own.levels, idx)] * own.num_frames
            if budget == "auto"
            else levels_of_frames(budget, own.levels, own.num_frames, None, idx, own.joined, own.num_fixed)
            for idx, own in enumerate(frames)
        ]
        # frames that change get more of another share, which pixels alone tell
        is_told = config.frame_split == "uniform" or isinstance(budget, str)
        if chosen not in seen or not is_told:
            seen.append(chosen)
            points.append(Point(str(budget), budget=budget))
    return points
