"""Reserve, then pack: from full-length prompts to the tokens that the language model sees, and back (C1, C2, C6).

A *block* is the unit that shrinks: a tile or an image with `num_reserved` consecutive placeholders, of which the first
`num_kept` stay. Plans are made on the host from masks that arrived in one transfer; the device only gathers.
"""

from dataclasses import dataclass

import torch


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


def rows_of_images(placeholder_mask: torch.Tensor, num_reserved: list[int]) -> list[int]:
    """The row of each image, and the check that the prompt reserves what the images need.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): on the CPU.
        num_reserved (`list[int]`): reserved placeholders per image, in prompt order.

    Raises:
        ValueError: a row's placeholders do not add up to whole images, or an image is interrupted by text.
    """
    rows, images = [], iter(enumerate(num_reserved))
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
    if len(rows) < len(num_reserved):
        raise _mismatch(
            placeholder_mask.shape[0] - 1,
            f"{len(num_reserved)} images were given, but the prompts hold placeholders for {len(rows)}",
        )
    return rows


def _mismatch(row: int, what: str) -> ValueError:
    return ValueError(
        f"Image features and image tokens do not match in sample {row}: {what}. Build `input_ids` with the processor "
        "of this checkpoint, from the same images, in prompt order, and do not truncate inside an image."
    )


