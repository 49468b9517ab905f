"""Models of hf_vtc for lmms-eval, which finds `manifest` by its entry point at every start.

Nothing of hf_vtc is imported here: every run of lmms-eval, of whatever model, would pay for it.
"""

from typing import Any


def manifest() -> Any:
    """What `lmms_eval --model hf_vtc` stands for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="hf_vtc", chat_class_path="hf_vtc.evaluation.lmms.HfVtc")
