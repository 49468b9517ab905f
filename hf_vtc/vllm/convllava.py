"""ConvLLaVA in vLLM: the size of an image says all."""

from vllm.multimodal import MULTIMODAL_REGISTRY

from ..models.modeling_convllava import ConvllavaVision
from .base import VtcServed
from .processing import VtcDummyInputs, VtcMultiModalProcessor, VtcProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(VtcMultiModalProcessor, info=VtcProcessingInfo, dummy_inputs=VtcDummyInputs)
class ConvllavaForConditionalGeneration(VtcServed):
    """A tower that compresses, and the engine's decoder."""

    vision_class = ConvllavaVision
