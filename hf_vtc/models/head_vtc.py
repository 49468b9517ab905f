"""What our models give back, and what a head computes of it: the rows that count, and no others (contract C2)."""

from dataclasses import dataclass

import torch
from torch import nn
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


def predicting_states(
    outputs: VtcModelOutputWithPast, labels: torch.Tensor, shift_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and what each of them predicts; a loss over these is the full-length loss.

    A kept token predicts the next kept token of its row.

    Args:
        outputs ([`VtcModelOutputWithPast`]): `last_hidden_state` `(B, L, D)`, and `kept_index` where tokens were
            dropped.
        labels (`torch.Tensor` of shape `(B, L)`): ids, -100 = none.
        shift_labels (`torch.Tensor` of shape `(B, L)`, *optional*): what each position of the full-length prompt
            predicts, as trainers give it that split sequences; replaces `labels`.

    Returns:
        States `(M, D)` and targets `(M,)`, -100 = none.
    """
    states, kept_index = outputs.last_hidden_state.flatten(0, 1), outputs.kept_index
    if shift_labels is not None:
        targets = shift_labels.flatten()
        predicted = (targets != -100).nonzero().flatten()
        return states[predicted], targets[predicted]
    if kept_index is None:
        return states, nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    kept_labels = labels.flatten()[kept_index]
    rows = kept_index // labels.shape[1]
    row_goes_on = nn.functional.pad(rows[1:] == rows[:-1], (0, 1), value=False)
    targets = nn.functional.pad(kept_labels[1:], (0, 1), value=-100).masked_fill(~row_goes_on, -100)
    return states[kept_index], targets


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
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return head(states[:, rows])
    # dropped positions repeat the kept ones before them
    repeats = (outputs.kept_mask.flatten().cumsum(0) - 1).clamp(min=0)
    return head(states.flatten(0, 1)[kept_index])[repeats].unflatten(0, outputs.kept_mask.shape)
