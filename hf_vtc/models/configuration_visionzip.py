"""Configuration of VisionZip."""

from typing import Any

from transformers import PretrainedConfig

from .host_vtc import GRID_BASES
from .tiling_vtc import ImageSizes
from .training_free_vtc import TrainingFreeConfig

# towers whose last attention can be read
TOWER_TYPES = ("clip_vision_model", "siglip_vision_model", "internvl_vision")


class VisionzipConfig(TrainingFreeConfig):
    """Dominant tokens stay as they are, the others are merged into a few contextual ones. No parameters are added.

    Every count is admissible from one visual token per tile on; the tiles of an image share it equally, the first
    ones having one more where it does not divide.

    Args:
        kept_share (`float` in (0, 1]): share of the visual tokens that `vtc_budget="auto"` keeps. Default: a third,
            the mildest of the paper's settings for LLaVA-1.5 (192 of 576).
        contextual_share (`float` in [0, 1]): share of what a tile keeps that are contextual tokens, rounded to whole
            tokens. Default: 10 of 64, the paper's; 0 drops what is not dominant.

    The other fields are those of `VtcConfig`.

    Raises:
        ValueError: a field is outside of its range, or the tower is of another type than `TOWER_TYPES`.
    """

    model_type = "vtc_visionzip"
    refused_bases = dict.fromkeys(
        ("llava_next", "llava_onevision"), "a map is joined from whole tiles, of which dominant tokens leave no rows"
    ) | dict.fromkeys(
        GRID_BASES, "the attention of its tower is not read: its images lie in one sequence, in windows on Qwen2.5-VL"
    )

    takes_decisions = True

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        kept_share: float = 1 / 3,
        contextual_share: float = 10 / 64,
        **kwargs: Any,
    ):
        self.contextual_share = contextual_share
        super().__init__(vision_config, text_config, kept_share, **kwargs)
        if not 0 <= contextual_share <= 1:
            raise ValueError(f"`contextual_share` of the kept tokens must lie in [0, 1], got {contextual_share}.")
        self._check_tower()

    @property
    def has_class_token(self) -> bool:
        """Whether the tower has a token that stands for the whole tile."""
        return self.vision_config.model_type != "siglip_vision_model"

    def _check_tower(self) -> None:
        tower, layer = self.vision_config, self.vision_feature_layer
        if tower.model_type not in TOWER_TYPES:
            raise ValueError(
                f"`vision_config` has `model_type` {tower.model_type!r}. VisionZip reads the attention of towers of "
                f"the types {', '.join(TOWER_TYPES)}."
            )
        num_layers = tower.num_hidden_layers
        if layer not in range(-num_layers, num_layers + 1) or layer == 0:
            raise ValueError(
                f"`vision_feature_layer` must be a hidden state that one of the tower's {num_layers} layers gives, "
                f"from {-num_layers} to {num_layers} and not 0, got {layer}."
            )
        strategy = "default" if self.has_class_token else "full"
        if self.vision_feature_select_strategy != strategy:
            raise ValueError(
                f"`vision_feature_select_strategy` must be {strategy!r} for {tower.model_type!r}, so that the tokens "
                f"are the tower's grid, got {self.vision_feature_select_strategy!r}."
            )

    def fewest_tokens(self, sizes: ImageSizes) -> list[int]:
        return sizes.num_tiles.tolist()
