"""What lies in the package hf_vtc and beside it, found without importing it."""

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# a name without a dot is found without being imported
PACKAGE = Path(importlib.util.find_spec("hf_vtc").origin).parent
# a wheel carries copies inside of the package (setup.py); in a clone the originals are beside it
_SHIPPED = PACKAGE / "_shipped" if (PACKAGE / "_shipped").is_dir() else PACKAGE.parent
SHIPPED_MODELS = _SHIPPED / "model_cards"
SHIPPED_PAGES = _SHIPPED / "examples" / "images" / "pages.json"
_DEFAULT_MODEL = "vico-tiny"
_QUESTION = {"image": "Describe the image.", "video": "Describe the video."}
# of a model that has seen nothing but what examples/digit_forms draws
NOTE_ON_TINY_MODELS = (
    "This model reads drawn forms only: pages of coloured boxes with handwritten digits, as in examples/images. What "
    "it says about any other picture means nothing. A model that reads photographs: hf-vtc convert "
    "OpenGVLab/InternVL3_5-1B-Flash my-flash (downloads about 2 GB), then hf-vtc run --model my-flash --image "
    "photo.jpg"
)
_CLONE = "install hf_vtc from a clone of its repository: pip install -e ."


def module_alone(path: str) -> ModuleType:
    """A file of hf_vtc as a module by itself; the package would load torch."""
    file = PACKAGE / path
    spec = importlib.util.spec_from_file_location(f"_hf_vtc_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkpoint_path(name: str | None) -> str:
    """The folder or repository of a model; a shipped checkpoint by default."""
    if name is None:
        folder = SHIPPED_MODELS / _DEFAULT_MODEL
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"The checkpoint that comes with hf_vtc is not here ({folder}). Name a model with --model, or {_CLONE}"
            )
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return str(folder) if folder.is_dir() else name
    raise FileNotFoundError(f"{name!r} is neither a folder nor owner/name of a repository on the Hub. Check the path.")


def shipped_models() -> list[str]:
    """Folders of the checkpoints that come with hf_vtc; their uncompressed base is none of them."""
    configs = sorted(SHIPPED_MODELS.glob("*-tiny/config.json"))
    types = [json.loads(path.read_text(encoding="utf-8")).get("model_type") for path in configs]
    is_method = module_alone("methods/names.py").is_method
    folders = [str(path.parent) for path, model_type in zip(configs, types) if is_method(model_type)]
    if not folders:
        raise FileNotFoundError(
            f"The checkpoints that come with hf_vtc are not here ({SHIPPED_MODELS}). Name a model with --model, or "
            f"{_CLONE}"
        )
    return folders


def is_shipped(path: str) -> bool:
    """Whether a model is one of those that come with hf_vtc."""
    return Path(path).resolve().parent == SHIPPED_MODELS.resolve()


def pages_of(
    images: Sequence[str] | None, question: str | None, videos: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The images and videos of the command line with its question, or the shipped pages with theirs."""
    if images or videos:
        shown = [*(("image", image) for image in images or ()), *(("video", video) for video in videos or ())]
        return [{kind: path, "questions": [{"question": question or _QUESTION[kind]}]} for kind, path in shown]
    if not SHIPPED_PAGES.is_file():
        raise FileNotFoundError(
            f"The pages that come with hf_vtc are not here ({SHIPPED_PAGES}). Name a picture with --image, or {_CLONE}"
        )
    pages = json.loads(SHIPPED_PAGES.read_text(encoding="utf-8"))
    for page in pages:
        page["image"] = str(SHIPPED_PAGES.parent / page["image"])
        if question:
            page["questions"] = [{"question": question}]
    return pages
