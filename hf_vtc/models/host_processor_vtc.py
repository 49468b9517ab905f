"""The door to transformers' processors: what the newest can do, on every supported version.

Seen on transformers 4.57.6 to 5.24.0. Before 5.10 each processor writes `__call__` itself, and before 5.23 masks of
what a model is trained to write do not know expanded images; two backports stand in for these.
"""

import bisect
import inspect
import re
from collections.abc import Iterable
from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import TextKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from .host_vtc import RELEASE
from .tiling_vtc import refuse_unknown

try:
    # transformers 5
    from transformers.image_processing_backends import PilBackend as ImageProcessorBase
except ImportError:
    # 4.57, where an image processor without torchvision derives from the base class itself
    from transformers.image_processing_utils import BaseImageProcessor as ImageProcessorBase

__all__ = ["ImageProcessorBase", "ProcessorBase", "TextArguments"]


class TextArguments(TextKwargs, total=False):
    """Arguments of the tokenizer. 5.11 reads this one and drops it, since it does not declare it; 5.16 does."""

    return_text_replacement_offsets: bool | None


class _CallBackport(ProcessorMixin):
    """The steps of the newest `ProcessorMixin.__call__`, for versions in which each processor writes its own.

    A subclass defines `prepare_inputs_layout` and `validate_inputs` as it would there, besides
    `images_and_placeholders` and `call_arguments`, the names of the arguments of a call.
    """

    if "attributes" in vars(ProcessorMixin):
        # 4.57 reads these; later versions read the parameters of `__init__`
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> BatchFeature:
        # what only the template reads; older versions hand all arguments to both
        for name in kwargs.pop(_FOR_TEMPLATES, ()):
            kwargs.pop(name, None)
        images, text, videos, audio = self.prepare_inputs_layout(images, text, videos, audio, **kwargs)
        self.validate_inputs(images, text, videos, audio, **kwargs)
        return_offsets = kwargs.pop("return_text_replacement_offsets", False)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **_by_modality(kwargs, self.valid_processor_kwargs),
        )
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        return_mm_token_type_ids = text_kwargs.pop("return_mm_token_type_ids", False)

        image_inputs, replacements = {}, []
        if images is not None:
            image_inputs, replacements = self.images_and_placeholders(images, **images_kwargs)
        text_inputs, offsets = {}, []
        if text is not None:
            text, offsets = _with_replacements(text, self.image_token, replacements)
            text_inputs = self.tokenizer(text, **text_kwargs)
            self._check_special_mm_tokens(text, text_inputs, modalities=["image"])
            if return_mm_token_type_ids:
                video_id = vars(self).get("video_token_id")
                text_inputs["mm_token_type_ids"] = [
                    [1 if token == self.image_token_id else 2 * (token == video_id) for token in row]
                    for row in text_inputs["input_ids"]
                ]
        data = {**text_inputs, **image_inputs}
        features = BatchFeature(
            {name: value for name, value in data.items() if name not in self.unused_input_names},
            tensor_type=return_tensors,
        )
        if return_offsets:
            features["text_replacement_offsets"] = offsets
        return features


class _Call(ProcessorMixin):
    """A step of `ProcessorMixin.__call__` under a name of our own.

    transformers 5.10 does not tell `replace_image_token` of the arguments of the call.
    """

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        return self.images_and_placeholders(images, **kwargs)


def _by_modality(kwargs: dict[str, Any], valid_kwargs: type) -> dict[str, dict[str, Any]]:
    """Arguments of a call as one dictionary for each modality: of flat ones beside such a dictionary 4.57 reads none.

    Raises:
        ValueError: an argument is given twice.
    """
    nested = ("text_kwargs", "images_kwargs", "common_kwargs")
    grouped = {modality: dict(kwargs.get(modality) or {}) for modality in nested}
    for name, value in kwargs.items():
        if name in nested:
            continue
        if name == "return_tensors":
            modality = "common_kwargs"
        elif name in valid_kwargs.__annotations__["images_kwargs"].__annotations__:
            modality = "images_kwargs"
        else:
            modality = "text_kwargs"
        if name in grouped[modality]:
            raise ValueError(f"Keyword argument `{name}` was given twice: in `{modality}` and by itself.")
        grouped[modality][name] = value
    return grouped


