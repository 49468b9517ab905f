"""Staged compression: which layer and stride a training step has. Pure arithmetic, without a trainer."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

# pivot of the released code once its list is empty
_NO_PIVOT = 10000


class Stage(NamedTuple):
    """A part of training.

    Args:
        layer_idx (`int`): decoder layer before which images get shorter.
        stride (`int`): visual tokens that become one, 1 for no compression.
        share (`float`): of all optimizer steps.
    """

    layer_idx: int
    stride: int
    share: float


# (depth, stride) of equally long stages, from the first to the last: the depth is that of the paper's 32 layers, None
# is no compression. "Deeper" compresses behind more layers later on, "wider" keeps more tokens.
SCHEMES: dict[str, tuple[tuple[int, int] | None, ...]] = {
    "single": (None,),
    "two": ((2, 8), None),
    "three_deeper": ((2, 8), (16, 8), None),
    "three_wider": ((2, 8), (2, 2), None),
    "four_wider_deeper": ((2, 8), (2, 2), (16, 2), None),
    "four_deeper_wider": ((2, 8), (16, 8), (16, 2), None),
}
_PUBLISHED_LAYERS = 32


def stages_of(scheme: str, num_layers: int) -> list[Stage]:
    """The stages of a published scheme.

    Layer 2 stays layer 2, as the paper argues from the first layers; layer 16 is the middle of its decoder and becomes
    the middle of a decoder of any depth.

    Args:
        scheme (`str`): one of `SCHEMES`.
        num_layers (`int`): of the decoder.

    Raises:
        ValueError: the scheme is unknown, or the decoder has too few layers for its stages to differ.

    Source: the table of schemes of the authors' project page, Beckschen/beckschen.github.io@f1b6dfe; equal shares.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"`scheme` must be one of {', '.join(SCHEMES)}, got {scheme!r}.")
    depths = {2: 2, 16: round(num_layers * 16 / _PUBLISHED_LAYERS)}
    used = {entry[0] for entry in SCHEMES[scheme] if entry is not None}
    if len({depths[depth] for depth in used}) < len(used) or any(depths[depth] >= num_layers for depth in used):
        raise ValueError(
            f"Scheme {scheme!r} compresses at layers {sorted(depths[depth] for depth in used)} of {num_layers}: too "
            "few for its stages to differ. Give `stages` of your own."
        )
    share = 1 / len(SCHEMES[scheme])
    entries = [(0, 1) if entry is None else (depths[entry[0]], entry[1]) for entry in SCHEMES[scheme]]
    return [Stage(layer_idx, stride, share) for layer_idx, stride in entries]


def boundaries(stages: Sequence[Stage], total_steps: int) -> list[int]:
    """The optimizer step, counted from 0, with which each stage begins; the first one is 0.

    A stage begins at its share of all steps, rounded to the nearest step, halves up. Shares count in proportion to
    their sum. A stage without a step is skipped.

    Args:
        stages (`Sequence[Stage]`): at least one.
        total_steps (`int`): optimizer steps of the whole training.
    """
    # floats such as 0.1 stand for the fraction that was meant, or thirds of 9 steps would begin a step late
    shares = [Fraction(stage.share).limit_denominator(10**6) for stage in stages]
    starts, before = [], Fraction(0)
    for share in shares:
        starts.append(math.floor(before / sum(shares) * total_steps + Fraction(1, 2)))
        before += share
    return starts


def stage_at(stages: Sequence[Stage], step: int, total_steps: int) -> int:
    """Index of the stage that optimizer step `step`, counted from 0, belongs to."""
    starts = boundaries(stages, total_steps)
    return max(idx for idx, start in enumerate(starts) if start <= step or idx == 0)


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise a ValueError for stages that are none."""
    if not stages or any(stage.share <= 0 for stage in stages):
        raise ValueError(f"`stages` needs at least one stage, each with a positive share, got {list(stages)}.")


def released_stage(forward_idx: int, pivots: Sequence[int], strides: Sequence[int]) -> int:
    """Index of the stage that a forward pass has in the released code, to compare runs with it.

    It counts forward passes, not optimizer steps, and switches *behind* a pass whose number is a multiple of the
    current pivot: pivots 3, 6, 9 give passes 0 to 3 the first stage, 4 to 6 the second. A stage of stride 1 is the
    last. The counter is not saved: a resumed run begins anew, and evaluation inside training advances it.

    Args:
        forward_idx (`int`): passes before this one.
        pivots (`Sequence[int]`): as in the released scripts, 1300, 2600, 3900.
        strides (`Sequence[int]`): of every stage.

    Source: Beckschen/LLaVolta@31ec151 `llava_llama.py`, `step`, `pivot` and `progressive`.
    """
    stage, remaining = 0, list(pivots)
    pivot = remaining.pop(0) if remaining else _NO_PIVOT
    for step in range(1, forward_idx):
        if step % pivot == 0 and strides[stage] > 1:
            stage += 1
            pivot = remaining.pop(0) if remaining else _NO_PIVOT
    return stage
