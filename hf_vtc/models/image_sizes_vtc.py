"""How large the images of a prompt are, from what a processor said of them, or from the prompt where it said less."""

import itertools
import math

import torch

from .configuration_vtc import VtcConfig
from .prompt_vtc import VisionInputs
from .tiling_vtc import ImageSizes, refuse_no_pixels

# the most frequent reason in training
STREAM_ADVICE = (
    "If the data is a stream, pass `accelerator_config={'dispatch_batches': False}` to `TrainingArguments`: "
    "accelerate cuts batches of streams otherwise, and images from their prompts. If a trainer deals out images, as "
    "TRL's do, set `return_layout=False` of the processor."
)


def sizes_of_images(
    config: VtcConfig,
    placeholder_mask: torch.Tensor,
    num_tiles: torch.Tensor | None,
    image_sizes: torch.Tensor | None,
    vision: VisionInputs,
) -> ImageSizes:
    """Tiles and pixels of each image, checked against each other and against what was given.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): on the CPU, as are the following.
        num_tiles (`torch.LongTensor` of shape `(num_images,)`, *optional*).
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): (height, width) in pixels; for a
            tower that sees grids those, `(num_images, 3)`.

    Raises:
        ValueError: they do not belong together.
    """
    if config.grid_base is not None:
        sizes = config.sizes_of(None, config.sizes_of_grids(image_sizes))
        if vision.image_features is None:
            check_patches("pixel_values", "image_grid_thw", vision.pixel_values, image_sizes)
        return sizes
    if vision.image_features is None and vision.pixel_values.ndim not in ((4, 5) if config.sees_tiles else (4,)):
        shapes = "(tiles, 3, S, S) or (images, tiles, 3, S, S)" if config.sees_tiles else "(images, 3, H, W)"
        raise ValueError(f"`pixel_values` must be {shapes}, got shape {tuple(vision.pixel_values.shape)}.")
    if not config.sees_tiles:
        return ImageSizes(None, _own_sizes(image_sizes, vision), None)
    given = vision.pixel_values if vision.image_features is None else vision.image_features
    apart = vision.image_features is None and given.ndim == 5
    total = len(next(iter(given.values())) if isinstance(given, dict) else given)
    if apart and num_tiles is None:
        num_tiles = _tiles_apart(config, placeholder_mask, image_sizes, *given.shape[:2])
    if num_tiles is not None and image_sizes is not None and image_sizes.shape != (len(num_tiles), 2):
        raise ValueError(
            f"`image_sizes` needs (height, width) for each of the {len(num_tiles)} images of `num_tiles`, got shape "
            f"{tuple(image_sizes.shape)}."
        )
    if image_sizes is not None:
        refuse_no_pixels(image_sizes)
    joined = config.mm_patch_merge_type == "spatial_unpad" and image_sizes is not None
    if num_tiles is None and joined:
        num_tiles = _tiles_of_joined(config, placeholder_mask, image_sizes, total)
    elif num_tiles is None:
        num_tiles = _tiles_unsaid(config, placeholder_mask, image_sizes, total)
    if apart and (len(num_tiles) != total or total and int(num_tiles.max()) > given.shape[1]):
        raise ValueError(
            f"Image features and image tokens do not match: the prompts need {num_tiles.tolist()} tiles, but "
            f"`pixel_values` hold {total} images with room for {given.shape[1]} each. {STREAM_ADVICE}"
        )
    if not apart and int(num_tiles.sum()) != total:
        raise ValueError(
            f"Image features and image tokens do not match: the prompts need {int(num_tiles.sum())} tiles of "
            f"{config.image_seq_length} placeholders, but {total} tiles were given. Pass `pixel_values` and "
            "`num_tiles` of the same images, in prompt order, and `input_ids` from the same call of the processor. "
            f"{STREAM_ADVICE}"
        )
    return config.joined_sizes(num_tiles, image_sizes) if joined else ImageSizes(num_tiles, image_sizes, None)


