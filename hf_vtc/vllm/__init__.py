"""Serving by vLLM, with the visual tokens really saved: `docs/serve.md`.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. Nothing else of hf_vtc
imports this package, and vllm is imported only where vLLM itself does it.
"""

import importlib.util

from .window import warn_of_unproven


def register() -> None:
    """Make every method that has a file here known to vLLM, by the name of its class in `config.json`."""
    from vllm import ModelRegistry

    from ..methods.record import RECORDS

    warn_of_unproven()
    for record in RECORDS.values():
        if importlib.util.find_spec(f"{__name__}.{record.name}") is not None:
            # as text, so that nothing is loaded before a model is
            ModelRegistry.register_model(record.head.__name__, f"{__name__}.{record.name}:{record.head.__name__}")