def keep_slots(
    placeholder_mask: torch.Tensor,
    num_reserved: torch.Tensor,
    num_kept: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mark every position that stays: text, and `num_kept` placeholders of each block.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(B, L)`): `num_reserved.sum()` positions are True.
        num_reserved, num_kept (`torch.LongTensor` of shape `(num_blocks,)`): in prompt order.
        slots (`torch.LongTensor` of shape `(num_kept.sum(),)`, *optional*): which placeholders of its block stay, the
            first ones if not given.

    Returns:
        `torch.BoolTensor` of shape `(B, L)`, True = keep.
    """
    starts = num_reserved.cumsum(0) - num_reserved
    keep = torch.ones_like(placeholder_mask)
    if slots is None:
        block = torch.repeat_interleave(torch.arange(len(num_reserved)), num_reserved)
        keep[placeholder_mask] = torch.arange(int(num_reserved.sum())) - starts[block] < num_kept[block]
        return keep
    kept = torch.zeros(int(num_reserved.sum()), dtype=torch.bool)
    kept[torch.repeat_interleave(starts, num_kept) + slots] = True
    keep[placeholder_mask] = kept
    return keep


def is_left_padded(attention_mask: torch.Tensor) -> bool:
    """Whether no padding follows a real token in any row of a `(B, L)` mask."""
    real = attention_mask.bool()
    return bool((real[:, 1:] | ~real[:, :-1]).all())


@dataclass
class PackedPrompt:
    """What the language model sees, and the way back to full length.

    `inputs_embeds` `(B, K, D)`; `attention_mask` `(B, K)`, None where nothing is padded; `position_ids` `(B, K)`, None
    for 0..K-1; `kept_mask` `(B, L)`. The rest is None where no token was dropped, since nothing moved then:
    `source_index` `(B, K)`, original position of each packed one; `expand_index` `(B, L)`, packed position that each
    original one repeats; `kept_index` `(num_kept,)`, the True positions of the flattened `kept_mask`.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    kept_mask: torch.Tensor
    source_index: torch.Tensor | None = None
    expand_index: torch.Tensor | None = None
    kept_index: torch.Tensor | None = None

    def pack_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, L)` ids to `(B, K)`; what lies under padding is arbitrary."""
        return input_ids if self.source_index is None else input_ids.gather(1, self.source_index)

    def expand(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, K, ...)` back to `(B, L, ...)`: a dropped position repeats the last kept one before it."""
        if self.expand_index is None:
            return states
        index = self.expand_index[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index)


def pack_visual_tokens(
    inputs_embeds: torch.Tensor,
    keep: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    align_left: bool = False,
    renumber: bool = True,
) -> PackedPrompt:
    """Drop the positions that are not kept, and padding, from embeddings, mask and positions together.

    Rows become as long as the longest needs and are padded on the left. Where nothing is dropped the layout stays as
    it is, unless `align_left` asks for padding on the left in any case, as generation needs it. Positions are
    renumbered unless the method keeps them: each kept token moves down by the number of dropped tokens before it in
    its row. Labels need no packing, since losses read full-length states at kept positions (`kept_index`).

    Args:
        inputs_embeds (`torch.Tensor` of shape `(B, L, D)`): text and, at kept placeholders, visual tokens.
        keep (`torch.BoolTensor` of shape `(B, L)`): on the CPU.
        attention_mask (`torch.Tensor` of shape `(B, L)`): on the CPU, non-zero = a real token.
        position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): the caller's, on the device.
        renumber (`bool`): False keeps the given `position_ids`, gaps and all.
    """
    device = inputs_embeds.device
    real = attention_mask.bool()
    kept_mask = keep & real
    on_device = kept_mask.to(device, non_blocking=True)
    if bool(keep.all()) and (not align_left or is_left_padded(real)):
        mask = None if bool(real.all()) else attention_mask.to(device, non_blocking=True)
        return PackedPrompt(inputs_embeds, mask, position_ids, on_device)

    lengths = kept_mask.sum(1)
    longest = int(lengths.max())
    # a stable sort moves dropped positions to the front and leaves kept ones in order
    source = torch.argsort(kept_mask.to(torch.int8), dim=1, stable=True)[:, kept_mask.shape[1] - longest :]
    packed_mask = kept_mask.gather(1, source)
    expand_index = (kept_mask.cumsum(1) - 1 + (longest - lengths)[:, None]).clamp(min=0)
    source_index = source.to(device, non_blocking=True)

    if not renumber:
        position_ids = position_ids.expand(source.shape[0], -1).gather(1, source_index)
    elif position_ids is not None:
        dropped_before = (real & ~keep).cumsum(1).gather(1, source).to(device, non_blocking=True)
        position_ids = position_ids.expand(source.shape[0], -1).gather(1, source_index) - dropped_before
        position_ids = position_ids.clamp(min=0)
    elif not bool(packed_mask.all()):
        position_ids = (packed_mask.cumsum(1) - 1).clamp(min=0).to(device, non_blocking=True)

    rows = torch.arange(source.shape[0])[:, None] * kept_mask.shape[1]
    flat_source = (source + rows).flatten().to(device, non_blocking=True)
    return PackedPrompt(
        inputs_embeds=inputs_embeds.flatten(0, 1).index_select(0, flat_source).unflatten(0, source.shape),
        attention_mask=None if bool(packed_mask.all()) else packed_mask.to(device, torch.long, non_blocking=True),
        position_ids=position_ids,
        kept_mask=on_device,
        source_index=source_index,
        expand_index=expand_index.to(device, non_blocking=True),
        kept_index=kept_mask.flatten().nonzero().flatten().to(device, non_blocking=True),
    )


def shifted_positions(
    attention_mask: torch.Tensor, position_ids: torch.Tensor | None, slots: torch.Tensor, shifts: torch.Tensor
) -> torch.LongTensor:
    """Positions `(B, L)` of a full-length prompt whose kept placeholders stand `shifts` further on than their slots.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, L)`): on the CPU.
        position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): the caller's. Default: those of the text
            without padding.
        slots (`torch.LongTensor` of shape `(num_kept,)`): of kept placeholders, indices of the flattened prompt.
        shifts (`torch.LongTensor` of shape `(num_kept,)`): on the device.
    """
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0).to(shifts.device, non_blocking=True)
    positions = position_ids.expand(attention_mask.shape).flatten()
    on_device = slots.to(shifts.device, non_blocking=True)
    return positions.index_add(0, on_device, shifts).unflatten(0, attention_mask.shape)
