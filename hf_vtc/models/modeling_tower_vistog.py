"""Semantic tokens beside a vision tower, which runs as it stands, layer by layer, and gives them its keys and values.

The image rows of an attention do not see the semantic tokens (VisToG's isolated attention), so that the image states
are bit for bit those of the plain tower, and the semantic tokens cost their own rows and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .host_tower_vtc import LayerParts, embed_patches, parts_of_layer, run_tower_layer
from .tower_vtc import outputs_of, tower_path


def isolated_attention(
    queries: torch.Tensor,
    image_keys: torch.Tensor,
    image_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    mutual: bool = True,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The rows of the semantic tokens in an attention whose image rows do not see them.

    Args:
        queries, keys, values (`torch.Tensor` of shape `(T, G, C)`): of the semantic tokens.
        image_keys, image_values (`torch.Tensor` of shape `(T, M, C)`): of class token and patches.
        num_heads (`int`): divides C.
        mutual (`bool`): whether a semantic token sees the others, or the image and itself alone.
        dropout (`float`): of the attention weights.

    Returns:
        `(T, G, C)`, before the output projection.
    """
    num_image, num_groups = image_keys.shape[1], keys.shape[1]
    keys, values = torch.cat([image_keys, keys], dim=1), torch.cat([image_values, values], dim=1)
    queries, keys, values = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (queries, keys, values))
    mask = None
    if not mutual:
        own = torch.eye(num_groups, dtype=torch.bool, device=keys.device)
        mask = torch.cat([own.new_ones(num_groups, num_image), own], dim=1)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


def _run(modules: tuple[nn.Module, ...], states: torch.Tensor) -> torch.Tensor:
    for module in modules:
        states = module(states)
    return states


def semantic_layer(
    parts: LayerParts, semantic: torch.Tensor, image_keys: torch.Tensor, image_values: torch.Tensor, mutual: bool
) -> torch.Tensor:
    """One layer of the tower on semantic tokens `(T, G, C)` alone, given the keys and values of its image rows."""
    # a tower may be spread over devices
    semantic = semantic.to(image_keys.device)
    normed = parts.norm_1(semantic)
    attended = isolated_attention(
        _run(parts.to_query, normed),
        image_keys,
        image_values,
        _run(parts.to_key, normed),
        _run(parts.to_value, normed),
        parts.num_heads,
        mutual,
        parts.dropout if parts.norm_1.training else 0.0,
    )
    semantic = semantic + parts.scale_1 * _run(parts.to_output, attended)
    return semantic + parts.scale_2 * _run(parts.feed_forward, parts.norm_2(semantic))


def run_tower(
    tower: nn.Module, feature_layer: int, pixel_values: torch.Tensor, tokens: torch.Tensor | None, mutual: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states of a tower's image tokens, and of the semantic tokens beside them.

    Args:
        tower (`nn.Module`): only its embeddings are called from here, not its `forward`.
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
    semantic = None if tokens is None else path.pre_norm(tokens).expand(states.shape[0], -1, -1)
    for layer in path.layers:
        if semantic is None:
            with torch.set_grad_enabled(trains):
                states = run_tower_layer(layer, states)
            continue
        _require_whole(layer)
        described = parts_of_layer(layer, tower.config.model_type)
        with torch.set_grad_enabled(trains):
            states, keys, values = _image_layer(layer, described, states, trains)
        semantic = semantic_layer(described, semantic, keys, values, mutual)
    with torch.set_grad_enabled(trains):
        states = path.final_norm(states)
    return states, None if semantic is None else path.final_norm(semantic)


def _require_whole(layer: nn.Module) -> None:
    """Raise for a layer whose parameters FSDP gathers only while the layer itself is called."""
    if any(type(parameter).__name__ == "DTensor" for parameter in layer.parameters()):
        raise RuntimeError(
            f"FSDP must not wrap {type(layer).__name__} of VisToG's tower: semantic tokens run through parts of it, "
            "which it gathers only as a whole. Name the units with `fsdp_config={'transformer_layer_cls_to_wrap': "
            "hf_vtc.trainers.sharding.sharded_units(model)}`, or train with `VtcTrainer`, which does."
        )


def _image_layer(
    layer: nn.Module, described: LayerParts, states: torch.Tensor, trains: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's output, keys and values for image states `(T, M, C)`."""
    if trains:
        # not those of the layer itself, which may be checkpointed: its graph would be hidden from us
        normed = described.norm_1(states)
        keys, values = _run(described.to_key, normed), _run(described.to_value, normed)
        return run_tower_layer(layer, states), keys, values
    with outputs_of(described.to_key[-1], described.to_value[-1]) as outputs:
        states = run_tower_layer(layer, states)
    return states, outputs[0], outputs[1]
