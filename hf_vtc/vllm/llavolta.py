"""LLaVolta in vLLM, where images get shorter before the sequence is built (`compress_layer_idx=-1`)."""

from vllm.multimodal import MULTIMODAL_REGISTRY

from ..models.configuration_llavolta import LlavoltaConfig
from ..models.modeling_llavolta import LlavoltaVision
from .base import VtcServed
from .processing import VtcDummyInputs, VtcMultiModalProcessor, VtcProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(VtcMultiModalProcessor, info=VtcProcessingInfo, dummy_inputs=VtcDummyInputs)
class LlavoltaForConditionalGeneration(VtcServed):
    """Images shortened behind the projector, and the engine's decoder."""

    vision_class = LlavoltaVision

    @classmethod
    def check(cls, config: LlavoltaConfig) -> None:
        layer_idx = config.compress_layer_idx
        if layer_idx != -1 and not config.compresses_nowhere:
            raise ValueError(
                f"`compress_layer_idx` must be -1 to be served by vLLM, got {layer_idx}: images that get shorter at a "
                "decoder layer need layers with caches of two lengths, or positions with gaps, which the engine does "
                "not have. Serve it with `--hf-overrides '{\"compress_layer_idx\": -1}'`, which shortens images "
                "before the sequence is built (measure the answers: it is another model), or use `generate` or "
                "`hf-vtc serve`."
            )
        # what an operator overrides was checked by nobody
        config.set_compression(layer_idx, config.compress_stride)
        if config.compressor == "random" and config.compresses:
            raise ValueError(
                "`compressor='random'` cannot be served by vLLM: which tokens stay depends on the images of one call, "
                "and an engine encodes images one by one. Use another compressor."
            )
