"""Parts of a model that are elsewhere when they are not at work: offloaded by accelerate, quantised, or sharded.

All of that works for weights that are read by calling their module, or inside of the module that holds them.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from accelerate import dispatch_model
from factories import random_batch, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

# every method, and what reads weights in a way of its own
VARIANTS = {
    "vico": ("vico", {}),
    "avg_llava": ("avg_llava", {}),
    "convllava": ("convllava", {}),
    "llavolta": ("llavolta", {}),
    "llavolta, by attention": ("llavolta", {"compressor": "attention"}),
    "vistog": ("vistog", {}),
    "vistog, from the class token": ("vistog", {"semantic_init": "cls", "similarity": "cosine"}),
    "vistog, merging projected": ("vistog", {"merge": "projected"}),
    "vistog, behind InternViT": ("vistog", {"tower": "internvl"}),
}
GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=VARIANTS)
def model(request):
    method, fields = VARIANTS[request.param]
    return tiny_model(method, **fields)


def batch_for(model, num_rows=2):
    return dict(random_batch(model.config, torch.Generator().manual_seed(0), num_rows=num_rows))


@torch.no_grad()
def results_of(model, batch):
    out = model(**batch)
    features = model.get_image_features(
        **{name: batch[name] for name in ("pixel_values", "num_tiles", "image_sizes") if name in batch}
    )
    return {
        "logits": out.logits,
        "router_logits": out.router_logits,
        "counts": model.count_visual_tokens(**batch),
        "features": torch.cat(list(features.pooler_output)),
        "ids": model.generate(**batch, **GREEDY),
    }


def assert_equal_results(found, expected):
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        assert tensor is None or torch.equal(found[name], tensor), name


def holders_of(model):
    """Modules with parameters or buffers of their own that are saved."""
    saved = model.state_dict()
    return [
        name
        for name, module in model.named_modules()
        if any(
            f"{name}.{own}" in saved
            for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        )
    ]


def test_every_module_alone_on_disk_gives_the_same_bits(model, tmp_path):
    batch, whole = batch_for(model), model.state_dict()
    expected = results_of(model, batch)
    for number, name in enumerate(holders_of(model)):
        other = type(model)(model.config).eval()
        other.load_state_dict(whole)
        device_map = {"": "cpu", name: "disk"}
        other = dispatch_model(
            other, device_map, main_device="cpu", offload_dir=str(tmp_path / str(number)), force_hooks=True
        )
        held = other.get_submodule(name)
        if [*held.parameters(recurse=False)]:
            assert all(parameter.is_meta for parameter in held.parameters(recurse=False)), name
        assert_equal_results(results_of(other, batch), expected)


class Closed(nn.Module):
    """A layer whose weights nobody sees, as adapters and quantisers put their own in the place of layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def layers_of(model) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Layers of PyTorch's own kinds, each with the module that holds it and its name there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding)):
                yield parent, name, child


def test_no_weight_is_read_without_its_layer(model):
    batch, closed = batch_for(model), copy.deepcopy(model)
    # where vision towers and `get_input_embeddings` of the host do so themselves
    hosts = [module for name, module in closed.named_modules() if name.endswith("vision_tower.embeddings")]
    kept = {id(child) for module in hosts for child in module.modules()} | {id(closed.get_input_embeddings())}
    for parent, name, layer in layers_of(closed):
        if id(layer) not in kept:
            setattr(parent, name, Closed(layer))
    expected = results_of(model, batch)
    assert_equal_results(results_of(closed, batch), expected)


@pytest.mark.parametrize("name", ["torchao", "quanto"])
def test_int8_weights_are_those_of_a_float_model_rounded(name, model, tmp_path):
    if name == "torchao":
        torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
        config = QuantoConfig(weights="int8")
    model.save_pretrained(tmp_path)
    load = AutoModelForImageTextToText.from_pretrained
    quantized = load(tmp_path, quantization_config=config, device_map="cpu").eval()
    rounded, num_rounded = copy.deepcopy(model), 0
    with torch.no_grad():
        for layer_name, module in quantized.named_modules():
            weight = vars(module).get("_parameters", {}).get("weight")
            if weight is not None and type(weight) is not nn.Parameter:
                rounded.get_submodule(layer_name).weight.copy_(weight.dequantize())
                num_rounded += not torch.equal(
                    rounded.get_submodule(layer_name).weight, model.get_submodule(layer_name).weight
                )
    num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    # the head stays as it is
    assert num_rounded == num_linear - 1
    batch = batch_for(model)
    found, expected = results_of(quantized, batch), results_of(rounded, batch)
    assert torch.equal(found["counts"], expected["counts"])
    for field in ("logits", "router_logits", "features"):
        if expected[field] is not None:
            torch.testing.assert_close(found[field], expected[field], rtol=1e-3, atol=1e-3)


def test_bitsandbytes_in_8_bits_calls_every_layer(model, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    quantized = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    ).eval()
    layers = {
        name: module for name, module in quantized.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)
    }
    called = set()
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    found = results_of(quantized, batch_for(model))
    assert bool(found["logits"].isfinite().all())
    # layers of a tower that lie behind the hidden state that is read
    assert {name for name in set(layers) - called if not name.startswith("model.vision_tower.")} == set()


def test_adapters_on_every_linear_layer_merge_to_the_same(model):
    batch, generator = batch_for(model, 3), torch.Generator().manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        before = adapted(**batch).logits
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        unmerged = adapted(**batch)
        merged = adapted.merge_and_unload().eval()(**batch)
    real = batch["attention_mask"].bool()
    assert (unmerged.logits - before)[real].abs().max() > 1e-2
    torch.testing.assert_close(merged.logits[real], unmerged.logits[real], rtol=1e-4, atol=1e-4)
    if unmerged.router_decisions is not None:
        assert torch.equal(merged.router_decisions, unmerged.router_decisions)


TARGETS = (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


@pytest.mark.parametrize("targets", TARGETS, ids=["two", "seven"])
def test_adapters_by_the_names_of_tutorials(model, targets):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    reached = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if ".lora_" in name
    }
    assert reached == set(targets)
    assert bool(adapted(**batch_for(model)).logits.isfinite().all())


def test_adapters_swap_in_place(model, tmp_path):
    hotswap = pytest.importorskip("peft.utils.hotswap").hotswap_adapter
    batch, expected = batch_for(model), {}
    for idx in range(2):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear")).eval()
        generator = torch.Generator().manual_seed(idx)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            expected[idx] = adapted(**batch).logits
        adapted.save_pretrained(tmp_path / str(idx))
    hotswap(adapted, str(tmp_path / "0"), adapter_name="default")
    with torch.no_grad():
        assert torch.equal(adapted(**batch).logits, expected[0])
    assert not torch.equal(expected[0], expected[1])
