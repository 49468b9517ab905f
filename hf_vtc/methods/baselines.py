"""How a method's decision is taken without its idea, for as many visual tokens: by lot, by a grid, or always alike.

A method says what it can, as functions from what must be met to what is asked of the model; `hf_vtc.evaluation` asks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.configuration_vtc import VtcConfig


@dataclass(frozen=True)
class Met:
    """Pictures of a batch, images and frames of videos, at the point of the method beside which a baseline stands.

    Args:
        config ([`VtcConfig`]): of the model.
        num_tiles (`list[int]`): of each picture.
        items (`list[list[int]]`): pictures of each image and each video, in the order of budgets.
        counts (`list[Sequence[int]]`): of each picture, the visual tokens of each of its levels.
        num_kept (`list[int]`): visual tokens that the point leaves of each picture.
        decisions (`torch.Tensor`, *optional*): the point's `router_decisions`, on the CPU.
        generator (`torch.Generator`): all chance.
    """

    config: VtcConfig
    num_tiles: list[int]
    items: list[list[int]]
    counts: list[Sequence[int]]
    num_kept: list[int]
    decisions: torch.Tensor | None
    generator: torch.Generator


@dataclass(frozen=True)
class Instead:
    """What is asked of the model in place of the point: arguments of the call, fields of its configuration while it
    lasts, and how many visual tokens each picture keeps then."""

    num_kept: list[int]
    arguments: dict[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """One way to do without the method's idea.

    Args:
        make (`(met) -> Instead`): what to ask instead.
        is_drawn (`bool`): whether draws differ.
        of_choice (`bool`): whether it says nothing where a budget leaves the method no choice.
        problem (`(config) -> str`): why it cannot be done with a model, empty if it can.
    """

    make: Callable[[Met], Instead]
    is_drawn: bool = False
    of_choice: bool = False
    problem: Callable[[VtcConfig], str] = lambda config: ""


@dataclass(frozen=True)
class Baselines:
    """What a method can be compared with.

    Args:
        random ([`Baseline`], *optional*): its decision by lot.
        pool ([`Baseline`], *optional*): means of a regular grid; without it those of the connector's output.
        pool_problem (`str`): why means of a grid are no baseline of this method, empty where they are.
        fixed (`(config) -> dict`): each decision that can be taken for all images alike, by its name.
    """

    random: Baseline | None = None
    pool: Baseline | None = None
    pool_problem: str = ""
    fixed: Callable[[VtcConfig], dict[str, Baseline]] = lambda config: {}


def between(target: float, options: Sequence[int], generator: torch.Generator) -> int:
    """`target` if it is an option, else one of its two neighbours by lot, so that `target` is expected; the nearest
    where there is only one."""
    below = max((option for option in options if option <= target), default=None)
    above = min((option for option in options if option >= target), default=None)
    if below is None or above is None or below == above:
        return above if below is None else below
    share = (target - below) / (above - below)
    return above if float(torch.rand((), generator=generator)) < share else below


def groups_by_lot(met: Met) -> Instead:
    """The patches of each tile shared out by lot among groups of the same sizes."""
    order = torch.stack([torch.randperm(len(tile), generator=met.generator) for tile in met.decisions])
    return Instead(met.num_kept, {"router_decisions": met.decisions.gather(1, order)})
