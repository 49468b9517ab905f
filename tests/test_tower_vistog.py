"""The tower of VisToG: image states of the plain one, and semantic tokens that attend beside it."""

import copy
import threading
from collections import Counter

import pytest
import torch
from factories import tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from vistog_models import GROUPS, NUM_PATCHES, SIGLIP, TOWERS, batch_of, model_of, pixels, plain_states, run

from hf_vtc.models.host_tower_vtc import embed_patches
from hf_vtc.models.tower_vtc import tower_path


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.mark.window
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("name", TOWERS)
def test_image_states_are_those_of_the_plain_tower(name, attention, training):
    model = model_of(name).train(training)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = plain_states(model, pixels())
        # whatever the semantic tokens are
        for tokens in (model.model.semantic_tokens(), 100 * torch.randn(7, 32), None):
            assert torch.equal(run(model, pixels(), tokens)[0], expected)


@pytest.mark.parametrize("name", TOWERS)
def test_image_states_do_not_depend_on_semantic_tokens(name):
    model = model_of(name)
    tokens = torch.randn(GROUPS, 32, requires_grad=True)
    states, semantic = run(model, pixels(), tokens)
    # with a trainable tower, so that there is a graph to look for them in
    assert states.requires_grad
    # rows of one product: zeros, and no rounding of anything else
    assert torch.equal(
        torch.autograd.grad(states.square().sum(), tokens, retain_graph=True)[0], torch.zeros_like(tokens)
    )
    assert float(torch.autograd.grad(semantic.square().sum(), tokens)[0].abs().min()) > 0


def dense_states(model, pixel_values, tokens, mutual):
    """Image and semantic tokens in one sequence, through the layers of transformers with the isolating mask."""
    base, config = model.model, model.config
    path = tower_path(base.vision_tower, config.vision_feature_layer)
    image = embed_patches(base.vision_tower, pixel_values)
    num_image, num_groups = image.shape[1], tokens.shape[0]
    states = path.pre_norm(torch.cat([image, tokens.expand(image.shape[0], -1, -1)], dim=1))
    mask = torch.full((num_image + num_groups, num_image + num_groups), float("-inf"))
    mask[:, :num_image] = 0
    own = torch.ones(num_groups, num_groups) if mutual else torch.eye(num_groups)
    mask[num_image:, num_image:][own.bool()] = 0
    mask = mask.expand(image.shape[0], 1, -1, -1)
    for layer in path.layers:
        if config.vision_config.model_type == "internvl_vision":
            branch, _ = layer.attention(layer.layernorm_before(states), attention_mask=mask)
            states = states + layer.lambda_1 * branch
            states = states + layer.lambda_2 * layer.mlp(layer.layernorm_after(states))
        else:
            branch, _ = layer.self_attn(layer.layer_norm1(states), attention_mask=mask)
            states = states + branch
            states = states + layer.mlp(layer.layer_norm2(states))
    return path.final_norm(states).split([num_image, num_groups], dim=1)


