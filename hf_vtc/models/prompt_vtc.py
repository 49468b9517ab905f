"""What one call asks for: images, and how many visual tokens they may take (contract C5)."""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Budget = None | str | float | int

# the level of an image about which only scores can tell, see `VtcConfig.own_level`
BY_SCORES = -1


@dataclass
class VisionInputs:
    """What the caller said about the images of one call, and which tokens beside them answer what is asked; shapes are
    those of `VtcModel.forward`."""

    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | dict[str, torch.Tensor] | None = None
    num_tiles: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    vtc_budget: Budget | Sequence[Budget] = None
    router_decisions: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    second_per_grid_ts: torch.Tensor | None = None
    supervised: torch.Tensor | None = None

    @property
    def given(self) -> bool:
        return any(each is not None for each in (self.pixel_values, self.image_features, self.pixel_values_videos))

    @property
    def has_videos(self) -> bool:
        """Whether anything is said of videos; of features `video_grid_thw` alone tells."""
        return self.pixel_values_videos is not None or self.video_grid_thw is not None

    def __post_init__(self) -> None:
        for name in ("pixel_values", "pixel_values_videos"):
            if getattr(self, name) is not None and len(getattr(self, name)) == 0:
                # what is left of a batch's images for its rows of text
                setattr(self, name, None)
        if self.video_grid_thw is not None and len(self.video_grid_thw) == 0:
            self.video_grid_thw = None
        for name in (
            "num_tiles",
            "image_sizes",
            "router_decisions",
            "image_grid_thw",
            "video_grid_thw",
            "second_per_grid_ts",
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, torch.Tensor):
                setattr(self, name, torch.as_tensor(value))
        # text alone leaves nothing to bound, but what is no budget is a mistake there too
        if isinstance(self.vtc_budget, (list, tuple)):
            budgets_per_image(self.vtc_budget, len(self.vtc_budget) if self.given else 0)
        else:
            _checked(self.vtc_budget)
        if self.router_decisions is not None and self.vtc_budget is not None:
            raise ValueError(
                "Give `router_decisions` or `vtc_budget`, not both: each decides how many visual tokens are kept."
            )


def supervised_tokens(labels: torch.Tensor | None, shift_labels: torch.Tensor | None = None) -> torch.Tensor | None:
    """Where the tokens stand that labels `(B, L)` supervise, None without any; `shift_labels` replace `labels`."""
    if shift_labels is None:
        return None if labels is None else labels != -100
    # what a position predicts stands behind it
    return F.pad(shift_labels[:, :-1] != -100, (1, 0))


