"""Tiny VisToG models on every kind of tower, and what tests of them share."""

import copy

import torch
from factories import random_batch, tiny_model
from torch import nn
from transformers import AutoModel

from hf_vtc.models.modeling_tower_vistog import run_tower

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP = {"model_type": "clip_vision_model", **SIZES, "image_size": 32, "patch_size": 8}
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
INTERNVL = {"model_type": "internvl_vision", **SIZES, "image_size": [32, 32], "patch_size": [8, 8]}
# config fields by name; layers of the tower that are read, and InternViT's last one with the norm behind it
TOWERS = {
    "clip": {"vision_config": CLIP},
    "clip-last": {"vision_config": CLIP, "vision_feature_layer": -1},
    "siglip": {"vision_config": SIGLIP, "vision_feature_select_strategy": "full"},
    "siglip-last": {
        "vision_config": SIGLIP,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    "internvl": {"vision_config": INTERNVL | {"attention_bias": True}, "vision_feature_layer": -1},
    "internvl-qk-norm": {"vision_config": INTERNVL | {"use_qk_norm": True, "norm_type": "rms_norm"}},
    "internvl-norm": {"vision_config": INTERNVL | {"use_mean_pooling": False}, "vision_feature_layer": -1},
    "early": {"vision_config": CLIP, "vision_feature_layer": 1},
}
NUM_PATCHES = 16
GROUPS = 4


def model_of(name="clip", **overrides):
    """Copies of the nested dicts, since a config takes what it is given."""
    return tiny_model("vistog", **copy.deepcopy(TOWERS[name] | overrides))


def batch_of(model, images_per_row, seed=0):
    return random_batch(model.config, torch.Generator().manual_seed(seed), images_per_row=images_per_row)


def pixels(num_tiles=3, seed=0):
    return torch.randn(num_tiles, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def run(model, pixel_values, tokens):
    """Image states and semantic states of the tower of a model, with these semantic tokens beside it."""
    base, config = model.model, model.config
    mutual = config.semantic_self_attention
    return run_tower(base.vision_tower, config.vision_feature_layer, pixel_values, tokens, mutual)


def plain_states(model, pixel_values):
    """The hidden state that the model reads, from the tower of transformers with the same weights, as a whole."""
    config = model.config
    tower = AutoModel.from_config(config.vision_config, attn_implementation=config.vision_config._attn_implementation)
    inner = getattr(tower, "vision_model", tower)
    inner.load_state_dict(model.model.vision_tower.state_dict())
    tower.train(model.training)
    # not every tower of 4.57 gives its hidden states away
    inputs = []
    for layer in next(each for each in inner.encoder.children() if isinstance(each, nn.ModuleList)):
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    before_norm = []
    inner.encoder.register_forward_hook(lambda module, args, output: before_norm.append(output.last_hidden_state))
    output = tower(pixel_values).last_hidden_state
    layer = config.vision_feature_layer
    if layer != -1:
        return inputs[layer if layer >= 0 else layer + 1]
    # LLaVA reads SigLIP before its last norm
    return before_norm[0] if config.vision_config.model_type == "siglip_vision_model" else output
