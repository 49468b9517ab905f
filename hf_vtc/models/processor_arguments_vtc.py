"""Arguments of a call to the processor: which there are, and what is refused."""

from typing import Any

from transformers.processing_utils import ProcessingKwargs

from .host_processor_vtc import TextArguments
from .image_processing_vtc import VtcImageProcessorKwargs
from .tiling_vtc import refuse_unknown


class VtcImagesKwargs(VtcImageProcessorKwargs, total=False):
    """Arguments of a call that concern images: fields of the image processor, and how many tokens are reserved."""

    vtc_budget: Any


class VtcProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call. Rows are padded unless `padding=False`: batches of images rarely have one length."""

    images_kwargs: VtcImagesKwargs
    text_kwargs: TextArguments
    _defaults = {"text_kwargs": {"padding": True}}


_IMAGE_ARGUMENTS = frozenset(VtcImagesKwargs.__annotations__)
# `return_tensors` stands elsewhere before transformers 5
_TEXT_ARGUMENTS = frozenset((*VtcProcessorKwargs.__annotations__["text_kwargs"].__annotations__, "return_tensors"))
_NESTED_ARGUMENTS = {
    "text_kwargs": _TEXT_ARGUMENTS,
    "images_kwargs": _IMAGE_ARGUMENTS,
    "common_kwargs": frozenset(("return_tensors",)),
    # of media that no model of ours takes
    "videos_kwargs": frozenset(),
    "audio_kwargs": frozenset(),
}
CALL_ARGUMENTS = frozenset((*_IMAGE_ARGUMENTS, *_TEXT_ARGUMENTS, *_NESTED_ARGUMENTS, "return_mm_token_type_ids"))


def refuse_unknown_arguments(kwargs: dict[str, Any]) -> None:
    """Raise for an argument of a call, or of one of its dictionaries, that the processor does not know."""
    refuse_unknown(kwargs, CALL_ARGUMENTS, "`VtcProcessor`")
    for name, known in _NESTED_ARGUMENTS.items():
        refuse_unknown(kwargs.get(name) or {}, known, f"`{name}` of `VtcProcessor`")


def layout_fields(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call to the image processor that decide how images are cut."""
    return {name: value for name, value in kwargs.items() if name not in ("input_data_format", "return_tensors")}