@pytest.mark.window
@pytest.mark.parametrize("mutual", (True, False))
@pytest.mark.parametrize("name", TOWERS)
def test_semantic_states_are_those_of_masked_attention(name, mutual):
    model = model_of(name, semantic_self_attention=mutual)
    tokens = model.model.semantic_tokens()
    with torch.no_grad():
        image, semantic = run(model, pixels(), tokens)
        expected_image, expected = dense_states(model, pixels(), tokens, mutual)
    torch.testing.assert_close(image, expected_image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(semantic, expected, rtol=1e-5, atol=1e-5)


def test_semantic_tokens_see_each_other_unless_told_not_to():
    for mutual in (True, False):
        model = model_of(semantic_self_attention=mutual)
        tokens = model.model.semantic_tokens().detach()
        changed = torch.cat([tokens[:1], torch.randn(GROUPS - 1, 32)])
        with torch.no_grad():
            first, second = run(model, pixels(), tokens)[1][:, 0], run(model, pixels(), changed)[1][:, 0]
        assert torch.allclose(first, second, rtol=0, atol=1e-6) != mutual


def test_semantic_tokens_cost_their_own_rows_only():
    for frozen in (False, True):
        model = model_of(num_semantic_tokens=5)
        model.model.vision_tower.requires_grad_(not frozen)
        tokens = model.model.semantic_tokens()
        counts = []
        for each in (None, tokens):
            # the fused kernels of a CPU are not counted
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                with torch.set_grad_enabled(frozen):
                    run(model, pixels(1), each)
            counts.append(counter.get_total_flops())
        width, inner, num_groups, num_image = 32, 64, 5, NUM_PATCHES + 1
        # multiplications and additions of four projections, two products of the attention, and the MLP
        layer = 2 * num_groups * (4 * width**2 + 2 * width * inner)
        layer += 2 * 2 * num_groups * (num_image + num_groups) * width
        assert counts[1] - counts[0] == 2 * layer


class Operations(TorchDispatchMode):
    """Counts operations that compute or copy, by name; views do neither."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.window
@pytest.mark.parametrize("name", ("clip", "siglip", "internvl"))
def test_semantic_tokens_cost_two_operations_of_each_layer(name):
    model, counts = model_of(name), []
    with torch.no_grad():
        for tokens in (None, model.model.semantic_tokens()):
            with Operations() as counted:
                run(model, pixels(), tokens)
            counts.append(counted.counts)
    num_layers = len(tower_path(model.model.vision_tower, model.config.vision_feature_layer).layers)
    # an attention of their own, and its rows put behind those of the image
    more = counts[1] - counts[0]
    attention, joining = "_scaled_dot_product_flash_attention_for_cpu", "cat"
    before_layers = {"native_layer_norm": 1} if name == "clip" else {}
    assert more == {attention: num_layers, joining: num_layers + 1, **before_layers}


@pytest.mark.window
@pytest.mark.parametrize("trains", ("nothing", "semantic tokens", "everything"))
@pytest.mark.parametrize("name", ("clip", "siglip", "internvl"))
def test_the_tower_compiles_as_one_graph(name, trains):
    model = model_of(name)
    model.requires_grad_(trains == "everything")
    model.model.semantic_tokens.requires_grad_(trains != "nothing")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda pixel_values, tokens: run(model, pixel_values, tokens), fullgraph=True, backend="eager"
    )
    tokens = model.model.semantic_tokens()
    for expected, found in zip(run(model, pixels(), tokens), compiled(pixels(), tokens), strict=True):
        assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad


def test_a_frozen_tower_builds_no_graph_and_semantic_tokens_learn(model):
    model = copy.deepcopy(model).train()
    model.model.vision_tower.requires_grad_(False)
    # as with adapters and checkpointing: something makes the input of the first layer ask for gradients
    model.model.vision_tower.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    states, semantic = run(model, pixels(), model.model.semantic_tokens())
    assert not states.requires_grad and semantic.requires_grad

    batch = batch_of(model, [1, 1], seed=1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.vision_tower.parameters())
    for name, parameter in model.model.named_parameters():
        if name.startswith(("semantic_tokens", "grouping", "multi_modal_projector")):
            assert bool(parameter.grad.isfinite().all()), name
            # adding one value to all similarities of a patch changes nothing, so this one has nothing to learn
            assert float(parameter.grad.abs().max()) > 1e-9 or name == "grouping.assign.q_proj.bias", name


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_a_trainable_tower_keeps_its_gradients(model, reentrant):
    gradients = []
    for checkpointed in (False, True):
        own = copy.deepcopy(model).train()
        if checkpointed:
            own.gradient_checkpointing_enable({"use_reentrant": reentrant})
        _, semantic = run(own, pixels(), own.model.semantic_tokens())
        semantic.square().mean().backward()
        gradients.append({name: each.grad for name, each in own.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    # the last layer's image rows lead nowhere but into its keys and values
    assert "model.vision_tower.encoder.layers.1.self_attn.k_proj.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_threads_do_not_mix_their_images(model):
    found = [None] * 8

    def work(seed):
        with torch.no_grad():
            for _ in range(20):
                found[seed] = model.model.encode(pixels(seed=seed))["semantic"]
                if not torch.equal(found[seed], expected[seed]):
                    return

    with torch.no_grad():
        expected = [model.model.encode(pixels(seed=seed))["semantic"] for seed in range(8)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, two) for one, two in zip(found, expected))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", ("clip", "siglip", "internvl"))
def test_half_precision_is_finite(name, dtype):
    model = model_of(name).to(dtype)
    batch = batch_of(model, [1, 2], seed=14)
    # similarities beyond the range of float16
    with torch.no_grad():
        model.model.grouping.norm_image.weight.fill_(300)
        model.model.grouping.norm_semantic.weight.fill_(300)
        out = model(**batch)
    assert out.router_logits.dtype == torch.float32 and float(out.router_logits.abs().max()) > 65504
    assert bool(out.logits.isfinite().all()) and bool(out.router_logits.isfinite().all())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()(**batch, labels=labels).loss.backward()
    for part in (model.model.semantic_tokens, model.model.grouping):
        assert all(bool(parameter.grad.isfinite().all()) for parameter in part.parameters())


def test_what_lies_behind_the_layer_that_is_read_is_frozen(model):
    frozen = {name for name, each in model.model.vision_tower.named_parameters() if not each.requires_grad}
    assert frozen and all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in frozen)
    # they do not take part either
    broken = copy.deepcopy(model)
    batch = batch_of(model, [1], seed=16)
    with torch.no_grad():
        for name in frozen:
            broken.model.vision_tower.get_parameter(name).fill_(float("nan"))
        assert torch.equal(broken(**batch).logits, model(**batch).logits)


def test_towers_that_cannot_be_run_raise():
    with pytest.raises(ValueError, match="dinov2"):
        tiny_config("vistog", vision_config={"model_type": "dinov2", "image_size": 32, "patch_size": 8})
    siglip = {"vision_config": dict(SIGLIP)}
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        tiny_config("vistog", **siglip)
    with pytest.raises(ValueError, match="class token"):
        tiny_config("vistog", **siglip, vision_feature_select_strategy="full", semantic_init="cls")
