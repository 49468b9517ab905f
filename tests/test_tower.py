"""`VtcModel.encode`: the hidden state that transformers would give, and no layer more than it needs."""

import copy

import pytest
import torch
from factories import tiny_model
from torch import nn
from transformers import AutoModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP = {"model_type": "clip_vision_model", **SIZES, "image_size": 32, "patch_size": 8}
INTERNVL = {"model_type": "internvl_vision", **SIZES, "image_size": [32, 32], "patch_size": [8, 8]}
TOWERS = {
    "clip": {"vision_config": CLIP, "vision_feature_select_strategy": "full"},
    "siglip": {
        "vision_config": CLIP | {"model_type": "siglip_vision_model"},
        "vision_feature_select_strategy": "full",
    },
    "internvl": {
        "vision_config": INTERNVL | {"use_mean_pooling": False},
        "vision_feature_select_strategy": "full",
    },
}
LAYERS = (-1, -2, -5, 0, 3, 4)


def model_of(tower, layer):
    # one grid whether or not the class token is among the features, which nobody counts here
    return tiny_model("llavolta", vision_feature_layer=layer, **copy.deepcopy(TOWERS[tower]))


def layers_of(tower):
    return next(each for each in tower.encoder.children() if isinstance(each, nn.ModuleList))


def stock_states(model, pixel_values):
    """What LLaVA (InternVL for InternViT) reads of a tower of transformers with the same weights."""
    config = model.config
    tower = AutoModel.from_config(config.vision_config).eval()
    inner = getattr(tower, "vision_model", tower)
    inner.load_state_dict(model.model.vision_tower.state_dict())
    if config.vision_config.model_type != "internvl_vision":
        return tower(pixel_values, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    # InternViT's of 4.57 cannot give them
    states = []
    for layer in layers_of(inner):
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    layers_of(inner)[-1].register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    output = tower(pixel_values).last_hidden_state
    return output if config.vision_feature_layer == -1 else states[config.vision_feature_layer]


@pytest.mark.window
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_encode_gives_the_state_of_transformers_bit_for_bit(tower, layer):
    model, pixel_values = model_of(tower, layer), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.model.encode(pixel_values), stock_states(model, pixel_values))


@pytest.mark.window
@pytest.mark.parametrize("layer", (-1, -2, 1))
def test_encode_runs_an_unknown_tower_as_a_whole(layer):
    vision = {"model_type": "dinov2", **SIZES, "image_size": 32, "patch_size": 8}
    model = tiny_model("llavolta", vision_config=vision, vision_feature_layer=layer)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = model.model.vision_tower(pixel_values, output_hidden_states=True)
        expected = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        assert torch.equal(model.model.encode(pixel_values), expected[:, 1:])
    model.train().model.encode(pixel_values).square().sum().backward()
    asked = {name for name, each in model.model.vision_tower.named_parameters() if each.requires_grad}
    # of masked patches, which nobody gives
    asked -= {"embeddings.mask_token"}
    assert {name for name, each in model.model.vision_tower.named_parameters() if each.grad is not None} == asked


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_encode_runs_the_layers_that_it_needs(tower, layer):
    model, ran = model_of(tower, layer), []
    layers = layers_of(model.model.vision_tower)
    for idx, each in enumerate(layers):
        each.register_forward_hook(lambda module, args, output, idx=idx: ran.append(idx))
    with torch.no_grad():
        model.model.encode(torch.randn(1, 3, 32, 32))
    assert ran == list(range(layer if layer >= 0 else len(layers) + 1 + layer))
    # what does not run has no gradient, and must not ask for one
    used = {id(each) for idx in ran for each in layers[idx].parameters()}
    unused = [each for part in layers for each in part.parameters() if id(each) not in used]
    assert not any(each.requires_grad for each in unused)


@pytest.mark.window
@pytest.mark.parametrize("layer", (-1, -2))
@pytest.mark.parametrize("tower", TOWERS)
def test_encode_with_gradient_checkpointing_gives_the_same_gradients(tower, layer):
    plain = model_of(tower, layer).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    pixel_values = torch.randn(2, 3, 32, 32)
    saved = {}
    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        saved[name] = 0

        def count(tensor, name=name):
            saved[name] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            features = model.model.encode(pixel_values)
        features.square().sum().backward()
    # layers keep their input only
    assert saved["checkpointed"] < saved["plain"] / 2
    reached = 0
    for (name, one), two in zip(
        plain.model.vision_tower.named_parameters(), checkpointed.model.vision_tower.parameters()
    ):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            reached += 1
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6, msg=name)
        assert one.requires_grad == (one.grad is not None), name
    assert reached > 0
