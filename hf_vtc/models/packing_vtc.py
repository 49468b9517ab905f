"""Reserve, then pack: from full-length prompts to the tokens that the language model sees, and back (C1, C2, C6).

There is one packer. It takes a mask of positions that stay, and gives indices: where each packed position comes from,
and which one each full-length position repeats. Plans are made on the host from masks that arrived in one transfer,
and the device only gathers; where the device has chosen what stays, it makes the plan from counts that the host knows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy tensors to the CPU, all together in one device-to-host transfer; CPU tensors pass through."""
    away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if not away:
        return list(tensors)
    # as bytes, so that integers, flags and scores of any dtype share the transfer bit for bit
    chunks = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in away]
    arrived = iter(torch.cat(chunks).cpu().split([chunk.numel() for chunk in chunks]))
    # the clone aligns each slice to its dtype
    return [
        tensor if tensor.device.type == "cpu" else next(arrived).clone().view(tensor.dtype).reshape(tensor.shape)
        for tensor in tensors
    ]


# bytes to which each tensor of a shared copy is aligned
_ALIGNMENT = 16


def to_device(device: torch.device, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Copy tensors from the CPU to a device, all together in one copy from pinned memory that nobody waits for.

    None stays None, and tensors that are there already pass through.
    """
    leaving = [tensor for tensor in tensors if tensor is not None and tensor.device != device]
    if not leaving or device.type == "cpu" or any(tensor.device.type != "cpu" for tensor in leaving):
        return [None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors]
    sizes = [tensor.numel() * tensor.element_size() for tensor in leaving]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    together = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, start, size in zip(leaving, starts, sizes):
        together[start : start + size] = tensor.contiguous().reshape(-1).view(torch.uint8)
    arrived = together.to(device, non_blocking=True)
    landed = iter(
        arrived[start : start + size].view(tensor.dtype).reshape(tensor.shape)
        for tensor, start, size in zip(leaving, starts, sizes)
    )
    return [tensor if tensor is None or tensor.device == device else next(landed) for tensor in tensors]


def first_slots(num_reserved: torch.LongTensor, num_kept: torch.LongTensor) -> torch.LongTensor:
    """The first `num_kept` placeholders of units that follow each other, `(num_kept.sum(),)`.

    Args:
        num_reserved, num_kept (`torch.LongTensor` of shape `(num_units,)`): placeholders of each unit, and those that
            stay.
    """
    starts, ends = num_reserved.cumsum(0) - num_reserved, num_kept.cumsum(0)
    return torch.repeat_interleave(starts - (ends - num_kept), num_kept) + torch.arange(int(num_kept.sum()))


def kept_positions(placeholder_mask: torch.Tensor, positions: torch.LongTensor) -> torch.Tensor:
    """Mark every position that stays as bool `(B, L)`: text, and placeholders at `positions` of the flattened rows."""
    return (~placeholder_mask).flatten().index_fill_(0, positions, True).unflatten(0, placeholder_mask.shape)


def filled(states: torch.Tensor, places: torch.LongTensor, rows: torch.Tensor) -> torch.Tensor:
    """States `(..., B, L, D)` with `rows` `(..., V, D)` at `places` `(V,)` of the flattened prompt."""
    flat = states.flatten(-3, -2).index_copy(-2, places, rows.to(states.device, states.dtype))
    return flat.unflatten(-2, states.shape[-3:-1])


def is_left_padded(attention_mask: torch.Tensor) -> bool:
    """Whether no padding follows a real token in any row of a `(B, L)` mask."""
    real = attention_mask.bool()
    return bool((real[:, 1:] | ~real[:, :-1]).all())


@dataclass
class PackedPrompt:
    """What the language model sees, and the way back to full length.

    `inputs_embeds` `(B, K, D)`; `attention_mask` `(B, K)`, None where nothing is padded; `position_ids` `(..., B, K)`,
    None for 0..K-1; `kept_mask` `(B, L)`; `layer_rows` `(R, B, K, D)`, what the first R decoder layers add to their
    output, None for nothing. The rest is None where no token was dropped, since nothing moved then: `source_index`
    `(B, K)`, original position of each packed one; `expand_index` `(B, L)`, packed position that each original one
    repeats; `kept_index` `(num_kept,)`, the True positions of the flattened `kept_mask`. The last two are None as well
    where nobody goes back.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    kept_mask: torch.Tensor
    source_index: torch.Tensor | None = None
    expand_index: torch.Tensor | None = None
    kept_index: torch.Tensor | None = None
    layer_rows: torch.Tensor | None = None

    def pack_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, L)` ids to `(B, K)`; what lies under padding is arbitrary."""
        return input_ids if self.source_index is None else input_ids.gather(1, self.source_index)

    def expand(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, K, ...)` back to `(B, L, ...)`: a dropped position repeats the last kept one before it."""
        if self.expand_index is None:
            return states
        index = self.expand_index[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index)

    def of_longer(self, longer: "PackedPrompt") -> "PackedPrompt":
        """This packing of a packed prompt as a packing of the full-length one."""
        if longer.expand_index is None:
            return self
        kept_mask = longer.kept_mask & self.kept_mask.gather(1, longer.expand_index)
        # as many positions stay, which a device need not be asked for
        kept_index = torch.argsort((~kept_mask).flatten().to(torch.int8), stable=True)[: len(self.kept_index)]
        expand_index = self.expand_index.gather(1, longer.expand_index)
        return replace(self, kept_mask=kept_mask, expand_index=expand_index, kept_index=kept_index)


def pack_visual_tokens(
    inputs_embeds: torch.Tensor,
    keep: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    align_left: bool = False,
    renumber: bool = True,
    expands: bool = True,
    layer_rows: torch.Tensor | None = None,
) -> PackedPrompt:
    """Drop the positions that are not kept, and padding, from embeddings and rows beside them, mask and positions.

    Rows become as long as the longest needs and are padded on the left. Where nothing is dropped the layout stays as
    it is, unless `align_left` asks for padding on the left in any case, as generation needs it. Positions are
    renumbered unless the method keeps them: each kept token moves down by the number of dropped tokens before it in
    its row. Labels need no packing, since losses read full-length states at kept positions (`kept_index`).

    Args:
        inputs_embeds (`torch.Tensor` of shape `(B, L, D)`): text and, at kept placeholders, visual tokens.
        keep (`torch.BoolTensor` of shape `(B, L)`): on the CPU.
        attention_mask (`torch.Tensor` of shape `(B, L)`): on the CPU, non-zero = a real token.
        position_ids (`torch.LongTensor` of shape `(..., B, L)`, *optional*): the caller's, on the device.
        renumber (`bool`): False keeps the given `position_ids`, gaps and all.
        expands (`bool`): whether somebody goes back to full length.
        layer_rows (`torch.Tensor` of shape `(R, B, L, D)`, *optional*): rows that travel beside the embeddings.
    """
    device, real = inputs_embeds.device, attention_mask.bool()
    kept = keep & real
    if bool(keep.all()) and (not align_left or is_left_padded(real)):
        on_device, mask = to_device(device, kept, None if bool(real.all()) else attention_mask)
        return PackedPrompt(inputs_embeds, mask, position_ids, on_device, layer_rows=layer_rows)

    source, mask, *back = packing_indices(kept, kept.sum(1))
    moved = (real & ~keep).cumsum(1).gather(1, source) if renumber and position_ids is not None else None
    counted = None
    if bool(mask.all()):
        mask = None
    elif renumber and position_ids is None:
        counted = (mask.cumsum(1) - 1).clamp(min=0)
    flat_source = (source + torch.arange(len(source))[:, None] * kept.shape[1]).flatten()
    back = back if expands else (None, None)
    on_device, source, flat_source, moved, counted, mask, expand_index, kept_index = to_device(
        device, kept, source, flat_source, moved, counted, mask, *back
    )
    if position_ids is not None:
        position_ids = gathered_positions(position_ids, source, moved)
    if layer_rows is not None:
        layer_rows = layer_rows.flatten(1, 2).index_select(1, flat_source).unflatten(1, source.shape)
    embeds = inputs_embeds.flatten(0, 1).index_select(0, flat_source).unflatten(0, source.shape)
    mask = None if mask is None else mask.long()
    position_ids = position_ids if counted is None else counted
    return PackedPrompt(embeds, mask, position_ids, on_device, source, expand_index, kept_index, layer_rows)


def packing_indices(kept: torch.Tensor, counts: torch.LongTensor) -> tuple[torch.Tensor, ...]:
    """Where packed positions come from, and the way back.

    Args:
        kept (`torch.BoolTensor` of shape `(B, L)`): on the CPU, or on a device from which nothing is read back.
        counts (`torch.LongTensor` of shape `(B,)`): True values of each row, on the CPU.

    Returns:
        `source_index` `(B, K)`, which is 0 at padding; a mask `(B, K)`, False there; `expand_index` and `kept_index`
        of a [`PackedPrompt`].
    """
    device, num_columns, longest = kept.device, kept.shape[1], int(counts.max())
    if device.type == "cpu":
        kept_index = kept.flatten().nonzero().flatten()
    else:
        # a stable sort leaves kept positions in order, and their number is known
        kept_index = torch.argsort((~kept).flatten().to(torch.int8), stable=True)[: int(counts.sum())]
    counts, first_rows = to_device(device, counts[:, None], torch.arange(len(counts))[:, None] * longest)
    expand_index = (kept.cumsum(1) - 1 + longest - counts).clamp(min=0)
    places = (expand_index + first_rows).flatten()[kept_index]
    source = kept_index.new_zeros(kept.shape[0] * longest).index_copy(0, places, kept_index % num_columns)
    mask = torch.arange(longest, device=device) >= longest - counts
    return source.unflatten(0, mask.shape), mask, expand_index, kept_index


def gathered_positions(
    position_ids: torch.Tensor, source: torch.LongTensor, moved: torch.LongTensor | None = None
) -> torch.Tensor:
    """Positions `(..., B or 1, L)` at `source` `(B, K)`, lower by `moved` `(B, K)`."""
    axes = position_ids.shape[:-2]
    gathered = position_ids.expand(*axes, source.shape[0], -1).gather(-1, source.expand(*axes, -1, -1))
    return gathered if moved is None else (gathered - moved).clamp(min=0)


def pack_shortened(
    take: Callable[[torch.Tensor, torch.LongTensor], torch.Tensor],
    states: torch.Tensor,
    kept: torch.Tensor,
    counts: torch.LongTensor,
    position_ids: torch.LongTensor,
    layer_rows: torch.Tensor | None = None,
) -> PackedPrompt:
    """The packer for a sequence inside of the decoder, of whose images only some places stay.

    Args:
        take: from flattened states `(B * L, D)` to rows of what they become, by their places, which are where `kept`
            is.
        states (`torch.Tensor` of shape `(B, L, D)`): of the sequence.
        kept (`torch.BoolTensor` of shape `(B, L)`): places that stay, on the CPU unless a device has chosen them.
        counts (`torch.LongTensor` of shape `(B,)`): how many of each row, on the CPU.
        position_ids (`torch.LongTensor` of shape `(..., B, L)`): of every place; they are kept.
        layer_rows (`torch.Tensor` of shape `(R, B, L, D)`, *optional*): which are shortened as the states are.
    """
    device = position_ids.device
    source, mask, expand_index, kept_index = packing_indices(kept, counts)
    rows = torch.arange(kept.shape[0], device=kept.device)[:, None] * kept.shape[1]
    places = (source + rows).flatten()
    embeds = take(states.flatten(0, 1), places).unflatten(0, source.shape)
    if layer_rows is not None:
        taken = [take(each.flatten(0, 1), places) for each in layer_rows]
        layer_rows = torch.stack(taken).unflatten(1, source.shape) if taken else None
    if not bool((counts != counts[0]).any()):
        mask = None
    kept, source, mask, expand_index, kept_index = to_device(device, kept, source, mask, expand_index, kept_index)
    position_ids = gathered_positions(position_ids, source)
    return PackedPrompt(embeds, mask, position_ids, kept, source, expand_index, kept_index, layer_rows)


def shifted_positions(
    attention_mask: torch.Tensor,
    entered: torch.Tensor,
    position_ids: torch.Tensor | None,
    slots: torch.Tensor,
    shifts: torch.Tensor,
) -> torch.LongTensor:
    """Positions `(..., B, L)` of a full-length prompt whose kept placeholders stand `shifts` behind their slots.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, L)`): on the CPU.
        entered (`torch.BoolTensor` of shape `(B, L)`): False where a token was dropped before, and others moved up.
        position_ids (`torch.LongTensor` of shape `(..., B, L)`, *optional*): the caller's, or those of the decoder.
            Default: those of the text without padding.
        slots (`torch.LongTensor` of shape `(num_kept,)`): of kept placeholders, indices of the flattened prompt.
        shifts (`torch.LongTensor` of shape `(..., num_kept)`): on the device, of each axis.
    """
    real = attention_mask.bool()
    moved = None
    if position_ids is None:
        position_ids = ((real & entered).long().cumsum(1) - 1).clamp(min=0)
    elif not bool(entered.all()):
        moved = (real & ~entered).cumsum(1)
    position_ids, slots, moved = to_device(shifts.device, position_ids, slots, moved)
    positions = position_ids if moved is None else position_ids - moved
    positions = positions.expand(*positions.shape[:-2], *attention_mask.shape).flatten(-2)
    shifts = shifts.expand(*positions.shape[:-1], -1)
    return positions.index_add(-1, slots, shifts).unflatten(-1, attention_mask.shape)


class Span(NamedTuple):
    """An image that gets shorter: `length` visual tokens from `(row, start)` on, `stride` of which become one.

    `columns`: of their grid, None where they are a sequence. `num_frames`: spans, this one and those before it, whose
    tokens at one place become one in this span; 0 for a span that a later one takes in.
    """

    row: int
    start: int
    length: int
    stride: int
    columns: int | None = None
    num_frames: int = 1


@dataclass
class DecodePlan:
    """What the decoder must know of a packed prompt; `generate` hands it to every step.

    Args:
        layer_idx (`int`): decoder layer before which spans are shortened.
        spans (`list[Span]`): in prompt order, columns of the packed prompt.
        real (`torch.BoolTensor` of shape `(B, L)`): the packed prompt without padding, on the CPU.
        positions (`torch.LongTensor` of shape `(..., B, L + 1)`, *optional*): of the prompt and of the token behind
            it, where they are no count of its tokens.
        num_behind (`int`): columns at the end that are text behind the prompt.
        reads_attention (`bool`): whether what stays is chosen by the attention of the layer before.
        is_padded (`bool`): whether the prompt has padding.
        layer_rows (`torch.Tensor` of shape `(R, B, L, D)`, *optional*): what the first R layers add to their output.
    """

    layer_idx: int
    spans: list[Span]
    real: torch.Tensor
    positions: torch.Tensor | None = None
    num_behind: int = 0
    reads_attention: bool = False
    is_padded: bool = True
    layer_rows: torch.Tensor | None = None

    def for_rows(self, num_rows: int) -> "DecodePlan":
        """The plan of a batch in which every row stands several times in a row, as for beams."""
        repeats = num_rows // self.real.shape[0]
        if repeats == 1:
            return self
        spans = [
            span._replace(row=span.row * repeats + copy_idx)
            for row in range(self.real.shape[0])
            for copy_idx in range(repeats)
            for span in self.spans
            if span.row == row
        ]
        positions = None if self.positions is None else self.positions.repeat_interleave(repeats, -2)
        return replace(self, spans=spans, real=self.real.repeat_interleave(repeats, 0), positions=positions)

    def of_columns(self, start: int, end: int) -> "DecodePlan | None":
        """The part of the plan from column `start` to `end`, None if nothing is to be done there; columns behind the
        prompt are text."""
        spans = [span._replace(start=span.start - start) for span in self.spans if span.start >= start]
        if not spans and self.layer_rows is None or start >= self.real.shape[1]:
            return None
        num_behind = max(end - self.real.shape[1], 0)
        real = F.pad(self.real[:, start:end], (0, num_behind), value=True)
        rows = self.layer_rows
        if rows is not None:
            # repeated here and not by `for_rows`, since steps behind the prompt do without
            rows = rows[:, :, start:end].repeat_interleave(len(real) // rows.shape[1], 1)
            rows = F.pad(rows, (0, 0, 0, num_behind))
        return replace(self, spans=spans, real=real, positions=None, num_behind=num_behind, layer_rows=rows)

    def behind(self, num_columns: int) -> "DecodePlan":
        """The plan of the same prompt behind that many columns of text."""
        spans = [span._replace(start=span.start + num_columns) for span in self.spans]
        positions, rows = self.positions, self.layer_rows
        if positions is not None:
            before = torch.arange(num_columns, device=positions.device).expand(*positions.shape[:-1], -1)
            positions = torch.cat([before, positions + num_columns], dim=-1)
        if rows is not None:
            rows = F.pad(rows, (0, 0, num_columns, 0))
        real = F.pad(self.real, (num_columns, 0), value=True)
        return replace(self, spans=spans, real=real, positions=positions, layer_rows=rows)

    def positions_of(self, start: int, end: int) -> torch.LongTensor:
        """Positions `(..., B, end - start)` of the columns from `start` to `end`, counted on behind the prompt."""
        behind = end - self.positions.shape[-1]
        if behind > 0:
            steps = torch.arange(1, behind + 1, device=self.positions.device)
            return torch.cat([self.positions, self.positions[..., -1:] + steps], dim=-1)[..., start:]
        return self.positions[..., start:end]
