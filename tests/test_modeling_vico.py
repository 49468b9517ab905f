"""What is particular to ViCO: routing rule, budgets over tiles, and which connector runs."""

import pytest
import torch
from factories import random_batch, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from hf_vtc.models.modeling_vico import SingleQueryAttention, most_compressible, route_tiles


@pytest.fixture(scope="module")
def model():
    return tiny_model("vico")


def batch_of(model, images_per_row, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return random_batch(model.config, generator, images_per_row=images_per_row)


def p_compress(model, batch):
    with torch.no_grad():
        return model.model.router(model.model.encode(batch["pixel_values"])).softmax(-1)[:, 0]


def test_route_tiles_by_hand():
    p = torch.tensor([0.1, 0.4, 0.3, 0.9, 0.9])
    # quantile 0.5 of the first three is 0.3, and 0.9 does not exceed itself
    assert route_tiles(p, [3, 2], 0.5, 0.0).tolist() == [False, True, False, False, False]
    assert route_tiles(p, [5], 0.25, 0.35).tolist() == [False, True, False, True, True]
    assert route_tiles(p, [5], 0.25, 0.35, "absolute").tolist() == [False, True, False, True, True]
    assert route_tiles(p[:1], [1], 0.0, 0.0).tolist() == [False]
    assert route_tiles(p[:1], [1], 0.0, 0.1, "absolute").tolist() == [True]
    assert route_tiles(p, [0, 5, 0], 1.0, 0.0).tolist() == [False] * 5
    assert route_tiles(p, [5], 0.0, 1.1).tolist() == [False] * 5


def test_route_tiles_rounds_thresholds_to_the_routers_dtype():
    # 0.3 lies above its bfloat16 neighbour: compared in float32, the tile would not reach it
    p = torch.tensor([0.3, 0.1], dtype=torch.bfloat16)
    assert float(p[0]) != 0.3
    assert route_tiles(p, [2], 0.0, 0.3).tolist() == [True, False]


def test_most_compressible_breaks_ties_by_order():
    p_compress = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.2, 0.2, 0.3])
    marked = most_compressible(p_compress, torch.tensor([4, 2, 1]), torch.tensor([2, 1, 0]))
    assert marked.tolist() == [True, True, False, False, True, False, False]


@pytest.mark.parametrize("as_share", (True, False))
def test_every_admissible_budget_is_honoured(model, as_share):
    batch = batch_of(model, [1, 2], seed=3)
    full, small = model.config.image_seq_length, model.config.compressed_seq_length
    probabilities = p_compress(model, batch).split(batch["num_tiles"].tolist())
    for image, tiles in enumerate(batch["num_tiles"].tolist()):
        for num_compressed in range(tiles + 1):
            count = full * tiles - (full - small) * num_compressed
            budgets = ["full"] * len(batch["num_tiles"])
            budgets[image] = count / (full * tiles) if as_share else count
            with torch.no_grad():
                out = model(**batch, vtc_budget=budgets)
            assert out.num_visual_tokens[image] == count
            decisions = out.router_decisions.split(batch["num_tiles"].tolist())
            marked = most_compressible(probabilities[image], torch.tensor([tiles]), torch.tensor([num_compressed]))
            assert torch.equal(decisions[image], marked)
            assert not any(bool(other.any()) for idx, other in enumerate(decisions) if idx != image)
            # one token more than admissible changes nothing, one less takes the next count or raises
            assert model.count_visual_tokens(**batch, vtc_budget=budgets)[image] == count
            if not as_share:
                budgets[image] = count + 1
                assert model.count_visual_tokens(**batch, vtc_budget=budgets)[image] == count
    smallest = small * int(batch["num_tiles"][0])
    with pytest.raises(ValueError, match=f"smallest admissible count is {smallest}"):
        model(**batch, vtc_budget=smallest - 1)


def test_mixed_list_of_budgets(model):
    batch = batch_of(model, [2, 1], seed=4)
    auto = model.count_visual_tokens(**batch)
    full = model.count_visual_tokens(**batch, vtc_budget="full")
    mixed = model.count_visual_tokens(**batch, vtc_budget=["full", None, 1.0])
    assert mixed.tolist() == [full[0], auto[1], full[2]]


