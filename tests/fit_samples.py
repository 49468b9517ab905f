"""What tests of fits share: records with images, requests of a few steps, and what came out."""

import json
from pathlib import Path

import factories
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_vtc.fit import FitRequest

# stages of two steps: one that is saved, and one that is lost when a run dies in the third
SMALL = (
    "batch_size=2",
    "training.per_device_train_batch_size=2",
    "training.max_steps=3",
    "training.warmup_steps=0",
    "training.learning_rate=0.01",
)
# what their stages compare with, of a decoder of few layers
METHOD_OVERRIDES = {"llavolta": ("options.scheme=two",)}
NUM_PICTURES = 8


def write_records(folder: Path) -> Path:
    """Nine records on eight pictures: two records show the same one, under another name and in another format."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for idx in range(NUM_PICTURES):
        picture = Image.new("RGB", (40, 40), (30 * idx, 255 - 30 * idx, 90))
        picture.save(folder / f"{idx}.png")
        records.append(_record(idx, f"{idx}.png"))
    Image.open(folder / "0.png").save(folder / "again.bmp")
    records.append(_record(NUM_PICTURES, "again.bmp"))
    (folder / "records.json").write_text(json.dumps(records, indent=1))
    return folder / "records.json"


def _record(idx: int, image: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\nwhat {idx}?"}, {"from": "gpt", "value": f"ton {idx}"}]
    return {"id": f"r{idx}", "image": image, "kind": "even" if idx % 2 == 0 else "odd", "conversations": turns}


def write_model(method: str, folder: Path) -> Path:
    """A tiny model of a method, and its processor."""
    torch.manual_seed(0)
    factories.tiny_model(method).save_pretrained(folder, save_code=False)
    factories.tiny_processor(method).save_pretrained(folder, save_code=False)
    return folder


def small_request(model: Path, data: Path, output: Path, method: str | None = None, **options) -> FitRequest:
    """A fit of three steps per stage."""
    more = (*METHOD_OVERRIDES.get(method, ()), *options.pop("overrides", ()))
    fields = {"workers": 0, "logging_steps": 1, "save_steps": 2, "budgets": ("full",), **options}
    return FitRequest(str(model), str(data), output, method=method, overrides=(*SMALL, *more), **fields)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are not the same bit for bit, or not in both."""
    return {name for name in {*first, *second} if not _same(first.get(name), second.get(name))}


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and first.dtype == second.dtype and torch.equal(first, second)
