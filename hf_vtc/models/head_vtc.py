"""What a language modelling head computes of full-length states: the rows that count, and no others (contract C2)."""

import torch
from torch import nn

from .outputs_vtc import VtcModelOutputWithPast


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
