"""Parity of the grouping layer with GroupViT's, the closest public module: VisToG itself has no public code."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_config
from safetensors.torch import load_file

from hf_vtc.models.modeling_vistog import GroupAssignment, GroupingMlp
from hf_vtc.models.ops_vtc import assign_segment_mean

# other recordings in the same form can be named instead
FOLDER = Path(os.environ.get("HF_VTC_GOLDEN_VISTOG", Path(__file__).parent / "golden" / "vistog"))
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
TENSORS = load_file(FOLDER / "golden.safetensors")
WIDTH = TENSORS["semantic_tokens"].shape[-1]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ASSIGN_CASES = [name for name in GOLDEN["cases"] if f"{name}.raw_logits" in TENSORS]
IDENTITY_CASES = [name for name in ASSIGN_CASES if name.startswith("assign_identity")]
BLOCK_CASES = [name for name in GOLDEN["cases"] if f"{name}.weights.norm_tokens.weight" in TENSORS]


def eps_of(name):
    """The cases that average name no other value."""
    found = re.search(r"assign_eps=([0-9.e-]+[0-9])", GOLDEN["cases"][name])
    return float(found.group(1)) if found else 1e-6


def part(name, prefix):
    """Tensors `name.prefix.*` by what follows."""
    start = f"{name}.{prefix}."
    return {key.removeprefix(start): tensor for key, tensor in TENSORS.items() if key.startswith(start)}


def assignment_of(name, prefix="weights", **options):
    vision = {"model_type": "clip_vision_model", "hidden_size": WIDTH, "num_attention_heads": 1}
    options = {"assign_eps": eps_of(name), "empty_assign_eps": eps_of(name), **options}
    module = GroupAssignment(tiny_config("vistog", vision_config=vision, **options))
    state = {
        key.replace("proj.", "out_proj.") if key.startswith("proj.") else key: value
        for key, value in part(name, prefix).items()
    }
    if options.get("merge") == "mean":
        state = {key: value for key, value in state.items() if key.startswith(("q_proj", "k_proj"))}
    module.load_state_dict(state, strict="similarity" not in options)
    return module.eval()


def inputs_of(name):
    """Query and key of a case, which some cases were given normalised."""
    query, key = TENSORS["semantic_tokens"].clone(), TENSORS["image_tokens"].clone()
    if "normalised" in GOLDEN["cases"][name]:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    return query.requires_grad_(), key.requires_grad_()


# the softmax over groups does not see what is added to all of them: nothing but rounding is recorded, of terms as
# large as the largest gradient of the case
ZERO_IN_EXACT_ARITHMETIC = "q_proj.bias"


def assert_gradient_close(gradient, expected, largest=None):
    """Relative to the largest entry: empty groups multiply by 1 / `assign_eps`, and large terms cancel."""
    scale = max(1.0, float(expected.abs().max())) if largest is None else largest
    torch.testing.assert_close(gradient / scale, expected / scale, **CLOSE)


@pytest.mark.parametrize("name", ASSIGN_CASES)
def test_assignment_matches_the_original(name):
    module, (query, key) = assignment_of(name), inputs_of(name)
    noise = TENSORS.get(f"{name}.noise")
    module.train(noise is not None)
    out = module(query, key, key, noise=noise)
    hard = TENSORS[f"{name}.hard_assign"]
    torch.testing.assert_close(out.logits, TENSORS[f"{name}.raw_logits"], **CLOSE)
    torch.testing.assert_close(out.logits.softmax(1), TENSORS[f"{name}.soft_assign"], **CLOSE)
    assert torch.equal(F.one_hot(out.group_idx, hard.shape[1]).transpose(1, 2).float(), hard)
    if f"{name}.assign_index" in TENSORS:
        assert torch.equal(out.group_idx, TENSORS[f"{name}.assign_index"])
    if f"{name}.group_count" in TENSORS:
        counts = F.one_hot(out.group_idx, hard.shape[1]).sum(1)
        assert torch.equal(counts.float(), TENSORS[f"{name}.group_count"]) and bool((counts == 0).any())
    torch.testing.assert_close(out.tokens, TENSORS[f"{name}.out"], **CLOSE)

    (out.tokens * TENSORS[f"{name}.cotangent"]).sum().backward()
    assert_gradient_close(query.grad, TENSORS[f"{name}.grad_query"])
    assert_gradient_close(key.grad, TENSORS[f"{name}.grad_key"])
    gradients = {key.replace("out_proj.", "proj."): each.grad for key, each in module.named_parameters()}
    recorded = part(name, "grad")
    for parameter, expected in recorded.items():
        largest = None
        if parameter == ZERO_IN_EXACT_ARITHMETIC:
            largest = max(float(each.abs().max()) for each in recorded.values())
            assert float(expected.abs().max()) < 1e-6 * largest
        assert_gradient_close(gradients[parameter], expected, largest)


@pytest.mark.parametrize("name", IDENTITY_CASES)
def test_identity_projections_are_a_plain_mean(name):
    module, (query, key) = assignment_of(name, merge="mean"), inputs_of(name)
    with torch.no_grad():
        out = module(query, key, key)
    assert torch.equal(out.group_idx, TENSORS[f"{name}.assign_index"])
    torch.testing.assert_close(out.tokens, TENSORS[f"{name}.out"], **CLOSE)


@pytest.mark.parametrize("name", [name for name in IDENTITY_CASES if "normalised" in GOLDEN["cases"][name]])
def test_cosine_similarity_matches_normalised_tokens(name):
    module = assignment_of(name, merge="mean", similarity="cosine")
    _, normalised = inputs_of(name)
    with torch.no_grad():
        module.logit_scale.fill_(WIDTH**-0.5).log_()
        # lengths do not matter any more
        out = module(3 * TENSORS["semantic_tokens"], 0.1 * TENSORS["image_tokens"], normalised)
    torch.testing.assert_close(out.logits, TENSORS[f"{name}.raw_logits"], **CLOSE)
    assert torch.equal(out.group_idx, TENSORS[f"{name}.assign_index"])
    torch.testing.assert_close(out.tokens, TENSORS[f"{name}.out"], **CLOSE)


@pytest.mark.parametrize("name", ASSIGN_CASES)
def test_assign_segment_mean_matches_the_original(name):
    """The pure function on recorded logits: what a fused kernel will be held against."""
    weights, (_, key) = part(name, "weights"), inputs_of(name)
    logits = TENSORS[f"{name}.raw_logits"] + TENSORS.get(f"{name}.noise", 0.0)
    with torch.no_grad():
        values = F.linear(key, weights["v_proj.weight"], weights["v_proj.bias"])
        means, group_idx = assign_segment_mean(logits, values, eps_of(name))
        again, _ = assign_segment_mean(torch.zeros_like(logits), values, eps_of(name), group_idx=group_idx)
        out = F.linear(means, weights["proj.weight"], weights["proj.bias"])
    assert torch.equal(group_idx, TENSORS[f"{name}.hard_assign"].argmax(1))
    assert torch.equal(again, means)
    torch.testing.assert_close(out, TENSORS[f"{name}.out"], **CLOSE)


@pytest.mark.parametrize("name", BLOCK_CASES)
def test_whole_block_matches_the_original(name):
    """GroupViT's block around the assignment; its mixer and cross attention, which we leave out, are written here."""
    weights = part(name, "weights")

    def linear(prefix, states):
        return F.linear(states, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])

    def norm(prefix, states):
        return F.layer_norm(states, (WIDTH,), weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], 1e-5)

    def mlp(prefix, states):
        return linear(f"{prefix}.fc2", F.gelu(linear(f"{prefix}.fc1", states)))

    heads = (GOLDEN["config"]["heads"], -1)
    assign = assignment_of(name, "weights.assign")
    branch = GroupingMlp(WIDTH).eval()
    branch.load_state_dict(
        {f"norm.{key}": weights[f"norm_new_x.{key}"] for key in ("weight", "bias")}
        | part(name, "weights.mlp_channels")
    )
    with torch.no_grad():
        groups = norm("norm_tokens", TENSORS["semantic_tokens"])
        image = norm("norm_x", TENSORS["image_tokens"])
        groups = norm("norm_post_tokens", mlp("mlp_inter", groups.transpose(1, 2)).transpose(1, 2))
        attention = "pre_assign_attn.attn"
        query, key, value = (
            linear(f"{attention}.{each}_proj", states).unflatten(-1, heads).transpose(1, 2)
            for each, states in (("q", groups), ("k", image), ("v", image))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        groups = groups + linear(f"{attention}.out_proj", attended)
        groups = groups + mlp("pre_assign_attn.mlp", norm("pre_assign_attn.norm2", groups))
        groups = norm("pre_assign_attn.norm_post", groups)

        out = assign(groups, image, image)
        tokens = groups + out.tokens
        tokens = tokens + branch(tokens)
    torch.testing.assert_close(out.logits.softmax(1), TENSORS[f"{name}.soft_assign"], **CLOSE)
    torch.testing.assert_close(tokens, TENSORS[f"{name}.out"], **CLOSE)
