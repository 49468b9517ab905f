"""What is compared: budgets of the method, and baselines that spend as many visual tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from ..models.prompt_vtc import Budget, budgets_per_image, chosen_levels
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


def levels_of(processor: Any, config: PretrainedConfig, questions: Sequence[Question]) -> list[Sequence[int]]:
    """Visual tokens of each image of some questions, at each of its levels, all of them first."""
    cutter = processor.image_processor
    placed = [(*size, len(each.image_sizes) == 1) for each in questions for size in each.image_sizes]
    num_tiles = [cutter.get_tile_layout(*place).num_tiles for place in placed]
    told = [cutter.get_model_size(height, width) for height, width, _ in placed]
    sizes = config.sizes_of(torch.tensor(num_tiles, dtype=torch.long), torch.tensor(told).reshape(-1, 2))
    return config.levels(sizes)


def clipped_budget(budget: Budget, counts: Sequence[int]) -> tuple[Budget, bool]:
    """A budget that an image admits, and whether it had to be changed."""
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
    levels = levels_of(processor, config, questions)
    if budgets is None:
        return _default_points(config, levels)
    given = list(budgets)
    if not given:
        raise ValueError("`budgets` must name at least one budget, such as ('full', 'auto', 0.5).")
    points = [Point("full", budget="full")]
    for budget in given:
        budgets_per_image(budget, 1)
        if not clip:
            _refuse_unmet(budget, levels)
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
        f"`budgets` has {budget!r}, which is too small for {unmet} of {len(levels)} images. All of them admit shares "
        f"from {share} or numbers of tokens from {least}. Choose such a one, or give `clip=True` for the smallest "
        "that each image admits."
    )


def _default_points(config: PretrainedConfig, levels: Sequence[Sequence[int]]) -> list[Point]:
    points, seen = [], []
    for budget in ("full", "auto", *_SHARES):
        if any(clipped_budget(budget, counts)[1] for counts in levels):
            continue
        chosen = chosen_levels(budget, levels, config.own_level)
        if chosen not in seen:
            seen.append(chosen)
            points.append(Point(str(budget), budget=budget))
    return points
