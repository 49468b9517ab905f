"""ViCO in vLLM: a budget says how many tiles of an image are compressed, and the router in the encoder which.

`"auto"` asks the router how many, which an engine wants to know before its encoder runs. Where the environment
variable `HF_VTC_VLLM_AUTO` is 1, tower and router run a second time, in the process that prepares images. It costs the
memory of a second tower there, on the CPU, and the time of a forward pass of it per image that is not in the cache.
The quantile of the rule then spans the tiles of an image, since an engine prepares images one by one; the model's own
spans those of a sample. Prompts of one image give the same tokens.
"""

import os
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..models.layout_vtc import layout_of_images
from ..models.modeling_vico import VicoVision
from ..models.processing_vtc import VtcProcessor
from ..models.prompt_vtc import VisionInputs, budgets_per_image
from .base import VtcServed
from .budgets import Planned
from .processing import VtcDummyInputs, VtcMultiModalProcessor, VtcProcessingInfo

_SWITCH = "HF_VTC_VLLM_AUTO"


def tokens_by_router(vision: VicoVision, tiles: torch.Tensor) -> int:
    """Visual tokens that the router leaves of one image, from its `(T, 3, S, S)` tiles."""
    asked = VisionInputs(tiles, num_tiles=torch.tensor([len(tiles)]), vtc_budget="auto")
    layout = layout_of_images(vision.config, asked)
    scores = vision.score(vision.encode(tiles, layout), None, layout)
    return int(vision.choose(list(scores.for_host), layout).num_kept)


class VicoProcessor(VtcMultiModalProcessor):
    auto_problem = (
        "its router reads the pixels, and an engine fixes the placeholders of an image before that. Set the "
        f"environment variable {_SWITCH}=1 for a second tower in the server's process, which docs/serve.md describes."
    )

    @cached_property
    def vision(self) -> VicoVision:
        """Tower and router in this process."""
        model = self.info.ctx.model_config
        return VicoVision.from_pretrained(
            model.model, revision=model.revision, config=self.info.get_hf_config(), dtype=model.dtype
        )

    @torch.no_grad()
    def plan(self, processor: VtcProcessor, outputs: BatchFeature, vtc_budget: Any, fields: dict[str, Any]) -> Planned:
        num_tiles = outputs["num_tiles"].tolist()
        if os.environ.get(_SWITCH) == "1" and self.info.get_hf_config().flash_mode:
            images = outputs["pixel_values"].split(num_tiles)
            vtc_budget = [
                tokens_by_router(self.vision, tiles) if budget == "auto" else budget
                for budget, tiles in zip(budgets_per_image(vtc_budget, len(images)), images, strict=True)
            ]
        return super().plan(processor, outputs, vtc_budget, fields)


@MULTIMODAL_REGISTRY.register_processor(VicoProcessor, info=VtcProcessingInfo, dummy_inputs=VtcDummyInputs)
class VicoForConditionalGeneration(VtcServed):
    """Two connectors and a router, and the engine's decoder."""

    vision_class = VicoVision
