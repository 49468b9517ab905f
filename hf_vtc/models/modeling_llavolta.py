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

`modeling_decoder_llavolta.py` runs the decoder, `modeling_compressors_llavolta.py` makes spans shorter; this file says
which spans, and by how much.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .budget_vtc import budgets_per_image, largest_admissible
from .configuration_llavolta import LlavoltaConfig
from .connector_vtc import Connector
from .modeling_compressors_llavolta import Span, shorten
from .modeling_decoder_llavolta import DecodePlan, past_length, run_segments
from .modeling_vtc import VtcForConditionalGeneration, VtcModel
from .packing_vtc import PackedPrompt, rows_of_images
from .prompt_vtc import HostPrompt, Prompt, VisualTokens
from .tiling_vtc import best_canvases, joined_order, refuse_no_pixels, refuse_wrong_tiles, unpadded_grids


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
            reserved = [len(order) for order in self._token_orders(host, tiles_per_image.tolist())]
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
        config, side = self.config, math.isqrt(self.config.image_seq_length)
        shortened = shorten(tokens.embeds, spans, config.compressor, side, self.training)
        embeds = shortened.take(tokens.embeds, shortened.host_slots)
        if config.compress_layer_idx == -1:
            return replace(tokens, embeds=embeds)
        starts = torch.repeat_interleave(tokens.num_reserved.cumsum(0) - tokens.num_reserved, tokens.num_kept)
        return replace(tokens, embeds=embeds, slots=shortened.host_slots - starts, position_shifts=shortened.shifts)

    def decode(
        self, packed: PackedPrompt, visual: LlavoltaTokens, cache: Cache | None = None, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPast, PackedPrompt, VisualTokens]:
        """Run the decoder on a prompt whose images are long, and shorten them on the way."""
        plan = self.decode_plan(packed, visual)
        if plan is None:
            return super().decode(packed, visual, cache, **kwargs)
        # those of the caller count another prompt
        kwargs.pop("cache_position", None)
        # positions with gaps come here too: without mask and cache the stock decoder takes them for several samples
        outputs, layout, image_states = run_segments(
            self.language_model,
            self.config,
            self.training,
            packed.inputs_embeds,
            packed.attention_mask,
            packed.position_ids,
            cache,
            plan,
            **kwargs,
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
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decode_plan: DecodePlan | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Text, or a step of `generate`: layers may have caches of two lengths, and positions gaps."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        past = past_length(cache, attention_mask, given.shape[1])
        end = past + given.shape[1]
        if decode_plan is not None:
            decode_plan = decode_plan.for_rows(given.shape[0])
            if decode_plan.positions is not None:
                position_ids = decode_plan.positions_of(past, end)
            decode_plan = decode_plan.of_columns(past, end) if past < decode_plan.real.shape[1] else None
        shortened = cache is not None and past > 0 and "vtc_layout" in vars(cache)
        if not shortened and (decode_plan is None or not decode_plan.spans):
            return super().continue_decoding(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` must be (batch, length) where layers have caches of two lengths, got "
                f"{attention_mask.ndim} dimensions. Pass the 2-D padding mask."
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        kwargs.pop("cache_position", None)
        outputs, _, _ = run_segments(
            self.language_model,
            self.config,
            self.training,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            decode_plan,
            **kwargs,
        )
        return outputs

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
        tiles_per_image = self._num_tiles(host, tokens.shape[0])
        for order, tiles in zip(self._token_orders(host, tiles_per_image), tiles_per_image, strict=True):
            orders.append(torch.where(order < 0, num_tokens, order + first))
            first += tiles * tokens.shape[1]
        # every rank must use the parameter, whatever its images are
        bank = torch.cat([tokens.flatten(0, 1) + 0 * newline, newline])
        return bank.index_select(0, torch.cat(orders).to(tokens.device, non_blocking=True))

    def _num_tiles(self, host: HostPrompt, total_tiles: int) -> list[int]:
        return super().reserved_blocks(host, total_tiles)[1].tolist()

    def _token_orders(self, host: HostPrompt, tiles_per_image: list[int]) -> list[torch.LongTensor]:
        """Which token of each image stands where, for LLaVA-NeXT; -1 is a newline. A single tile gets none."""
        config, side = self.config, math.isqrt(self.config.image_seq_length)
        single = torch.arange(side * side)
        if all(tiles == 1 for tiles in tiles_per_image):
            return [single] * len(tiles_per_image)
        sizes = host.image_sizes
        if sizes is None:
            raise ValueError(
                "Images of several tiles need `image_sizes`: pass everything that the processor returned."
            )
        refuse_no_pixels(sizes)
        grids = best_canvases(sizes, config.image_grid_pinpoints) // config.vision_config.image_size
        kept = unpadded_grids(sizes, grids, (side, side), config.unpad_rule)
        refuse_wrong_tiles(sizes, grids, kept, tiles_per_image)
        return [
            single if tiles == 1 else joined_order(tuple(grid), (side, side), tuple(content))
            for tiles, grid, content in zip(tiles_per_image, grids.tolist(), kept.tolist(), strict=True)
        ]


class LlavoltaForConditionalGeneration(LlavoltaInit, VtcForConditionalGeneration):
    """A LLaVA-type model whose images get shorter before a decoder layer, with a language modelling head."""

    config_class = LlavoltaConfig
    _no_split_modules = LlavoltaModel._no_split_modules
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LlavoltaConfig):
        super().__init__(config, LlavoltaModel(config))
        self.post_init()
