"""Budgets: what a caller may ask for, and the largest admissible count that fits (contract C5)."""

import math
from collections.abc import Sequence

Budget = None | str | float | int


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


def largest_admissible(budget: float | int | str, admissible: Sequence[int], image_idx: int = 0) -> int:
    """The largest admissible count of visual tokens within a budget.

    Args:
        budget: `"full"`, a share of `max(admissible)` or a number of tokens; `"auto"` is the method's own business.
        admissible (`Sequence[int]`): visual tokens that the method can give this image, the reserved count included.
        image_idx (`int`): which image of the call, for the error message.

    Raises:
        ValueError: nothing fits; the message names the smallest admissible count.
    """
    reserved = max(admissible)
    if budget == "full":
        return reserved
    # a share such as 0.7 of 10 must give 7 although 0.7 * 10 is not exact in binary
    allowed = math.floor(budget * reserved + 1e-6) if isinstance(budget, float) else budget
    fitting = [count for count in admissible if count <= allowed]
    if not fitting:
        raise ValueError(
            f"`vtc_budget` of {budget!r} allows {allowed} visual tokens for image {image_idx}, but the smallest "
            f"admissible count is {min(admissible)} (reserved: {reserved}). Allow at least that many."
        )
    return max(fitting)
