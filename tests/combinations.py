"""Two methods at once: one before the language model, LLaVolta in it, by putting their steps one after the other.

The budget bounds what leaves. Levels are pairs, the smallest stride first: with n levels of the first method, level
`i * n + j` is its level j and stride i + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from hf_vtc.models.configuration_avg_llava import AvgLlavaConfig
from hf_vtc.models.configuration_llavolta import LlavoltaConfig
from hf_vtc.models.configuration_vico import VicoConfig
from hf_vtc.models.head_vtc import VtcForConditionalGeneration
from hf_vtc.models.layout_vtc import Layout
from hf_vtc.models.modeling_avg_llava import AvgLlavaSteps
from hf_vtc.models.modeling_llavolta import LlavoltaModel, LlavoltaSteps
from hf_vtc.models.modeling_vico import VicoSteps
from hf_vtc.models.modeling_vtc import VtcModel
from hf_vtc.models.prompt_vtc import BY_SCORES
from hf_vtc.models.tiling_vtc import ImageSizes
from hf_vtc.models.vision_vtc import Choice, Scores, VisualTokens


class CombinedConfig(LlavoltaConfig):
    """Fields of LLaVolta and of the method that comes first in `__mro__` behind it. Abstract."""

    takes_decisions = False
    one_tile_per_image = False
    joins_tiles = False

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        super().__init__(vision_config, text_config, **kwargs)

    def first_levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        return super(LlavoltaConfig, self).levels(sizes)

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        firsts = self.first_levels(sizes)
        return [tuple(n // stride for stride in range(1, min(counts) + 1) for n in counts) for counts in firsts]

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        return BY_SCORES


@dataclass
class CombinedChoice(Choice):
    """With the choice of the first method."""

    first: Choice | None = None


class CombinedSteps:
    """`choose` and `connect` of the first method on its part of each level, then LLaVolta's. Abstract."""

    first: type
    reads_padding_mask = True
    shorten, shorten_before = LlavoltaModel.shorten, LlavoltaSteps.shorten_before

    def first_layout(self, layout: Layout) -> Layout:
        counts = self.config.first_levels(layout.sizes)
        levels = [
            level if level == BY_SCORES else level % len(own) for level, own in zip(layout.levels, counts, strict=True)
        ]
        return replace(layout, counts=counts, levels=levels)

    def score(self, features: torch.Tensor, prompts: torch.Tensor | None, layout: Layout) -> Scores | None:
        return self.first.score(self, features, prompts, self.first_layout(layout))

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        first, own = self.first_layout(layout), self.config.compress_stride
        choice = self.first.choose(self, scores, first)
        strides = [
            own if level == BY_SCORES else level // len(counts) + 1
            for level, counts in zip(layout.levels, first.counts, strict=True)
        ]
        num_kept = choice.num_entering // torch.tensor(strides, dtype=torch.long)
        entering = choice.num_entering if self.config.compress_layer_idx > 0 else num_kept
        return CombinedChoice(entering, num_kept, choice.decisions, strides, first=choice)

    def connect(
        self, features: torch.Tensor, choice: CombinedChoice, layout: Layout, scores: Scores | None
    ) -> VisualTokens:
        visual = self.first.connect(self, features, choice.first, layout, scores)
        return self.shorten_before(visual, choice.first.num_entering, choice, layout)


class VicoLlavoltaConfig(CombinedConfig, VicoConfig):
    model_type = "vtc_vico_llavolta"

    # transformers 5 makes a plain one of every configuration that has none
    def __init__(self, vision_config=None, text_config=None, **kwargs):
        super().__init__(vision_config, text_config, **kwargs)


class VicoLlavoltaModel(CombinedSteps, VicoSteps, VtcModel):
    config_class, first = VicoLlavoltaConfig, VicoSteps


class VicoLlavoltaForConditionalGeneration(VtcForConditionalGeneration):
    config_class, model_class = VicoLlavoltaConfig, VicoLlavoltaModel


class AvgLlavaLlavoltaConfig(CombinedConfig, AvgLlavaConfig):
    model_type = "vtc_avg_llava_llavolta"

    # transformers 5 makes a plain one of every configuration that has none
    def __init__(self, vision_config=None, text_config=None, **kwargs):
        super().__init__(vision_config, text_config, **kwargs)


class AvgLlavaLlavoltaModel(CombinedSteps, AvgLlavaSteps, VtcModel):
    config_class, first = AvgLlavaLlavoltaConfig, AvgLlavaSteps


class AvgLlavaLlavoltaForConditionalGeneration(VtcForConditionalGeneration):
    config_class, model_class = AvgLlavaLlavoltaConfig, AvgLlavaLlavoltaModel


COMBINATIONS = {
    "vico": (VicoLlavoltaConfig, VicoLlavoltaModel, VicoLlavoltaForConditionalGeneration),
    "avg_llava": (AvgLlavaLlavoltaConfig, AvgLlavaLlavoltaModel, AvgLlavaLlavoltaForConditionalGeneration),
}
for config, model, head in COMBINATIONS.values():
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageTextToText.register(config, head, exist_ok=True)
