"""LLaVolta's decoder: its layers in two segments, of which the second sees shorter images.

Layers before the split have longer caches than those after it. Masks are therefore made for each segment, and what the
shorter one needs to know travels on the cache object: see `CacheLayout`. No other file touches decoder internals.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .compat_vtc import decoder_masks, named_cache
from .configuration_llavolta import LlavoltaConfig
from .modeling_compressors_llavolta import Span, shorten
from .packing_vtc import PackedPrompt


@dataclass
class DecodePlan:
    """What the decoder must know of a packed prompt; `generate` hands it to every step.

    Args:
        layer_idx (`int`): decoder layer before which spans are shortened.
        spans (`list[Span]`): in prompt order, columns of the packed prompt.
        real (`torch.BoolTensor` of shape `(B, L)`): the packed prompt without padding, on the CPU.
        positions (`torch.LongTensor` of shape `(B, L)`, *optional*): of a prompt that is short already, and whose
            positions have gaps.
        num_behind (`int`): columns at the end that are text behind the prompt.
    """

    layer_idx: int
    spans: list[Span]
    real: torch.Tensor
    positions: torch.Tensor | None = None
    num_behind: int = 0

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
        positions = None if self.positions is None else self.positions.repeat_interleave(repeats, 0)
        return DecodePlan(self.layer_idx, spans, self.real.repeat_interleave(repeats, 0), positions)

    def of_columns(self, start: int, end: int) -> "DecodePlan":
        """The part of the plan from column `start` to `end`; columns behind the prompt are text."""
        spans = [span._replace(start=span.start - start) for span in self.spans if span.start >= start]
        num_behind = max(end - self.real.shape[1], 0)
        real = F.pad(self.real[:, start:end], (0, num_behind), value=True)
        return DecodePlan(self.layer_idx, spans, real, num_behind=num_behind)

    def positions_of(self, start: int, end: int) -> torch.LongTensor:
        """Positions `(B, end - start)` of the columns from `start` to `end`, counted on behind the prompt."""
        behind = end - self.positions.shape[1]
        if behind > 0:
            steps = torch.arange(1, behind + 1, device=self.positions.device)
            return torch.cat([self.positions, self.positions[:, -1:] + steps], dim=1)[:, start:]
        return self.positions[:, start:end]


@dataclass
class CacheLayout:
    """How the layers of a cache differ, kept on the cache object, which lives as long as the difference.

    Args:
        layer_idx (`int`): layers from here on are shorter.
        num_dropped (`int`): by how many tokens.
        mask (`torch.BoolTensor` of shape `(B, full_length - num_dropped)`): False = padding in the shorter layers.
        full_length (`int`): tokens in the longer layers when the mask was made; later ones are in all layers.
    """

    layer_idx: int
    num_dropped: int
    mask: torch.Tensor
    full_length: int


def run_segments(
    decoder: nn.Module,
    config: LlavoltaConfig,
    training: bool,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    cache: Cache | None,
    plan: DecodePlan | None,
    use_cache: bool | None = None,
    output_hidden_states: bool | list[int] | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[BaseModelOutputWithPast, PackedPrompt | None, torch.Tensor | None]:
    """A decoder's own forward in two segments, of which the second sees shorter images.

    Args:
        decoder (`nn.Module`): of the Llama, Qwen2, Qwen3 or Mistral family, without a head.
        config ([`LlavoltaConfig`]): gives the compressor.
        training (`bool`): of the model around the decoder.
        embeds (`torch.Tensor` of shape `(B, L, D)`): a packed prompt, or what follows it.
        attention_mask (`torch.Tensor` of shape `(B, past + L)`, *optional*): 0 = padding.
        position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): default: counted without padding.
        cache (`Cache`, *optional*): whose layers may hold prompts of two lengths.
        plan ([`DecodePlan`], *optional*): of these columns; may be None only where the cache holds shorter images.

    Returns:
        Outputs, the layout of `last_hidden_state` and the visual tokens that the second segment saw; the last two are
        None where `plan` has no spans.
    """
    own, length = decoder.config, embeds.shape[1]
    use_cache = own.use_cache if use_cache is None else use_cache
    if training and decoder.gradient_checkpointing:
        use_cache = False
    if use_cache and cache is None:
        cache = DynamicCache(config=own)
    past = past_length(cache, attention_mask, length)
    old = vars(cache).get("vtc_layout") if cache is not None and past > 0 else None
    split = plan.layer_idx if old is None else old.layer_idx
    if position_ids is None:
        position_ids = _positions(embeds, attention_mask, past)
    wanted = own.output_hidden_states if output_hidden_states is None else output_hidden_states
    attended = own.output_attentions if output_attentions is None else output_attentions
    run = _DecoderRun(decoder, cache, [embeds] if wanted else None, {"use_cache": use_cache, **kwargs})

    layout = image_states = None
    with _recorded_attentions(decoder, attended) as attentions:
        past_mask = _past_mask(old, attention_mask, past, embeds)
        past_short = past if old is None else past - old.num_dropped
        if plan is not None and plan.spans:
            states, scores = _run_scored(run, config.compressor, embeds, attention_mask, position_ids, past, plan)
            layout, image_states = _shorten_sequence(states, position_ids, plan, scores, config, training)
            states, position_ids = layout.inputs_embeds, layout.position_ids
            mask = _joined_mask(past_mask, layout.attention_mask, states)
        else:
            states = run.layers(embeds, 0, split, attention_mask, position_ids, past)
            mask = _joined_mask(past_mask, None if attention_mask is None else attention_mask[:, past:], states)
        if old is not None:
            _crop_rejected(cache, split, past_short)
        if layout is not None and cache is not None:
            num_dropped = past - past_short + length - states.shape[1]
            cache.vtc_layout = _cache_layout(states, mask, num_dropped, past + length, plan)
        states = run.layers(states, split, own.num_hidden_layers, mask, position_ids, past_short)
    states = decoder.norm(states)
    if wanted:
        # the last entry is the normed one, as in the stock decoder
        run.hidden_states[-1] = states
    outputs = BaseModelOutputWithPast(
        last_hidden_state=states,
        **named_cache(cache if use_cache else None),
        hidden_states=_selected_states(run.hidden_states, wanted) if wanted else None,
        attentions=tuple(attentions) if attended else None,
    )
    return outputs, layout, image_states


def past_length(cache: Cache | None, attention_mask: torch.Tensor | None, length: int) -> int:
    """Tokens before the `length` given ones, in the layers that see all of them."""
    if cache is None:
        return 0
    if attention_mask is not None and attention_mask.ndim == 2:
        # a static cache would have to be read back from the device
        return attention_mask.shape[1] - length
    return int(cache.get_seq_length())


def _run_scored(
    run: "_DecoderRun",
    compressor: str,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor,
    past: int,
    plan: DecodePlan,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Layers before the split, and the scores `(B, L)` that the compressor `"attention"` takes from the last one."""
    split = plan.layer_idx
    if compressor != "attention":
        return run.layers(embeds, 0, split, attention_mask, position_ids, past), None
    states = run.layers(embeds, 0, split - 1, attention_mask, position_ids, past)
    real = plan.real.to(states.device, non_blocking=True)
    rotary = run.decoder.rotary_emb(states, position_ids)
    scores = last_token_attention(run.decoder.layers[split - 1], states, rotary, real)
    return run.layers(states, split - 1, split, attention_mask, position_ids, past), scores


