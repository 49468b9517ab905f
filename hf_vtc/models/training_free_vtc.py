"""What the configurations of training-free methods share: they keep as many visual tokens as they are asked for."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .configuration_vtc import VtcConfig
from .tiling_vtc import ImageSizes


class TrainingFreeConfig(VtcConfig):
    """Configuration of a method that adds no parameters to a base and meets any count of visual tokens. Abstract.

    Args:
        kept_share (`float` in (0, 1]): share of an image's visual tokens that `vtc_budget="auto"` keeps.
    """

    chooses_by_scores = True

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        kept_share: float = 1 / 3,
        **kwargs: Any,
    ):
        self.kept_share = kept_share
        super().__init__(vision_config, text_config, **kwargs)
        if not 0 < kept_share <= 1:
            raise ValueError(f"`kept_share` of the visual tokens must lie in (0, 1], got {kept_share}.")

    @property
    def one_tile_per_image(self) -> bool:
        """LLaVA's images are single tiles, whose processors say nothing of tiles; InternVL's are several."""
        return self.mm_patch_merge_type == "flat" and self.shuffle_factor == 1

    def fewest_tokens(self, sizes: ImageSizes) -> list[int]:
        """The smallest admissible count of visual tokens of each image."""
        return [1] * len(self.reserved_tokens(sizes))

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        """At level i an image has i visual tokens fewer."""
        counts = zip(self.reserved_tokens(sizes).tolist(), self.fewest_tokens(sizes), strict=True)
        return [range(most, fewest - 1, -1) for most, fewest in counts]

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        # a third of 576 must give 192 although 1 / 3 is not exact in binary
        wanted = int(self.kept_share * counts[0] + 1e-6)
        return counts.index(max(wanted, counts[-1]))
