"""The skeleton of every compressing model: encode, compress, pack, decode, expand.

`VtcModel` and `VtcForConditionalGeneration` are abstract. They own merging, packing, expansion, loss and `generate`; a
method is a pair of final classes that implements one of the hooks `encode`, `compress`, `decode` of `VtcModel`.

Outside, everything has the length of `input_ids`: reserved placeholders in, full-length states and logits out. Inside,
only kept tokens run through the language model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .budget_vtc import Budget, budgets_per_image, largest_admissible
from .compat_vtc import build_tower, cache_of, given_cache, named_cache
from .configuration_vtc import VtcConfig
from .generation_vtc import VtcGenerationMixin
from .head_vtc import full_length_logits, predicting_states
from .outputs_vtc import VtcCausalLMOutputWithPast, VtcModelOutputWithPast
from .packing_vtc import PackedPrompt, keep_slots, pack_visual_tokens, rows_of_images, shifted_positions
from .pretrained_vtc import VtcPreTrainedModel
from .prompt_vtc import HostPrompt, Prompt, VisionInputs, VisualTokens, tiles_of_images
from .tower_vtc import run_tower_to, unused_modules


class VtcModel(VtcPreTrainedModel):
    """Tower, connector and language model, without a head. Abstract."""

    # whether text that comes later can change what a router decided for an image
    routes_by_text = False
    # whether `continue_decoding` makes attention masks itself and therefore wants the padding mask at every step
    reads_padding_mask = False

    def __init__(self, config: VtcConfig, vision_tower: nn.Module | None = None):
        super().__init__(config)
        # an encoder of a method's own is built by the method: remote code cannot find it by its config
        self.vision_tower = build_tower(config.vision_config) if vision_tower is None else vision_tower
        if vision_tower is None:
            # no feature depends on them: without this, distributed training waits for their gradients
            for unused in unused_modules(self.vision_tower, config.vision_feature_layer):
                unused.requires_grad_(False)
        self.language_model = AutoModel.from_config(config.text_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model = decoder

    def encode(self, pixel_values: torch.Tensor, prompt: Prompt | None = None) -> torch.Tensor:
        """Hook: features of each tile, `(total_tiles, 3, S, S)` to `(total_tiles, N, C)`, row-major.

        `prompt` is there for towers that need the sizes of the images; it is None where all are of one size.
        """
        features = run_tower_to(self.vision_tower, pixel_values.to(self.dtype), self.config.vision_feature_layer)
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def reserved_blocks(self, host: HostPrompt, num_tiles: int) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Reserved placeholders of each block `(num_blocks,)`, and blocks of each image `(num_images,)`.

        Here a block is a tile and all have one count; a method whose images differ in more than tiles overrides it.

        Args:
            host (`HostPrompt`): the layout of this call.
            num_tiles (`int`): tiles, or rows of features, that were given.
        """
        per_tile = self.config.image_seq_length
        tiles_per_image = tiles_of_images(host, num_tiles, per_tile)
        return torch.full((num_tiles,), per_tile), torch.tensor(tiles_per_image)

    def compress(self, features: torch.Tensor, prompt: Prompt) -> VisualTokens:
        """Hook: from features to the visual tokens that stay. Here: all of them, through `multi_modal_projector`."""
        if prompt.host is None:
            # a tower that goes by sizes has fetched them already
            prompt.to_host()
        num_reserved, blocks_per_image = self.reserved_blocks(prompt.host, features.shape[0])
        reserved = [int(blocks.sum()) for blocks in num_reserved.split(blocks_per_image.tolist())]
        rows_of_images(prompt.host.placeholder_mask, reserved)
        for image_idx, budget in enumerate(budgets_per_image(prompt.vision.vtc_budget, len(reserved))):
            if budget != "auto":
                largest_admissible(budget, [reserved[image_idx]], image_idx)
        embeds = self.multi_modal_projector(features).flatten(0, 1)
        if embeds.shape[0] != sum(reserved):
            raise ValueError(
                f"Image features and image tokens do not match: {embeds.shape[0]} visual tokens for {sum(reserved)} "
                "placeholders. Pass `image_features` that `encode` gave for these images."
            )
        return VisualTokens(
            embeds=embeds,
            num_reserved=num_reserved,
            num_kept=num_reserved,
            blocks_per_image=blocks_per_image,
        )

    def decode(
        self, packed: PackedPrompt, visual: VisualTokens, cache: Cache | None = None, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPast, PackedPrompt, VisualTokens]:
        """Hook: run the language model on a packed prompt.

        Returns the outputs, and layout and visual tokens as `last_hidden_state` has them. A method that shortens
        images in the decoder overrides `decode_plan` and `continue_decoding` as well, for `generate`.
        """
        outputs = self.language_model(
            inputs_embeds=packed.inputs_embeds,
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            **named_cache(cache),
            **kwargs,
        )
        return outputs, packed, visual

    def decode_plan(self, packed: PackedPrompt, visual: VisualTokens) -> Any:
        """What every step of `generate` must know of its packed prompt, None for nothing."""
        return None

    def continue_decoding(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the language model on what `forward` does not pack: text, or a step of `generate`.

        `decode_plan` is among `kwargs` where that method gave one.
        """
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **named_cache(cache),
            **kwargs,
        )

    def find_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """Embeddings `(B, L, D)` of a prompt and where its placeholders are, `(B, L)`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            embeds = self.get_input_embeddings()(self.ids_with_embeddings(input_ids))
            return embeds, input_ids == self.config.image_token_id
        if self.placeholder_is_beyond_vocabulary:
            raise ValueError(
                f"`inputs_embeds` cannot say where images belong: the placeholder (id {self.config.image_token_id}) "
                "lies beyond the vocabulary and has no embedding. Pass `input_ids`."
            )
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return inputs_embeds, (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @property
    def placeholder_is_beyond_vocabulary(self) -> bool:
        """Whether the placeholder is no token of the language model, as in official LLaVA checkpoints."""
        return self.config.image_token_id >= self.config.text_config.vocab_size

    def ids_with_embeddings(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """`input_ids`, with token 0 for placeholders that have no row in the embeddings; images replace it anyway."""
        if not self.placeholder_is_beyond_vocabulary:
            return input_ids
        return input_ids.masked_fill(input_ids == self.config.image_token_id, 0)

    def require_no_placeholders(self, input_ids: torch.LongTensor) -> None:
        """Raise a ValueError for a prompt that expects images."""
        if bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                f"The prompt holds image placeholders (id {self.config.image_token_id}), but no `pixel_values` were "
                "given. Pass everything that the processor returned, or leave images out of the text."
            )

    def compact(
        self,
        input_ids: torch.LongTensor | None,
        vision: VisionInputs,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        align_left: bool = False,
    ) -> tuple[PackedPrompt, VisualTokens]:
        """Route, compress and pack one batch of prompts: everything before the language model."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` must be (batch, length) when images are given, got {attention_mask.ndim} "
                "dimensions: dropping tokens would need another mask. Pass the 2-D padding mask."
            )
        inputs_embeds, placeholder_mask = self.find_placeholders(input_ids, inputs_embeds)
        prompt = Prompt(inputs_embeds, placeholder_mask, attention_mask, vision)
        features = self.encode(vision.pixel_values, prompt) if vision.image_features is None else vision.image_features
        visual = self.compress(features, prompt)
        num_kept = visual.num_reserved if visual.shortened_in_decoder else visual.num_kept
        keep = keep_slots(prompt.host.placeholder_mask, visual.num_reserved, num_kept, visual.slots)

        positions = (prompt.host.placeholder_mask & keep).flatten().nonzero().flatten()
        if visual.position_shifts is not None:
            position_ids = shifted_positions(
                prompt.host.attention_mask, position_ids, positions, visual.position_shifts
            )
        embeds = visual.embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        on_device = positions.to(inputs_embeds.device, non_blocking=True)
        filled = inputs_embeds.flatten(0, 1).index_copy(0, on_device, embeds)
        filled = filled.unflatten(0, inputs_embeds.shape[:2])
        renumber = visual.position_shifts is None
        packed = pack_visual_tokens(filled, keep, prompt.host.attention_mask, position_ids, align_left, renumber)
        return packed, visual

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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> VtcModelOutputWithPast:
        """Full-length prompts in, full-length states out.

        Args:
            input_ids (`(B, L)`): with the placeholders that the processor reserved.
            pixel_values (`(total_tiles, 3, S, S)`): tiles of all images in prompt order.
            attention_mask (`(B, L)`): 0 = padding, on either side.
            num_tiles (`(num_images,)`): tiles per image; without it a run of placeholders is one image.
            image_sizes (`(num_images, 2)`): (height, width) in pixels, for methods that need them.
            vtc_budget: see `budget_vtc.budgets_per_image`.
            router_decisions: overrides the router; not together with `vtc_budget`.
            image_features: output of `encode` for these tiles, in place of `pixel_values`.
            past_key_values, cache: two names of one argument, on every version of transformers.

        Raises:
            ValueError: placeholders and images do not match, or a budget cannot be met.
        """
        cache = given_cache(past_key_values, cache)
        vision = VisionInputs(pixel_values, image_features, num_tiles, image_sizes, vtc_budget, router_decisions)
        if not vision.given:
            return self._forward_text(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "`forward` cannot take images together with a filled cache, since the cache is shorter than the "
                "prompt. Use `generate`, or run the whole conversation without a cache."
            )
        packed, visual = self.compact(input_ids, vision, attention_mask, position_ids, inputs_embeds)
        if packed.expand_index is not None:
            # positions of the full-length prompt, which the packed one does not have
            kwargs.pop("cache_position", None)
        outputs, packed, visual = self.decode(packed, visual, cache, **kwargs)
        return VtcModelOutputWithPast(
            last_hidden_state=packed.expand(outputs.last_hidden_state),
            **named_cache(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual.embeds,
            router_logits=visual.router_logits,
            router_decisions=visual.router_decisions,
            kept_mask=packed.kept_mask,
            kept_index=packed.kept_index,
            num_visual_tokens=visual.per_image,
        )

    def _forward_text(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor | None,
        **kwargs: Any,
    ) -> VtcModelOutputWithPast:
        """A plain language model step: text only, or decoding after a packed prompt."""
        # with a cache it is a step of `generate`, which has looked at its prompt
        if cache is None and input_ids is not None:
            self.require_no_placeholders(input_ids)
        if self.training:
            embeds, _ = self.find_placeholders(input_ids, inputs_embeds)
            # every rank must run the same modules, or sharded training hangs on batches without an image
            input_ids, inputs_embeds = None, embeds + self._vision_of_nothing().to(embeds.dtype)
        outputs = self.continue_decoding(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return VtcModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **named_cache(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def smallest_image(self) -> tuple[int, int]:
        """(height, width) in pixels of the smallest tile that the tower takes: here they are all of one size."""
        size = self.config.vision_config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def _vision_of_nothing(self) -> torch.Tensor:
        """Zero, computed through every vision parameter by way of one black tile."""
        (height, width), num_channels = self.smallest_image, self.config.vision_config.num_channels
        tile = torch.zeros(1, num_channels, height, width, device=self.device, dtype=self.dtype)
        one, sizes = torch.ones(1, dtype=torch.long), torch.tensor([[height, width]])
        prompt = self._blank_prompt(VisionInputs(tile, num_tiles=one, image_sizes=sizes))
        return 0 * self.compress(self.encode(tile, prompt), prompt).embeds.sum()

    def _blank_prompt(self, vision: VisionInputs) -> Prompt:
        """A prompt of placeholders alone, as many as the images of `vision` reserve."""
        pixel_values = vision.pixel_values
        no_text = Prompt(pixel_values.new_zeros(1, 0, 1), torch.zeros(1, 0, dtype=torch.bool), None, vision)
        no_text.to_host()
        num_reserved, _ = self.reserved_blocks(no_text.host, pixel_values.shape[0])
        # nobody reads them, and a look-up would be one more call of a module that other ranks do not make
        shape = (1, int(num_reserved.sum()), self.config.text_config.hidden_size)
        embeds = torch.zeros(shape, device=self.device, dtype=self.dtype)
        return Prompt(embeds, torch.ones(shape[:2], dtype=torch.bool, device=self.device), None, vision)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_tiles: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Uncompressed visual tokens of some images, as many as the processor reserves.

        Returns:
            `last_hidden_state` `(total_tiles, N, C)`: features; `pooler_output`: one `(reserved, D)` tensor per image.
        """
        num_tiles = torch.tensor([pixel_values.shape[0]]) if num_tiles is None else num_tiles
        prompt = self._blank_prompt(VisionInputs(pixel_values, None, num_tiles, image_sizes, vtc_budget="full"))
        features = self.encode(pixel_values, prompt)
        visual = self.compress(features, prompt)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=list(visual.embeds.split(visual.per_image.tolist()))
        )

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
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor:
        """Visual tokens that the language model would see, per image `(num_images,)`, without running it.

        Takes what the processor gives; the arguments are those of `forward`.
        """
        vision = VisionInputs(pixel_values, image_features, num_tiles, image_sizes, vtc_budget, router_decisions)
        if not vision.given:
            return torch.zeros(0, dtype=torch.long)
        _, visual = self.compact(input_ids, vision, attention_mask, None, inputs_embeds)
        return visual.per_image


class VtcForConditionalGeneration(VtcGenerationMixin, VtcPreTrainedModel):
    """A `VtcModel` with a language modelling head. Abstract."""

    # the head as in every stock decoder, in the words of the installed version
    _tp_plan = dict(LlamaForCausalLM._tp_plan)

    def __init__(self, config: VtcConfig, model: VtcModel):
        super().__init__(config)
        self.model = model
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.model.set_decoder(decoder)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `VtcModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def count_visual_tokens(self, *args: Any, **kwargs: Any) -> torch.LongTensor:
        """See `VtcModel.count_visual_tokens`."""
        return self.model.count_visual_tokens(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_tiles: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        vtc_budget: Budget | Sequence[Budget] = None,
        router_decisions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        decode_plan: Any = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> VtcCausalLMOutputWithPast:
        """Full-length prompts in, full-length logits or a loss out; see `VtcModel.forward` for the arguments.

        Args:
            labels (`(B, L)`): ids to predict, -100 = none; placeholders never count. In training mode only the loss is
                computed, on kept rows; in eval mode the logits as well.
            logits_to_keep (`int` or index tensor): logits of the last positions only, 0 = all.
            decode_plan: what `generate` knows of its packed prompt; not for callers.
        """
        if decode_plan is not None:
            kwargs["decode_plan"] = decode_plan
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            num_tiles=num_tiles,
            image_sizes=image_sizes,
            vtc_budget=vtc_budget,
            router_decisions=router_decisions,
            image_features=image_features,
            **kwargs,
        )
        loss = logits = None
        if labels is not None:
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == self.config.image_token_id, -100)
            loss = self._next_token_loss(outputs, labels, **kwargs)
        if labels is None or not self.training:
            logits = full_length_logits(self.lm_head, outputs, logits_to_keep)
        return VtcCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **named_cache(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            router_logits=outputs.router_logits,
            router_decisions=outputs.router_decisions,
            kept_mask=outputs.kept_mask,
            kept_index=outputs.kept_index,
            num_visual_tokens=outputs.num_visual_tokens,
        )

    def _next_token_loss(self, outputs: VtcModelOutputWithPast, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Equal to the full-length loss, from compact rows; `shift_labels` among `kwargs` replaces the targets."""
        shift_labels = kwargs.pop("shift_labels", None)
        if shift_labels is not None:
            shift_labels = shift_labels.masked_fill(shift_labels == self.config.image_token_id, -100)
        states, targets = predicting_states(outputs, labels, shift_labels)
        vocab_size = self.config.text_config.vocab_size
        return self.loss_function(
            logits=self.lm_head(states), labels=None, vocab_size=vocab_size, shift_labels=targets, **kwargs
        )