def _shorten_sequence(
    states: torch.Tensor,
    position_ids: torch.LongTensor,
    plan: DecodePlan,
    scores: torch.Tensor | None,
    config: LlavoltaConfig,
    training: bool,
) -> tuple[PackedPrompt, torch.Tensor]:
    """Shorten the images of a sequence `(B, L, D)`; rows become ragged and are padded on the left.

    Returns the new sequence with its positions, and the visual tokens `(num_visual_tokens, D)`. Nothing is read back
    from the device: how many tokens stay is known, whichever they are.
    """
    num_rows, length, device = *states.shape[:2], states.device
    flat = states.flatten(0, 1)
    spans = [span._replace(row=0, start=span.row * length + span.start) for span in plan.spans]
    shortened = shorten(flat, spans, config.compressor, math.isqrt(config.image_seq_length), training, scores)
    # plans are made on the CPU, unless the tokens that stay were chosen on the device
    planner = shortened.host_slots.device

    text, counts = plan.real.clone(), plan.real.sum(1)
    for span in plan.spans:
        text[span.row, span.start : span.start + span.length] = False
        counts[span.row] -= span.length - config.kept_tokens(span.length, span.stride)
    kept = text.to(planner, non_blocking=True).flatten().index_fill(0, shortened.host_slots, True)
    kept = kept.unflatten(0, (num_rows, length))
    longest, is_padded = int(counts.max()), bool((counts != counts.max()).any())
    # a stable sort moves dropped positions to the front and leaves kept ones in order
    source = torch.argsort(kept.to(torch.int8), dim=1, stable=True)[:, length - longest :]
    rows = torch.arange(num_rows, device=planner)[:, None] * length
    flat_source = (source + rows).flatten()
    expand_index = (kept.cumsum(1) - 1 + longest - kept.sum(1, keepdim=True)).clamp(min=0)
    kept_index = torch.argsort((~kept).flatten().to(torch.int8), stable=True)[: int(counts.sum())]
    embeds = shortened.take(flat, flat_source).unflatten(0, source.shape)
    image_states = shortened.take(flat, shortened.host_slots)
    packed_mask = kept.gather(1, source) if is_padded else None
    kept, source, flat_source, expand_index, kept_index = (
        plan.to(device, non_blocking=True) for plan in (kept, source, flat_source, expand_index, kept_index)
    )
    positions = position_ids.expand(num_rows, -1).flatten().index_add(0, shortened.slots, shortened.shifts)
    layout = PackedPrompt(
        inputs_embeds=embeds,
        attention_mask=None if packed_mask is None else packed_mask.to(device, non_blocking=True),
        position_ids=positions.index_select(0, flat_source).unflatten(0, source.shape),
        kept_mask=kept,
        source_index=source,
        expand_index=expand_index,
        kept_index=kept_index,
    )
    return layout, image_states


