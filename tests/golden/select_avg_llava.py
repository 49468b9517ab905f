"""Cut the golden data of AVG-LLaVA down to what the tests read.

    python tests/golden/select_avg_llava.py FULL_FOLDER tests/golden/avg_llava

The full folder holds a tiny random checkpoint in the official layout with inputs and outputs of the original code
(DeepLearnXMU/AVG-LLaVA@3685bc8; `golden.json` names versions and seeds). Kept are the cases below, every n-th entry
of logits, embeddings and pixels, the small gradients, and of the checkpoint what an output depends on: `golden.json`
lists under `omitted` the tensors, or the rows of the embeddings, that the tests fill with zeros.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CASES = ("square_2x2", "wide_3x1", "wide_2x1", "small_square_tie")
# odd numbers, so that all columns and channels are met
STRIDES = {"pixel_values": 211, "inputs_embeds": 61, "logits_last16": 61, "logits_last4": 31, "text_only.logits": 31}
DROPPED = re.compile(
    r"(projected_features|pooled_\d+|text_embeds|filtered_text|router_token_logits|router_probs|forced_\d+\.inputs_embeds)$"
    r"|^rglf\.(filtered_text|grad\..*(linear[12]|out_proj|in_proj|0)\.?_?weight)$|^stage3\.grad\..*(q_proj|projector\.0)"
)
EMBEDDINGS = "model.embed_tokens.weight"


def strided(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or every n-th entry of one that `STRIDES` names."""
    step = STRIDES.get(name, STRIDES.get(name.rpartition(".")[2]))
    return tensor if step is None else tensor.flatten()[::step].clone()


def select_checkpoint(source: Path, target: Path, used_ids: torch.Tensor, num_layers: int) -> dict[str, dict]:
    """Write the checkpoint without what no output depends on, and say what that is."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors, omitted = load_file(source / "model.safetensors"), {}
    for name in list(tensors):
        if f"encoder.layers.{num_layers - 1}." in name or "post_layernorm" in name:
            omitted[name] = {"shape": list(tensors.pop(name).shape)}
    omitted[EMBEDDINGS] = {"shape": list(tensors[EMBEDDINGS].shape), "rows": used_ids.tolist()}
    tensors[EMBEDDINGS] = tensors[EMBEDDINGS][used_ids].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return omitted


def main(source: Path, target: Path) -> None:
    golden = json.loads((source / "golden.json").read_text())
    full = load_file(source / "golden.safetensors")
    cases = golden["summary"]["cases"]
    other_cases = set(cases) - set(CASES)
    tensors = {
        name: strided(name, tensor)
        for name, tensor in full.items()
        if name.split(".")[0] not in other_cases and not DROPPED.search(name)
    }
    golden["summary"]["cases"] = {name: cases[name] for name in CASES}
    golden["strides"] = STRIDES
    del golden["tensors"], golden["checkpoint_keys"]

    tower = json.loads((source / "checkpoint" / "vision_tower" / "config.json").read_text())
    ids = torch.cat([tensor.flatten() for name, tensor in tensors.items() if "_ids" in name]).unique()
    target.mkdir(parents=True, exist_ok=True)
    golden["omitted"] = select_checkpoint(
        source / "checkpoint", target / "checkpoint", ids[ids >= 0], tower["num_hidden_layers"]
    )
    save_file(tensors, target / "golden.safetensors")
    (target / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    counts = json.loads((source / "token_counts_336.json").read_text())
    (target / "token_counts_336.json").write_text(json.dumps(counts, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
