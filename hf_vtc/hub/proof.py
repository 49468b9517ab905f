"""The proof that a folder is complete: its code computes, without hf_vtc, what the installed classes compute."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .. import models  # noqa: F401  registers the installed classes that `check` compares with
from ..auto import REMOTE_CODE_FROM_FOLDER

_AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "AutoImageProcessor",
)
_PROBE_FILE = "probe.safetensors"
# characters of the clean process's error output that are worth repeating
_ERROR_TAIL = 3000


def check(folder: str | os.PathLike) -> None:
    """Prove that a folder is complete: without hf_vtc its own code computes what the installed classes compute.

    A new process, in which hf_vtc cannot be imported and the Hub is offline, loads model and processor with
    `trust_remote_code=True`, encodes a fixed prompt with two images and computes logits for the budgets `"auto"` and
    `"full"`. Inputs and logits must be equal bit for bit. Both sides run on the CPU.

    Raises:
        RuntimeError: something is missing, does not load, or differs; the message says what.
    """
    folder = Path(folder)
    if not REMOTE_CODE_FROM_FOLDER:
        raise RuntimeError(
            "Remote code from a local folder needs transformers >= 5.11 (from the Hub, older ones load it too). "
            "Upgrade transformers, or pass `check=False`."
        )
    _require_complete(folder)
    with tempfile.TemporaryDirectory(prefix="hf_vtc_check_") as scratch:
        remote = _probe_in_clean_process(folder, Path(scratch))
        installed = _probe(str(folder), trust_remote_code=False)
    for name, expected in installed.items():
        if name not in remote:
            raise RuntimeError(f"The code in {folder} gives no {name!r}, the installed hf_vtc does. Export it again.")
        if not torch.equal(remote[name], expected):
            raise RuntimeError(
                f"The code in {folder} and the installed hf_vtc give different {name!r} for the same input. The "
                "folder holds other code than this version: export it again."
            )


def _probe(folder: str, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Inputs and logits of a fixed prompt with two images; its source also runs alone, so it imports for itself."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype="auto", output_loading_info=True
    )
    absent = sorted(loading["missing_keys"]) + sorted(loading["mismatched_keys"])
    if absent:
        raise RuntimeError(f"The weights of {folder} lack {len(absent)} tensors of the model: {absent[:5]}.")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)

    # squares, since they give the fewest tiles; a pattern that needs no random generator
    pixels = bytes(index * index // 97 % 256 for index in range(64 * 64 * 3))
    images = [Image.frombytes("RGB", (64, 64), pixels), Image.frombytes("RGB", (64, 64), pixels[::-1])]
    text = f"{processor.image_token}\n{processor.image_token}\nWhat is different?"
    inputs = processor(images=images, text=[text], return_tensors="pt").to(model.dtype)
    results = {name: value.contiguous() for name, value in inputs.items()}
    for budget in ("auto", "full"):
        with torch.no_grad():
            results[f"logits of budget {budget}"] = model(**inputs, vtc_budget=budget).logits.contiguous()
    return results


def _probe_in_clean_process(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    script = "\n".join(
        (
            "import sys",
            'sys.modules["hf_vtc"] = None',
            "import torch",
            "from safetensors.torch import save_file",
            f"torch.set_num_threads({torch.get_num_threads()})",
            inspect.getsource(_probe),
            f"save_file(_probe({str(folder.absolute())!r}, trust_remote_code=True), {_PROBE_FILE!r})",
        )
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"{folder} does not work in a process without hf_vtc (exit status {result.returncode}). Its error output "
            f"ends with:\n{result.stderr[-_ERROR_TAIL:]}"
        )
    return load_file(scratch / _PROBE_FILE)


def _require_complete(folder: Path) -> None:
    """Raise a RuntimeError unless weights are there and `auto_map` names an existing file for every auto class."""
    auto_map = {}
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        auto_map.update(_auto_map_in(folder / name))
    missing = [key for key in _AUTO_CLASSES if key not in auto_map]
    if missing:
        raise RuntimeError(
            f"`auto_map` of {folder} lacks {missing}. Save model and processor with `save_code=True`, or use "
            "`hf_vtc.hub.export`."
        )
    files = {f"{auto_map[key].split('.')[0]}.py" for key in _AUTO_CLASSES}
    absent = sorted(name for name in files if not (folder / name).is_file())
    if absent:
        raise RuntimeError(f"`auto_map` of {folder} names files that are not there: {absent}. Export it again.")
    if not any(folder.glob("*.safetensors")):
        raise RuntimeError(f"{folder} holds no safetensors weights. Export it again.")


def _auto_map_in(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    # transformers 5 nests the image processor inside of the processor's file
    nested = values.get("image_processor", {})
    return {**values.get("auto_map", {}), **nested.get("auto_map", {})}
