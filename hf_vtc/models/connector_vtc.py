"""From the tower's features to the language model's width: the connectors of LLaVA and of InternVL."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_vtc import VtcConfig
from .ops_vtc import unshuffle_layernorm


class Connector(nn.Module):
    """A stack of linear layers: `(T, N, C)` to `(T, N / factor^2, D)`.

    With `factor` 1 it is LLaVA's projector. Else a pixel shuffle by `factor` and a LayerNorm come first: InternVL's.

    Args:
        config (`VtcConfig`): gives width of the tower, activation and channel order of the pixel shuffle.
        widths (`list[int]`): output width of each linear layer.
        factor (`int`): side factor of the pixel shuffle.
        dropout (`float`): before every linear layer but the first, in training.

    Source: `mm_projector` of LLaVA; `mlp1` (two layers) and `mlp2` (three layers, twice as wide inside, dropout) of
    InternVL3.5-Flash.
    """

    def __init__(self, config: VtcConfig, widths: list[int], factor: int = 1, dropout: float = 0.0):
        super().__init__()
        self.factor = factor
        self.version = config.ps_version
        folded = config.vision_config.hidden_size * factor**2
        self.layer_norm = nn.LayerNorm(folded, eps=1e-5) if factor > 1 else None
        self.act = ACT2FN[config.projector_hidden_act]
        self.dropout = nn.Dropout(dropout)
        self.num_layers = len(widths)
        for idx, (fan_in, fan_out) in enumerate(zip([folded, *widths], widths, strict=False), start=1):
            self.add_module(f"linear_{idx}", nn.Linear(fan_in, fan_out))

    def forward(self, features: torch.Tensor, tiles: torch.LongTensor | None = None) -> torch.Tensor:
        """Project `features` `(T, N, C)`, or the tiles of them that `tiles` `(T',)` names, each once."""
        norm = self.layer_norm
        if norm is None:
            states = features if tiles is None else features[tiles]
        else:
            states = unshuffle_layernorm(features, self.factor, norm.weight, norm.bias, norm.eps, self.version, tiles)
        states = self.linear_1(states)
        for idx in range(2, self.num_layers + 1):
            states = self.get_submodule(f"linear_{idx}")(self.dropout(self.act(states)))
        return states
