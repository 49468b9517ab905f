"""The door to vision towers of transformers: CLIP, SigLIP and InternViT, whose parts are called one by one.

Seen on transformers 4.57.6 to 5.24.0. Other towers run as a whole, by their `forward`; of them Qwen's see grids.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .host_vtc import grid_base_of

# module and class of the towers of `GRID_BASES`
_GRID_TOWERS = {
    "qwen2_5_vl": ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
    "qwen3_vl": ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLVisionModel"),
    "qwen3_5": ("transformers.models.qwen3_5.modeling_qwen3_5", "Qwen3_5VisionModel"),
}

# towers whose parts are called one by one; others run as a whole
TOWERS_IN_PARTS = ("clip_vision_model", "siglip_vision_model", "internvl_vision")


@contextmanager
def bare_parameters_of(module: nn.Module) -> Iterator[None]:
    """While it lasts, parameters of a module that does not run can be read, even if accelerate has offloaded them.

    What is read stays. Seen on accelerate 1.1 to 1.15.
    """
    hook = vars(module).get("_hf_hook")
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def build_tower(config: PretrainedConfig) -> nn.Module:
    """A vision tower whose parameters have the names of the newest transformers.

    Before 5.x CLIP and SigLIP held the tower in another module, which has no use here.
    """
    base = grid_base_of(config.model_type)
    if base is not None:
        # most versions know these towers as parts of their models only
        module, name = _GRID_TOWERS[base]
        return getattr(import_module(module), name)(config)
    tower = AutoModel.from_config(config)
    return getattr(tower, "vision_model", tower)


@torch.no_grad()
def restore_places(module: nn.Module) -> None:
    """Count the places of a tower's patches anew, a buffer that no file holds and loading on `"meta"` loses.

    From 5.0 on the host does it by the class of the tower; the part that `build_tower` takes of it has no such class
    in the versions that hold one in the other (seen: 5.0).
    """
    places = dict(module.named_buffers(recurse=False)).get("position_ids")
    if places is not None:
        places.copy_(torch.arange(places.shape[-1]).expand_as(places))


def run_grid_tower(
    tower: nn.Module, pixel_values: torch.Tensor, grid_thw: torch.LongTensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a tower that sees grids gives for the patches of some images, behind its connector.

    Args:
        pixel_values (`torch.Tensor` of shape `(patches, C)`): of all images, as their processor orders them.
        grid_thw (`torch.LongTensor` of shape `(num_images, 3)`): patches of each in time, height and width.

    Returns:
        Visual tokens `(V, D)`, row by row, and as many of each deeper layer that the decoder reads, if there are any.
    """
    output = tower(pixel_values, grid_thw=grid_thw)
    if isinstance(output, torch.Tensor):
        # 4.57
        return output, []
    if type(output) is tuple:
        # 4.57
        return output
    return output.pooler_output, list(vars(output).get("deepstack_features") or ())


