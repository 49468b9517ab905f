"""Store what every method computes, and compare with it after a change that must not change a number.

    python tests/same_numbers.py store values.pt      # before
    python tests/same_numbers.py compare values.pt    # after; differences are printed, status 1 if there are any

Random tiny models of every method and of its variants, and the shipped checkpoints; left and right padding, rows
without images and with several; budgets, decisions; float32 and bfloat16; logits, counts, decisions, losses, gradients
and generated ids. Run both with `HF_VTC_OPS=off` and with `HF_VTC_OPS=require`.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_VTC_OPS", "off")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from factories import budgets_of, random_batch, tiny_model  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

import hf_vtc  # noqa: E402, F401

ANYRES = {"mm_patch_merge_type": "spatial_unpad"}
VARIANTS = {
    "vico": [{}, {"routing_rule": "absolute"}, {"flash_mode": False}],
    "avg_llava": [
        {},
        {"router_attention": "tiles", "router_text": "first_image", "unpad_rule": "token_grid"},
        {"router_select": False},
    ],
    "llavolta": [
        *({"compress_layer_idx": layer_idx} for layer_idx in (-1, 0, 1, 2, 3)),
        *({"compressor": name} for name in ("uniform", "random", "avgpool2d", "kmeans", "attention")),
        {"compressor": "uniform", "compress_layer_idx": 0},
    ],
    "vistog": [{}, {"hard": False}, {"merge": "mean", "mlp": True}, {"semantic_init": "cls", "similarity": "cosine"}],
    "convllava": [{}],
}
GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
# of the same operations in another order, in float32; bfloat16 is compared at its own resolution
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def tiny_models() -> Iterator[tuple[str, torch.nn.Module]]:
    for method, variants in VARIANTS.items():
        for variant in variants:
            yield f"{method} {variant}", tiny_model(method, **variant)


def shipped_models() -> Iterator[tuple[str, torch.nn.Module, dict]]:
    """Checkpoints of this repository, each with a batch of two questions about two pages."""
    pages = json.loads((ROOT / "examples/images/pages.json").read_text())[:2]
    for folder in sorted(ROOT.glob("model_cards/*-tiny")):
        if folder.name == "base-tiny":
            continue
        processor = AutoProcessor.from_pretrained(folder)
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": page["questions"][0]["question"]}],
                }
            ]
            for page in pages
        ]
        text = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = [[Image.open(ROOT / "examples/images" / page["image"])] for page in pages]
        batch = processor(text=text, images=images, return_tensors="pt")
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        yield folder.name, model, dict(batch)


def budgets(model: torch.nn.Module) -> list:
    if model.config.model_type == "vtc_llavolta" and not model.config.compresses:
        return [None, "full"]
    return [None, "full", *budgets_of(model.config)]


def evaluated(model: torch.nn.Module, batch: dict, budget) -> dict[str, torch.Tensor]:
    """What `forward` and `generate` give for a batch."""
    with torch.no_grad():
        out = model(**batch, vtc_budget=budget)
        values = {"logits": out.logits[batch["attention_mask"].bool()], "counts": out.num_visual_tokens}
        for name in ("router_logits", "router_decisions", "kept_mask"):
            if getattr(out, name) is not None:
                values[name] = getattr(out, name)
        values["ids"] = model.generate(**batch, vtc_budget=budget, **GREEDY)
    return values


def trained(model: torch.nn.Module, batch: dict, budget) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step; dropout and noise are drawn from one seed."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    model.train()
    out = model(**batch, labels=labels, vtc_budget=budget)
    out.loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    model.eval()
    return {"loss": out.loss.detach()} | {f"gradient {name}": each.clone() for name, each in gradients.items()}


def computed() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for name, model in tiny_models():
        for dtype in TOLERANCE:
            model = model.to(dtype)
            for seed in range(4):
                side = ("left", "right")[seed % 2]
                batch = dict(random_batch(model.config, torch.Generator().manual_seed(seed), seed + 1, None, side))
                for budget in budgets(model):
                    yield f"{name} {dtype} {seed} {budget}", evaluated(model, batch, budget)
                if seed < 2:
                    yield f"{name} {dtype} {seed} training", trained(model, batch, budgets(model)[-seed])
            text = {"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
            yield f"{name} {dtype} text", trained(model, text, None)
    for name, model, batch in shipped_models():
        for dtype in TOLERANCE:
            model = model.to(dtype)
            for budget in (None, "full", 1.0):
                yield f"{name} {dtype} {budget}", evaluated(model, batch, budget)


def differences(stored: dict, found: dict) -> Iterator[str]:
    for name, tensor in stored.items():
        other = found.get(name)
        if other is None:
            yield f"{name} is missing"
        elif tensor.shape != other.shape:
            yield f"{name} has shape {tuple(other.shape)}, had {tuple(tensor.shape)}"
        elif not torch.equal(tensor, other):
            if not tensor.is_floating_point():
                yield f"{name} differs"
                continue
            scale = max(float(tensor.float().abs().max()), 1.0)
            far = float((tensor.float() - other.float()).abs().max()) / scale
            yield f"{name} differs by {far:.1e}" + (" !" if not far <= TOLERANCE[tensor.dtype] else "")
    for name in found.keys() - stored.keys():
        yield f"{name} is new"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("store", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "store":
        torch.save({name: values for name, values in computed() if given.only in name}, given.file)
        return 0
    stored, num_same, num_other = torch.load(given.file), 0, 0
    for name, values in computed():
        if given.only not in name:
            continue
        found = list(differences(stored[name], values))
        num_same, num_other = num_same + (not found), num_other + bool(found)
        for line in found:
            print(f"{name}: {line}")
    print(f"{num_same} cases bit-equal, {num_other} with differences")
    return int(num_other > 0)


if __name__ == "__main__":
    sys.exit(main())