def test_router_decisions_override_the_rule(model):
    batch = batch_of(model, [1, 1], seed=5)
    decisions = torch.rand(int(batch["num_tiles"].sum())) < 0.5
    with torch.no_grad():
        out = model(**batch, router_decisions=decisions)
    assert torch.equal(out.router_decisions, decisions)
    saved = model.config.image_seq_length - model.config.compressed_seq_length
    assert int(out.num_visual_tokens.sum()) == 16 * len(decisions) - saved * int(decisions.sum())
    with pytest.raises(ValueError, match="router_decisions"):
        model(**batch, router_decisions=decisions, vtc_budget="full")
    with pytest.raises(ValueError, match="router_decisions"):
        model(**batch, router_decisions=decisions[1:])


@pytest.mark.parametrize(
    "budget, expected", (("full", (True, False)), (0.25, (False, True)), (0.7, (True, True))), ids=str
)
def test_a_tile_runs_through_the_connector_it_needs_only(model, budget, expected):
    batch = batch_of(model, [1], seed=6)
    assert int(batch["num_tiles"]) > 1
    tiles = {"multi_modal_projector": 0, "compressed_projector": 0}
    handles = [
        getattr(model.model, name).register_forward_hook(
            lambda module, args, output, name=name: tiles.update({name: output.shape[0]})
        )
        for name in tiles
    ]
    try:
        with torch.no_grad():
            out = model(**batch, vtc_budget=budget)
    finally:
        for handle in handles:
            handle.remove()
    assert tiles["compressed_projector"] == int(out.router_decisions.sum())
    assert tiles["multi_modal_projector"] == int((~out.router_decisions).sum())
    assert tuple(count > 0 for count in tiles.values()) == expected


def test_single_tile_follows_the_rule():
    for rule, expected in (("relative+absolute", 16), ("absolute", 4)):
        model = tiny_model("vico", routing_rule=rule, flash_absolute_threshold=0.0)
        batch = batch_of(model, [1], seed=0)
        batch["input_ids"] = torch.cat(
            [torch.tensor([[3, 4]]), torch.full((1, 16), model.config.image_token_id), torch.tensor([[5]])], dim=1
        )
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["pixel_values"], batch["num_tiles"] = batch["pixel_values"][:1], torch.tensor([1])
        assert model.count_visual_tokens(**batch).tolist() == [expected]


def test_flash_mode_off_is_full_length(model):
    batch = batch_of(model, [2], seed=7)
    off = tiny_model("vico", flash_mode=False)
    with torch.no_grad():
        assert torch.equal(off(**batch).logits, model(**batch, vtc_budget="full").logits)


def test_num_tiles_can_be_left_out(model):
    batch = batch_of(model, [2, 0, 1], seed=8)
    with torch.no_grad():
        with_counts = model(**batch)
        batch.pop("num_tiles")
        without = model(**batch)
    assert torch.equal(with_counts.logits, without.logits)
    assert torch.equal(with_counts.num_visual_tokens, without.num_visual_tokens)


def test_precomputed_features_give_the_same_result(model):
    batch = batch_of(model, [1, 2], seed=9)
    with torch.no_grad():
        expected = model(**batch, vtc_budget=0.5)
        features = model.model.encode(batch.pop("pixel_values"))
        assert torch.equal(model(**batch, image_features=features, vtc_budget=0.5).logits, expected.logits)
        assert torch.equal(
            model.count_visual_tokens(**batch, image_features=features, vtc_budget=0.5), expected.num_visual_tokens
        )


def test_attention_implementations_agree(model):
    batch = batch_of(model, [1, 2], seed=10)
    eager = tiny_model("vico")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected, out = model(**batch, vtc_budget=0.5), eager(**batch, vtc_budget=0.5, output_attentions=True)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=0, atol=1e-5)
    assert out.attentions[0].shape[-1] == int(out.kept_mask.sum(1).max())


