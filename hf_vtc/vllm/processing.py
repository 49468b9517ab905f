"""The side of an engine that sees images: from a request to pixels, placeholders and budgets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from ..models.processing_vtc import VtcProcessor
from .budgets import Planned, image_arguments, planned, refuse_unserved_base


class VtcProcessingInfo(BaseProcessingInfo):
    """What the engine asks of a model's processor before there is a request."""

    def get_hf_processor(self, **kwargs: Any) -> VtcProcessor:
        # arguments of a request are no fields of the processor
        processor = self.ctx.get_hf_processor(VtcProcessor)
        # as the engine has it, with the overrides of its operator
        processor.model_config = self.get_hf_config()
        refuse_unserved_base(processor.model_config)
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def largest_image(self) -> tuple[int, int]:
        """(height, width) in pixels of an image with the most visual tokens."""
        processor = self.get_hf_processor()
        settings = processor.image_processor
        tile = settings.size["height"]
        # square ones, and rows and columns of as many tiles as there may be
        sides = [tile * count for count in range(1, settings.max_tiles + 1)]
        sizes = [(side, side) for side in sides] + [(tile, side) for side in sides] + [(side, tile) for side in sides]
        return max(sizes, key=lambda size: processor.reserved_tokens(*size))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        # whatever budget the server has, a request may ask for all of them
        return {"image": self.get_hf_processor().reserved_tokens(*self.largest_image())}


class VtcDummyInputs(BaseDummyInputsBuilder[VtcProcessingInfo]):
    """What the engine measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> MultiModalDataDict:
        height, width = self.info.largest_image()
        bounds = mm_options.get("image")
        if bounds is not None:
            height, width = min(height, bounds.height or height), min(width, bounds.width or width)
        return {"image": [Image.new("RGB", (width, height))] * mm_counts.get("image", 0)}


class VtcMultiModalProcessor(BaseMultiModalProcessor[VtcProcessingInfo]):
    """From images and arguments of a request to what the encoder takes and the prompt holds."""

    # why the method's router cannot decide here; empty if it has none
    auto_problem = ""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {"vtc_budget": "full"}
        return inputs

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        image_id, num_images = self.info.get_hf_processor().image_token_id, len(inputs.mm_data_items.get("image", ()))
        written = inputs.prompt.count(image_id)
        if written != num_images:
            raise ValueError(
                f"The prompt has {written} image placeholders but {num_images} images were given. Give each image one "
                "content item in the chat, and leave the placeholder token out of texts."
            )
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor = self.info.get_hf_processor()
        vtc_budget, fields = image_arguments(self.info.ctx.get_merged_mm_kwargs(hf_kwargs))
        outputs = processor(images=hf_data["images"], return_tensors="pt", **fields)
        plan = self.plan(processor, outputs, vtc_budget, fields)
        outputs = outputs.to(self.info.ctx.model_config.dtype)
        if "num_tiles" not in outputs:
            # an image in the cache may not depend on those beside which it came
            sizes = outputs["image_sizes"].tolist()
            pixels = zip(outputs["pixel_values"], sizes, strict=True)
            outputs["pixel_values"] = [whole[:, :height, :width].clone() for whole, (height, width) in pixels]
        outputs["num_placeholders"] = torch.tensor(plan.num_placeholders)
        outputs["budget_code"] = torch.tensor(plan.codes)
        return outputs

    def plan(self, processor: VtcProcessor, outputs: BatchFeature, vtc_budget: Any, fields: dict[str, Any]) -> Planned:
        """Placeholders of each image, and the budget that its encoder is told."""
        return planned(processor, outputs["image_sizes"].tolist(), vtc_budget, fields, self.auto_problem)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        # nothing is left of a request whose images are all in the cache
        fields = {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=True)
            for name in hf_inputs
            if name != "pixel_values"
        }
        if "num_tiles" in hf_inputs:
            fields["pixel_values"] = MultiModalFieldConfig.flat_from_sizes("image", hf_inputs["num_tiles"])
        elif hf_inputs:
            fields["pixel_values"] = MultiModalFieldConfig.batched("image")
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: MultiModalKwargsItems
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor()
        vocabulary, image_id = processor.tokenizer.get_vocab(), processor.image_token_id
        before, after = (
            [] if token is None else [vocabulary[token]]
            for token in (processor.image_start_token, processor.image_end_token)
        )

        def replacement(item_idx: int) -> PromptUpdateDetails:
            count = int(out_mm_kwargs["image"][item_idx]["num_placeholders"].data)
            return PromptUpdateDetails.select_token_id([*before, *[image_id] * count, *after], image_id)

        return [PromptReplacement(modality="image", target=[image_id], replacement=replacement)]
