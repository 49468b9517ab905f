"""Cut the golden data of ViCO down to what the tests read.

    python tests/golden/select_vico.py FULL_FOLDER tests/golden/vico

The full folder holds a tiny random checkpoint in the official InternVL3.5-Flash layout with inputs and outputs of the
original code (OpenGVLab/InternVL@2410d1d, InternLM/lmdeploy@1263d5c; `golden.json` names versions and seeds). Kept are
inputs, router outputs, decisions, ids, and every second position of the logits.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

LOGITS_STRIDE = 2
DROPPED = ("inputs_embeds", "visual_tokens_selected", "vit_last_hidden_state")


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "checkpoint", target / "checkpoint", dirs_exist_ok=True)
    tensors = {}
    for name, tensor in load_file(source / "golden.safetensors").items():
        if name.endswith(DROPPED):
            continue
        if name.endswith("logits_v8"):
            tensor = tensor[:, ::LOGITS_STRIDE].contiguous()
        tensors[name] = tensor
    save_file(tensors, target / "golden.safetensors")
    golden = json.loads((source / "golden.json").read_text())
    golden.pop("tensors")
    golden["logits_position_stride"] = LOGITS_STRIDE
    (target / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
