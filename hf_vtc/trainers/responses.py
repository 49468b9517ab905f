"""Which tokens of a batch are supervised, and which states predict them."""

from dataclasses import dataclass

import torch

from .losses import IGNORE_INDEX


@dataclass
class Responses:
    """The supervised tokens of one batch; the state at position t predicts label t + 1.

    Outputs of our models are full-length whatever was compressed, so one position means the same token to the policy
    and to the reference.

    Args:
        mask (`torch.BoolTensor` of shape `(B, L - 1)`): True where the state predicts a supervised token.
        targets (`torch.LongTensor` of shape `(N,)`): the supervised tokens, row by row.
        row_idx (`torch.LongTensor` of shape `(N,)`): the sample of each.
    """

    mask: torch.Tensor
    targets: torch.Tensor
    row_idx: torch.Tensor

    @classmethod
    def from_labels(cls, labels: torch.Tensor) -> "Responses":
        """Read `labels` `(B, L)`, -100 where nothing is supervised."""
        shifted = labels[:, 1:]
        mask = shifted != IGNORE_INDEX
        return cls(mask, shifted[mask], mask.nonzero()[:, 0])

    @property
    def supervised(self) -> torch.Tensor:
        """True at the supervised tokens themselves, `(B, L)`."""
        return torch.nn.functional.pad(self.mask, (1, 0))

    @property
    def num_rows(self) -> int:
        return self.mask.shape[0]

    def tokens_of(self, rows: list[int]) -> torch.Tensor:
        """Indices into the N tokens that give the tokens of `rows`, one row after the other, repeats allowed."""
        return torch.cat([(self.row_idx == row).nonzero()[:, 0] for row in rows])

    def select(self, rows: list[int]) -> "Responses":
        """The responses of a batch that consists of `rows` of this one."""
        mask = self.mask[rows]
        return Responses(mask, self.targets[self.tokens_of(rows)], mask.nonzero()[:, 0])
