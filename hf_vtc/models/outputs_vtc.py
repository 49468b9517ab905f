"""What our models give back: full-length states and logits, and what was decided about each image."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class VtcModelOutputWithPast(BaseModelOutputWithPast):
    """Output of a base model; `last_hidden_state` is full-length, `hidden_states` and `attentions` are compact.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_visual_tokens.sum(), D)`): kept visual tokens, prompt order.
        router_logits (`torch.Tensor`): what the method's router said; its page gives the shape.
        router_decisions (`torch.Tensor`): what was done, in the form that `forward(router_decisions=...)` takes.
        kept_mask (`torch.BoolTensor` of shape `(B, L)`): positions that the language model really computed.
        kept_index (`torch.LongTensor` of shape `(num_kept,)`): True positions of the flattened `kept_mask`.
        num_visual_tokens (`torch.LongTensor` of shape `(num_images,)`): kept per image, on the CPU.
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
