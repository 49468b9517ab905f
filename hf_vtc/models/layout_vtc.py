"""Where the images of one call are: made once, on the host, before the tower runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .configuration_vtc import VtcConfig
from .host_vtc import counts_seconds
from .image_sizes_vtc import (
    STREAM_ADVICE,
    check_patches,
    check_tiled_videos,
    frames_of_videos,
    placeholder_runs,
    sizes_of_images,
    sizes_of_tiled_videos,
)
from .packing_vtc import to_host
from .prompt_vtc import BY_SCORES, VisionInputs, asked_tokens, budgets_per_image, chosen_levels
from .tiling_vtc import ImageSizes
from .videos_vtc import Videos, changes_of_frames, changes_of_tiles


@dataclass(frozen=True)
class Layout:
    """The prompts and images of one call, and what their sizes and budgets decide. Everything is on the CPU.

    Args:
        placeholder_mask, attention_mask (`torch.Tensor` of shape `(B, L)`): the former bool, the latter 0 = padding.
        sizes ([`ImageSizes`]): tiles and pixels of each image.
        num_reserved (`torch.LongTensor` of shape `(num_images,)`): visual tokens of each image without compression.
        num_written (`torch.LongTensor` of shape `(num_images,)`): placeholders of each image in the prompts: as many,
            or just those that enter the language model.
        rows (`list[int]`): the row of each image.
        counts (`list[Sequence[int]]`): of each image, the visual tokens that leave at each level, all of them first.
        levels (`list[int]`): the level of each image, `BY_SCORES` where a router must be asked. Of no meaning beside
            `router_decisions`.
        wants_all (`bool`): whether no image is to be compressed, by word and not by a budget that leaves no other
            choice: then whatever compresses need not run.
        router_decisions (`torch.Tensor`, *optional*): what the caller wants in place of a router's decisions.
        positions (`torch.LongTensor` of shape `(A, B, L)`, *optional*): of every token, for a decoder whose positions
            have several axes. They stay when tokens are dropped.
        videos ([`Videos`], *optional*): where there are any, every one of their frames counts as an image here.
        order (`torch.LongTensor` of shape `(num_images,)`, *optional*): with videos, which picture, as the tensors
            stand, is where in the prompts.
        supervised (`torch.BoolTensor` of shape `(B, L)`, *optional*): which tokens answer what is asked.
    """

    placeholder_mask: torch.Tensor
    attention_mask: torch.Tensor
    sizes: ImageSizes
    num_reserved: torch.LongTensor
    num_written: torch.LongTensor
    rows: list[int]
    counts: list[Sequence[int]]
    levels: list[int]
    wants_all: bool
    router_decisions: torch.Tensor | None = None
    positions: torch.LongTensor | None = None
    videos: Videos | None = None
    order: torch.LongTensor | None = None
    supervised: torch.Tensor | None = None

    @property
    def num_images(self) -> int:
        return len(self.num_reserved)

    @property
    def is_exact(self) -> bool:
        """Whether the prompts were written for the tokens that enter the language model, and none is to be dropped."""
        return self.num_written is not self.num_reserved

    @property
    def asks_scores(self) -> bool:
        """Whether a router must say at which level some image is."""
        return self.router_decisions is None and BY_SCORES in self.levels

    @property
    def visual_positions(self) -> torch.LongTensor | None:
        """Those of `positions` at placeholders, `(A, V)`."""
        return None if self.positions is None else self.positions[:, self.placeholder_mask]

    def of_items(self, values: torch.LongTensor) -> torch.LongTensor:
        """Sums over the pictures of each image and video, `(num_items,)`, images first, as their tensors stand."""
        if self.videos is None:
            return values
        return values.new_zeros(len(self.videos.frames)).index_add(0, self.videos.items[self.order], values)

    @property
    def token_columns(self) -> list[int | None]:
        """Columns of the grid of each image, None for a tower that sees no grids."""
        tokens = self.sizes.tokens
        return [None] * self.num_images if tokens is None else tokens[:, 1].tolist()

    @property
    def frames_of_windows(self) -> list[int] | None:
        """`Videos.frames_of_windows` in prompt order, with 1 for what is not compressed; None where all are 1."""
        if self.videos is None or self.videos.joined == 1:
            return None
        counts = self.videos.frames_of_windows
        return [counts[idx] if level else 1 for idx, level in zip(self.order.tolist(), self.levels, strict=True)]

    @property
    def next_positions(self) -> torch.LongTensor | None:
        """Where text behind each row goes on, `(B, 1)`: behind the farthest place, whatever is dropped."""
        if self.positions is None:
            return None
        return self.positions.masked_fill(self.attention_mask == 0, -1).amax((0, 2))[:, None] + 1

    @cached_property
    def placeholders(self) -> torch.LongTensor:
        """Positions of placeholders in the flattened prompts, `(num_placeholders,)`."""
        return self.placeholder_mask.flatten().nonzero().flatten()

    def positions_of(self, slots: torch.LongTensor | None) -> torch.LongTensor:
        """Positions of the placeholders `slots` among all of them, in the flattened prompts; of all if None."""
        return self.placeholders if slots is None else self.placeholders[slots]

    @cached_property
    def text(self) -> torch.LongTensor:
        """Positions of real text in the flattened prompts, `(num_text,)`; of what is asked, if `supervised` tells."""
        text, known = ~self.placeholder_mask, self.attention_mask.bool()
        if self.supervised is not None:
            known = asked_tokens(self.supervised & text, known)
        return (known & text).flatten().nonzero().flatten()

    @cached_property
    def num_leaving(self) -> torch.LongTensor:
        """Visual tokens of each image at its level, `(num_images,)`."""
        return torch.tensor([own[level] for own, level in zip(self.counts, self.levels)], dtype=torch.long)


def layout_of_prompt(
    config: VtcConfig,
    placeholder_mask: torch.Tensor,
    attention_mask: torch.Tensor | None,
    vision: VisionInputs,
    position_ids: torch.Tensor | None = None,
    video_mask: torch.Tensor | None = None,
) -> Layout:
    """The layout of prompts and their images, by one transfer from the device.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): where placeholders are.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 = padding.
        position_ids (`torch.LongTensor` of shape `(..., B, L)`, *optional*): the caller's.
        video_mask (`torch.BoolTensor` of shape `(B, L)`, *optional*): where placeholders of videos are.

    Raises:
        ValueError: sizes and tiles are not those of the images, placeholders are not as many as these need, or no
            count of visual tokens fits a budget; or several sequences share a row that gets shorter.
    """
    of_videos = _told_of_videos(config, vision, video_mask)
    of_prompt = (attention_mask, position_ids, vision.supervised)
    optional = (*_told(config, vision), vision.router_decisions, *of_prompt, *of_videos)
    placeholder_mask, *arrived = to_host(placeholder_mask, *[tensor for tensor in optional if tensor is not None])
    fetched = iter(arrived)
    num_tiles, image_sizes, decisions, mask, positions, supervised, *of_videos = (
        None if tensor is None else next(fetched) for tensor in optional
    )
    if mask is None:
        mask = torch.ones_like(placeholder_mask, dtype=torch.long)
    else:
        _check_mask(mask, placeholder_mask)
    if vision.has_videos and config.grid_base is None:
        grids, _, videos_at = of_videos
        told = num_tiles, image_sizes, grids
        sizes, videos = _pictures_of_tiles(config, placeholder_mask, *told, videos_at, vision)
    elif vision.has_videos:
        sizes, videos = _pictures(config, image_sizes, *of_videos, vision)
    else:
        sizes, videos = sizes_of_images(config, placeholder_mask, num_tiles, image_sizes, vision), None
    if supervised is not None and supervised.shape != placeholder_mask.shape:
        raise ValueError(
            f"Labels must say of each token whether it is supervised, shape {tuple(placeholder_mask.shape)}, got "
            f"{tuple(supervised.shape)}. Make them as long as the prompts."
        )
    layout = replace(_layout(config, placeholder_mask, mask, sizes, vision, decisions, videos), supervised=supervised)
    if positions is not None:
        _check_positions(positions, layout)
    own = config.positions(layout)
    if own is None:
        return layout
    # with an axis more, whose first one counts tokens, as stock models take them
    own = own if positions is None else positions[-len(own) :].expand(own.shape)
    return replace(layout, positions=own)


def _told(config: VtcConfig, vision: VisionInputs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the caller says of tiles and of sizes, which for a tower that sees grids are `image_grid_thw`."""
    if config.grid_base is None:
        if vision.image_grid_thw is not None:
            raise ValueError("`image_grid_thw` is of no use here: the tower sees no grids. Leave it out.")
        return vision.num_tiles, vision.image_sizes
    for name in ("num_tiles", "image_sizes"):
        if getattr(vision, name) is not None:
            raise ValueError(f"`{name}` is of no use for {config.grid_base}. Leave it out, and give `image_grid_thw`.")
    grids = vision.image_grid_thw
    if grids is None and vision.has_videos and vision.pixel_values is None:
        return None, None
    _check_grids("image_grid_thw", "image", grids)
    return None, grids


