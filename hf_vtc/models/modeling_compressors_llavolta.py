"""How LLaVolta makes V visual tokens fewer: pure functions on the states of spans.

Means of consecutive tokens are the paper's (arXiv 2406.20092; Beckschen/LLaVolta@31ec151 `visual_operating`). The
released code has nothing else; the definitions of the other compressors are ours: all keep order, and floor(V /
stride) tokens (`"avgpool2d"`: whole windows of each grid).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .configuration_llavolta import WINDOWS
from .grids_vtc import grid_windows
from .ops_vtc import segment_mean
from .packing_vtc import Span

_KMEANS_STEPS = 10


@dataclass
class Shortened:
    """What becomes of some spans, in prompt order.

    `slots` `(M,)`: indices of the flattened states where the tokens that stay stand, `host_slots` the same on the CPU
    unless they were chosen on the device; `shifts` `(M,)`: how far behind the position of that slot; `num_kept`: how
    many stay of each span. What stands at a slot is the mean of its `members`, `widths` `(M,)` of which belong to each
    slot, or `values` `(M, D)`, or, with neither, the token of the slot itself.
    """

    slots: torch.LongTensor
    shifts: torch.LongTensor
    host_slots: torch.LongTensor
    num_kept: list[int]
    members: torch.LongTensor | None = None
    widths: torch.LongTensor | None = None
    values: torch.Tensor | None = None

    def take(self, states: torch.Tensor, source: torch.LongTensor) -> torch.Tensor:
        """Rows `source` `(K,)` of what the flattened states `(N, D)` become, in one pass over those rows.

        `source` is where `host_slots` are, so that the plan of a pooling is made on the CPU.
        """
        if self.members is not None:
            index, offsets = self._plan(states.shape[0], source)
            return segment_mean(
                states, index.to(states.device, non_blocking=True), offsets.to(states.device, non_blocking=True)
            )
        if self.values is not None:
            states = states.index_copy(0, self.slots, self.values.to(states.dtype))
        return states.index_select(0, source.to(states.device, non_blocking=True))

    def moved(self, positions: torch.LongTensor) -> torch.LongTensor:
        """Positions `(..., N)` of the flattened states, with those of what stays at its slots.

        Of several axes each is the mean of the members on it, rounded down.
        """
        if positions.ndim == 1:
            return positions.index_add(0, self.slots, self.shifts)
        if self.members is None:
            return positions
        index, offsets = self._plan(positions.shape[-1], self.host_slots)
        index, offsets = (each.to(positions.device, non_blocking=True) for each in (index, offsets))
        sums = F.pad(positions[..., index].cumsum(-1), (1, 0))[..., offsets].diff(dim=-1)
        return positions.index_copy(-1, self.slots, sums // offsets.diff())

    def _plan(self, num_states: int, source: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Members of each row of `source` and where they begin, as `segment_mean` takes them."""
        # every state is listed by itself, and behind all of them the members of each slot
        listed = torch.cat([torch.arange(num_states), self.members])
        first, widths = torch.arange(num_states), torch.ones(num_states, dtype=torch.long)
        widths[self.host_slots] = self.widths
        first[self.host_slots] = num_states + self.widths.cumsum(0) - self.widths
        offsets = F.pad(widths[source].cumsum(0), (1, 0))
        within = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], widths[source])
        return listed[torch.repeat_interleave(first[source], widths[source]) + within], offsets


def float16_means(
    positions: torch.LongTensor, members: torch.LongTensor, widths: torch.LongTensor
) -> torch.LongTensor:
    """Means of positions as the released code takes them: in and to float16, then rounded down.

    Args:
        positions (`torch.LongTensor` of shape `(..., N)`): of all tokens.
        members (`torch.LongTensor`): indices of those that are averaged, one mean after the other.
        widths (`torch.LongTensor` of shape `(M,)`): how many belong to each mean.
    """
    # sums of integers are exact, as those of pooling kernels in float32 are
    sums = F.pad(positions[..., members].half().double().cumsum(-1), (1, 0))
    sums = sums[..., F.pad(widths.cumsum(0), (1, 0))].diff(dim=-1)
    return (sums.float() / widths).half().long()


def consecutive_windows(length: int, stride: int) -> torch.LongTensor:
    """Members `(length // stride, stride)` of windows of neighbours; a rest that fills no window is in none."""
    num_kept = length // stride
    return torch.arange(num_kept * stride).reshape(num_kept, stride)


def strided_picks(length: int, stride: int) -> torch.LongTensor:
    """The first token of every window, `(length // stride, 1)`."""
    return consecutive_windows(length, stride)[:, :1]