def test_get_image_features_are_the_reserved_tokens(model):
    batch = batch_of(model, [2], seed=11)
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], num_tiles=batch["num_tiles"])
        full = model(**batch, vtc_budget="full").image_hidden_states
    assert [part.shape[0] for part in features.pooler_output] == (16 * batch["num_tiles"]).tolist()
    torch.testing.assert_close(torch.cat(features.pooler_output), full)


@pytest.mark.window
@pytest.mark.parametrize(
    "spelling", ({"rope_theta": 7000.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}), ids=str
)
def test_both_spellings_of_rotary_settings_are_read(spelling):
    text = tiny_config("vico").text_config.to_dict()
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        text.pop(name, None)
    config = tiny_config("vico", text_config=text | spelling)
    rope = AutoModel.from_config(config.text_config).rotary_emb
    torch.testing.assert_close(rope.inv_freq[1], torch.tensor(7000.0 ** (-2 / 16)))


@pytest.mark.parametrize(
    "fields",
    (
        {"downsample_ratio": 0.4},
        {"downsample_ratio": 1.0},
        {"image_seq_length": 250},
        {"ps_version": "v3"},
        {"routing_rule": "relative"},
        {"flash_relative_threshold": 1.5},
        {"router_num_heads": 5},
        {"vision_feature_select_strategy": "cls"},
    ),
    ids=str,
)
def test_bad_config_fields_raise(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        tiny_config("vico", **fields)


def test_single_query_attention_equals_multihead_attention():
    torch.manual_seed(0)
    stock = torch.nn.MultiheadAttention(32, 16, batch_first=True).double()
    torch.nn.init.normal_(stock.in_proj_bias)
    own = SingleQueryAttention(32, 16).double()
    names = ("q_proj", "k_proj", "v_proj")
    state = {f"{name}.weight": part for name, part in zip(names, stock.in_proj_weight.chunk(3))}
    state |= {f"{name}.bias": part for name, part in zip(names, stock.in_proj_bias.chunk(3))}
    own.load_state_dict(state | {f"out_proj.{key}": value for key, value in stock.out_proj.state_dict().items()})
    query, features = torch.randn(5, 32).double(), torch.randn(5, 9, 32).double()
    expected = stock(query[:, None], features, features, need_weights=False)[0][:, 0]
    torch.testing.assert_close(own(query, features), expected, rtol=0, atol=1e-12)


UNUSED = ("attn3", "attn4", "norm3", "norm4")


def unused_weights(tensors):
    return {name: value for name, value in tensors if set(UNUSED) & set(name.split("."))}


@pytest.mark.window
def test_unused_weights_load_and_save_and_are_no_parameters(model, tmp_path):
    assert unused_weights(model.named_parameters()) == {}
    names = unused_weights(model.state_dict().items()).keys()
    parts = [f"attn{idx}.{part}_proj" for idx in (3, 4) for part in ("q", "k", "v", "out")] + ["norm3", "norm4"]
    assert names == {f"model.router.{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
    model.save_pretrained(tmp_path, save_code=False)
    state = load_file(tmp_path / "model.safetensors")
    for name in names:
        state[name] = torch.randn(state[name].shape)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in names)
    loaded.save_pretrained(tmp_path / "again", save_code=False)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert state.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in state.items())
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(half.state_dict()[name], state[name].bfloat16()) for name in names)
    # a repository without them is complete
    save_file(
        {name: value for name, value in state.items() if name not in names},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    lean = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(bool(value.isfinite().all()) for value in lean.state_dict().values())
    batch = batch_of(model, [1])
    with torch.no_grad():
        assert torch.equal(lean(**batch).logits, model(**batch).logits)


def test_an_adapter_that_saves_the_router_has_no_parameter_without_a_gradient():
    targets = r"model\.language_model\.layers\.\d+\.self_attn\.[qv]_proj"
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["router"])
    adapted = get_peft_model(tiny_model("vico"), config).train()
    batch = batch_of(adapted, [2])
    out = adapted(**batch, labels=batch["input_ids"])
    (out.loss + out.router_logits.square().sum()).backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("router" in name for name in trained)
    assert [name for name in trained if adapted.get_parameter(name).grad is None] == []
