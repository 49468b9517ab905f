"""LLaVolta / Visual Context Compressor: images get shorter in the middle of the decoder.

Paper: "Efficient Large Multi-modal Models via Visual Context Compression" (arXiv 2406.20092, NeurIPS 2024). Upstream:
Beckschen/LLaVolta@31ec151 `llava/model/language_model/llava_llama.py` (Apache-2.0); checkpoints are LLaVA-1.5's, since
the compressor has no parameters.

Before decoder layer K every span of V visual tokens becomes floor(V / S) means of S neighbours; text stays, and keeps
its positions. A pooled token stands where its first member stood, `S` apart, at position `(S - 1) // 2` further on.

Ours: spans from the prompt instead of a constant, left padding, text-only rows, unequal counts per row, beams, static
caches, every decoder of the Llama, Qwen2, Qwen3 and Mistral families; budgets; compressors other than means. Where we
differ: positions are exact where the original rounds means in float16 (from position 1024 on), and decoding with K = 0
works.

Layers before K have longer caches than those after it. Masks are therefore made for each of the two segments, and what
the shorter one needs to know travels on the cache object: see `CacheLayout`.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .budget_vtc import budgets_per_image, largest_admissible
from .compat_vtc import decoder_masks
from .configuration_llavolta import LlavoltaConfig
from .connector_vtc import Connector
from .modeling_compressors_llavolta import Shortened, Span, shorten
from .modeling_vtc import VtcForConditionalGeneration, VtcModel
from .packing_vtc import PackedPrompt, rows_of_images
from .prompt_vtc import HostPrompt, Prompt, VisualTokens
from .tiling_vtc import best_canvases, joined_order, refuse_empty_map, unpadded_grids


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


@dataclass
class LlavoltaTokens(VisualTokens):
    """Visual tokens of images that are one block each; `strides` and `starts` (row, column) per image on the CPU."""

    strides: Sequence[int] = ()
    starts: Sequence[tuple[int, int]] = ()
    attention_mask: torch.Tensor | None = None


class LlavoltaInit:
    """Initial values of the parameters that are not part of a standard layer."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlavoltaModel) and module.image_newline is not None:
            nn.init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class LlavoltaModel(LlavoltaInit, VtcModel):
    """A LLaVA-type model without a head, whose images get shorter before a decoder layer.

    `image_hidden_states` of the outputs are the visual tokens as the layers behind see them first. `hidden_states`
    are compact and of two lengths: entry i is the output of layer i - 1, so entry K is what was shortened.
    """

    config_class = LlavoltaConfig
    reads_padding_mask = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "InternVLVisionLayer", "Connector"]

    def __init__(self, config: LlavoltaConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.multi_modal_projector = Connector(config, [width, width], config.shuffle_factor)
        joined = config.mm_patch_merge_type == "spatial_unpad"
        self.image_newline = nn.Parameter(torch.empty(width)) if joined else None
        self.post_init()

    def reserved_blocks(self, host: HostPrompt, num_tiles: int) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Visual tokens of each image, which is one block, and as many ones."""
        num_reserved, tiles_per_image = super().reserved_blocks(host, num_tiles)
        if self.image_newline is None:
            reserved = [int(blocks.sum()) for blocks in num_reserved.split(tiles_per_image.tolist())]
        else:
            reserved = [len(order) for order in self._token_orders(host, num_tiles)]
        return torch.tensor(reserved, dtype=torch.long), torch.ones(len(reserved), dtype=torch.long)

    def compress(self, features: torch.Tensor, prompt: Prompt) -> LlavoltaTokens:
        """Project `features` `(T, N, C)`, and shorten the images here if no decoder layer comes first."""
        if prompt.vision.router_decisions is not None:
            raise ValueError("`router_decisions` are of no use here: nothing is routed. Give `vtc_budget`.")
        if prompt.host is None:
            prompt.to_host()
        host, layer_idx = prompt.host, self.config.compress_layer_idx
        lengths, blocks_per_image = self.reserved_blocks(host, features.shape[0])
        rows = rows_of_images(host.placeholder_mask, lengths.tolist())
        strides = self._strides(lengths.tolist(), prompt.vision.vtc_budget)
        embeds = self._join(self.multi_modal_projector(features), host)

        firsts = (lengths.cumsum(0) - lengths).tolist()
        columns = host.placeholder_mask.nonzero()[:, 1][firsts].tolist()
        kept = [self.config.kept_tokens(length, stride) for length, stride in zip(lengths.tolist(), strides)]
        tokens = LlavoltaTokens(
            embeds=embeds,
            num_reserved=lengths,
            num_kept=torch.tensor(kept, dtype=torch.long),
            blocks_per_image=blocks_per_image,
            shortened_in_decoder=layer_idx > 0,
            strides=strides,
            starts=list(zip(rows, columns, strict=True)),
            attention_mask=host.attention_mask,
        )
        if layer_idx > 0 or set(strides) <= {1}:
            return tokens
        spans = [Span(0, *image) for image in zip(firsts, lengths.tolist(), strides, strict=True)]
        return self._shorten_embeds(tokens, spans)

    def _shorten_embeds(self, tokens: LlavoltaTokens, spans: list[Span]) -> LlavoltaTokens:
        """Shorten images `(V, D)` that follow each other, before there is a sequence."""
        shortened = self._shorten(tokens.embeds, spans)
        embeds = shortened.fill(tokens.embeds).index_select(0, shortened.slots)
        if self.config.compress_layer_idx == -1:
            return replace(tokens, embeds=embeds)
        starts = torch.repeat_interleave(tokens.num_reserved.cumsum(0) - tokens.num_reserved, tokens.num_kept)
        return replace(tokens, embeds=embeds, slots=shortened.host_slots - starts, position_shifts=shortened.shifts)

    def decode(
        self, packed: PackedPrompt, visual: LlavoltaTokens, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPast, PackedPrompt, VisualTokens]:
        """Run the decoder on a prompt whose images are long, and shorten them on the way."""
        plan = self.decode_plan(packed, visual)
        if plan is None:
            return super().decode(packed, visual, past_key_values=past_key_values, **kwargs)
        # those of the caller count another prompt
        kwargs.pop("cache_position", None)
        # positions with gaps come here too: without mask and cache the stock decoder takes them for several samples
        outputs, layout, image_states = self._run_segments(
            packed.inputs_embeds, packed.attention_mask, packed.position_ids, past_key_values, plan, **kwargs
        )
        if not plan.spans:
            return outputs, packed, visual
        return outputs, layout, replace(visual, embeds=image_states)

    def decode_plan(self, packed: PackedPrompt, visual: LlavoltaTokens) -> DecodePlan | None:
        """What is still to be done to a packed prompt, or to be known of it; None for nothing."""
        layer_idx = self.config.compress_layer_idx
        if layer_idx <= 0:
            if visual.position_shifts is None:
                return None
            return DecodePlan(layer_idx, [], torch.ones(packed.position_ids.shape), packed.position_ids)
        real = visual.attention_mask.bool()
        places = torch.arange(real.shape[1]).expand(real.shape)
        if packed.source_index is not None:
            # every row has moved to the right edge
            num_columns = packed.source_index.shape[1]
            counts = real.sum(1, keepdim=True)
            places = real.cumsum(1) - 1 + num_columns - counts
            real = torch.arange(num_columns) >= num_columns - counts
        spans = [
            Span(row, int(places[row, column]), length, stride)
            for (row, column), length, stride in zip(
                visual.starts, visual.num_reserved.tolist(), visual.strides, strict=True
            )
        ]
        return DecodePlan(layer_idx, spans, real) if any(span.stride > 1 for span in spans) else None

    def continue_decoding(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decode_plan: DecodePlan | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Text, or a step of `generate`: layers may have caches of two lengths, and positions gaps."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        past = _past_length(past_key_values, attention_mask, given.shape[1])
        end = past + given.shape[1]
        if decode_plan is not None:
            decode_plan = decode_plan.for_rows(given.shape[0])
            if decode_plan.positions is not None:
                position_ids = decode_plan.positions_of(past, end)
            decode_plan = decode_plan.of_columns(past, end) if past < decode_plan.real.shape[1] else None
        shortened = past_key_values is not None and past > 0 and "vtc_layout" in vars(past_key_values)
        if not shortened and (decode_plan is None or not decode_plan.spans):
            return super().continue_decoding(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` must be (batch, length) where layers have caches of two lengths, got "
                f"{attention_mask.ndim} dimensions. Pass the 2-D padding mask."
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        kwargs.pop("cache_position", None)
        outputs, _, _ = self._run_segments(
            inputs_embeds, attention_mask, position_ids, past_key_values, decode_plan, **kwargs
        )
        return outputs

    def _run_segments(
        self,
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
        """The decoder's own forward in two segments, of which the second sees shorter images.

        Returns outputs, the layout of `last_hidden_state` and the visual tokens that the second segment saw; the last
        two are None where `plan` has no spans.
        """
        decoder, config, length = self.language_model, self.language_model.config, embeds.shape[1]
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.training and decoder.gradient_checkpointing:
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        past = _past_length(cache, attention_mask, length)
        old = vars(cache).get("vtc_layout") if cache is not None and past > 0 else None
        split = plan.layer_idx if old is None else old.layer_idx
        if position_ids is None:
            position_ids = _positions(embeds, attention_mask, past)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attended = config.output_attentions if output_attentions is None else output_attentions
        run = _DecoderRun(decoder, cache, [embeds] if wanted else None, {"use_cache": use_cache, **kwargs})

        layout = image_states = None
        with _recorded_attentions(decoder, attended) as attentions:
            past_mask = _past_mask(old, attention_mask, past, embeds)
            past_short = past if old is None else past - old.num_dropped
            if plan is not None and plan.spans:
                states, scores = self._run_scored(run, embeds, split, attention_mask, position_ids, past, plan)
                layout, image_states = self._shorten_sequence(states, position_ids, plan, scores)
                states, position_ids = layout.inputs_embeds, layout.position_ids
                mask = _joined_mask(past_mask, layout.attention_mask, states)
            else:
                states = run.layers(embeds, 0, split, attention_mask, position_ids, past)
                mask = _joined_mask(past_mask, None if attention_mask is None else attention_mask[:, past:], states)
            if old is not None:
                _crop_rejected(cache, split, past_short)
            if layout is not None and cache is not None:
                prompt_mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
                prompt_mask = prompt_mask[:, : prompt_mask.shape[1] - plan.num_behind].bool()
                num_dropped = past - past_short + length - states.shape[1]
                cache.vtc_layout = CacheLayout(split, num_dropped, prompt_mask, past + length - plan.num_behind)
            states = run.layers(states, split, config.num_hidden_layers, mask, position_ids, past_short)
        states = decoder.norm(states)
        if wanted:
            # the last entry is the normed one, as in the stock decoder
            run.hidden_states[-1] = states
        outputs = BaseModelOutputWithPast(
            last_hidden_state=states,
            past_key_values=cache if use_cache else None,
            hidden_states=_selected_states(run.hidden_states, wanted) if wanted else None,
            attentions=tuple(attentions) if attended else None,
        )
        return outputs, layout, image_states

    def _run_scored(
        self,
        run: "_DecoderRun",
        embeds: torch.Tensor,
        split: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past: int,
        plan: DecodePlan,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Layers before `split`, and the scores `(B, L)` that the compressor `"attention"` takes from the last one."""
        if self.config.compressor != "attention":
            return run.layers(embeds, 0, split, attention_mask, position_ids, past), None
        states = run.layers(embeds, 0, split - 1, attention_mask, position_ids, past)
        real = plan.real.to(states.device, non_blocking=True)
        rotary = run.decoder.rotary_emb(states, position_ids)
        scores = last_token_attention(run.decoder.layers[split - 1], states, rotary, real)
        return run.layers(states, split - 1, split, attention_mask, position_ids, past), scores

    def _shorten_sequence(
        self, states: torch.Tensor, position_ids: torch.LongTensor, plan: DecodePlan, scores: torch.Tensor | None
    ) -> tuple[PackedPrompt, torch.Tensor]:
        """Shorten the images of a sequence `(B, L, D)`; rows become ragged and are padded on the left.

        Returns the new sequence with its positions, and the visual tokens `(num_visual_tokens, D)`. Nothing is read
        back from the device: how many tokens stay is known, whichever they are.
        """
        num_rows, length, device = *states.shape[:2], states.device
        flat = states.flatten(0, 1)
        spans = [span._replace(row=0, start=span.row * length + span.start) for span in plan.spans]
        shortened = self._shorten(flat, spans, scores)
        filled = shortened.fill(flat)

        text, counts = plan.real.clone(), plan.real.sum(1)
        for span in plan.spans:
            text[span.row, span.start : span.start + span.length] = False
            counts[span.row] -= span.length - self.config.kept_tokens(span.length, span.stride)
        kept = text.to(device, non_blocking=True).flatten().index_fill(0, shortened.slots, True)
        kept = kept.unflatten(0, (num_rows, length))
        longest, is_padded = int(counts.max()), bool((counts != counts.max()).any())
        # a stable sort moves dropped positions to the front and leaves kept ones in order
        source = torch.argsort(kept.to(torch.int8), dim=1, stable=True)[:, length - longest :]
        rows = torch.arange(num_rows, device=device)[:, None] * length
        positions = position_ids.expand(num_rows, -1).flatten().index_add(0, shortened.slots, shortened.shifts)
        flat_source = (source + rows).flatten()
        layout = PackedPrompt(
            inputs_embeds=filled.index_select(0, flat_source).unflatten(0, source.shape),
            attention_mask=kept.gather(1, source) if is_padded else None,
            position_ids=positions.index_select(0, flat_source).unflatten(0, source.shape),
            kept_mask=kept,
            source_index=source,
            expand_index=(kept.cumsum(1) - 1 + longest - kept.sum(1, keepdim=True)).clamp(min=0),
            kept_index=torch.argsort((~kept).flatten().to(torch.int8), stable=True)[: int(counts.sum())],
        )
        return layout, filled.index_select(0, shortened.slots)

    def _shorten(self, states: torch.Tensor, spans: list[Span], scores: torch.Tensor | None = None) -> Shortened:
        config = self.config
        return shorten(states, spans, config.compressor, math.isqrt(config.image_seq_length), self.training, scores)

    def _strides(self, lengths: list[int], vtc_budget: Any) -> list[int]:
        """The stride of each image, 1 = as it is."""
        config, strides = self.config, []
        for image_idx, budget in enumerate(budgets_per_image(vtc_budget, len(lengths))):
            length = lengths[image_idx]
            if budget == "full" or budget == "auto" and not config.compresses:
                strides.append(1)
            elif budget == "auto":
                if config.kept_tokens(length, config.compress_stride) < 1:
                    raise ValueError(
                        f"`compress_stride` ({config.compress_stride}) is larger than image {image_idx} allows, which "
                        f"has {length} visual tokens. Lower it, or give a `vtc_budget`."
                    )
                strides.append(config.compress_stride)
            else:
                counts = {stride: config.kept_tokens(length, stride) for stride in config.strides_of(length)}
                chosen = largest_admissible(budget, list(counts.values()), image_idx)
                strides.append(next(stride for stride, count in counts.items() if count == chosen))
        return strides

    def _join(self, tokens: torch.Tensor, host: HostPrompt) -> torch.Tensor:
        """Visual tokens of all images, one after the other, from projected tiles `(T, N, D)`."""
        if self.image_newline is None:
            return tokens.flatten(0, 1)
        newline = self.image_newline[None].to(tokens)
        orders, first = [], 0
        num_tokens = tokens.shape[0] * tokens.shape[1]
        for order, tiles in zip(
            self._token_orders(host, tokens.shape[0]), self._num_tiles(host, tokens.shape[0]), strict=True
        ):
            orders.append(torch.where(order < 0, num_tokens, order + first))
            first += tiles * tokens.shape[1]
        # every rank must use the parameter, whatever its images are
        bank = torch.cat([tokens.flatten(0, 1) + 0 * newline, newline])
        return bank.index_select(0, torch.cat(orders).to(tokens.device, non_blocking=True))

    def _num_tiles(self, host: HostPrompt, total_tiles: int) -> list[int]:
        return super().reserved_blocks(host, total_tiles)[1].tolist()

    def _token_orders(self, host: HostPrompt, total_tiles: int) -> Iterator[torch.LongTensor]:
        """Which token of each image stands where, for LLaVA-NeXT; -1 is a newline."""
        side = math.isqrt(self.config.image_seq_length)
        tile_size = self.config.vision_config.image_size
        for image_idx, num_tiles in enumerate(self._num_tiles(host, total_tiles)):
            if num_tiles == 1:
                yield torch.arange(side * side)
                continue
            if host.image_sizes is None:
                raise ValueError(
                    "Images of several tiles need `image_sizes`: pass everything that the processor returned."
                )
            size = host.image_sizes[image_idx][None]
            grid = best_canvases(size, self.config.image_grid_pinpoints) // tile_size
            ((rows, columns),) = grid.tolist()
            if num_tiles != 1 + rows * columns:
                raise ValueError(
                    f"Image {image_idx} of {size[0].tolist()} pixels needs {rows} x {columns} tiles and the whole "
                    f"view, but has {num_tiles}. Use an image processor with `tiling='anyres'` and the model's "
                    "`image_grid_pinpoints`."
                )
            (kept,) = unpadded_grids(size, grid, (side, side), self.config.unpad_rule).tolist()
            refuse_empty_map(size[0].tolist(), kept)
            yield joined_order((rows, columns), (side, side), tuple(kept))


class LlavoltaForConditionalGeneration(LlavoltaInit, VtcForConditionalGeneration):
    """A LLaVA-type model whose images get shorter before a decoder layer, with a language modelling head."""

    config_class = LlavoltaConfig
    _no_split_modules = LlavoltaModel._no_split_modules
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LlavoltaConfig):
        super().__init__(config, LlavoltaModel(config))
        self.post_init()


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
                past_key_values=self.cache,
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


def _past_length(cache: Cache | None, attention_mask: torch.Tensor | None, length: int) -> int:
    """Tokens before the `length` given ones, in the layers that see all of them."""
    if cache is None:
        return 0
    if attention_mask is not None and attention_mask.ndim == 2:
        # a static cache would have to be read back from the device
        return attention_mask.shape[1] - length
    return int(cache.get_seq_length())


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
