"""Semantic tokens beside a vision tower: rows behind those of the image, through the same layers, part by part.

The image rows of an attention do not see the semantic tokens (VisToG's isolated attention), so that the image states
are those of the plain tower: bit for bit where a row of a matrix product does not depend on how many others there are,
as on the CPUs where it was looked at. The semantic tokens cost their own rows, and two operations of each layer.
"""

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .host_tower_vtc import LayerParts, checkpointed, embed_patches, on_device_of, parts_of_layer, run_tower_layer
from .tower_vtc import tower_path


def isolated_attention(
    parts: LayerParts,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_image: int,
    mutual: bool,
) -> torch.Tensor:
    """An attention whose image rows do not see the semantic tokens.

    Args:
        queries (`torch.Tensor` of shape `(T, R, C)`): of image rows, then of semantic tokens; of both or of either.
        keys, values (`torch.Tensor` of shape `(T, M + G, C)`): of class token and patches, then of semantic tokens.
        num_image (`int`): of the queries, M or 0.
        mutual (`bool`): whether a semantic token sees the others, or the image and itself alone.

    Returns:
        `(T, R, C)`, before the output projection.
    """
    queries, keys, values = (
        part.unflatten(-1, (parts.num_heads, -1)).transpose(1, 2) for part in (queries, keys, values)
    )
    num_groups, attended = queries.shape[2] - num_image, []
    if num_image > 0:
        attended.append(parts.attend(*(part[:, :, :num_image] for part in (queries, keys, values))))
    if num_groups > 0:
        mask = None
        if not mutual:
            own = torch.eye(num_groups, dtype=torch.bool, device=keys.device)
            mask = torch.cat([own.new_ones(num_groups, keys.shape[2] - num_groups), own], dim=1)
        semantic = F.scaled_dot_product_attention(
            queries[:, :, num_image:], keys, values, attn_mask=mask, dropout_p=parts.dropout
        )
        attended.append(semantic.transpose(1, 2).flatten(2))
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)


def _run(modules: Iterable[nn.Module], states: torch.Tensor) -> torch.Tensor:
    for module in modules:
        states = module(states)
    return states


def _scaled(scale: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    return states if scale is None else scale * states


def run_rows(
    parts: LayerParts,
    num_image: int,
    mutual: bool,
    states: torch.Tensor,
    seen: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One layer of a tower on image rows, semantic tokens, or both.

    Args:
        num_image (`int`): image rows among `states`, which come first; all or none.
        mutual (`bool`): whether semantic tokens attend to each other.
        states (`torch.Tensor` of shape `(T, R, C)`): what the layer gets.
        seen (`tuple` of `torch.Tensor` of shape `(T, M, C)`, *optional*): keys and values of image rows that are not
            among `states`.

    Returns:
        What the layer gives, `(T, R, C)`, and its keys and values.
    """
    normed = parts.norm_1(states)
    queries, keys, values = (_run(steps, normed) for steps in (parts.to_query, parts.to_key, parts.to_value))
    if seen is not None:
        keys, values = torch.cat([seen[0], keys], dim=1), torch.cat([seen[1], values], dim=1)
    attended = isolated_attention(parts, queries, keys, values, num_image, mutual)
    states = states + _scaled(parts.scale_1, _run(parts.to_output, attended))
    return states + _scaled(parts.scale_2, _run(parts.feed_forward, parts.norm_2(states))), (keys, values)


def run_tower(
    tower: nn.Module, feature_layer: int, pixel_values: torch.Tensor, tokens: torch.Tensor | None, mutual: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states of a tower's image tokens, and of the semantic tokens beside them.

    Args:
        tower (`nn.Module`): its parts are called from here, not its `forward`.
        feature_layer (`int`): the hidden state that is read, see `tower_vtc.py`.
        pixel_values (`torch.Tensor` of shape `(T, 3, S, S)`): in the dtype of the tower.
        tokens (`torch.Tensor` of shape `(G, C)`, *optional*): semantic tokens, the same for every tile.
        mutual (`bool`): whether semantic tokens attend to each other.

    Returns:
        Image states `(T, M, C)`, class token first where there is one, and semantic states `(T, G, C)` or None.
    """
    path = tower_path(tower, feature_layer)
    # a frozen tower builds no graph, whatever asks its input for gradients; the semantic tokens always do
    trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(trains):
        states = path.pre_norm(embed_patches(tower, pixel_values))
        if tokens is None:
            for layer in path.layers:
                states = run_tower_layer(layer, states)
            return path.final_norm(states), None
    _require_whole(path.layers)
    semantic = path.pre_norm(tokens).expand(states.shape[0], -1, -1)
    if torch.is_grad_enabled() and semantic.requires_grad and not trains:
        return _run_beside(tower, feature_layer, states, semantic, mutual)
    num_image = states.shape[1]
    states = torch.cat([states, semantic], dim=1)
    for layer in path.layers:
        rows = partial(run_rows, parts_of_layer(layer, tower.config.model_type), num_image, mutual)
        states = checkpointed(layer, lambda states, rows=rows: rows(states)[0], on_device_of(layer, states))
    states = path.final_norm(states)
    return states[:, :num_image], states[:, num_image:]


def _run_beside(
    tower: nn.Module, feature_layer: int, states: torch.Tensor, semantic: torch.Tensor, mutual: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `run_tower` from the embedded patches on, where the semantic tokens alone build a graph."""
    path, num_image = tower_path(tower, feature_layer), states.shape[1]
    for layer in path.layers:
        parts = parts_of_layer(layer, tower.config.model_type)
        with torch.no_grad():
            states, seen = run_rows(parts, num_image, mutual, on_device_of(layer, states))
        semantic, _ = run_rows(parts, 0, mutual, on_device_of(layer, semantic), seen)
    with torch.no_grad():
        states = path.final_norm(states)
    return states, path.final_norm(semantic)


def _require_whole(layers: Iterable[nn.Module]) -> None:
    """Raise for layers whose parameters FSDP gathers only while the layer itself is called."""
    for layer in layers:
        if any(type(parameter).__name__ == "DTensor" for parameter in layer.parameters()):
            raise RuntimeError(
                f"FSDP must not wrap {type(layer).__name__} of VisToG's tower: semantic tokens run through parts of "
                "it, which it gathers only as a whole. Name the units with `fsdp_config={"
                "'transformer_layer_cls_to_wrap': hf_vtc.trainers.sharding.sharded_units(model)}`, or train with "
                "`VtcTrainer`, which does."
            )
