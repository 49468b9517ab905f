"""Configuration of a training-free pruner."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .configuration_vtc import VtcConfig
from .tiling_vtc import ImageSizes


class PruningConfig(VtcConfig):
    """A model that keeps the `kept_share` of an image's visual tokens farthest from the mean of their tile."""

    model_type = "vtc_pruning"

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        kept_share: float = 0.25,
        **kwargs: Any,
    ):
        self.kept_share = kept_share
        super().__init__(vision_config, text_config, **kwargs)
        if not 0 < kept_share <= 1:
            raise ValueError(f"`kept_share` of the visual tokens must lie in (0, 1], got {kept_share}.")

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        return [range(count, 0, -1) for count in self.reserved_tokens(sizes).tolist()]

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        return counts.index(max(1, int(self.kept_share * counts[0])))