def embed_patches(tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a tower's `embeddings` give for `(T, 3, S, S)` pixels; InternVL's of 4.57 gives the grid beside it."""
    embedded = tower.embeddings(on_device_of(tower, pixel_values))
    return embedded[0] if isinstance(embedded, tuple) else embedded


def on_device_of(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What parts of a module are going to read, where accelerate would move it if the module itself were called."""
    device = next(module.parameters()).device
    return states if device.type == "meta" else states.to(device)


def run_tower_layer(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """One encoder layer of a tower on `(T, N, C)` states, without a mask.

    Layers ask for no mask (InternVL), one (SigLIP, CLIP of 5.x) or two (CLIP of 4.57, which returns a tuple as well).
    """
    output = layer(states, *[None] * _num_masks(type(layer)))
    return output[0] if isinstance(output, tuple) else output


@lru_cache
def _num_masks(layer_class: type[nn.Module]) -> int:
    parameters = list(inspect.signature(layer_class.forward).parameters.values())[2:]
    return sum(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The layers of a tower, whatever its encoder calls them."""
    return next(module for module in tower.encoder.children() if isinstance(module, nn.ModuleList))


def norm_before_layers(tower: nn.Module) -> nn.Module:
    """What stands between embeddings and layers; the identity in most towers."""
    # spelt so in CLIP
    return dict(tower.named_children()).get("pre_layrnorm", nn.Identity())


def norm_of_output(tower: nn.Module) -> nn.Module:
    """InternViT's norm behind the last layer; the identity in towers whose norm is for something else."""
    return dict(tower.named_children()).get("layernorm", nn.Identity())


def modules_behind_layers(tower: nn.Module) -> list[nn.Module]:
    """What a tower does after its layers."""
    parts = dict(tower.named_children())
    # the norm behind CLIP's last layer is for the class token alone
    return [parts[name] for name in ("head", "post_layernorm", "layernorm") if name in parts]


class LayerParts(NamedTuple):
    """The steps of one encoder layer of a tower; a tuple is run in order.

    `attend` makes `(T, N, C)` of queries, keys and values `(T, heads, N, C / heads)` as the layer itself does.
    `scale_1` and `scale_2` multiply the two residual branches if there are any, `dropout` is of attention weights.
    """

    norm_1: nn.Module
    to_query: tuple[nn.Module, ...]
    to_key: tuple[nn.Module, ...]
    to_value: tuple[nn.Module, ...]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    to_output: tuple[nn.Module, ...]
    scale_1: torch.Tensor | None
    norm_2: nn.Module
    feed_forward: tuple[nn.Module, ...]
    scale_2: torch.Tensor | None
    num_heads: int
    dropout: float


def parts_of_layer(layer: nn.Module, tower_type: str) -> LayerParts:
    """Take an encoder layer of one of `TOWERS_IN_PARTS` apart; `tower_type` is the `model_type` of its config."""
    if tower_type == "internvl_vision":
        attention = layer.attention
        dropout = attention.attention_dropout if attention.training else 0.0
        # bare parameters, which are read while the layer itself does not run
        with bare_parameters_of(layer):
            scale_1, scale_2 = layer.lambda_1, layer.lambda_2
        return LayerParts(
            norm_1=layer.layernorm_before,
            to_query=(attention.q_proj, attention.q_norm),
            to_key=(attention.k_proj, attention.k_norm),
            to_value=(attention.v_proj,),
            attend=partial(_attend, attention, dropout),
            to_output=(attention.projection_layer, attention.projection_dropout),
            scale_1=scale_1,
            norm_2=layer.layernorm_after,
            feed_forward=(layer.mlp, layer.dropout),
            scale_2=scale_2,
            num_heads=attention.num_heads,
            dropout=dropout,
        )
    attention = layer.self_attn
    dropout = attention.dropout if attention.training else 0.0
    return LayerParts(
        norm_1=layer.layer_norm1,
        to_query=(attention.q_proj,),
        to_key=(attention.k_proj,),
        to_value=(attention.v_proj,),
        attend=partial(_attend, attention, dropout),
        to_output=(attention.out_proj,),
        scale_1=None,
        norm_2=layer.layer_norm2,
        feed_forward=(layer.mlp,),
        scale_2=None,
        num_heads=attention.num_heads,
        dropout=dropout,
    )


def _attend(
    attention: nn.Module, dropout: float, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """What the attention of a tower's layer does, by the implementation that was chosen for it."""
    name = attention.config._attn_implementation
    # the eager one stands in the file of each tower, not among the others
    function = (
        import_module(type(attention).__module__).eager_attention_forward
        if name == "eager"
        else ALL_ATTENTION_FUNCTIONS[name]
    )
    attended, _ = function(
        attention, queries, keys, values, None, scaling=attention.scale, dropout=dropout, is_causal=False
    )
    return attended.flatten(2)


def checkpointed(
    layer: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor
) -> torch.Tensor:
    """`function(states)`, which runs parts of a layer; it runs again for gradients if the layer itself would."""
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(function, states)
    return function(states)


def class_token_of(tower: nn.Module, tower_type: str) -> torch.Tensor | None:
    """The class token `(C,)` of one of `TOWERS_IN_PARTS`, None for a tower without one."""
    with bare_parameters_of(tower.embeddings):
        if tower_type == "clip_vision_model":
            return tower.embeddings.class_embedding
        return None if tower_type == "siglip_vision_model" else tower.embeddings.cls_token.flatten()
