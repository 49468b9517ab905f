"""The door to decoders of transformers: masks, and a decoder's own forward in two segments.

Seen on transformers 4.57.6 to 5.24.0, with the Llama, Qwen2, Qwen3 and Mistral families. Layers before the split have
longer caches than those after it. Masks are therefore made for each segment, and what the shorter one needs to know
travels on the cache object: see `CacheLayout`. No other file touches the inside of a decoder.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast

from .host_vtc import named_cache, position_axes
from .packing_vtc import DecodePlan, PackedPrompt

Shorten = Callable[
    [torch.Tensor, torch.LongTensor, DecodePlan, torch.Tensor | None], tuple[PackedPrompt, torch.Tensor]
]


def decoder_masks(
    config: PretrainedConfig,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    past_length: int,
) -> tuple[Any, dict[str, Any]]:
    """Attention masks of a decoder, one or a dict by layer type, and what its layers need besides.

    Args:
        config (`PretrainedConfig`): of the decoder.
        states (`torch.Tensor` of shape `(B, L, D)`): what the layers get.
        attention_mask (`torch.Tensor` of shape `(B, past_length + L)`, *optional*): 0 = padding.
        cache (`Cache`, *optional*): whose first layers are those that get `states`.
        past_length (`int`): tokens in these layers of the cache.
    """
    if "cache_position" in _MASK_PARAMETERS:
        # until 4.57
        places = torch.arange(past_length, past_length + states.shape[1], device=states.device)
        masks = create_masks_for_generate(config, states, attention_mask, places, cache)
        return masks, {"cache_position": places}
    return create_masks_for_generate(config, states, attention_mask, cache), {}


_MASK_PARAMETERS = inspect.signature(create_masks_for_generate).parameters


@dataclass
class CacheLayout:
    """How the layers of a cache differ, kept on the cache object, which lives as long as the difference.

    Args:
        layer_idx (`int`): layers from here on are shorter.
        num_dropped (`int`): by how many tokens.
        mask (`torch.BoolTensor` of shape `(B, full_length - num_dropped)`, *optional*): False = padding in the shorter
            layers, None where there is none.
        full_length (`int`): tokens in the longer layers when the mask was made; later ones are in all layers.
    """

    layer_idx: int
    num_dropped: int
    mask: torch.Tensor | None
    full_length: int


def may_be_shortened(cache: Cache | None) -> bool:
    """Whether the layers of a cache hold prompts of two lengths, unless it was emptied since."""
    return cache is not None and "vtc_layout" in vars(cache)


def forget_emptied(cache: Cache | None, past: int) -> None:
    """Drop what was noted on a cache that was emptied since, as `generate` of 4.57 does with static ones."""
    if cache is not None and past == 0:
        for name in ("vtc_layout", "vtc_next_position", "vtc_prompt"):
            vars(cache).pop(name, None)


class NextPosition(NamedTuple):
    """Where tokens behind a prompt of `length` columns go on, `(..., B, 1)`; kept on the cache of the prompt."""

    position: torch.LongTensor
    length: int


def note_next_position(cache: Cache | None, plan: DecodePlan | None) -> None:
    """Let whoever continues a cache know where positions go on that are no count of its tokens."""
    if cache is not None and plan is not None and plan.positions is not None:
        cache.vtc_next_position = NextPosition(plan.positions[..., -1:], plan.real.shape[1])


def continued_positions(cache: Cache | None, attention_mask: Any, num_rows: int, length: int) -> torch.Tensor | None:
    """Positions `(..., B, length)` of tokens behind what a cache holds, None where they are a count."""
    known = None if cache is None else vars(cache).get("vtc_next_position")
    if known is None:
        return None
    past = past_length(cache, attention_mask, length)
    forget_emptied(cache, past)
    if past == 0:
        return None
    if past < known.length:
        raise _cropped(past, known.length)
    steps = torch.arange(past - known.length, past - known.length + length, device=known.position.device)
    return known.position.repeat_interleave(num_rows // known.position.shape[-2], -2) + steps


def _cropped(past: int, length: int) -> RuntimeError:
    return RuntimeError(
        f"The cache was cropped to {past} tokens, inside of a prompt of {length} with images. Crop behind it only, or "
        "start without the cache."
    )


def run_segments(
    decoder: nn.Module,
    shorten: Shorten,
    training: bool,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    cache: Cache | None,
    plan: DecodePlan | None,
    past: int,
    use_cache: bool | None = None,
    output_hidden_states: bool | list[int] | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[BaseModelOutputWithPast, PackedPrompt | None, torch.Tensor | None]:
    """A decoder's own forward in two segments, of which the second sees shorter images.

    Args:
        decoder (`nn.Module`): of the Llama, Qwen2, Qwen3 or Mistral family, without a head.
        shorten: from states, positions, plan and scores to the shorter sequence and its visual tokens.
        training (`bool`): of the model around the decoder.
        embeds (`torch.Tensor` of shape `(B, L, D)`): a packed prompt, or what follows it.
        attention_mask (`torch.Tensor` of shape `(B, past + L)`, *optional*): 0 = padding.
        position_ids (`torch.LongTensor` of shape `(..., B, L)`, *optional*): default: counted without padding.
        cache (`Cache`, *optional*): whose layers may hold prompts of two lengths.
        plan ([`DecodePlan`], *optional*): of these columns; may be None only where the cache holds shorter images.
        past (`int`): tokens in the cache, in the layers that see all of them.

    Returns:
        Outputs, and where `plan` has spans the layout of `last_hidden_state` and the second segment's visual tokens.
    """
    own, length = decoder.config, embeds.shape[1]
    wanted = own.output_hidden_states if output_hidden_states is None else output_hidden_states
    attended = own.output_attentions if output_attentions is None else output_attentions
    run = _DecoderRun(decoder, training, cache, embeds, wanted, use_cache, kwargs)
    cache = run.cache
    old = vars(cache).get("vtc_layout") if cache is not None and past > 0 else None
    split = plan.layer_idx if old is None else old.layer_idx
    position_ids = counted_positions(own, embeds, attention_mask, past) if position_ids is None else position_ids
    layout = image_states = rows = later_rows = None
    if plan is not None and plan.layer_rows is not None:
        rows, later_rows = plan.layer_rows[:split], plan.layer_rows[split:]
    with _recorded_attentions(decoder, attended) as attentions:
        past_mask = _past_mask(old, attention_mask, past, embeds)
        past_short = past if old is None else past - old.num_dropped
        if plan is not None and plan.spans:
            states, scores = _run_scored(run, embeds, attention_mask, position_ids, past, plan)
            layout, image_states = shorten(states, position_ids, plan, scores)
            states, position_ids, later_rows = layout.inputs_embeds, layout.position_ids, layout.layer_rows
            mask = _joined_mask(past_mask, layout.attention_mask, states)
        else:
            states = run.layers(embeds, 0, split, attention_mask, position_ids, past, rows)
            mask = _joined_mask(past_mask, None if attention_mask is None else attention_mask[:, past:], states)
        if old is not None:
            _crop_rejected(cache, split, past_short)
        if layout is not None and cache is not None:
            num_dropped = past - past_short + length - states.shape[1]
            cache.vtc_layout = _cache_layout(states, mask, num_dropped, past + length, plan)
        states = run.layers(states, split, own.num_hidden_layers, mask, position_ids, past_short, later_rows)
    return run.outputs(states, attentions if attended else None), layout, image_states


def past_length(cache: Cache | None, attention_mask: torch.Tensor | None, length: int) -> int:
    """Tokens before the `length` given ones, in the layers that see all of them."""
    if cache is None:
        return 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        # a static cache would have to be read back from the device
        return attention_mask.shape[1] - length
    return int(cache.get_seq_length())


def _run_scored(
    run: "_DecoderRun",
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor,
    past: int,
    plan: DecodePlan,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Layers before the split, and the scores `(B, L)` that the last one gives, if the plan asks for them."""
    split = plan.layer_idx
    if not plan.reads_attention:
        return run.layers(embeds, 0, split, attention_mask, position_ids, past, plan.layer_rows), None
    rows = plan.layer_rows
    states = run.layers(embeds, 0, split - 1, attention_mask, position_ids, past, rows)
    rotary = run.decoder.rotary_emb(states, position_ids)
    attention = run.decoder.layers[split - 1].self_attn
    with _recorded_queries_and_keys(attention) as recorded:
        rows = None if rows is None else rows[split - 1 :]
        states = run.layers(states, split - 1, split, attention_mask, position_ids, past, rows)
    return states, last_token_attention(attention, *recorded, rotary, plan.real)