def _cache_layout(
    states: torch.Tensor, mask: torch.Tensor | None, num_dropped: int, full_length: int, plan: DecodePlan
) -> CacheLayout:
    """What the second segment's cache is, once it holds `states` `(B, K, D)` with padding `mask` `(B, past + K)`."""
    prompt_mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
    prompt_mask = prompt_mask[:, : prompt_mask.shape[1] - plan.num_behind].bool()
    return CacheLayout(plan.layer_idx, num_dropped, prompt_mask, full_length - plan.num_behind)


def last_token_attention(
    layer: nn.Module,
    states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    real: torch.Tensor,
) -> torch.Tensor:
    """Attention `(B, L)` that a decoder layer's heads, on average, pay from the last real token of each row.

    Args:
        layer (`nn.Module`): of a Llama, Qwen2, Qwen3 or Mistral decoder.
        states (`torch.Tensor` of shape `(B, L, D)`): its input.
        rotary (`tuple`): cosines and sines of the rotary embedding.
        real (`torch.BoolTensor` of shape `(B, L)`): False = padding.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    parts = dict(attention.named_children())
    places = torch.arange(real.shape[1], device=real.device)
    last = (real * places).argmax(1)
    heads = (-1, attention.head_dim)

    def rotated(values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        first, second = values.chunk(2, dim=-1)
        return values * cosines + torch.cat([-second, first], dim=-1) * sines

    cosines, sines = (part.expand(states.shape[0], -1, -1)[:, :, None] for part in rotary)  # (B, L, 1, head_dim)
    rows = torch.arange(states.shape[0], device=states.device)
    query = parts.get("q_norm", nn.Identity())(attention.q_proj(normed[rows, last]).unflatten(-1, heads))
    query = rotated(query, cosines[rows, last], sines[rows, last])  # (B, heads, head_dim)
    keys = parts.get("k_norm", nn.Identity())(attention.k_proj(normed).unflatten(-1, heads))
    keys = rotated(keys, cosines, sines).repeat_interleave(attention.num_key_value_groups, dim=2)
    scores = torch.einsum("bhd,blhd->bhl", query, keys).float() * attention.scaling
    return scores.masked_fill(~real[:, None], float("-inf")).softmax(-1).mean(1)


def _selected_states(states: list[torch.Tensor], wanted: bool | list[int]) -> tuple[torch.Tensor | None, ...]:
    """All hidden states, or those at the indices `wanted` and None elsewhere, as in transformers 5."""
    if isinstance(wanted, bool):
        return tuple(states)
    chosen = {index % len(states) for index in wanted}
    return tuple(state if index in chosen else None for index, state in enumerate(states))


class _DecoderRun:
    """One pass through the layers of a decoder, some at a time."""

    def __init__(
        self, decoder: nn.Module, cache: Cache | None, hidden_states: list[torch.Tensor] | None, kwargs: dict[str, Any]
    ):
        self.decoder = decoder
        self.cache = cache
        self.hidden_states = hidden_states
        self.kwargs = kwargs

    def layers(
        self,
        states: torch.Tensor,
        first: int,
        last: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past_length: int,
    ) -> torch.Tensor:
        """Run layers `first` to `last - 1`, whose caches hold `past_length` tokens."""
        if first == last:
            return states
        config, own_cache = self.decoder.config, self.cache
        if own_cache is not None:
            # the same layers, counted from the first of these: masks are sized by the cache's first layer
            own_cache = copy.copy(own_cache)
            own_cache.layers = own_cache.layers[first:]
        masks, extra = decoder_masks(config, states, attention_mask, own_cache, past_length)
        rotary = self.decoder.rotary_emb(states, position_ids)
        for layer_idx in range(first, last):
            states = self.decoder.layers[layer_idx](
                states,
                attention_mask=masks[config.layer_types[layer_idx]] if isinstance(masks, dict) else masks,
                position_embeddings=rotary,
                position_ids=position_ids,
                **named_cache(self.cache),
                **extra,
                **self.kwargs,
            )
            if self.hidden_states is not None:
                self.hidden_states.append(states)
        return states


@contextmanager
def _recorded_attentions(decoder: nn.Module, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Collect what the attention modules of a decoder return beside their output."""
    attentions: list[torch.Tensor] = []
    modules = [layer.self_attn for layer in decoder.layers] if wanted else []
    handles = [
        module.register_forward_hook(lambda module, args, output: attentions.append(output[1])) for module in modules
    ]
    try:
        yield attentions
    finally:
        for handle in handles:
            handle.remove()