def _tiles_unsaid(
    config: VtcConfig, placeholder_mask: torch.Tensor, image_sizes: torch.Tensor | None, total: int
) -> torch.LongTensor:
    """Tiles of each image where nobody gives `num_tiles`: one each if that fits, else a run of placeholders is one."""
    if len(image_sizes) == total if image_sizes is not None else config.one_tile_per_image:
        return torch.ones(total, dtype=torch.long)
    runs = placeholder_runs(placeholder_mask)
    if image_sizes is not None and len(image_sizes) != len(runs):
        raise ValueError(
            f"`image_sizes` are those of {len(image_sizes)} images, but the prompts hold {len(runs)} runs of "
            "placeholders. Where images touch each other, `num_tiles` must say which tiles are whose. "
            f"{STREAM_ADVICE}"
        )
    return torch.tensor([-(-length // config.image_seq_length) for _, length in runs], dtype=torch.long)


def _tiles_of_joined(
    config: VtcConfig, placeholder_mask: torch.Tensor, image_sizes: torch.Tensor, num_given: int
) -> torch.LongTensor:
    """Tiles of each image where nobody gives `num_tiles` and the tiles of an image are joined.

    Where an image that shares its prompt is a single tile, the placeholders of a row tell: they are those of the next
    images, cut each, or else of single tiles.
    """
    cut = config.tiles_of_joined(image_sizes, num_given)
    if config.max_map_tiles is None or not placeholder_mask.numel() or int(cut.max()) == 1:
        return cut
    single = torch.ones_like(cut)
    of_cut = config.reserved_tokens(config.joined_sizes(cut, image_sizes)).tolist()
    of_single = int(config.reserved_tokens(config.joined_sizes(single, image_sizes))[0])
    num_tiles, first = cut.clone(), 0
    for written in placeholder_mask.sum(1).tolist():
        sums = list(itertools.accumulate(of_cut[first:]))
        if written in sums:
            first += 1 + sums.index(written)
        else:
            num_tiles[first : first + written // of_single] = 1
            first += written // of_single
    return num_tiles


def _tiles_apart(
    config: VtcConfig,
    placeholder_mask: torch.Tensor,
    image_sizes: torch.Tensor | None,
    num_images: int,
    most: int,
) -> torch.LongTensor:
    """Tiles of each image where `pixel_values` hold a block of as many for every image, with zeros behind its own."""
    if most == 1:
        return torch.ones(num_images, dtype=torch.long)
    if config.mm_patch_merge_type == "spatial_unpad" and image_sizes is not None:
        return _tiles_of_joined(config, placeholder_mask, image_sizes, num_images * most)
    runs = placeholder_runs(placeholder_mask)
    if len(runs) != num_images:
        raise ValueError(
            f"`pixel_values` hold {num_images} images with room for {most} tiles each, but the prompts hold "
            f"{len(runs)} runs of placeholders. Write text between images, or pass `num_tiles`."
        )
    return torch.tensor([-(-length // config.image_seq_length) for _, length in runs], dtype=torch.long)


def check_patches(name: str, name_of_grids: str, pixels: torch.Tensor | None, grids: torch.Tensor) -> None:
    given, expected = 0 if pixels is None else len(pixels), int(grids.prod(-1).sum())
    if given != expected:
        raise ValueError(
            f"`{name}` must have a row for each patch of `{name_of_grids}`, {expected}, got {given}. Pass both of the "
            "same call of the processor."
        )


def check_tiled_videos(config: VtcConfig, vision: VisionInputs) -> None:
    """Raise for videos whose frames are no tiles, or beside which something is said that nobody reads."""
    for name in ("second_per_grid_ts", "image_features"):
        if getattr(vision, name) is not None:
            raise ValueError(f"`{name}` is of no use beside videos whose frames are tiles. Leave it out.")
    pixels, side = vision.pixel_values_videos, config.tile_size
    shape = None if pixels is None else tuple(pixels.shape)
    num_axes = 5 if vision.video_grid_thw is None else 4
    if pixels is None or len(shape) != num_axes or shape[-3:] != (config.vision_config.num_channels, side, side):
        raise ValueError(
            f"`pixel_values_videos` must be (videos, frames, 3, {side}, {side}), or with `video_grid_thw` the frames "
            f"of all videos, (frames, 3, {side}, {side}), got shape {shape}. Pass what the processor returned."
        )


def frames_of_videos(pixel_values_videos: torch.Tensor, grids: torch.Tensor | None) -> list[int]:
    """Frames of each video that is shown as tiles.

    Args:
        grids (`torch.LongTensor` of shape `(num_videos, 3)`, *optional*): tiles of each in time, height and width, on
            the CPU; None where the pixels say it.

    Raises:
        ValueError: a video has no frame, or the pixels are those of other videos.
    """
    given = len(pixel_values_videos)
    num_frames = [pixel_values_videos.shape[1]] * given if grids is None else grids[:, 0].tolist()
    if min(num_frames) < 1 or grids is not None and (sum(num_frames) != given or bool((grids[:, 1:] != 1).any())):
        raise ValueError(
            f"`pixel_values_videos` must hold the frames of all videos, at least one of each, got {given} for "
            f"{num_frames} frames; `video_grid_thw` are frames, 1 and 1. Pass both of the same call of the processor."
        )
    return num_frames


def sizes_of_tiled_videos(config: VtcConfig, num_frames: list[int]) -> ImageSizes:
    """Sizes of the frames of videos, each a tile, and of the newline behind each video, which is none."""
    tiles = torch.tensor([tile for frames in num_frames for tile in (*[1] * frames, 0)])
    sides, ones = torch.full((len(tiles), 2), config.tile_size), torch.ones(len(tiles), 2, dtype=torch.long)
    return ImageSizes(tiles, sides, ones, frames=torch.where(tiles > 0, math.prod(config.frame_grid), 1))


def _own_sizes(image_sizes: torch.Tensor | None, vision: VisionInputs) -> torch.Tensor:
    """Processed sizes of images that are encoded each at its own."""
    if vision.image_features is not None:
        if image_sizes is None:
            raise ValueError(
                "`image_sizes` must be given with `image_features`, which do not tell the sizes of their images. Pass "
                "what the processor returned."
            )
        return image_sizes
    num_images, _, *largest = vision.pixel_values.shape
    if image_sizes is None:
        return torch.tensor([largest] * num_images)
    if image_sizes.shape != (num_images, 2):
        raise ValueError(
            f"`image_sizes` must be (height, width) of each image, shape ({num_images}, 2), got "
            f"{tuple(image_sizes.shape)}. Pass what the processor returned with `pixel_values`."
        )
    for image_idx, (height, width) in enumerate(image_sizes.tolist()):
        if height > largest[0] or width > largest[1]:
            raise ValueError(
                f"`image_sizes` of image {image_idx} is {height} x {width}, but `pixel_values` has room for "
                f"{largest[0]} x {largest[1]}. Give processed sizes in pixels, not those of the originals."
            )
    return image_sizes


def placeholder_runs(placeholder_mask: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of placeholders in prompt order.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): on the CPU.

    Returns:
        A list of `(row, length)`, one per run.
    """
    padded = torch.nn.functional.pad(placeholder_mask.to(torch.int8), (1, 1))
    edges = padded.diff(dim=1)
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    ends = (edges == -1).nonzero(as_tuple=True)[1]
    return list(zip(rows.tolist(), (ends - starts).tolist(), strict=True))
