"""What our models give back, and what a head computes of it: the rows that count, and no others (contract C2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple

from .configuration_vtc import VtcConfig
from .generation_vtc import VtcGenerationMixin
from .host_vtc import HEAD_TP_PLAN, cache_of, named_cache
from .prompt_vtc import Budget, supervised_tokens
from .vision_vtc import Features, VtcPreTrainedModel, VtcVision


@dataclass
class VtcModelOutputWithPast(BaseModelOutputWithPast):
    """Output of a base model; `last_hidden_state` is full-length, `hidden_states` and `attentions` are compact.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_visual_tokens.sum(), D)`): kept visual tokens, prompt order.
        router_logits (`torch.Tensor`): what the method's router said; its page gives the shape.
        router_decisions (`torch.Tensor`): what was done, in the form that `forward(router_decisions=...)` takes.
        kept_mask (`torch.BoolTensor` of shape `(B, L)`): positions that the language model really computed.
        kept_index (`torch.LongTensor` of shape `(num_kept,)`): True positions of the flattened `kept_mask`.
        num_visual_tokens (`torch.LongTensor` of shape `(num_images,)`): kept per image, on the CPU; with videos of all
            images first, then of all videos.
    """

    image_hidden_states: torch.FloatTensor | None = None
    router_logits: torch.FloatTensor | None = None
    router_decisions: torch.Tensor | None = None
    kept_mask: torch.BoolTensor | None = None
    kept_index: torch.LongTensor | None = None
    num_visual_tokens: torch.LongTensor | None = None


@dataclass
class VtcCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of a model with a language modelling head; the fields of `VtcModelOutputWithPast`, and:

    Args:
        loss (`torch.Tensor` of shape `()`): next-token loss, if `labels` were given.
        logits (`torch.Tensor` of shape `(B, L, vocab_size)`): full-length; None in training mode with `labels`.
    """

    image_hidden_states: torch.FloatTensor | None = None
    router_logits: torch.FloatTensor | None = None
    router_decisions: torch.Tensor | None = None
    kept_mask: torch.BoolTensor | None = None
    kept_index: torch.LongTensor | None = None
    num_visual_tokens: torch.LongTensor | None = None


def predicting_rows(
    outputs: VtcModelOutputWithPast, labels: torch.Tensor, shift_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the flattened states that predict something, and what; a loss over these is the full-length loss.

    A kept token predicts the next kept token of its row.

    Args:
        outputs ([`VtcModelOutputWithPast`]): `kept_index` where tokens were dropped.
        labels (`torch.Tensor` of shape `(B, L)`): ids, -100 = none.
        shift_labels (`torch.Tensor` of shape `(B, L)`, *optional*): what each position of the full-length prompt
            predicts, as trainers give it that split sequences; replaces `labels`.

    Returns:
        Rows `(N,)` of `B * L`, rising, and targets `(N,)`.
    """
    kept_index, device = outputs.kept_index, outputs.last_hidden_state.device
    labels, shift_labels = (None if each is None else each.to(device) for each in (labels, shift_labels))
    if shift_labels is not None or kept_index is None:
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
        targets = targets.flatten()
        rows = (targets != -100).nonzero().flatten()
        return rows, targets[rows]
    kept_labels, of_row = labels.flatten()[kept_index], kept_index // labels.shape[1]
    predicts = ((kept_labels[1:] != -100) & (of_row[1:] == of_row[:-1])).nonzero().flatten()
    return kept_index[predicts], kept_labels[predicts + 1]


def full_length_logits(
    head: nn.Module, outputs: VtcModelOutputWithPast, logits_to_keep: int | torch.Tensor = 0
) -> torch.Tensor:
    """Logits `(B, L, V)` of every position; the head runs on kept rows only.

    Args:
        head (`nn.Module`): `(..., D)` to `(..., V)`.
        outputs ([`VtcModelOutputWithPast`]): of the base model.
        logits_to_keep (`int` or index tensor): the last positions only, 0 = all, or these positions.
    """
    states, kept_index = outputs.last_hidden_state, outputs.kept_index
    if kept_index is None or not isinstance(logits_to_keep, int) or logits_to_keep > 0:
        return head(_asked_states(states, logits_to_keep))
    # dropped positions repeat the kept ones before them
    repeats = (outputs.kept_mask.flatten().cumsum(0) - 1).clamp(min=0)
    return head(states.flatten(0, 1)[kept_index])[repeats].unflatten(0, outputs.kept_mask.shape)


def _asked_states(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    return states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


class VtcForConditionalGeneration(VtcGenerationMixin, VtcPreTrainedModel):
    """A `VtcModel` of `modeling_vtc.py`, `model_class`, with a language modelling head. Abstract."""

    model_class: type[VtcVision]
    _tp_plan = HEAD_TP_PLAN
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VtcConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # which knows the parameters of its method
        self.model._init_weights(module)

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
        image_features: Features | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        supervised: torch.BoolTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> VtcCausalLMOutputWithPast:
        """Full-length prompts in, full-length logits or a loss out; see `VtcModel.forward` for the arguments.

        Args:
            labels (`(B, L)`): ids to predict, -100 = none; placeholders never count. In training mode the head runs on
                the rows that predict one, and `logits` is None; in eval mode it makes the logits as well. In training
                mode they also say which tokens are `supervised`, so that a method that chooses by the text chooses as
                `generate` will; in eval mode labels change no logits, as in the released code of AVG-LLaVA.
            logits_to_keep (`int` or index tensor): logits of the last positions only, 0 = all.
        """
        if supervised is None and self.training:
            supervised = supervised_tokens(labels, kwargs.get("shift_labels"))
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
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            supervised=supervised,
            **kwargs,
        )
        loss = logits = None
        if labels is not None:
            _, placeholder_mask = self.model.find_placeholders(input_ids, inputs_embeds)
            labels = labels.masked_fill(placeholder_mask.to(labels.device), -100)
            if attention_mask is not None and attention_mask.ndim == 2:
                # nothing stands before the first token of a row, on whichever side the row is padded
                unread = nn.functional.pad(attention_mask[:, :-1] == 0, (1, 0), value=True)
                labels = labels.masked_fill(unread.to(labels.device), -100)
            loss, logits = self._loss_and_logits(outputs, labels, logits_to_keep, **kwargs)
        else:
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

    def _loss_and_logits(
        self,
        outputs: VtcModelOutputWithPast,
        labels: torch.Tensor,
        logits_to_keep: int | torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The full-length loss, and in eval mode logits, by one call of the head; `shift_labels` replaces targets."""
        if shift_labels is not None:
            for token_id in self.config.placeholder_ids:
                shift_labels = shift_labels.masked_fill(shift_labels == token_id, -100)
        rows, targets = predicting_rows(outputs, labels, shift_labels)
        states, logits = outputs.last_hidden_state, None
        if self.training:
            predicted = self.lm_head(states.flatten(0, 1)[rows])
        elif isinstance(logits_to_keep, int) and logits_to_keep == 0:
            logits = full_length_logits(self.lm_head, outputs)
            predicted = logits.flatten(0, 1)[rows]
        else:
            asked = _asked_states(states, logits_to_keep)
            both = self.lm_head(torch.cat([states.flatten(0, 1)[rows], asked.flatten(0, 1)]))
            predicted, logits = both[: len(rows)], both[len(rows) :].unflatten(0, asked.shape[:2])
        vocab_size = self.config.text_config.vocab_size
        loss = self.loss_function(logits=predicted, labels=None, vocab_size=vocab_size, shift_labels=targets, **kwargs)
        return loss, logits