def _positions(embeds: torch.Tensor, attention_mask: torch.Tensor | None, past: int) -> torch.LongTensor:
    if attention_mask is None:
        return torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def _past_mask(
    layout: CacheLayout | None, attention_mask: torch.Tensor | None, past: int, embeds: torch.Tensor
) -> torch.Tensor | None:
    """Padding `(B, tokens)` in the shorter layers of a cache, None for an empty one."""
    if past == 0:
        return None
    if layout is None:
        full = torch.ones(embeds.shape[0], past, device=embeds.device)
        return full if attention_mask is None else attention_mask[:, :past]
    if past < layout.full_length:
        raise RuntimeError(
            f"The cache was cropped to {past} tokens, inside of a prompt of {layout.full_length} with images. Crop "
            "behind it only, or start without the cache."
        )
    recent = layout.mask.new_ones(layout.mask.shape[0], past - layout.full_length)
    if attention_mask is not None:
        recent = attention_mask[:, layout.full_length : past].bool()
    return torch.cat([layout.mask, recent], dim=1)


def _joined_mask(
    past_mask: torch.Tensor | None, recent: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor | None:
    """Padding of cached and new tokens together, None for none."""
    if past_mask is None:
        return recent
    if recent is None:
        recent = torch.ones(states.shape[:2], device=states.device)
    return torch.cat([past_mask.bool(), recent.bool()], dim=1)


def _crop_rejected(cache: Cache, split: int, length: int) -> None:
    """Remove what longer layers have lost already: some versions crop a cache to a length that only those have."""
    if cache.is_compileable:
        return
    for layer in cache.layers[split:]:
        surplus = layer.get_seq_length() - length
        if surplus > 0:
            layer.crop(-surplus)
