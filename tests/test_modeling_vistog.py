"""What is particular to VisToG: grouping, budgets of two counts, and its parts beside those of a base."""

import copy

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_config, tiny_model, uncompressed
from vistog_models import GROUPS, NUM_PATCHES, batch_of, model_of, pixels, plain_states, run

from hf_vtc.convert import from_base
from hf_vtc.models.modeling_vistog import VistogForConditionalGeneration, gumbel_noise
from hf_vtc.models.ops_vtc import assign_segment_mean


@pytest.fixture(scope="module")
def model():
    return model_of()


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