def _check_grids(name: str, kind: str, grids: torch.Tensor | None) -> None:
    if grids is None or grids.ndim != 2 or grids.shape[1] != 3:
        raise ValueError(
            f"`{name}` must be patches of each {kind} in time, height and width, shape (num_{kind}s, 3), got "
            f"{None if grids is None else tuple(grids.shape)}. Pass what the processor returned."
        )


def _told_of_videos(
    config: VtcConfig, vision: VisionInputs, video_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Grids of the videos, seconds between their frames and where their placeholders are."""
    seconds = vision.second_per_grid_ts
    if not vision.has_videos:
        if seconds is not None:
            raise ValueError("`second_per_grid_ts` is of no use without videos. Leave it out.")
        return None, None, None
    if not config.takes_videos:
        raise ValueError(
            f"`pixel_values_videos` are of no use for {config.model_type} on {config.vision_config.model_type}: "
            "videos need a tower that sees grids, as Qwen3-VL's does, or LLaVA-OneVision and a method for its frames. "
            "Give frames as images."
        )
    if config.video_token_id is None:
        raise ValueError(
            "`pixel_values_videos` need a `video_token_id` in the model's configuration, which has none. Convert the "
            "checkpoint again, or set it to the id of the placeholder of videos."
        )
    if config.grid_base is None:
        check_tiled_videos(config, vision)
    if config.grid_base is not None or vision.video_grid_thw is not None:
        _check_grids("video_grid_thw", "video", vision.video_grid_thw)
    if seconds is not None and not counts_seconds(config.grid_base):
        raise ValueError(
            f"`second_per_grid_ts` is of no use for {config.grid_base}, whose prompts say the time of each frame. "
            "Leave it out."
        )
    if seconds is not None and seconds.shape != (len(vision.video_grid_thw),):
        raise ValueError(
            f"`second_per_grid_ts` needs the seconds between frames of each of {len(vision.video_grid_thw)} videos, "
            f"got shape {tuple(seconds.shape)}. Pass what the processor returned."
        )
    if video_mask is None:
        raise ValueError("Videos need a prompt, which says where they are.")
    return vision.video_grid_thw, seconds, video_mask


def _pictures(
    config: VtcConfig,
    image_grids: torch.Tensor | None,
    video_grids: torch.Tensor,
    seconds: torch.Tensor | None,
    mask: torch.Tensor,
    vision: VisionInputs,
) -> tuple[ImageSizes, Videos]:
    """Images and frames of videos as the tensors stand, each a grid of its own; arguments are on the CPU."""
    image_grids = video_grids.new_zeros(0, 3) if image_grids is None else image_grids
    for video_idx, grid in enumerate(video_grids.tolist()):
        if grid[0] < 1:
            raise ValueError(f"`video_grid_thw` of video {video_idx} must have at least one frame, got {grid}.")
    frames = torch.repeat_interleave(video_grids, video_grids[:, 0], dim=0)
    frames[:, 0] = 1
    sizes = config.sizes_of(None, config.sizes_of_grids(torch.cat([image_grids, frames])))
    if vision.image_features is None:
        check_patches("pixel_values", "image_grid_thw", vision.pixel_values, image_grids)
        check_patches("pixel_values_videos", "video_grid_thw", vision.pixel_values_videos, video_grids)
    changes = None
    if _splits_by_change(config, vision):
        if vision.pixel_values_videos is None:
            raise ValueError(
                "`frame_split='change'` looks at `pixel_values_videos`, which were not given. Give them in place of "
                "`image_features`."
            )
        (changes,) = to_host(changes_of_frames(vision.pixel_values_videos, video_grids))
    counts = [1] * len(image_grids) + video_grids[:, 0].tolist()
    return sizes, Videos(counts, len(image_grids), seconds, mask, changes, config.frames_joined)


def _pictures_of_tiles(
    config: VtcConfig,
    placeholder_mask: torch.Tensor,
    num_tiles: torch.Tensor | None,
    image_sizes: torch.Tensor | None,
    grids: torch.Tensor | None,
    mask: torch.Tensor,
    vision: VisionInputs,
) -> tuple[ImageSizes, Videos]:
    """Images, frames of videos that are a tile each, and a newline behind each video, as the tensors stand."""
    pixels = vision.pixel_values_videos
    num_frames = frames_of_videos(pixels, grids)
    sizes, num_images = sizes_of_tiled_videos(config, num_frames), 0
    if vision.pixel_values is not None:
        if image_sizes is None:
            raise ValueError("Images beside videos need `image_sizes`. Pass what the processor returned.")
        images = sizes_of_images(config, placeholder_mask & ~mask, num_tiles, image_sizes, vision)
        num_images = len(images)
        images = ImageSizes(*images[:-1], torch.zeros(num_images, dtype=torch.long))
        sizes = ImageSizes(*(None if pair[0] is None else torch.cat(pair) for pair in zip(images, sizes)))
    changes = None
    if _splits_by_change(config, vision):
        (changes,) = to_host(changes_of_tiles(pixels if grids is None else pixels.split(num_frames), 1))
    counts = [1] * num_images + [frames + 1 for frames in num_frames]
    return sizes, Videos(counts, num_images, None, mask, changes, newlines=1)


def _splits_by_change(config: VtcConfig, vision: VisionInputs) -> bool:
    """Whether some budget is split over frames by how much they change."""
    budgets = vision.vtc_budget if isinstance(vision.vtc_budget, (list, tuple)) else [vision.vtc_budget]
    return config.frame_split == "change" and any(isinstance(each, (int, float)) for each in budgets)


def _check_positions(position_ids: torch.Tensor, layout: Layout) -> None:
    """Raise where sequences were packed into one row and images get shorter.

    Attention is kept apart by positions that start anew, which dropped tokens hide, and a router would read the
    questions of all of them.
    """
    if layout.wants_all or layout.router_decisions is None and torch.equal(layout.num_leaving, layout.num_reserved):
        return
    real = layout.attention_mask.bool()
    positions = position_ids.flatten(0, -2).unflatten(0, (-1, position_ids.shape[-2]))[0].expand(real.shape)
    restarts = (positions.diff(dim=1) <= 0) & real[:, 1:] & real[:, :-1]
    if position_ids.ndim > 2:
        # of several axes the first stands still within an image
        restarts &= positions.diff(dim=1) < 0
    for row in restarts.any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"`position_ids` of sample {row} start anew within the row: sequences that share a row cannot be told "
            "apart once images get shorter. Give each its own row, or `vtc_budget='full'`."
        )


def _check_mask(attention_mask: torch.Tensor, placeholder_mask: torch.Tensor) -> None:
    """Raise for what a packed prompt could not say: padding inside of a row, and images under padding."""
    real = attention_mask.bool()
    if bool(real.all()):
        return
    begins = torch.nn.functional.pad(real[:, 1:] & ~real[:, :-1], (1, 0))
    begins[:, 0] = real[:, 0]
    for row in (begins.sum(1) > 1).nonzero().flatten().tolist():
        raise ValueError(
            f"`attention_mask` of sample {row} has zeros between real tokens. With images a row may be "
            "padded at its ends only: leave the masked tokens out of `input_ids`."
        )
    for row in (placeholder_mask & ~real).any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"`attention_mask` of sample {row} is 0 at image placeholders. Leave the image out, or attend to it whole."
        )


def layout_of_images(config: VtcConfig, vision: VisionInputs) -> Layout:
    """The layout of a prompt of placeholders alone, as many as the images of `vision` reserve."""
    optional = (*_told(config, vision), vision.router_decisions)
    fetched = iter(to_host(*[tensor for tensor in optional if tensor is not None]))
    num_tiles, image_sizes, decisions = (None if tensor is None else next(fetched) for tensor in optional)
    if num_tiles is None and config.sees_tiles and vision.pixel_values.ndim == 4:
        num_tiles = torch.tensor([len(vision.pixel_values)])
    sizes = sizes_of_images(config, torch.zeros(1, 0, dtype=torch.bool), num_tiles, image_sizes, vision)
    placeholder_mask = torch.ones(1, int(config.reserved_tokens(sizes).sum()), dtype=torch.bool)
    return _layout(config, placeholder_mask, placeholder_mask.long(), sizes, vision, decisions)


def _layout(
    config: VtcConfig,
    placeholder_mask: torch.Tensor,
    attention_mask: torch.Tensor,
    sizes: ImageSizes,
    vision: VisionInputs,
    decisions: torch.Tensor | None,
    videos: Videos | None = None,
) -> Layout:
    if decisions is not None and not config.takes_decisions:
        raise ValueError("`router_decisions` are of no use here: nothing is routed. Give `vtc_budget`.")
    reserved = config.reserved_tokens(sizes)
    counts = config.levels(sizes)
    if videos is None:
        levels = chosen_levels(vision.vtc_budget, counts, config.own_level)
    else:
        levels = videos.levels(vision.vtc_budget, counts, config.own_level)
        counts = videos.shared(counts)
    written, num_placeholders = reserved, int(placeholder_mask.sum())
    if num_placeholders != int(reserved.sum()):
        if decisions is None and BY_SCORES not in levels:
            entering = [own[config.level_entering(level)] for own, level in zip(counts, levels, strict=True)]
            if num_placeholders == sum(entering):
                written = torch.tensor(entering, dtype=torch.long)
        if written is reserved and config.mm_patch_merge_type == "spatial_unpad" and sizes.grids is None:
            raise ValueError(
                f"Image features and image tokens do not match: the prompts hold {num_placeholders} placeholders, but "
                f"{int(sizes.num_tiles.sum())} separate tiles need {int(reserved.sum())}. Images of several tiles "
                "need `num_tiles` and `image_sizes`: pass all that the processor returned. "
                f"{STREAM_ADVICE}"
            )
    budgets = budgets_per_image(vision.vtc_budget, len(levels) if videos is None else len(videos.frames))
    wants_all = decisions is None and not any(levels) and all(isinstance(budget, str) for budget in budgets)
    order = None
    if videos is not None:
        order, is_exact = videos.order(placeholder_mask, written), written is not reserved
        sizes = ImageSizes(*(None if each is None else each[order] for each in sizes))
        reserved = reserved[order]
        written = written[order] if is_exact else reserved
        counts, levels = ([values[idx] for idx in order.tolist()] for values in (counts, levels))
    rows = rows_of_images(placeholder_mask, written.tolist())
    if videos is not None:
        _check_undivided(videos, videos.items[order], rows)
        if config.grid_base is None or counts_seconds(config.grid_base):
            _check_adjacent(placeholder_mask, written, videos.items[order], rows)
    return Layout(
        placeholder_mask,
        attention_mask,
        sizes,
        reserved,
        written,
        rows,
        counts,
        levels,
        wants_all,
        decisions,
        videos=videos,
        order=order,
    )


def _check_undivided(videos: Videos, items: torch.LongTensor, rows: list[int]) -> None:
    """Raise where samples share a video, or where another picture stands between frames that share tokens."""
    for item_idx in range(videos.num_images, len(videos.frames)):
        places = (items == item_idx).nonzero().flatten().tolist()
        video_idx, samples = item_idx - videos.num_images, sorted({rows[place] for place in places})
        if len(samples) > 1:
            raise ValueError(
                f"The frames of video {video_idx} stand in samples {samples}. A video is shown in one: build "
                "`input_ids` with the processor of this checkpoint, from the same videos."
            )
        if videos.joined > 1 and places[-1] - places[0] >= len(places):
            raise ValueError(
                f"Sample {samples[0]} shows another picture between the frames of video {video_idx}, which have their "
                "tokens in common. Show it before or behind, or set `compress_frames=1`."
            )


def _check_adjacent(
    placeholder_mask: torch.Tensor, num_written: torch.LongTensor, items: torch.LongTensor, rows: list[int]
) -> None:
    """Raise where text stands between frames of a video whose prompt does not say their time."""
    places = placeholder_mask.flatten().nonzero().flatten()
    lasts = num_written.cumsum(0) - 1
    gaps = places[lasts[:-1] + 1] - places[lasts[:-1]] > 1
    for picture_idx in (gaps & (items[1:] == items[:-1])).nonzero().flatten().tolist():
        raise ValueError(
            f"Sample {rows[picture_idx]} has text between the frames of a video. Here one run of placeholders is a "
            "video: build `input_ids` with the processor of this checkpoint."
        )


def rows_of_images(placeholder_mask: torch.Tensor, num_written: list[int]) -> list[int]:
    """The row of each image, and the check that the prompts hold the placeholders of whole images.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): on the CPU.
        num_written (`list[int]`): placeholders of each image, in prompt order.

    Raises:
        ValueError: a row's placeholders do not add up to whole images, or an image is interrupted by text.
    """
    rows, images = [], iter(enumerate(num_written))
    for row, left in placeholder_runs(placeholder_mask):
        # images with no text between them share a run
        while left > 0:
            image_idx, reserved = next(images, (None, 0))
            if image_idx is None:
                raise _mismatch(row, f"{left} placeholders are left over after the last of {len(rows)} images")
            if reserved > left:
                raise _mismatch(row, f"image {image_idx} needs {reserved} placeholders, but a run of {left} is next")
            rows.append(row)
            left -= reserved
    if len(rows) < len(num_written):
        raise _mismatch(
            placeholder_mask.shape[0] - 1,
            f"{len(num_written)} images were given, but the prompts hold placeholders for {len(rows)}",
        )
    return rows


def _mismatch(row: int, what: str) -> ValueError:
    return ValueError(
        f"Image features and image tokens do not match in sample {row}: {what}. Build `input_ids` with the processor "
        "of this checkpoint, from the same images, in prompt order, and do not truncate inside an image. A prompt "
        "that the processor wrote for a `vtc_budget` needs the same `vtc_budget` here. "
        f"{STREAM_ADVICE}"
    )