def asked_tokens(supervised: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """What is known of each row when it is asked: real tokens before the last supervised one that are not supervised.

    What a template writes behind the last answer is not there yet when a model is asked. Of a row without supervised
    tokens everything is. Both arguments and the result are bool, `(B, L)`; `real` is False at padding.
    """
    # nothing predicts the first token of a row, on whichever side the row is padded
    supervised = supervised & real & F.pad(real[:, :-1], (1, 0))
    more_to_come = supervised.flip(1).cumsum(1).flip(1) > 0
    return real & ~supervised & (more_to_come | ~supervised.any(1, keepdim=True))


def budgets_per_image(vtc_budget: Budget | Sequence[Budget], num_images: int) -> list[Budget]:
    """Spread one budget, or a list with one entry per image, over the images of a call.

    Args:
        vtc_budget: `None` or `"auto"` (the method decides), `"full"` (no compression), a float in (0, 1] (share of the
            reserved tokens), an int (at most that many visual tokens per image), or a list of these.
        num_images (`int`): images of the whole batch, in prompt order.

    Returns:
        A list of `num_images` entries, each `"auto"`, `"full"`, a float or an int.

    Raises:
        ValueError: an entry is none of these, or the list has another length.
    """
    entries = list(vtc_budget) if isinstance(vtc_budget, (list, tuple)) else [vtc_budget] * num_images
    if len(entries) != num_images:
        raise ValueError(
            f"A list for `vtc_budget` needs one entry per image: {num_images} images, {len(entries)} entries."
        )
    return [_checked(entry) for entry in entries]


def leaves_a_choice(vtc_budget: Budget | Sequence[Budget]) -> bool:
    """Whether the method itself decides for some image; the entries are not checked here."""
    entries = vtc_budget if isinstance(vtc_budget, (list, tuple)) else [vtc_budget]
    return any(entry is None or isinstance(entry, str) and entry == "auto" for entry in entries)


def _checked(budget: Budget) -> str | float | int:
    if budget is None:
        return "auto"
    valid = budget in ("auto", "full") if isinstance(budget, str) else isinstance(budget, (int, float))
    if isinstance(budget, float):
        valid = 0 < budget <= 1
    if not valid or isinstance(budget, bool):
        raise ValueError(
            "`vtc_budget` must be None or 'auto', 'full', a float in (0, 1] (share of the reserved tokens), an int "
            f"(visual tokens per image) or a list of these, got {budget!r}."
        )
    return budget


def level_within(budget: float | int | str, levels: Sequence[int], image_idx: int = 0) -> int:
    """The level of an image with the most visual tokens within a budget.

    Args:
        budget: `"full"`, a share of the first level's tokens or a number of tokens.
        levels (`Sequence[int]`): tokens that can be left of this image, all of them first. Of equal counts the first
            one wins, and none may be larger than the first.
        image_idx (`int`): which image of the call, for the error message.

    Raises:
        ValueError: nothing fits; the message names the smallest admissible count.
    """
    reserved = levels[0]
    if budget == "full":
        return 0
    # a share such as 0.7 of 10 must give 7 although 0.7 * 10 is not exact in binary
    allowed = math.floor(budget * reserved + 1e-6) if isinstance(budget, float) else budget
    within = min(allowed, reserved)
    # not a generator: an image that LLaVolta may shorten by any stride has thousands of levels
    largest = max(filter(within.__ge__, levels), default=None)
    if largest is None:
        raise ValueError(
            f"`vtc_budget` of {budget!r} allows {allowed} visual tokens for image {image_idx}, but the smallest "
            f"admissible count is {min(levels)} (reserved: {reserved}). Allow at least that many."
        )
    return levels.index(largest)


def chosen_levels(
    vtc_budget: Budget | Sequence[Budget],
    levels: Sequence[Sequence[int]],
    own_level: Callable[[Sequence[int], int], int],
) -> list[int]:
    """The level of each image of a call: the method's own for `"auto"`, else the largest within the budget.

    Args:
        vtc_budget: as `budgets_per_image` takes it.
        levels (`Sequence[Sequence[int]]`): of each image, as `level_within` takes them.
        own_level: from levels and index of an image to the method's own level for it, `BY_SCORES` where a router must
            be asked.
    """
    budgets = budgets_per_image(vtc_budget, len(levels))
    return [
        own_level(counts, idx) if budget == "auto" else level_within(budget, counts, idx)
        for idx, (budget, counts) in enumerate(zip(budgets, levels, strict=True))
    ]


# outputs of processors that say nothing about an image that a model would have to know
OF_PROCESSORS = ("mm_token_type_ids", "num_patches", "batch_num_images")
_OF_IMAGES = tuple(VisionInputs.__dataclass_fields__)


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for names of arguments that nobody reads, with the nearest that somebody does."""
    known = {*known, *OF_PROCESSORS}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, sorted({*known, *_OF_IMAGES}), 1)
            raise TypeError(f"`{name}` is no argument here." + (f" Did you mean `{near[0]}`?" if near else ""))


# where sequences that share a row begin, for attention kernels
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_bounds(given: Iterable[str]) -> None:
    """Raise a ValueError for bounds of sequences that were counted before rows became shorter."""
    for name in given:
        if name in _BOUNDS:
            raise ValueError(
                f"`{name}` counts tokens of full-length rows, but images or padding leave fewer. Give each sequence "
                "its own row, or `vtc_budget='full'` and no padding."
            )
