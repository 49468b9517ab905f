"""The proof that a folder is complete: its code computes, without hf_vtc, what the installed classes compute."""

import inspect
import os
import re
import signal
import site
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from .. import models  # noqa: F401  registers the installed classes that `check` compares with
from ..auto import REMOTE_CODE_FROM_FOLDER
from ..files import read_json, require_own_files

_AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "AutoImageProcessor",
)
_PROBE_FILE = "probe.safetensors"
# bytes of the clean process's error output that are worth repeating
_ERROR_TAIL = 3000
_SECONDS, _SECONDS_PER_GB = 600, 120
# what the clean process gets of the environment: programs, languages, and how to compute
_KEPT_VARIABLES = ("PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "CONDA_PREFIX")
_KEPT_PREFIXES = (
    *("LC_", "LD_", "DYLD_", "PYTHON", "HF_VTC_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "PYTORCH_", "ATEN_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "DNNL_", "ONEDNN_", "CUDA_", "CUBLAS_", "HIP_", "ROCR_"),
)
_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY")


def check(folder: str | os.PathLike, timeout: float | None = None) -> None:
    """Prove that a folder is complete: without hf_vtc its own code computes what the installed classes compute.

    A new process, in which hf_vtc cannot be imported and the Hub is offline, loads model and processor with
    `trust_remote_code=True`, encodes a fixed prompt with two images, and a video where both take any, and computes
    logits for the budgets `"auto"` and `"full"`. Inputs and logits must be equal bit for bit. Both sides run on the
    CPU.

    This runs the folder's code. Its process is given a home of its own and no environment variable beside those that
    decide how to compute, so that no access token is within its reach by name; it is no sandbox.

    Args:
        folder (`str` or `os.PathLike`): as `export` writes it.
        timeout (`float`, *optional*): seconds after which the process is ended. Default: 10 minutes, and 2 more per
            GB of weights.

    Raises:
        RuntimeError: something is missing, does not load, takes too long, or differs; the message says what.
        ValueError: a link leads out of the folder, or a file of settings is none.
    """
    folder = Path(folder)
    if not REMOTE_CODE_FROM_FOLDER:
        raise RuntimeError(
            "Remote code from a local folder needs transformers >= 5.11 (from the Hub, older ones load it too). "
            "Upgrade transformers, or pass `check=False`."
        )
    require_own_files(folder)
    _require_complete(folder)
    if timeout is None:
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        timeout = _SECONDS + _SECONDS_PER_GB * num_bytes / 1e9
    with tempfile.TemporaryDirectory(prefix="hf_vtc_check_") as scratch:
        remote = _probe_in_clean_process(folder, Path(scratch), timeout)
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
    """Inputs and logits of a fixed prompt; its source also runs alone, so it imports for itself."""
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
    shown = {}
    if processor.video is not None and model.config.video_token_id is not None:
        text += processor.video_token
        shown = {"videos": [images * 2], "video_metadata": [{"fps": 2}], "do_sample_frames": False}
    inputs = processor(images=images, text=[text], return_tensors="pt", **shown).to(model.dtype)
    results = {name: value.contiguous() for name, value in inputs.items()}
    for budget in ("auto", "full"):
        with torch.no_grad():
            results[f"logits of budget {budget}"] = model(**inputs, vtc_budget=budget).logits.contiguous()
    return results


def _probe_in_clean_process(folder: Path, scratch: Path, timeout: float) -> dict[str, torch.Tensor]:
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
    with open(scratch / "errors", "w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=scratch,
            env=_clean_environment(scratch),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            # a group of its own, so that it ends with all that it has started
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"{folder} was still computing after {timeout:.0f} s in a process without hf_vtc, which was ended. If "
                "this machine needs longer, pass `check=False` and call `hf_vtc.hub.check(folder, timeout=...)`."
            ) from None
        finally:
            _end_group(process)
        errors.seek(max(errors.seek(0, os.SEEK_END) - _ERROR_TAIL, 0))
        tail = errors.read().decode("utf-8", errors="replace")
    if status != 0:
        raise RuntimeError(
            f"{folder} does not work in a process without hf_vtc (exit status {status}). Its error output ends with:\n"
            f"{tail}"
        )
    return load_file(scratch / _PROBE_FILE)


def _end_group(process: subprocess.Popen) -> None:
    """Kill a process, finished or not, and whatever is left of its group."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _clean_environment(scratch: Path) -> dict[str, str]:
    """Environment of the process: what decides how it computes, and nothing that is a secret."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or (name.startswith(_KEPT_PREFIXES) and not _SECRET.search(name))
    }
    return kept | {
        # where libraries look for tokens that are stored
        "HOME": str(scratch),
        "HF_HOME": str(scratch / "hf_home"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        # packages that were installed for this user alone
        "PYTHONUSERBASE": site.getuserbase(),
    }


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
    values = read_json(file)
    # transformers 5 nests the image processor inside of the processor's file
    nested = values.get("image_processor")
    maps = [part.get("auto_map") for part in (values, nested) if isinstance(part, dict)]
    merged = {key: value for auto_map in maps if isinstance(auto_map, dict) for key, value in auto_map.items()}
    return {key: value for key, value in merged.items() if isinstance(value, str)}
