"""VisToG in vLLM: a fixed number of groups for each tile, or all patches."""

from vllm.multimodal import MULTIMODAL_REGISTRY

from ..models.modeling_vistog import VistogVision
from .base import VtcServed
from .processing import VtcDummyInputs, VtcMultiModalProcessor, VtcProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(VtcMultiModalProcessor, info=VtcProcessingInfo, dummy_inputs=VtcDummyInputs)
class VistogForConditionalGeneration(VtcServed):
    """Grouped tokens, and the engine's decoder."""

    vision_class = VistogVision
