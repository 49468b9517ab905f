"""What is particular to VisToG: isolated semantic tokens, grouping, and budgets of two counts."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from factories import random_batch, tiny_config, tiny_model, uncompressed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from hf_vtc.convert import from_base
from hf_vtc.models.host_tower_vtc import embed_patches
from hf_vtc.models.modeling_tower_vistog import run_tower
from hf_vtc.models.modeling_vistog import VistogForConditionalGeneration, gumbel_noise
from hf_vtc.models.ops_vtc import assign_segment_mean
from hf_vtc.models.tower_vtc import tower_path

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


@pytest.fixture(scope="module")
def model():
    return model_of()


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
    assert torch.autograd.grad(states.sum(), tokens, allow_unused=True, retain_graph=True) == (None,)
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


def test_permuting_semantic_tokens_permutes_visual_tokens(model):
    batch, order = batch_of(model, [2, 1], seed=2), torch.tensor([2, 0, 3, 1])
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        permuted.model.semantic_tokens.weight.copy_(model.model.semantic_tokens.weight[order])
        one, two = model.model(**batch), permuted.model(**batch)
    tokens, permuted_tokens = (out.image_hidden_states.unflatten(0, (-1, GROUPS)) for out in (one, two))
    torch.testing.assert_close(permuted_tokens, tokens[:, order], rtol=1e-5, atol=1e-5)
    assert torch.equal(order[two.router_decisions], one.router_decisions)
    torch.testing.assert_close(two.router_logits, one.router_logits[:, order], rtol=1e-5, atol=1e-5)


def test_each_patch_joins_one_group(model):
    batch = batch_of(model, [2, 3], seed=3)
    with torch.no_grad():
        out = model(**batch)
    num_tiles = int(batch["num_tiles"].sum())
    assert out.router_decisions.shape == (num_tiles, NUM_PATCHES) and out.router_decisions.dtype == torch.long
    assert torch.equal(out.router_decisions, out.router_logits.argmax(1))
    members = F.one_hot(out.router_decisions, GROUPS).sum(1)
    assert members.sum(1).tolist() == [NUM_PATCHES] * num_tiles
    # the tiny model does group: neither one group for all nor the same for all tiles
    assert len(members.unique(dim=0)) > 1 and int((members > 0).sum(1).max()) > 1


def test_noise_is_for_training(model):
    batch, training = batch_of(model, [2, 2], seed=4), copy.deepcopy(model).train()
    silent = model_of(gumbel_noise=False).train()
    with torch.no_grad():
        expected = model(**batch)
        assert torch.equal(model(**batch).logits, expected.logits)
        torch.manual_seed(1)
        one, two = training(**batch), training(**batch)
        torch.manual_seed(1)
        again = training(**batch)
        assert torch.equal(silent(**batch).router_decisions, expected.router_decisions)
    assert not torch.equal(one.router_decisions, two.router_decisions)
    assert torch.equal(one.router_decisions, again.router_decisions) and torch.equal(one.logits, again.logits)
    # what is reported is without noise
    torch.testing.assert_close(one.router_logits, expected.router_logits, rtol=0, atol=1e-6)


def test_gumbel_noise_is_gumbel():
    torch.manual_seed(0)
    noise = gumbel_noise(torch.zeros(200, 500, dtype=torch.bfloat16))
    assert noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.03)


def test_empty_groups_are_finite(model):
    model = copy.deepcopy(model).train()
    model.model.vision_tower.requires_grad_(False)
    patches, semantic = torch.randn(2, NUM_PATCHES, 32), torch.randn(2, GROUPS, 32)
    everything = torch.zeros(2, NUM_PATCHES, dtype=torch.long)
    grouping = model.model.grouping
    tokens, _, _ = grouping(patches, semantic, everything)
    torch.testing.assert_close(tokens[:, 1:], semantic[:, 1:] + grouping.assign.out_proj.bias)
    expected = grouping.assign.v_proj(grouping.norm_image(patches)).mean(1)
    torch.testing.assert_close(tokens[:, 0], semantic[:, 0] + grouping.assign.out_proj(expected), rtol=1e-4, atol=1e-5)

    tokens.square().mean().backward()
    gradients = {name: float(each.grad.abs().max()) for name, each in grouping.named_parameters()}
    # divided by `assign_eps`, those of the similarities would be a million times larger than the others
    assert max(gradients.values()) < 100 and gradients["assign.k_proj.weight"] > 0


def test_assign_segment_mean_by_hand():
    logits = torch.tensor([[[1.0, 0.0, 2.0], [1.0, 5.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    values = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    means, group_idx = assign_segment_mean(logits, values, eps=1.0)
    # the first patch is a tie, which the lower group wins; sum / (count + 1)
    assert group_idx.tolist() == [[0, 1, 0]]
    expected = torch.tensor([[[4 / 3, 40 / 3], [1.0, 10.0], [0.0, 0.0]]])
    torch.testing.assert_close(means, expected)
    # gradient of the softmax over groups at the second patch, whose members of group 1 are it alone
    (gradient,) = torch.autograd.grad(means[0, 1, 0], logits)
    soft = logits.detach().softmax(1)[0]
    by_share = (values[0, :, 0] - means[0, 1, 0].detach()) / 2
    for patch in range(3):
        row = torch.zeros(3)
        row[1] = by_share[patch]
        want = soft[:, patch] * (row - (row * soft[:, patch]).sum())
        torch.testing.assert_close(gradient[0, :, patch], want)


@pytest.mark.parametrize(
    "options",
    (
        {"hard": False},
        {"similarity": "cosine"},
        {"merge": "mean"},
        {"mlp": True},
        {"semantic_init": "cls"},
        {"assign_eps": 1.0, "tau": 0.5},
        {"merge": "mean", "hard": False, "similarity": "cosine", "mlp": True, "semantic_self_attention": False},
    ),
    ids=str,
)
def test_options(options, tmp_path):
    model = model_of("internvl" if "semantic_init" in options else "clip", **options)
    batch = batch_of(model, [1, 2], seed=5)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**batch).logits
        default = model_of("internvl" if "semantic_init" in options else "clip")
        default.load_state_dict(model.state_dict(), strict=False)
        # an option that changed nothing would not be one; temperature and its like are for training
        assert not torch.allclose(default(**batch).logits, expected, rtol=0, atol=1e-4)
        model.save_pretrained(tmp_path)
        assert torch.equal(VistogForConditionalGeneration.from_pretrained(tmp_path)(**batch).logits, expected)
    model.train()(**batch, labels=labels).loss.backward()
    untouched = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert untouched == [] and all(each.grad.isfinite().all() for each in model.parameters() if each.requires_grad)


def test_mean_merge_averages_patches(model):
    mean = model_of(merge="mean")
    patches, semantic = torch.randn(1, NUM_PATCHES, 32), torch.randn(1, GROUPS, 32)
    groups = torch.tensor([[0] * 6 + [2] * 10])
    with torch.no_grad():
        tokens, _, _ = mean.model.grouping(patches, semantic, groups)
    torch.testing.assert_close(tokens[0, 0], patches[0, :6].mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[0, 2], patches[0, 6:].mean(0), rtol=1e-5, atol=1e-5)
    # no patch, no mean: the semantic token itself
    assert torch.equal(tokens[0, [1, 3]], semantic[0, [1, 3]])


def test_shares_of_soft_assignment_sum_to_one_patch():
    model = model_of(hard=False, merge="mean")
    patches, semantic = torch.randn(2, NUM_PATCHES, 32), torch.randn(2, GROUPS, 32)
    with torch.no_grad():
        tokens, logits, group_idx = model.model.grouping(patches, semantic)
    shares = logits.softmax(1)
    expected = shares @ patches / shares.sum(-1, keepdim=True)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(group_idx, logits.argmax(1))


def test_temperature_changes_gradients_alone():
    patches, semantic = torch.randn(1, NUM_PATCHES, 32), torch.randn(1, GROUPS, 32)
    found = []
    for tau in (1.0, 0.25):
        grouping = model_of(tau=tau).model.grouping
        tokens, _, _ = grouping(patches, semantic)
        tokens.square().sum().backward()
        found.append((tokens.detach(), grouping.assign.k_proj.weight.grad))
    assert torch.equal(found[0][0], found[1][0]) and not torch.allclose(found[0][1], found[1][1], rtol=1e-3)


def test_class_token_is_the_origin_of_semantic_tokens():
    for name in ("clip", "internvl"):
        model = model_of(name, semantic_init="cls")
        tower, weight = model.model.vision_tower, model.model.semantic_tokens.weight
        token = tower.embeddings.class_embedding if name == "clip" else tower.embeddings.cls_token.flatten()
        with torch.no_grad():
            expected = run(model, pixels(), token + weight)[1]
            assert torch.equal(model.model.encode(pixels())["semantic"], expected)


def test_initial_semantic_tokens_differ():
    torch.manual_seed(0)
    model = VistogForConditionalGeneration(tiny_config("vistog", num_semantic_tokens=12, similarity="cosine"))
    tokens = model.model.semantic_tokens.weight.detach()
    assert float(tokens.std()) == pytest.approx(0.02, rel=0.15) and abs(float(tokens.mean())) < 0.005
    assert float(torch.pdist(tokens).min()) > 0.05
    assert float(model.model.grouping.assign.logit_scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-3)


def test_groups_reach_the_language_model_and_are_no_labels(model):
    batch = batch_of(model, [2, 1], seed=6)
    labels = torch.randint(1, 200, batch["input_ids"].shape)
    placeholders = batch["input_ids"] == model.config.image_token_id
    with torch.no_grad():
        out = model(**batch, labels=labels)
        masked = model(**batch, labels=labels.masked_fill(placeholders, -100))
    assert out.num_visual_tokens.tolist() == (GROUPS * batch["num_tiles"]).tolist()
    assert torch.equal(out.loss, masked.loss)
    # of each tile the first G placeholders stay
    kept = out.kept_mask[placeholders].unflatten(0, (-1, NUM_PATCHES))
    assert bool(kept[:, :GROUPS].all()) and not bool(kept[:, GROUPS:].any())


def test_every_admissible_budget_is_honoured(model):
    batch = batch_of(model, [1, 2], seed=7)
    tiles = batch["num_tiles"]
    for image in range(3):
        for count, kept in (
            (int(tiles[image]) * GROUPS, GROUPS),
            (int(tiles[image]) * NUM_PATCHES - 1, GROUPS),
            (int(tiles[image]) * NUM_PATCHES, NUM_PATCHES),
            (1.0, NUM_PATCHES),
            (0.99, GROUPS),
        ):
            budgets = ["full", "auto", "full"]
            budgets[image] = count
            counts = model.count_visual_tokens(**batch, vtc_budget=budgets)
            assert int(counts[image]) == kept * int(tiles[image])
        smallest = int(tiles[image]) * GROUPS
        budgets[image] = smallest - 1
        with pytest.raises(ValueError, match=f"smallest admissible count is {smallest} "):
            model(**batch, vtc_budget=budgets)


def test_mixed_budgets_equal_each_alone(model):
    batch = batch_of(model, [2, 1], seed=8)
    with torch.no_grad():
        auto, full = model.model(**batch), model.model(**batch, vtc_budget="full")
        mixed = model.model(**batch, vtc_budget=["full", None, "full"])
    tiles = batch["num_tiles"].tolist()
    per_image = [
        out.image_hidden_states.split(out.num_visual_tokens.tolist())[image]
        for image, out in enumerate((full, auto, full))
    ]
    torch.testing.assert_close(mixed.image_hidden_states, torch.cat(per_image), rtol=1e-5, atol=1e-5)
    first, second, third = mixed.router_decisions.split(tiles)
    assert torch.equal(second, auto.router_decisions.split(tiles)[1])
    assert bool((first == -1).all()) and bool((third == -1).all()) and bool((full.router_decisions == -1).all())
    assert full.router_logits is None
    assert mixed.router_logits.split(tiles)[0].count_nonzero() == 0
    torch.testing.assert_close(mixed.router_logits.split(tiles)[1], auto.router_logits.split(tiles)[1])


def test_full_leaves_the_semantic_tokens_out(model):
    batch = batch_of(model, [1, 2], seed=9)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in broken.model.named_parameters():
            if name.startswith(("semantic_tokens", "grouping")):
                parameter.fill_(float("nan"))
        expected = model(**batch, vtc_budget="full").logits
        assert torch.equal(broken(**batch, vtc_budget="full").logits, expected)
        assert torch.equal(broken(**batch, vtc_budget=["full"] * 3).logits, expected)
        assert broken.get_image_features(batch["pixel_values"]).last_hidden_state.shape[1] == NUM_PATCHES


@pytest.mark.window
@pytest.mark.parametrize("name", ("clip", "clip-last", "early", "siglip", "siglip-last"))
def test_full_equals_llava(name):
    model = model_of(name)
    batch = batch_of(model, [1, 2], seed=10)
    theirs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.equal(model(**batch, vtc_budget="full").logits, uncompressed(model)(**theirs).logits)


def test_given_groups_replace_the_models_own(model):
    batch = batch_of(model, [1, 1], seed=11)
    num_tiles = int(batch["num_tiles"].sum())
    with torch.no_grad():
        auto = model(**batch)
        assert torch.equal(model(**batch, router_decisions=auto.router_decisions).logits, auto.logits)
        given = torch.arange(NUM_PATCHES).remainder(GROUPS).repeat(num_tiles, 1)
        given[0] = -1
        out = model(**batch, router_decisions=given)
    assert torch.equal(out.router_decisions, given)
    assert int(out.num_visual_tokens.sum()) == NUM_PATCHES + GROUPS * (num_tiles - 1)
    assert not torch.allclose(out.logits, auto.logits, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    (
        lambda groups: groups[1:],
        lambda groups: groups[:, :-1],
        lambda groups: groups.float(),
        lambda groups: groups.clone().fill_(GROUPS),
        lambda groups: groups.clone().fill_(-2),
        lambda groups: groups.clone().index_fill_(1, torch.tensor([3]), -1),
    ),
)
def test_bad_groups_raise(model, change):
    batch = batch_of(model, [1, 1], seed=12)
    groups = torch.zeros(int(batch["num_tiles"].sum()), NUM_PATCHES, dtype=torch.long)
    with pytest.raises(ValueError, match="router_decisions"):
        model(**batch, router_decisions=change(groups))
    with pytest.raises(ValueError, match="router_decisions"):
        model(**batch, router_decisions=groups, vtc_budget="auto")


def test_precomputed_features_give_the_same_result(model):
    batch = batch_of(model, [1, 2], seed=13)
    with torch.no_grad():
        expected = model(**batch)
        plain = model(**batch, vtc_budget="full")
        pixel_values = batch.pop("pixel_values")
        features = model.model.encode(pixel_values)
        assert {name: states.shape[1] for name, states in features.items()} == {
            "patches": NUM_PATCHES,
            "semantic": GROUPS,
        }
        assert torch.equal(model(**batch, image_features=features).logits, expected.logits)
        full = model(**batch, image_features=features, vtc_budget="full").logits
        torch.testing.assert_close(full, plain.logits, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="image_features"):
            model(**batch, image_features={"patches": features["patches"]})
        patches = model(**batch, image_features={"patches": features["patches"]}, vtc_budget="full")
        assert torch.equal(patches.logits, full)


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


def test_autocast_groups_in_float32(model):
    batch = batch_of(model, [1, 2], seed=15)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
    assert out.router_logits.dtype == torch.float32 and bool(out.logits.isfinite().all())


def test_state_dict_of_llava_lacks_the_new_parts_alone(model):
    stock = uncompressed(model)
    state = {
        name.replace("vision_tower.vision_model.", "vision_tower."): tensor
        for name, tensor in stock.state_dict().items()
    }
    loaded = VistogForConditionalGeneration(model.config).load_state_dict(state, strict=False)
    assert loaded.unexpected_keys == []
    assert {name.split(".")[1] for name in loaded.missing_keys} == {"semantic_tokens", "grouping"}


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


@pytest.mark.parametrize(
    "fields",
    (
        {"num_semantic_tokens": 0},
        {"num_semantic_tokens": 16},
        {"semantic_init": "zeros"},
        {"similarity": "l2"},
        {"merge": "sum"},
        {"tau": 0.0},
        {"tau": float("nan")},
        {"assign_eps": 0.0},
        {"empty_assign_eps": -1.0},
        {"hard": "yes"},
        {"mlp": 4},
        {"stage1_grouping": None},
        {"gumbel_noise": 1},
        {"semantic_self_attention": "all"},
        {"downsample_ratio": 0.5},
        {"vision_feature_layer": -5},
        {"vision_feature_layer": [-2, -1]},
        {"vision_feature_select_strategy": "full"},
        {"image_seq_length": 4},
    ),
    ids=str,
)
def test_bad_config_fields_raise(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        tiny_config("vistog", **fields)


def test_towers_that_cannot_be_run_raise():
    with pytest.raises(ValueError, match="dinov2"):
        tiny_config("vistog", vision_config={"model_type": "dinov2", "image_size": 32, "patch_size": 8})
    siglip = {"vision_config": dict(SIGLIP)}
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        tiny_config("vistog", **siglip)
    with pytest.raises(ValueError, match="class token"):
        tiny_config("vistog", **siglip, vision_feature_select_strategy="full", semantic_init="cls")


@pytest.mark.window
@pytest.mark.parametrize("name", ("clip", "siglip"))
def test_from_base_llava_adds_the_new_parts(name, tmp_path):
    source = model_of(name)
    stock = uncompressed(source)
    stock.save_pretrained(tmp_path)
    batch = batch_of(source, [1, 2], seed=17)
    theirs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = stock(**theirs).logits
        for base in (stock, tmp_path):
            model = from_base(base, "vistog", num_semantic_tokens=5, dtype=torch.float32)
            assert model.config.vision_feature_layer == -2 and model.config.num_semantic_tokens == 5
            assert torch.equal(model(**batch, vtc_budget="full").logits, expected)
            out = model(**batch)
            assert out.num_visual_tokens.tolist() == (5 * batch["num_tiles"]).tolist()
            assert bool(out.logits.isfinite().all())
            assert 0.01 < float(model.model.semantic_tokens.weight.detach().std()) < 0.03


@pytest.mark.window
def test_from_base_internvl_gets_a_plain_projector():
    source = tiny_model("vico")
    stock = uncompressed(source)
    model = from_base(stock, "vistog", num_semantic_tokens=GROUPS)
    config = model.config
    assert (config.downsample_ratio, config.image_seq_length, config.vision_feature_layer) == (1.0, 64, -1)
    state, theirs = model.state_dict(), stock.state_dict()
    new = ("model.semantic_tokens.", "model.grouping.", "model.multi_modal_projector.")
    for name, tensor in state.items():
        if not name.startswith(new):
            assert torch.equal(tensor, theirs[name]), name
    # the layer that would fit is not taken over either
    linear = "model.multi_modal_projector.linear_2.weight"
    assert theirs[linear].shape == state[linear].shape and not torch.equal(state[linear], theirs[linear])
    batch = batch_of(model, [1, 2], seed=18)
    with torch.no_grad():
        assert torch.equal(run(model, batch["pixel_values"], None)[0], plain_states(model, batch["pixel_values"]))
        assert bool(model(**batch).logits.isfinite().all())


def test_missing_parts_are_initialised(model, tmp_path):
    new = ("model.semantic_tokens", "model.grouping")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(new)}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = VistogForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all(name.startswith(new) for name in info["missing_keys"])
    tokens = loaded.model.semantic_tokens.weight.detach()
    assert float(tokens.std()) == pytest.approx(0.02, rel=0.3) and float(torch.pdist(tokens).min()) > 0.05
    assert torch.equal(loaded.model.grouping.norm_image.weight, torch.ones(32))
    assert float(loaded.model.grouping.assign.q_proj.weight.detach().abs().max()) < 0.2
