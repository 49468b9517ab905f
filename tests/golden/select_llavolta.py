"""Cut the golden data of LLaVolta down to what the tests read.

    python tests/golden/select_llavolta.py FULL_FOLDER tests/golden/llavolta

The full folder holds a tiny random checkpoint in the official layout with inputs and outputs of the original code
(Beckschen/LLaVolta@31ec151; `golden.json` names versions, seeds and patches). Kept are the sets below, logits at every
n-th position, and of the checkpoint what an output depends on: `golden.json` lists under `omitted` the tensors, or the
rows of the embeddings, that the tests fill with zeros.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

POSITION_STRIDE = 16
# (case, set) pairs with outputs; None stands for every case
KEPT = {"batch": None, "multi": ("none", "K2_s2", "K2_s5_nondiv", "K0_s4", "Kneg1_s4")}
GRADIENTS = ("model.mm_projector.0.weight",)
EMBEDDINGS = "model.embed_tokens.weight"


def is_kept(name: str) -> bool:
    parts = name.split(".")
    if parts[0] in KEPT:
        return parts[1] != "image_features"
    if parts[0] == "generate":
        return parts[-1] != "scores"
    if parts[1] not in KEPT or KEPT[parts[1]] is not None and parts[0] not in KEPT[parts[1]]:
        return False
    return ".grad." not in name or name.partition(".grad.")[2] in GRADIENTS


def selected(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, ::POSITION_STRIDE].clone() if name.endswith("logits_v8") else tensor


def select_checkpoint(source: Path, target: Path, used_ids: torch.Tensor) -> dict[str, dict]:
    """Write the checkpoint without what no output depends on, and say what that is."""
    tower = json.loads((source / "vision_tower" / "config.json").read_text())
    shutil.copytree(source / "vision_tower", target / "vision_tower", dirs_exist_ok=True)
    shutil.copy(source / "config.json", target)
    tensors, omitted = load_file(source / "model.safetensors"), {}
    for name in list(tensors):
        # features are the output of the last layer but one
        if f"encoder.layers.{tower['num_hidden_layers'] - 1}." in name or "post_layernorm" in name:
            omitted[name] = {"shape": list(tensors.pop(name).shape)}
    omitted[EMBEDDINGS] = {"shape": list(tensors[EMBEDDINGS].shape), "rows": used_ids.tolist()}
    tensors[EMBEDDINGS] = tensors[EMBEDDINGS][used_ids].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return omitted


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    golden = json.loads((source / "golden.json").read_text())
    full = load_file(source / "golden.safetensors")
    tensors = {name: selected(name, tensor) for name, tensor in full.items() if is_kept(name)}
    used = {int(token) for name, tensor in tensors.items() if "input_ids" in name for token in tensor.flatten()}
    # decoding feeds back what it wrote
    used |= {
        int(token) for name, tensor in tensors.items() if name.endswith("sequences") for token in tensor.flatten()
    }
    used_ids = torch.tensor(sorted(token for token in used if token >= 0))
    golden["omitted"] = select_checkpoint(source, target, used_ids)
    golden["logits_position_stride"] = POSITION_STRIDE
    # the full file describes every tensor
    del golden["tensors"]
    save_file(tensors, target / "golden.safetensors", metadata={"format": "pt"})
    (target / "golden.json").write_text(json.dumps(golden) + "\n")
    for file in target.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
