"""Vision towers, run as far as the hidden state that is read.

A feature layer counts as in LLaVA: 0 is what the first encoder layer gets, i what layer i - 1 gives, -1 what the last
one gives, before any norm behind it, in CLIP and SigLIP. Of every other tower -1 is the output, with the norm behind
it, as InternVL reads InternViT.
"""

from typing import NamedTuple

import torch
from torch import nn

from .compat_vtc import embed_patches, run_tower_layer

# towers whose parts are called one by one; others run as a whole
_TOWERS_IN_PARTS = ("clip_vision_model", "siglip_vision_model", "internvl_vision")


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
    layers, parts = _layers(tower), dict(tower.named_children())
    depth = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    # spelt so in CLIP
    pre_norm = parts.get("pre_layrnorm", nn.Identity())
    final_norm = parts.get("layernorm") if _reads_output(tower, feature_layer) else None
    return TowerPath(pre_norm, list(layers[:depth]), nn.Identity() if final_norm is None else final_norm)


def unused_modules(tower: nn.Module, feature_layer: int) -> list[nn.Module]:
    """Modules of a tower that a hidden state does not depend on."""
    path, parts = tower_path(tower, feature_layer), dict(tower.named_children())
    # the norm behind CLIP's last layer is for the class token alone
    behind = [parts[name] for name in ("head", "post_layernorm", "layernorm") if name in parts]
    return [*_layers(tower)[len(path.layers) :], *(module for module in behind if module is not path.final_norm)]


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
    if tower.config.model_type not in _TOWERS_IN_PARTS:
        return tower(pixel_values, output_hidden_states=True).hidden_states[feature_layer]
    path = tower_path(tower, feature_layer)
    states = path.pre_norm(embed_patches(tower, pixel_values))
    for layer in path.layers:
        states = run_tower_layer(layer, states)
    return states


def _layers(tower: nn.Module) -> nn.ModuleList:
    return next(module for module in tower.encoder.children() if isinstance(module, nn.ModuleList))


def _reads_output(tower: nn.Module, feature_layer: int) -> bool:
    """Whether a hidden state is the tower's output, with the norm behind it."""
    return feature_layer == -1 and tower.config.model_type not in ("clip_vision_model", "siglip_vision_model")
