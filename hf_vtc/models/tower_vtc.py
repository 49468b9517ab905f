"""Vision towers, run as far as the hidden state that is read, and the connectors behind them.

A feature layer counts as in LLaVA: 0 is what the first encoder layer gets, i what layer i - 1 gives, -1 what the last
one gives, before any norm behind it, in CLIP and SigLIP. Of every other tower -1 is the output, with the norm behind
it, as InternVL reads InternViT.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_vtc import VtcConfig
from .host_tower_vtc import (
    TOWERS_IN_PARTS,
    embed_patches,
    encoder_layers,
    modules_behind_layers,
    norm_before_layers,
    norm_of_output,
    run_tower_layer,
)
from .ops_vtc import unshuffle_layernorm


class TowerPath(NamedTuple):
    """What lies between embedded patches and a hidden state; both norms may be the identity."""

    pre_norm: nn.Module
    layers: list[nn.Module]
    final_norm: nn.Module


def tower_path(tower: nn.Module, feature_layer: int) -> TowerPath:
    """The part of a tower that a hidden state depends on, embeddings apart.

    Args:
        tower (`nn.Module`): as `build_tower` gives it.
        feature_layer (`int`): the hidden state.
    """
    layers = encoder_layers(tower)
    depth = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    final_norm = norm_of_output(tower) if _reads_output(tower, feature_layer) else nn.Identity()
    return TowerPath(norm_before_layers(tower), list(layers[:depth]), final_norm)


def unused_modules(tower: nn.Module, feature_layer: int) -> list[nn.Module]:
    """Modules of a tower that a hidden state does not depend on."""
    path = tower_path(tower, feature_layer)
    behind = [module for module in modules_behind_layers(tower) if module is not path.final_norm]
    return [*encoder_layers(tower)[len(path.layers) :], *behind]


def run_tower_to(tower: nn.Module, pixel_values: torch.Tensor, feature_layer: int) -> torch.Tensor:
    """A hidden state `(T, N, C)` of a tower; layers behind it do not run.

    Args:
        tower (`nn.Module`): as `build_tower` gives it. Of CLIP, SigLIP and InternViT the parts are called and not the
            whole, unless its output is what is read.
        pixel_values (`torch.Tensor` of shape `(T, 3, S, S)`): in the dtype of the tower.
        feature_layer (`int`): the hidden state.
    """
    if _reads_output(tower, feature_layer):
        return tower(pixel_values).last_hidden_state
    if tower.config.model_type not in TOWERS_IN_PARTS:
        return tower(pixel_values, output_hidden_states=True).hidden_states[feature_layer]
    path = tower_path(tower, feature_layer)
    states = path.pre_norm(embed_patches(tower, pixel_values))
    for layer in path.layers:
        states = run_tower_layer(layer, states)
    return states


def _reads_output(tower: nn.Module, feature_layer: int) -> bool:
    """Whether a hidden state is the tower's output, with the norm behind it."""
    return feature_layer == -1 and tower.config.model_type not in ("clip_vision_model", "siglip_vision_model")


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Collect what modules return while the body runs: position in `modules` -> output."""
    outputs, thread = {}, threading.get_ident()

    def keep(idx: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            # another thread may run the same model at this moment
            if threading.get_ident() == thread:
                outputs[idx] = output

        return hook

    handles = [module.register_forward_hook(keep(idx)) for idx, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class UnshuffleLayerNorm(nn.LayerNorm):
    """Fold `factor` x `factor` neighbours of square grids `(T, N, C)` into channels, and LayerNorm over these.

    Args:
        width (`int`): channels after folding.
        factor (`int`): side of what is folded.
        version (`str`): channel order, see `ops_vtc.unshuffle_layernorm`.
    """

    def __init__(self, width: int, factor: int, version: str):
        super().__init__(width, eps=1e-5)
        self.factor = factor
        self.version = version

    def forward(self, features: torch.Tensor, tiles: torch.LongTensor | None = None) -> torch.Tensor:
        """Of all grids, or of those that `tiles` `(T',)` names, each once."""
        return unshuffle_layernorm(features, self.factor, self.weight, self.bias, self.eps, self.version, tiles)


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
        folded = config.vision_config.hidden_size * factor**2
        self.layer_norm = UnshuffleLayerNorm(folded, factor, config.ps_version) if factor > 1 else None
        self.act = ACT2FN[config.projector_hidden_act]
        self.dropout = nn.Dropout(dropout)
        self.num_layers = len(widths)
        for idx, (fan_in, fan_out) in enumerate(zip([folded, *widths], widths, strict=False), start=1):
            self.add_module(f"linear_{idx}", nn.Linear(fan_in, fan_out))

    def forward(self, features: torch.Tensor, tiles: torch.LongTensor | None = None) -> torch.Tensor:
        """Project `features` `(T, N, C)`, or the tiles of them that `tiles` `(T',)` names, each once."""
        if self.layer_norm is None:
            states = features if tiles is None else features[tiles]
        else:
            states = self.layer_norm(features, tiles)
        states = self.linear_1(states)
        for idx in range(2, self.num_layers + 1):
            states = self.get_submodule(f"linear_{idx}")(self.dropout(self.act(states)))
        return states