def random_picks(length: int, stride: int, generator: torch.Generator | None = None) -> torch.LongTensor:
    """A uniform subset of `length // stride` tokens in order, `(length // stride, 1)`."""
    picked = torch.randperm(length, generator=generator)[: length // stride]
    return picked.sort().values[:, None]


def square_windows(length: int, stride: int, side: int) -> torch.LongTensor:
    """Members `(num_kept, stride)` of square windows, on grids of `side` x `side` tokens that follow each other.

    Rows and columns of a grid that fill no window are in none.

    Args:
        length (`int`): tokens, a multiple of `side * side`.
        stride (`int`): members of a window, a square.
        side (`int`): of a grid.
    """
    edge, per_side = math.isqrt(stride), side // math.isqrt(stride)
    grids = torch.arange(length).reshape(-1, side, side)[:, : per_side * edge, : per_side * edge]
    windows = grids.reshape(-1, per_side, edge, per_side, edge).transpose(2, 3)
    return windows.reshape(-1, stride)


def most_attended(scores: torch.Tensor, num_kept: int) -> torch.LongTensor:
    """Indices `(num_kept,)` of the highest `scores` `(V,)` in order of place; ties go to the earlier one."""
    return torch.argsort(scores, descending=True, stable=True)[:num_kept].sort().values


def kmeans_centroids(states: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """Means of `num_kept` clusters of neighbours in value, in the order of the mean places of their members.

    Lloyd's algorithm from the means of consecutive windows, so that the result depends on nothing else. A cluster that
    loses all members keeps centre and place. Gradients flow through the means, not through the assignment.

    Args:
        states (`torch.Tensor` of shape `(V, D)`).

    Returns:
        Centroids `(num_kept, D)` and mean places `(num_kept,)`, rounded down.
    """
    places = torch.arange(len(states), device=states.device, dtype=torch.float32)
    values = torch.cat([states.float(), places[:, None]], dim=1)
    stride = len(states) // num_kept
    centres = values[: num_kept * stride].unflatten(0, (num_kept, stride)).mean(1)
    for _ in range(_KMEANS_STEPS):
        distances = torch.cdist(values[:, :-1].detach(), centres[:, :-1].detach())
        members = F.one_hot(distances.argmin(1), num_kept).to(values.dtype).T  # (num_kept, V)
        sizes = members.sum(1, keepdim=True)
        centres = torch.where(sizes > 0, members @ values / sizes.clamp(min=1), centres)
    centres = centres[torch.argsort(centres[:, -1], stable=True)]
    return centres[:, :-1].to(states.dtype), centres[:, -1].detach().floor().long()


def shorten(
    states: torch.Tensor,
    spans: list[Span],
    compressor: str,
    side: int,
    training: bool = False,
    scores: torch.Tensor | None = None,
) -> Shortened:
    """Shorten some spans of flattened states.

    Args:
        states (`torch.Tensor` of shape `(N, D)`): spans lie in it by their `start`; `row` is not looked at.
        spans (`list[Span]`): at least one, in order.
        compressor (`str`): see `LlavoltaConfig`.
        side (`int`): of a tile's grid, for `"avgpool2d"`.
        training (`bool`): whether `"random"` draws anew; otherwise the layout alone decides, so that answers repeat.
        scores (`torch.Tensor` of N numbers, *optional*): for `"attention"`.
    """
    device = states.device
    shared = [spans[end - span.num_frames : end] for end, span in enumerate(spans, 1)]
    windows = [_windows(frames, compressor, side, training, scores) for frames in shared]
    widths, num_kept = torch.cat([own for _, own in windows]), [len(own) for _, own in windows]
    members = torch.cat([own for own, _ in windows])
    if compressor != "kmeans" and len(members) == len(widths):
        on_device = members.to(device, non_blocking=True)
        return Shortened(on_device, torch.zeros_like(on_device), members, num_kept)
    offsets = F.pad(widths.cumsum(0), (1, 0))
    starts, num_frames = torch.repeat_interleave(
        torch.tensor([(span.start, span.num_frames) for span in spans]), torch.tensor(num_kept), dim=0
    ).unbind(1)
    # the first member of the last frame: no token stands before what it is made of
    slots = members[offsets[1:] - widths // num_frames]
    on_device = slots.to(device, non_blocking=True)
    if compressor == "kmeans":
        values, places = zip(*[_clusters(states, span) for span in spans], strict=True)
        first_places = (slots - starts).to(device, non_blocking=True)
        return Shortened(on_device, torch.cat(places) - first_places, slots, num_kept, values=torch.cat(values))
    sums = F.pad((members - torch.repeat_interleave(starts, widths)).cumsum(0), (1, 0))[offsets].diff()
    shifts = (sums // widths - (slots - starts)).to(device, non_blocking=True)
    return Shortened(on_device, shifts, slots, num_kept, members, widths)


def _windows(
    frames: list[Span], compressor: str, side: int, training: bool, scores: torch.Tensor | None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Members of all that stays of spans that share windows, and how many of them become each."""
    if not frames:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    span, starts = frames[-1], torch.tensor([frame.start for frame in frames])
    if span.columns is not None and compressor in WINDOWS:
        high, wide = WINDOWS[compressor](span.stride)
        members, widths = grid_windows(span.length, span.columns, high, wide, len(frames))
        return starts[members // span.length] + members % span.length, widths
    equal = _equal_windows(span, compressor, side, training, scores) + span.start
    return equal.flatten(), torch.full((len(equal),), equal.shape[1], device=equal.device)


def _equal_windows(
    span: Span, compressor: str, side: int, training: bool, scores: torch.Tensor | None
) -> torch.LongTensor:
    """Members `(num_kept, width)` of what stays of a span, counted from its start."""
    length, stride = span.length, span.stride
    if compressor == "attention":
        if stride == 1:
            return torch.arange(length, device=scores.device)[:, None]
        own = scores.flatten()[span.start : span.start + length]
        return most_attended(own, length // stride)[:, None]
    if stride == 1:
        return torch.arange(length)[:, None]
    if compressor == "random":
        generator = None if training else torch.Generator().manual_seed(length * stride)
        return random_picks(length, stride, generator)
    if compressor == "avgpool2d":
        return square_windows(length, stride, side)
    return strided_picks(length, stride) if compressor == "uniform" else consecutive_windows(length, stride)


def _clusters(states: torch.Tensor, span: Span) -> tuple[torch.Tensor, torch.LongTensor]:
    own = states[span.start : span.start + span.length]
    if span.stride == 1:
        return own, torch.arange(span.length, device=states.device)
    return kmeans_centroids(own, span.length // span.stride)
