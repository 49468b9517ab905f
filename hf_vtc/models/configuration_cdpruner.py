"""Configuration of CDPruner."""

from typing import Any

from transformers import PretrainedConfig

from .training_free_vtc import TrainingFreeConfig


class CdprunerConfig(TrainingFreeConfig):
    """Of every image the visual tokens stay that are most diverse, given the question. No parameters are added.

    Every count is admissible from one visual token per image on, whatever its tiles: they are chosen from together.

    Args:
        kept_share (`float` in (0, 1]): share of the visual tokens that `vtc_budget="auto"` keeps. Default: a third,
            192 of the 576 tokens of LLaVA-1.5, which papers on pruning report first.

    The other fields are those of `VtcConfig`.

    Raises:
        ValueError: a field is outside of its range.
    """

    model_type = "vtc_cdpruner"
    refused_bases = {"qwen3_5": "it was not tried on a decoder most of whose layers are recurrent"}
    takes_decisions = True
    joins_tiles = True
    takes_tiled_videos = True

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        kept_share: float = 1 / 3,
        **kwargs: Any,
    ):
        super().__init__(vision_config, text_config, kept_share, **kwargs)