def _cache_layout(
    states: torch.Tensor, mask: torch.Tensor | None, num_dropped: int, full_length: int, plan: DecodePlan
) -> CacheLayout:
    """What the second segment's cache is, once it holds `states` `(B, K, D)` with padding `mask` `(B, past + K)`."""
    prompt_mask = None if mask is None else mask[:, : mask.shape[1] - plan.num_behind].bool()
    return CacheLayout(plan.layer_idx, num_dropped, prompt_mask, full_length - plan.num_behind)


@contextmanager
def _recorded_queries_and_keys(attention: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect queries and keys of an attention module while it runs, before they are rotated.

    Its parts are not called for them alone: where parameters are sharded, the layer around them must run.
    """
    parts = dict(attention.named_children())
    sources = [parts.get(norm, parts[layer]) for norm, layer in (("q_norm", "q_proj"), ("k_norm", "k_proj"))]
    recorded: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: recorded.append(output.detach()))
        for module in sources
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_token_attention(
    attention: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    real: torch.Tensor,
) -> torch.Tensor:
    """Attention `(B, L)` that the heads of a decoder layer, on average, pay from the last real token of each row.

    Args:
        attention (`nn.Module`): of a Llama, Qwen2, Qwen3 or Mistral decoder.
        queries, keys (`torch.Tensor` of shape `(B, L, ...)`): of that module, before they are rotated.
        rotary (`tuple`): cosines and sines of the rotary embedding.
        real (`torch.BoolTensor` of shape `(B, L)`): False = padding.
    """
    real, rotary = real.to(keys.device, non_blocking=True), [part.to(keys.device) for part in rotary]
    queries, keys = (part.flatten(2).unflatten(-1, (-1, attention.head_dim)) for part in (queries, keys))
    places = torch.arange(real.shape[1], device=real.device)
    last = (real * places).argmax(1)

    def rotated(values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        first, second = values.chunk(2, dim=-1)
        return values * cosines + torch.cat([-second, first], dim=-1) * sines

    cosines, sines = (part.expand(keys.shape[0], -1, -1)[:, :, None] for part in rotary)  # (B, L, 1, head_dim)
    rows = torch.arange(keys.shape[0], device=keys.device)
    query = rotated(queries[rows, last], cosines[rows, last], sines[rows, last])  # (B, heads, head_dim)
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
    """One pass of `embeds` through the layers of a decoder, some at a time; arguments are those of `run_segments`."""

    def __init__(
        self,
        decoder: nn.Module,
        training: bool,
        cache: Cache | None,
        embeds: torch.Tensor,
        wanted: bool | list[int],
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ):
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        if training and decoder.gradient_checkpointing:
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=decoder.config)
        self.decoder, self.cache, self.wanted = decoder, cache, wanted
        self.hidden_states = [embeds] if wanted else None
        self.kwargs = {"use_cache": use_cache, **kwargs}

    def outputs(self, states: torch.Tensor, attentions: list[torch.Tensor] | None) -> BaseModelOutputWithPast:
        """What the stock decoder gives back after its last layer."""
        states, hidden_states = self.decoder.norm(states), None
        if self.wanted:
            # the last entry is the normed one, as in the stock decoder
            hidden_states = _selected_states([*self.hidden_states[:-1], states], self.wanted)
        return BaseModelOutputWithPast(
            last_hidden_state=states,
            **named_cache(self.cache if self.kwargs["use_cache"] else None),
            hidden_states=hidden_states,
            attentions=None if attentions is None else tuple(attentions),
        )

    def layers(
        self,
        states: torch.Tensor,
        first: int,
        last: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past_length: int,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run layers `first` to `last - 1`, whose caches hold `past_length` tokens; the first of them add `rows`
        `(R, B, L, D)` to their output."""
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
            output = self.decoder.layers[layer_idx](
                states,
                attention_mask=masks[config.layer_types[layer_idx]] if isinstance(masks, dict) else masks,
                position_embeddings=rotary,
                # of several axes none counts tokens, by which kernels would find packed sequences
                position_ids=position_ids if position_ids.ndim == 2 else None,
                **named_cache(self.cache),
                **extra,
                **self.kwargs,
            )
            # Qwen2.5-VL's of 4.57 return a tuple
            states = output[0] if isinstance(output, tuple) else output
            if rows is not None and layer_idx - first < len(rows):
                states = states + rows[layer_idx - first].to(states.device, states.dtype)
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


def counted_positions(
    config: PretrainedConfig, embeds: torch.Tensor, attention_mask: torch.Tensor | None, past: int
) -> torch.LongTensor:
    """Positions `(..., B or 1, L)` of text `embeds` `(B, L, D)` behind `past` tokens, counted without padding."""
    if attention_mask is None:
        positions = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
    else:
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    return positions.expand(*position_axes(config), *positions.shape)


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
        raise _cropped(past, layout.full_length)
    if layout.mask is None and attention_mask is None:
        return None
    shape, device = (embeds.shape[0], layout.full_length - layout.num_dropped), embeds.device
    prompt = torch.ones(shape, dtype=torch.bool, device=device) if layout.mask is None else layout.mask
    recent = prompt.new_ones(shape[0], past - layout.full_length)
    if attention_mask is not None:
        recent = attention_mask[:, layout.full_length : past].bool()
    return torch.cat([prompt, recent], dim=1)


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
