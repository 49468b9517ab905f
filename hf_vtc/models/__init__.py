"""Every method that hf_vtc offers, registered with the Auto classes of transformers when this package is imported."""

from typing import NamedTuple

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

# the top-level name is a stand-in without torchvision in some 5.x
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_avg_llava import AvgLlavaConfig
from .configuration_convllava import ConvllavaConfig
from .configuration_llavolta import LlavoltaConfig
from .configuration_vico import VicoConfig
from .configuration_vistog import VistogConfig
from .image_processing_vtc import VtcImageProcessor
from .modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel
from .modeling_convllava import ConvllavaForConditionalGeneration, ConvllavaModel
from .modeling_llavolta import LlavoltaForConditionalGeneration, LlavoltaModel
from .modeling_vico import VicoForConditionalGeneration, VicoModel
from .modeling_vistog import VistogForConditionalGeneration, VistogModel
from .processing_vtc import VtcProcessor

try:
    # transformers 4.57 has the class with a mapping of its own; 5.0 removed both
    from transformers import AutoModelForVision2Seq
except ImportError:
    _HEAD_AUTO_CLASSES = (AutoModelForImageTextToText,)
else:
    _HEAD_AUTO_CLASSES = (AutoModelForImageTextToText, AutoModelForVision2Seq)


class Method(NamedTuple):
    """The classes that make up one method."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    head: type[PreTrainedModel]
    processor: type[ProcessorMixin]
    image_processor: type[BaseImageProcessor]


METHODS = (
    Method(VicoConfig, VicoModel, VicoForConditionalGeneration, VtcProcessor, VtcImageProcessor),
    Method(AvgLlavaConfig, AvgLlavaModel, AvgLlavaForConditionalGeneration, VtcProcessor, VtcImageProcessor),
    Method(ConvllavaConfig, ConvllavaModel, ConvllavaForConditionalGeneration, VtcProcessor, VtcImageProcessor),
    Method(LlavoltaConfig, LlavoltaModel, LlavoltaForConditionalGeneration, VtcProcessor, VtcImageProcessor),
    Method(VistogConfig, VistogModel, VistogForConditionalGeneration, VtcProcessor, VtcImageProcessor),
)

for _method in METHODS:
    AutoConfig.register(_method.config.model_type, _method.config, exist_ok=True)
    AutoModel.register(_method.config, _method.model, exist_ok=True)
    for _auto_class in _HEAD_AUTO_CLASSES:
        _auto_class.register(_method.config, _method.head, exist_ok=True)
    AutoProcessor.register(_method.config, _method.processor, exist_ok=True)
    # the older of two spellings that transformers 5 takes: "slow" means that it works on PIL images
    AutoImageProcessor.register(_method.config, slow_image_processor_class=_method.image_processor, exist_ok=True)