class _ChatTemplateBackport:
    """`apply_chat_template` of the newest transformers, for versions that mark the wrong tokens after an image."""

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in the newest transformers: text content, `image_url` parts, and masks that know expanded images."""
        conversation = _with_content_parts(conversation)
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        wants_mask = kwargs.pop("return_assistant_tokens_mask", False)
        if not (wants_mask and kwargs.get("tokenize") and kwargs.get("return_dict")):
            return self._apply_older(conversation, chat_template, kwargs, processor_kwargs)
        if kwargs.get("continue_final_message"):
            raise ValueError("`continue_final_message` is not compatible with `return_assistant_tokens_mask`.")
        template_kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_TEMPLATES}
        _, spans = render_jinja_template(
            conversations=conversation if _is_batch(conversation) else [conversation],
            chat_template=_template_of(self, chat_template),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **template_kwargs},
        )
        processor_kwargs.update(return_offsets_mapping=True, return_text_replacement_offsets=True)
        return_tensors = kwargs.get("return_tensors", processor_kwargs.get("return_tensors"))
        features = self._apply_older(conversation, chat_template, kwargs, processor_kwargs)
        offsets, replaced = features.pop("offset_mapping"), features.pop("text_replacement_offsets")
        features["assistant_masks"] = [_token_mask(*row) for row in zip(offsets, replaced, spans)]
        return features.convert_to_tensors(tensor_type=return_tensors)

    def _apply_older(self, conversation: Any, chat_template: str | None, kwargs: dict, processor_kwargs: dict) -> Any:
        if _TAKES_PROCESSOR_KWARGS:
            return super().apply_chat_template(
                conversation, chat_template, **kwargs, processor_kwargs=processor_kwargs
            )
        # 4.57 takes the arguments of the processor among all others
        read = _read_by(_template_of(self, chat_template), kwargs)
        return super().apply_chat_template(
            conversation, chat_template, **kwargs, **processor_kwargs, **{_FOR_TEMPLATES: read}
        )


class _CheckedChatTemplate:
    """`apply_chat_template` that refuses what neither itself, nor the template, nor the processor reads."""

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: an argument is unknown, or the template does not write what it is given.
        """
        template = _template_of(self, chat_template)
        read = _read_by(template, kwargs)
        refuse_unknown(
            kwargs.keys() - set(read), _CHAT_ARGUMENTS | self.call_arguments, "`VtcProcessor.apply_chat_template`"
        )
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in read:
                raise ValueError(f"`{name}` is of no use: the chat template does not write them. Leave it out.")
        return super().apply_chat_template(conversation, chat_template, **kwargs)


def _template_of(processor: Any, chat_template: str | None) -> str:
    """The text of a template given by its name or as it is; the processor's own for None."""
    own = processor.chat_template
    templates = own if isinstance(own, dict) else {"default": own}
    return templates.get(chat_template or "default", chat_template) or ""


def _read_by(template: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if re.search(rf"\b{re.escape(name)}\b", template)]


# of `apply_chat_template` on every supported version; 4.57 lists none in its signature
_CHAT_ARGUMENTS = frozenset(inspect.signature(ProcessorMixin.apply_chat_template).parameters) - {"self", "kwargs"} | {
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
    "tokenize",
    "return_tensors",
    "return_dict",
    "load_audio_from_video",
    "processor_kwargs",
}
_TAKES_PROCESSOR_KWARGS = "processor_kwargs" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
_FOR_TEMPLATES = "names_for_template"
_NOT_FOR_TEMPLATES = ("tokenize", "return_dict", "return_tensors")


def _with_replacements(
    texts: list[str], token: str, replacements: list[str]
) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Replace each `token` by the next of `replacements`; spans are (start, end) characters before and after."""
    remaining = iter(replacements)
    expanded_texts, batch_offsets = [], []
    for text in texts:
        pieces = text.split(token)
        expanded, offsets, start = pieces[0], [], len(pieces[0])
        for piece in pieces[1:]:
            # a prompt without images keeps its tokens; `validate_inputs` has said what is wrong with it
            replacement = next(remaining, token)
            span, new_span = (start, start + len(token)), (len(expanded), len(expanded) + len(replacement))
            offsets.append({"type": "image", "span": span, "new_span": new_span, "replacement": replacement})
            expanded += replacement + piece
            start += len(token) + len(piece)
        expanded_texts.append(expanded)
        batch_offsets.append(offsets)
    return expanded_texts, batch_offsets


def _token_mask(offsets: Any, replaced: list[dict[str, Any]], spans: list[tuple[int, int]]) -> list[int]:
    """1 for every token that overlaps one of `spans`, given in characters before placeholders were expanded."""
    ends = [replacement["span"][1] for replacement in replaced]
    gained = [0, *(replacement["new_span"][1] - replacement["span"][1] for replacement in replaced)]
    mask = [0] * len(offsets)
    for span in spans:
        first, last = (position + gained[bisect.bisect_right(ends, position)] for position in span)
        for index, (start, end) in enumerate(offsets):
            if start < last and end > first:
                mask[index] = 1
    return mask


def _is_batch(conversation: Any) -> bool:
    return isinstance(conversation, (list, tuple)) and (
        isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "content")
    )


def _with_content_parts(conversation: Any) -> Any:
    if _is_batch(conversation):
        return [_with_content_parts(single) for single in conversation]
    return [{**message, "content": _content_parts(message.get("content"))} for message in conversation]


def _content_parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = []
    for part in content or []:
        if part.get("type") == "image_url":
            address = part["image_url"]
            part = {"type": "image", "url": address["url"] if isinstance(address, dict) else address}
        parts.append(part)
    return parts


# 5.10 brought the steps of `__call__`, and 5.23 masks that know expanded images
_MIXIN = _Call if RELEASE >= (5, 10) else _CallBackport

if RELEASE >= (5, 23):

    class ProcessorBase(_CheckedChatTemplate, _MIXIN):
        """`ProcessorMixin`, with arguments checked."""

else:

    class ProcessorBase(_CheckedChatTemplate, _ChatTemplateBackport, _MIXIN):
        """`ProcessorMixin` of an older version, with what the newest can do."""
