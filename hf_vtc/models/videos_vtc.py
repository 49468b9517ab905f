"""Videos as pictures: an image is one, and so is every frame of a video, which is what one temporal patch holds.

A tower that sees grids attends within a frame, so that frames are to it what images are, and every method compresses
them as such. Of LLaVA-OneVision a frame is a tile, and behind all of them stands a newline, a picture of one token.
What makes a video of them is here: how one budget is shared out, where its frames stand, and in time.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .prompt_vtc import Budget, budgets_per_image, level_within

# how a budget is split over the frames of a video
FRAME_SPLITS = ("uniform", "change")


@dataclass(frozen=True)
class Videos:
    """The videos of a call among its pictures; everything is on the CPU.

    Args:
        frames (`list[int]`): pictures of each item, all images first and then all videos, as their tensors stand.
        num_images (`int`): how many of the items are images.
        seconds (`torch.Tensor` of shape `(num_videos,)`, *optional*): between frames of each video.
        mask (`torch.BoolTensor` of shape `(B, L)`): where placeholders of videos are.
        changes (`torch.Tensor` of shape `(num_frames,)`, *optional*): how much each frame differs from the one before.
        joined (`int`): frames of a video that have tokens in common where it is compressed.
        newlines (`int`): pictures at the end of each video that are a newline, one token that always stays.
    """

    frames: list[int]
    num_images: int
    seconds: torch.Tensor | None
    mask: torch.Tensor
    changes: torch.Tensor | None = None
    joined: int = 1
    newlines: int = 0

    @property
    def items(self) -> torch.LongTensor:
        """The item of each picture, as the tensors stand."""
        return torch.repeat_interleave(torch.tensor(self.frames))

    @property
    def frames_of_windows(self) -> list[int]:
        """Frames that have their tokens in each picture where it is compressed, 0 of one whose tokens a later one has.

        Of a picture by itself 1; the last frames of a video may be fewer than `joined`.
        """
        counts = []
        for num_frames in self.frames:
            for place in range(1, num_frames + 1):
                ends = place % self.joined == 0 or place == num_frames
                counts.append((place - 1) % self.joined + 1 if ends else 0)
        return counts

    def shared(self, counts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Of each picture, the visual tokens that are left at each level, where frames have them in common."""
        if self.joined == 1:
            return list(counts)
        return [
            own if num_frames else (own[0], *[0] * (len(own) - 1))
            for own, num_frames in zip(counts, self.frames_of_windows, strict=True)
        ]

    def levels(
        self,
        vtc_budget: Budget | Sequence[Budget],
        counts: Sequence[Sequence[int]],
        own_level: Callable[[Sequence[int], int], int],
    ) -> list[int]:
        """The level of each picture, of a video by its share of the video's budget.

        Args:
            vtc_budget: of all items or a list, one for each.
            counts (`Sequence[Sequence[int]]`): of each picture, the visual tokens that are left at each level.
            own_level: as `chosen_levels` takes it, of each picture.
        """
        levels, first, first_frame = [], 0, sum(self.frames[: self.num_images])
        for item_idx, (budget, num_frames) in enumerate(
            zip(budgets_per_image(vtc_budget, len(self.frames)), self.frames, strict=True)
        ):
            newlines = self.newlines if item_idx >= self.num_images else 0
            num_frames -= newlines
            if budget == "auto":
                levels += [own_level(counts[idx], idx) for idx in range(first, first + num_frames)]
            elif item_idx < self.num_images:
                levels.append(level_within(budget, counts[first], item_idx))
            else:
                changes = self.changes
                if changes is not None:
                    changes = changes[first - first_frame :][:num_frames].tolist()
                levels += levels_of_frames(budget, counts[first], num_frames, changes, item_idx, self.joined, newlines)
            levels += [0] * newlines
            first += num_frames + newlines
        return levels

    def order(self, placeholder_mask: torch.Tensor, num_written: torch.LongTensor) -> torch.LongTensor:
        """Which picture, counted as the tensors stand, is where in the prompts.

        Args:
            placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): of both kinds.
            num_written (`torch.LongTensor` of shape `(num_pictures,)`): placeholders of each picture.

        Raises:
            ValueError: a kind has other placeholders than its pictures need.
        """
        firsts, own = [], num_written.split([self.num_images, len(num_written) - self.num_images])
        kinds = (("images", placeholder_mask & ~self.mask), ("videos", self.mask))
        for (kind, mask), counts in zip(kinds, own, strict=True):
            places = mask.flatten().nonzero().flatten()
            if len(places) != int(counts.sum()):
                raise ValueError(
                    f"Features and tokens do not match: the prompts hold {len(places)} placeholders of {kind}, but "
                    f"those given need {int(counts.sum())}. Build `input_ids` with the processor of this checkpoint, "
                    "from the same images and videos; a prompt written for a `vtc_budget` needs the same one here."
                )
            firsts.append(places[counts.cumsum(0) - counts])
        return torch.argsort(torch.cat(firsts))

    def steps_in_time(
        self, tokens: torch.LongTensor, order: torch.LongTensor, tokens_per_second: float
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Time of each picture behind that of its item, and how far the token behind it goes on, `(num_pictures,)`.

        Behind a frame goes on the next one, at the same place, and behind the last frame text, behind all positions of
        the video.

        Args:
            tokens (`torch.LongTensor` of shape `(num_pictures, 2)`): (rows, columns) of each, in prompt order.
            order (`torch.LongTensor` of shape `(num_pictures,)`): as `order` gives it.
            tokens_per_second (`float`): of the axis of time.

        Source: Qwen2.5-VL's positions as published; releases of transformers round seconds, or let text behind a video
        go on within its time.
        """
        num_pictures, items = torch.tensor(self.frames), self.items[order]
        place = order - (num_pictures.cumsum(0) - num_pictures)[items]
        seconds = torch.ones(len(self.frames) - self.num_images) if self.seconds is None else self.seconds.float()
        seconds = torch.cat([torch.zeros(self.num_images), seconds])[items]
        times = (place * (tokens_per_second * seconds)).long()
        behind = torch.maximum(tokens.amax(-1), times + 1)
        return times, torch.where(place == num_pictures[items] - 1, behind, 0)


def levels_of_frames(
    budget: float | int | str,
    levels: Sequence[int],
    num_frames: int,
    changes: Sequence[float] | None = None,
    item_idx: int = 0,
    joined: int = 1,
    num_fixed: int = 0,
) -> list[int]:
    """The level of each frame of a video, within one budget for all of them.

    Args:
        budget: `"full"`, a share of all tokens of the video, or a number of tokens.
        levels (`Sequence[int]`): tokens that can be left of a frame, all of them first.
        num_frames (`int`): of the video, all of one size.
        changes (`Sequence[float]`, *optional*): how much each frame differs from the one before, by which more tokens
            go to it; of no meaning for the first one, which is new as a whole and counts as the one that changes most.
            Default: every frame gets as many.
        item_idx (`int`): which image or video of the call, for the error message.
        joined (`int`): frames that have what is left of them in common, at every level but the first; without
            `changes`.
        num_fixed (`int`): tokens of the video besides those of its frames, which always stay.

    Raises:
        ValueError: nothing fits; the message names the smallest admissible count.
    """
    reserved, fewest = levels[0], min(levels)
    if budget == "full":
        return [0] * num_frames
    # as `level_within`, of the video as a whole
    num_windows = -(-num_frames // joined)
    totals = [num_fixed + num_frames * reserved, *(num_fixed + num_windows * count for count in levels[1:])]
    allowed = math.floor(budget * totals[0] + 1e-6) if isinstance(budget, float) else budget
    if allowed < min(totals):
        raise ValueError(
            f"`vtc_budget` of {budget!r} allows {allowed} visual tokens for video {item_idx} of {num_frames} frames, "
            f"but the smallest admissible count is {min(totals)} (reserved: {totals[0]}). Allow at least that many, "
            "or give fewer frames."
        )
    if changes is None or num_frames == 1 or not any(changes[1:]):
        return [level_within(allowed, totals, item_idx)] * num_frames
    allowed -= num_fixed
    worth = [max(changes[1:]), *changes[1:]]
    shares = _shares(allowed - num_frames * fewest, worth, reserved - fewest)
    # a share that is a whole number may miss it by rounding
    chosen = [level_within(math.floor(fewest + share + 1e-6), levels, item_idx) for share in shares]
    left = allowed - sum(levels[level] for level in chosen)
    rising = sorted(set(levels))
    for idx in sorted(range(num_frames), key=lambda each: -worth[each]):
        # what rounding left over goes to the frames that change most
        more = next((count for count in reversed(rising) if 0 < count - levels[chosen[idx]] <= left), None)
        if more is not None:
            left -= more - levels[chosen[idx]]
            chosen[idx] = levels.index(more)
    return chosen


def _shares(total: int, worth: Sequence[float], most: int) -> list[float]:
    """`total` by `worth`, at most `most` for each; what is above that goes to the others."""
    shares, open_ones = [0.0] * len(worth), set(range(len(worth)))
    while open_ones:
        left = total - sum(shares)
        whole = sum(worth[idx] for idx in open_ones)
        if whole == 0:
            for idx in open_ones:
                shares[idx] = min(left / len(open_ones), most)
            return shares
        full = {idx for idx in open_ones if left * worth[idx] / whole >= most}
        for idx in full or open_ones:
            shares[idx] = most if full else left * worth[idx] / whole
        open_ones -= full or open_ones
    return shares


def changes_of_frames(pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor) -> torch.Tensor:
    """How much each frame differs from the one before, `(num_frames,)`: means of absolute differences of its values.

    Args:
        pixel_values_videos (`torch.Tensor` of shape `(patches, C)`): of all videos.
        video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`): their patches in time, height and width, on
            the CPU.

    Returns:
        On the device of the pixels; 0 for the first frame of each video.
    """
    grids = video_grid_thw.tolist()
    videos = pixel_values_videos.split([frames * rows * columns for frames, rows, columns in grids])
    by_frame = (pixels.unflatten(0, (frames, -1)) for pixels, (frames, _, _) in zip(videos, grids, strict=True))
    return torch.cat([F.pad(_differences(pixels), (1, 0)) for pixels in by_frame])


def changes_of_tiles(videos: Iterable[torch.Tensor], newlines: int) -> torch.Tensor:
    """`changes_of_frames` of videos `(frames, 3, S, S)`, with 0 for the `newlines` behind each."""
    return torch.cat([F.pad(_differences(pixels), (1, newlines)) for pixels in videos])


def _differences(frames: torch.Tensor) -> torch.Tensor:
    """Means of absolute differences of frames `(frames, ...)` to the one before, of all but the first."""
    frames = frames.flatten(1).float()
    return (frames[1:] - frames[:-1]).abs().mean(1)
