"""A model in an engine: tower, connectors and router are the vision half of `models/`, the decoder is the engine's.

`VtcServed` is abstract. A method is one small file: its vision half, and what it cannot do in an engine.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)

from ..models.configuration_vtc import VtcConfig
from ..models.vision_vtc import VtcVision
from .budgets import budget_of_code, refuse_unserved_base

_VISION = "vision."


class VtcWeightsMapper(WeightsMapper):
    """Names of our checkpoints and adapters to those of `VtcServed`."""

    def _map_name(self, key: str) -> str | None:
        name = super()._map_name(key)
        if name is not None and name.startswith(_VISION) and ".lora_" in key:
            # vLLM would leave it out without saying so
            raise ValueError(
                f"The adapter changes {key!r}, which is not of the decoder: vLLM applies adapters to that only. "
                "Merge it into the model (`merge_and_unload`) and serve that, or train one with "
                "`default_lora_config(model, compressor=())`."
            )
        return name


class VtcServed(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """A method of hf_vtc in vLLM. Abstract."""

    vision_class: ClassVar[type[VtcVision]]

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = VtcWeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": _VISION,
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        # chat templates of our processors write it themselves
        return None

    @classmethod
    def check(cls, config: VtcConfig) -> None:
        """Raise a ValueError for a model that an engine cannot serve with its tokens saved."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        refuse_unserved_base(config)
        self.check(config)
        self.config = config
        text_config = config.text_config
        self.configure_mm_token_handling(text_config.vocab_size, [config.image_token_id])
        # towers are built in the dtype that their own configuration says
        self.vision = self.vision_class(config).to(vllm_config.model_config.dtype).requires_grad_(False)
        # our configurations say it for the whole model
        text_config.tie_word_embeddings = config.tie_word_embeddings
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config,
            hf_config=text_config,
            architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]],
            prefix=maybe_prefix(prefix, "language_model"),
        )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # a placeholder that no image stands behind may have no row in the embeddings
        known = input_ids < self.config.text_config.vocab_size
        return super().embed_input_ids(input_ids.where(known, 0), *args, **kwargs)

    @torch.no_grad()
    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        budget_code: torch.Tensor | None = None,
        num_tiles: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        num_placeholders: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Visual tokens of each image of some requests, as many as `num_placeholders` says."""
        if pixel_values is None:
            return []
        if isinstance(pixel_values, list):
            pixel_values = _padded(pixel_values)
        features = self.vision.get_image_features(
            pixel_values,
            num_tiles=None if num_tiles is None else num_tiles.flatten(),
            image_sizes=image_sizes.reshape(-1, 2),
            vtc_budget=[budget_of_code(code) for code in budget_code.flatten().tolist()],
        )
        return list(features.pooler_output)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        vision = self.vision.state_dict(keep_vars=True)
        loaded = set()

        def of_decoder() -> Iterable[tuple[str, torch.Tensor]]:
            for name, value in self.hf_to_vllm_mapper.apply(weights):
                if not name.startswith(_VISION):
                    yield name, value
                    continue
                # buffers too, which the loader of vLLM does not know
                vision[name.removeprefix(_VISION)].data.copy_(value)
                loaded.add(name)

        decoder = AutoWeightsLoader(self).load_weights(of_decoder())
        missing = [name for name in vision if _VISION + name not in loaded]
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of the vision part, such as {missing[0]!r}. Serve a "
                "folder that `save_pretrained` of the whole model wrote."
            )
        return loaded | decoder

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="vision.multi_modal_projector",
            tower_model="vision.vision_tower",
        )


def _padded(images: list[torch.Tensor]) -> torch.Tensor:
    """Images `(3, H, W)` of several sizes in one batch, zeros on the right and at the bottom."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack(
        [nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    )
