"""Qwen3.5 of transformers as a base of LLaVolta: a decoder most of whose layers are recurrent."""

import copy

import pytest
import torch
from contract_samples import GREEDY, batch_of
from factories import TINY, row_of, stock_inputs, tiny_config, tiny_model, uncompressed
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig

from hf_vtc import estimate
from hf_vtc.convert import convert, from_base
from hf_vtc.lora import default_lora_config
from hf_vtc.methods import record_named
from hf_vtc.methods.costs import RecurrentShape, config_dict, decoder_of
from hf_vtc.models.configuration_llavolta import LlavoltaConfig

NAME = "llavolta on qwen3_5"
needs_base = pytest.mark.skipif("qwen3_5" not in CONFIG_MAPPING, reason="Qwen3.5 needs transformers >= 5.2")
pytestmark = pytest.mark.window


@pytest.mark.skipif("qwen3_5" in CONFIG_MAPPING, reason="transformers has Qwen3.5")
def test_a_host_without_the_base_is_told_the_version():
    with pytest.raises(ImportError, match="qwen3_5 needs transformers >= 5.2"):
        LlavoltaConfig(vision_config={"model_type": "qwen3_5"})


@pytest.fixture(scope="module")
def model():
    return tiny_model(NAME)


@needs_base
def test_from_base_equals_the_stock_model_bit_for_bit(model, tmp_path):
    stock = uncompressed(model)
    stock.generation_config = GenerationConfig(pad_token_id=0)
    stock.save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    # published files draft tokens by layers that the stock model leaves out
    drafts = {"mtp.fc.weight": torch.ones(2, 2), "mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
    save_file(weights | drafts, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta", compress_layer_idx=0)
    assert not report.fresh_keys and not report.missing_keys and set(report.unused_keys) == set(drafts)
    assert all(any(name in note for note in report.notes) for name in drafts)
    models = [from_base(each, "llavolta", compress_layer_idx=0) for each in (stock, tmp_path / "hf")]
    for each in (*models, AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")):
        for seed, side in ((8, "left"), (9, "right")):
            batch = batch_of(each, seed, images_per_row=[2, 0, 1], padding_side=side)
            with torch.no_grad():
                expected = stock(**stock_inputs(stock, batch)).logits
                real = batch["attention_mask"].bool()
                assert torch.equal(each(**batch, vtc_budget="full").logits[real], expected[real])


@needs_base
@pytest.mark.parametrize("options", ({}, {"num_beams": 3}), ids=str)
def test_ids_are_those_of_the_stock_model(model, options):
    stock = uncompressed(model)
    batch = batch_of(model, 3, images_per_row=[1, 2], padding_side="left")
    expected = stock.generate(**stock_inputs(stock, batch), **GREEDY | options)
    assert torch.equal(model.generate(**batch, **GREEDY | options, vtc_budget="full"), expected)


@needs_base
@pytest.mark.parametrize("compressor", ("avgpool1d", "avgpool2d", "uniform"))
def test_a_row_in_a_batch_is_the_row_alone(compressor):
    """Recurrent layers see what is left of a row, and no padding: what is dropped they never saw."""
    model = tiny_model(NAME, compressor=compressor)
    for seed, side in ((2, "left"), (4, "right")):
        batch = batch_of(model, seed, images_per_row=[2, 1, 1], padding_side=side)
        with torch.no_grad():
            out = model(**batch)
        full = model.count_visual_tokens(**batch, vtc_budget="full")
        assert (out.num_visual_tokens < full).all()
        for row in range(3):
            with torch.no_grad():
                alone = model(**row_of(batch, row))
            found, expected = out.logits[row, out.kept_mask[row]], alone.logits[0, alone.kept_mask[0]]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@needs_base
def test_one_batch_size_generates_and_another_trains(model):
    batch = batch_of(model, 6, images_per_row=[1, 1, 2, 0])
    trained = copy.deepcopy(model)
    trained.generate(**batch, **GREEDY)
    row = row_of(batch, 2)
    labels = row["input_ids"].masked_fill(row["input_ids"] == model.config.image_token_id, -100)
    loss = trained.train()(**row, labels=labels).loss
    assert torch.equal(loss, copy.deepcopy(model).train()(**row, labels=labels).loss)
    adapted = get_peft_model(copy.deepcopy(model), default_lora_config(model, r=2)).train()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    for part in ("linear_attn", "self_attn", "merger"):
        assert any(part in name for name in moved), part


@needs_base
def test_costs_count_both_kinds_of_layers(model):
    shape = decoder_of(config_dict(model))
    assert isinstance(shape, RecurrentShape) and shape.num_recurrent == 1
    decoder = model.model.language_model
    matrices = sum(each.numel() for each in decoder.layers.parameters() if each.ndim > 1)
    assert shape.params == matrices
    batch = batch_of(model, 1, images_per_row=[1])
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**batch, vtc_budget="full", use_cache=True)
    cache = next(value for name, value in cache.items() if name in ("past_key_values", "cache"))
    tensors = [value for layer in cache.layers for value in _tensors(vars(layer))]
    assert sum(each.numel() * 4 for each in tensors) == shape.kv_cache_bytes(length, bytes_per_value=4)
    found = estimate(model, image_size=(40, 56), vtc_budget=0.5)
    assert found.kv_cache_bytes < found.full_kv_cache_bytes and found.prefill_flops < found.full_prefill_flops


def _tensors(value):
    """What a layer of a cache holds, also in lists and dictionaries of states."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [each for item in value for each in _tensors(item)] if isinstance(value, (list, tuple)) else []


@needs_base
def test_what_does_not_fit_is_refused_by_name(model):
    with pytest.raises(ValueError, match="`compress_layer_idx` must be 0 on qwen3_5, or 2"):
        tiny_config(NAME, compress_layer_idx=1)
    with pytest.raises(ValueError, match="kmeans"):
        tiny_config(NAME, compressor="kmeans")
    tiny_config(NAME, compress_layer_idx=2)
    fields = TINY[NAME].config
    parts = {name: fields[name] for name in ("vision_config", "text_config")}
    for method in ("avg_llava", "cdpruner", "vico", "vistog", "visionzip"):
        with pytest.raises(ValueError, match=f"vtc_{method} does not fit qwen3_5"):
            record_named(method).config(**parts)
        with pytest.raises(ValueError, match=f"{method} does not fit qwen3_5"):
            from_base(uncompressed(model), method)
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` does not work with .* recurrent layers"):
        model.generate(**text, **GREEDY, prompt_lookup_num_tokens=3)
