"""Parts of a model that are elsewhere when they are not at work: offloaded by accelerate, quantised, or sharded.

All of that works for weights that are read by calling their module, or inside of the module that holds them.
"""

import pytest
import torch
from accelerate import dispatch_model
from factories import random_batch, tiny_model

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
