"""Vision-token compression for transformers. Importing this package registers its models with the Auto classes."""

from importlib import import_module
from typing import Any

from . import methods, models
from .auto import AutoModelForVision2Seq, install_vision2seq
from .version import __version__ as __version__

# loaded on first use, so that loading a model costs neither peft, matplotlib nor the trainers
_SUBMODULES = ("convert", "data", "demo", "evaluation", "fit", "hub", "lora", "plot", "report", "trainers")
_FUNCTIONS = {"bench": ".report", "estimate": ".report", "evaluate": ".evaluation"}

__all__ = ["AutoModelForVision2Seq", "install_vision2seq", "methods", "models", *_FUNCTIONS, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
