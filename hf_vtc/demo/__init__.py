"""A page in the browser: a picture, a question, a budget, and a model's answers without and with compression.

Needs gradio, which `pip install 'hf_vtc[demo]'` brings. Nothing here asks the network for anything: gradio's analytics
are off, and what the page shows comes from this machine.
"""

from importlib import import_module
from typing import Any

from .prompts import Prompt, model_inputs

__all__ = ["Prompt", "build_page", "launch", "model_inputs"]


def __getattr__(name: str) -> Any:
    # gradio takes seconds to load and is not there everywhere; questions need none of it
    if name in ("build_page", "launch"):
        return getattr(import_module(".page", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
