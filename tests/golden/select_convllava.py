"""Cut the golden data of ConvLLaVA down to what the tests read.

    python tests/golden/select_convllava.py FULL_FOLDER tests/golden/convllava

The full folder holds a tiny random checkpoint in both published layouts with inputs and outputs of the original code
(alibaba/conv-llava@3e7ae57; `golden.json` names versions and seeds). Kept are the layout of two folders, from which
the tests put the single file together; of the prompts, every eighth position, from the tower's features on, since
pixels are bulky; and for the tower the photograph, whose pixels follow from bytes and are known by their SHA-256.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

POSITION_STRIDE = 8
# the last stage's map is `visual_tokens` in another order
DROPPED = ("pixel_values", "stem", "stage1", "stage2", "stage3", "stage4", "stage5", "padded_uint8")


def main(source: Path, target: Path) -> None:
    for folder in ("checkpoint_split_llm", "checkpoint/vision_tower"):
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    tensors, digests, grids = {}, {}, {}
    for name, tensor in load_file(source / "golden.safetensors").items():
        case, _, kind = name.partition(".")
        if kind == "stage5":
            grids[case] = list(tensor.shape[-2:])
        if name.startswith("preprocess.pixel_values_"):
            digests[kind] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            continue
        if kind in DROPPED:
            continue
        if kind == "logits":
            name, tensor = f"{name}_v8", tensor[..., ::8]
        if kind in ("logits", "logits_v8", "inputs_embeds"):
            tensor = tensor[:, ::POSITION_STRIDE]
        tensors[name] = tensor.contiguous()
    save_file(tensors, target / "golden.safetensors")
    golden = json.loads((source / "golden.json").read_text())
    for name in ("tensors", "checkpoint_keys"):
        golden.pop(name)
    golden |= {"position_stride": POSITION_STRIDE, "sha256": digests, "grids": grids}
    (target / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
