"""The skeleton of every compressing model: one way from images and text to states and logits.

    layout (host) -> encode -> score -> choose (host) -> connect -> pack -> decode (shorten) -> expand

`VtcModel` is abstract. With `vision_vtc.py`, and `head_vtc.py` for loss and `generate`, it owns the layout of a call,
transfers, checks, budgets, packing and expansion. A method is a few final classes that share pure
steps: those above that it does not leave as they are.

Outside, everything has the length of `input_ids`: reserved placeholders in, full-length states and logits out. Inside,
only kept tokens run through the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_vtc import VtcConfig
from .grids_vtc import black_image
from .head_vtc import VtcModelOutputWithPast
from .host_decoder_vtc import (
    continued_positions,
    forget_emptied,
    may_be_shortened,
    note_next_position,
    past_length,
    run_segments,
)
from .host_vtc import FORWARD_ARGUMENTS, cache_of, engine_of, given_cache, is_recurrent, named_cache
from .layout_vtc import Layout, layout_of_images, layout_of_prompt
from .packing_vtc import (
    DecodePlan,
    PackedPrompt,
    filled,
    kept_positions,
    pack_visual_tokens,
    shifted_positions,
    to_device,
)
from .placeholders_vtc import PromptPlaceholders
from .prompt_vtc import Budget, VisionInputs, leaves_a_choice, refuse_bounds, refuse_unknown
from .vision_vtc import Choice, Features, VtcVision, touch


@dataclass
class Compressed:
    """A batch of prompts before the language model: packed, and what was found on the way.

    `visual`: visual tokens that were packed; `num_kept` `(num_images,)` on the CPU; `plan`: what the language model,
    and every step of `generate`, must know besides, None for nothing.
    """

    packed: PackedPrompt
    visual: torch.Tensor
    num_kept: torch.LongTensor
    plan: DecodePlan | None
    router_logits: torch.Tensor | None
    router_decisions: torch.Tensor | None


class VtcModel(PromptPlaceholders, VtcVision):
    """Tower, connector and language model, without a head. Abstract."""

    # whether `decode` makes attention masks itself and therefore wants the padding mask at every step
    reads_padding_mask = False

    def make_decoder(self, config: VtcConfig) -> None:
        _refuse_engines(config)
        self.language_model = AutoModel.from_config(config.text_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model = decoder

    def shorten(
        self, states: torch.Tensor, position_ids: torch.LongTensor, plan: DecodePlan, scores: torch.Tensor | None
    ) -> tuple[PackedPrompt, torch.Tensor]:
        """Step: shorten the images of a sequence `(B, L, D)` before a decoder layer, through the packer.

        Args:
            position_ids (`torch.LongTensor` of shape `(..., B or 1, L)`): of these states.
            plan ([`DecodePlan`]): where the images are, and what layers behind add to them.
            scores (`torch.Tensor` of shape `(B, L)`, *optional*): attention that the last token pays to each, if the
                plan asks for it.

        Returns:
            The shorter sequence, and its visual tokens `(num_visual_tokens, D)`.
        """
        raise NotImplementedError

    def layout_of(
        self,
        placeholder_mask: torch.Tensor,
        attention_mask: torch.Tensor | None,
        vision: VisionInputs,
        position_ids: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
    ) -> Layout:
        """The layout of a call, from its one transfer before the tower."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` must be (batch, length) when images are given, got {attention_mask.ndim} "
                "dimensions: dropping tokens would need another mask. Pass the 2-D padding mask."
            )
        return layout_of_prompt(self.config, placeholder_mask, attention_mask, vision, position_ids, video_mask)

    def compress_prompt(
        self,
        input_ids: torch.LongTensor | None,
        vision: VisionInputs,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        align_left: bool = False,
        expands: bool = True,
    ) -> Compressed:
        """Route, compress and pack one batch of prompts: everything before the language model."""
        video_mask = self.find_videos(input_ids, inputs_embeds) if vision.has_videos else None
        inputs_embeds, placeholder_mask = self.find_placeholders(input_ids, inputs_embeds)
        layout = self.layout_of(placeholder_mask, attention_mask, vision, position_ids, video_mask)
        choice, visual = self.compress(vision, layout, inputs_embeds)

        slots = layout.positions_of(None if layout.is_exact else visual.slots)
        keep = kept_positions(layout.placeholder_mask, slots)
        on_device, axes, behind = to_device(inputs_embeds.device, slots, layout.positions, layout.next_positions)
        position_ids = position_ids if axes is None else axes
        if visual.position_shifts is not None:
            entered = kept_positions(layout.placeholder_mask, layout.positions_of(visual.entered_slots))
            position_ids = shifted_positions(
                layout.attention_mask, entered, position_ids, slots, visual.position_shifts
            )
        # positions of several axes are places in an image, which stay where others are dropped
        renumber = visual.position_shifts is None and axes is None
        rows = visual.layer_rows
        if rows is not None:
            rows = filled(inputs_embeds.new_zeros(len(rows), *inputs_embeds.shape), on_device, rows)
        embeds = filled(inputs_embeds, on_device, visual.embeds)
        packed = pack_visual_tokens(
            embeds, keep, layout.attention_mask, position_ids, align_left, renumber, expands, rows
        )
        return Compressed(
            packed=packed,
            visual=visual.embeds,
            num_kept=layout.of_items(choice.num_kept),
            plan=self._plan_of(layout, choice, packed, keep, slots, behind),
            router_logits=visual.router_logits,
            router_decisions=visual.router_decisions,
        )

    def _plan_of(
        self,
        layout: Layout,
        choice: Choice,
        packed: PackedPrompt,
        keep: torch.Tensor,
        slots: torch.LongTensor,
        behind: torch.LongTensor | None,
    ) -> DecodePlan | None:
        """What is still to be done to a packed prompt, or to be known of it, None for nothing.

        Args:
            keep (`torch.BoolTensor` of shape `(B, L)`): what was packed, on the CPU.
            slots (`torch.LongTensor` of shape `(V,)`): of the visual tokens in the flattened prompt.
            behind (`torch.LongTensor` of shape `(B, 1)`, *optional*): positions behind the rows, on the device.
        """
        layer_idx = self.config.compress_layer_idx if choice.shortens else -1
        positions = None
        if behind is not None or layer_idx == 0:
            positions = packed.position_ids
            behind = positions[..., -1:] + 1 if behind is None else behind.expand(*positions.shape[:-1], 1)
            positions = torch.cat([positions, behind], dim=-1)
        if layer_idx <= 0:
            if positions is None and packed.layer_rows is None:
                return None
            return DecodePlan(
                0, [], torch.ones(packed.inputs_embeds.shape[:2]), positions, layer_rows=packed.layer_rows
            )
        real = layout.attention_mask.bool()
        places = torch.arange(real.shape[1]).expand(real.shape)
        if packed.source_index is not None:
            # every row has moved to the right edge
            kept, num_columns = real & keep, packed.source_index.shape[1]
            counts = kept.sum(1, keepdim=True)
            places = kept.cumsum(1) - 1 + num_columns - counts
            real = torch.arange(num_columns) >= num_columns - counts
        entering = choice.num_entering
        starts = places.flatten()[slots[entering.cumsum(0) - entering]]
        spans = choice.spans(layout.rows, starts, entering, layout.token_columns)
        by_attention = self.config.compressor == "attention"
        return DecodePlan(
            layer_idx,
            spans,
            real,
            positions,
            reads_attention=by_attention,
            is_padded=not bool(real.all()),
            layer_rows=packed.layer_rows,
        )

    def decode(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        plan: DecodePlan | None = None,
        past: int | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPast, PackedPrompt | None, torch.Tensor | None]:
        """Run the language model on a packed prompt, on text, or on a step of `generate`.

        Args:
            plan ([`DecodePlan`], *optional*): of these tokens, where images get shorter or positions have gaps.
            past (`int`, *optional*): tokens in the cache, if the mask does not tell.

        Returns:
            Outputs; and where images were shortened, the layout of `last_hidden_state` and the visual tokens.
        """
        if past is None and (plan is not None or may_be_shortened(cache)):
            given = input_ids if inputs_embeds is None else inputs_embeds
            past = past_length(cache, attention_mask, given.shape[1])
        if past is not None:
            forget_emptied(cache, past)
        if plan is not None and is_recurrent(self.config.text_config):
            # its own forward knows the masks of such layers; of the plan there are positions alone, which are given
            plan = None
        if plan is None and not (may_be_shortened(cache) and past > 0):
            outputs = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **named_cache(cache),
                **kwargs,
            )
            return outputs, None, None
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` must be (batch, length) where layers have caches of two lengths, got "
                f"{attention_mask.ndim} dimensions. Pass the 2-D padding mask."
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        # positions of the caller count another prompt
        kwargs.pop("cache_position", None)
        return run_segments(
            self.language_model,
            self.shorten,
            self.training,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            plan,
            past,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        vtc_budget: Budget | Sequence[Budget] = None,
        router_decisions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        supervised: torch.BoolTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> VtcModelOutputWithPast:
        """Full-length prompts in, full-length states out.

        Args:
            input_ids (`(B, L)`): with the placeholders that the processor reserved.
            pixel_values (`(total_tiles, 3, S, S)`): tiles of all images in prompt order; or a block for each image,
                `(num_images, most, 3, S, S)`, with anything behind its own tiles.
            attention_mask (`(B, L)`): 0 = padding, on either side.
            num_tiles (`(num_images,)`): tiles per image; without it a run of placeholders is one image.
            image_sizes (`(num_images, 2)`): (height, width) in pixels, for methods that need them.
            vtc_budget: see `prompt_vtc.budgets_per_image`.
            router_decisions: overrides the router; not together with `vtc_budget`.
            image_features: output of `encode` for these tiles, in place of `pixel_values`.
            image_grid_thw (`(num_images, 3)`): patches in time, height and width, for towers that see grids; then
                `pixel_values` are their patches, as the processor of such a model returns both.
            pixel_values_videos (`(patches, C)`), video_grid_thw (`(num_videos, 3)`): the same of videos; of
                LLaVA-OneVision frames `(total_frames, 3, S, S)`, each a patch, or without grids those of each video,
                `(num_videos, frames, 3, S, S)`. Budgets and `num_visual_tokens` are those of images first, then of
                videos; a router decides for each frame, and `router_decisions` are those of images and frames in
                prompt order.
            second_per_grid_ts (`(num_videos,)`): seconds between frames of each video, where positions tell them.
            supervised (`(B, L)`): True at answers, of which a method that chooses by the text reads nothing, nor of
                what stands behind the last of them; see `prompt_vtc.asked_tokens`.
            past_key_values, cache: two names of one argument, on every version of transformers.

        Raises:
            ValueError: placeholders and images do not match, or a budget cannot be met.
            TypeError: an argument is none that this or a stock model takes.
        """
        refuse_unknown(kwargs, {*FORWARD_ARGUMENTS, "decode_plan"})
        cache = given_cache(past_key_values, cache)
        vision = VisionInputs(
            pixel_values,
            image_features,
            num_tiles,
            image_sizes,
            vtc_budget,
            router_decisions,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            second_per_grid_ts,
            supervised if self.routes_by_text else None,
        )
        if not vision.given:
            return self._forward_text(input_ids, attention_mask, position_ids, cache, inputs_embeds, vision, **kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "`forward` cannot take images together with a filled cache, since the cache is shorter than the "
                "prompt. Use `generate`, or run the whole conversation without a cache."
            )
        compressed = self.compress_prompt(input_ids, vision, attention_mask, position_ids, inputs_embeds)
        packed = compressed.packed
        if packed.expand_index is not None or compressed.plan is not None:
            refuse_bounds(kwargs)
        if packed.expand_index is not None:
            # positions of the full-length prompt, which the packed one does not have
            kwargs.pop("cache_position", None)
        outputs, shortened, visual = self.decode(
            inputs_embeds=packed.inputs_embeds,
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            cache=cache,
            plan=compressed.plan,
            **kwargs,
        )
        note_next_position(cache_of(outputs), compressed.plan)
        packed = packed if shortened is None else shortened.of_longer(packed)
        return VtcModelOutputWithPast(
            last_hidden_state=packed.expand(outputs.last_hidden_state),
            **named_cache(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=compressed.visual if visual is None else visual,
            router_logits=compressed.router_logits,
            router_decisions=compressed.router_decisions,
            kept_mask=packed.kept_mask,
            kept_index=packed.kept_index,
            num_visual_tokens=compressed.num_kept,
        )

    def _forward_text(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor | None,
        vision: VisionInputs,
        decode_plan: DecodePlan | None = None,
        **kwargs: Any,
    ) -> VtcModelOutputWithPast:
        """A plain language model step: text only, or a step of `generate`, which hands on its `decode_plan`."""
        # with a cache it is a step of `generate`, which has looked at its prompt
        if cache is None and input_ids is not None:
            self.require_no_placeholders(input_ids)
        if self.training and torch.is_grad_enabled():
            embeds, _ = self.find_placeholders(input_ids, inputs_embeds)
            # every process must run the same modules, or sharded training hangs on batches without an image
            input_ids, inputs_embeds = None, touch(embeds, *self._vision_of_nothing(vision))
        past, given, plan = None, input_ids if inputs_embeds is None else inputs_embeds, decode_plan
        if plan is None and position_ids is None:
            position_ids = continued_positions(cache, attention_mask, *given.shape[:2])
        if decode_plan is not None:
            past = past_length(cache, attention_mask, given.shape[1])
            columns = (past, past + given.shape[1])
            decode_plan = decode_plan.for_rows(given.shape[0])
            if decode_plan.positions is not None:
                position_ids = decode_plan.positions_of(*columns)
            if not decode_plan.is_padded:
                # layers of two lengths would need two masks of ones
                attention_mask = None
            decode_plan = decode_plan.of_columns(*columns)
        outputs, _, _ = self.decode(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, decode_plan, past, **kwargs
        )
        note_next_position(cache_of(outputs), plan)
        return VtcModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **named_cache(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _vision_of_nothing(self, asked: VisionInputs) -> list[torch.Tensor]:
        """Visual tokens of one black tile, and rows beside them, through every module that the other processes run."""
        # a router runs on a batch of text if it does where there are images
        undecided = asked.router_decisions is None and leaves_a_choice(asked.vtc_budget)
        black = black_image(self.config)
        black["pixel_values"] = black["pixel_values"].to(self.device, self.dtype)
        vision = VisionInputs(**black, vtc_budget=None if undecided else "full")
        layout = layout_of_images(self.config, vision)
        # nobody reads them, and a look-up would be one more call of a module that other ranks do not make
        shape = (*layout.placeholder_mask.shape, self.config.text_config.hidden_size)
        nothing = torch.zeros(shape, device=self.device, dtype=self.dtype)
        visual = self.compress(vision, layout, nothing)[1]
        return [each for each in (visual.embeds, visual.layer_rows) if each is not None]

    @torch.no_grad()
    def count_visual_tokens(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        vtc_budget: Budget | Sequence[Budget] = None,
        router_decisions: torch.Tensor | None = None,
        image_features: Features | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor:
        """Visual tokens that the language model would see, per image `(num_images,)`, without running it.

        Takes what the processor gives; the arguments are those of `forward`. Tower and router run only where only they
        can tell.
        """
        refuse_unknown(kwargs, FORWARD_ARGUMENTS)
        vision = VisionInputs(
            pixel_values,
            image_features,
            num_tiles,
            image_sizes,
            vtc_budget,
            router_decisions,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            second_per_grid_ts,
        )
        if not vision.given:
            return torch.zeros(0, dtype=torch.long)
        video_mask = self.find_videos(input_ids, inputs_embeds) if vision.has_videos else None
        embeds, placeholder_mask = self.find_placeholders(input_ids, inputs_embeds)
        layout = self.layout_of(placeholder_mask, attention_mask, vision, None, video_mask)
        if router_decisions is None and not layout.asks_scores:
            return layout.of_items(layout.num_leaving)
        choice, _ = self.compress(vision, layout, embeds)
        return layout.of_items(choice.num_kept)


def _refuse_engines(config: VtcConfig) -> None:
    """Raise where an engine builds the model that asks for all visual tokens, and the model could do with fewer."""
    engine = engine_of(config.text_config)
    if engine is None:
        return
    # an engine builds on the meta device
    one, size = torch.ones(1, dtype=torch.long, device="cpu"), torch.tensor([config.smallest_image], device="cpu")
    (counts,) = config.levels(config.sizes_of(one, size))
    if min(counts) < counts[0]:
        raise ValueError(
            f"{engine} would serve this {config.model_type} model uncompressed without saying so: its backend for "
            "models of transformers fixes the placeholders of an image, and asks for all of its visual tokens. "
            "With hf_vtc beside it vLLM serves the methods and bases of docs/serve.md with their tokens saved; for "
            "others use `generate` or `hf-vtc serve`."
        )
