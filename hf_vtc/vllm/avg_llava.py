"""AVG-LLaVA in vLLM: each image at the granularity that fits its budget. Its router is never asked."""

from vllm.multimodal import MULTIMODAL_REGISTRY

from ..models.modeling_avg_llava import AvgLlavaVision
from .base import VtcServed
from .processing import VtcDummyInputs, VtcMultiModalProcessor, VtcProcessingInfo


class AvgLlavaProcessor(VtcMultiModalProcessor):
    auto_problem = (
        "its router reads the question, and an engine prepares and caches an image without it, before it is asked."
    )


@MULTIMODAL_REGISTRY.register_processor(AvgLlavaProcessor, info=VtcProcessingInfo, dummy_inputs=VtcDummyInputs)
class AvgLlavaForConditionalGeneration(VtcServed):
    """Tokens of one granularity for each image, and the engine's decoder."""

    vision_class = AvgLlavaVision
