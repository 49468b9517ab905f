"""Configuration of ViCO / ViR (InternVL3.5-Flash)."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .configuration_vtc import VtcConfig
from .host_vtc import GRID_BASES
from .tiling_vtc import ImageSizes


class VicoConfig(VtcConfig):
    """Two connectors per tile and a router (ViR) that chooses between them.

    Field names follow the official `config.json` of InternVL3.5-Flash where it has one. The official default values of
    the two thresholds are not published; those below are ours.

    Args:
        downsample_ratio (`float`): side ratio of the pixel shuffle of the full connector; the compressed one uses its
            square. `1 / downsample_ratio` must be a whole number above 1.
        flash_mode (`bool`): whether `vtc_budget="auto"` routes at all; `False` is the base InternVL path.
        flash_relative_threshold (`float` in [0, 1]): quantile over the tiles of one sample that a tile's P(compress)
            must exceed.
        flash_absolute_threshold (`float`): smallest P(compress) of a compressed tile. Above 1: none is compressed.
        routing_rule (`str`): `"relative+absolute"` is the official rule; `"absolute"` uses the second threshold alone,
            so that a single tile can be compressed too.
        router_num_heads (`int`): heads of the router's cross attentions (16 in every official checkpoint).
        connector_dropout (`float`): dropout of the compressed connector and of the router's blocks in training.

    The other fields are those of `VtcConfig`.
    """

    model_type = "vtc_vico"
    refused_bases = dict.fromkeys(
        ("llava", "llava_next", "llava_onevision"),
        "it has no pixel shuffle, beside which a second one could be trained",
    ) | dict.fromkeys(
        GRID_BASES,
        "a merger for windows of 4 x 4 visual tokens, and on Qwen3-VL one for each deeper row, is not there",
    )
    takes_decisions = True

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        downsample_ratio: float = 0.5,
        flash_mode: bool = True,
        flash_relative_threshold: float = 0.0,
        flash_absolute_threshold: float = 0.5,
        routing_rule: str = "relative+absolute",
        router_num_heads: int = 16,
        connector_dropout: float = 0.1,
        **kwargs: Any,
    ):
        self.flash_mode = flash_mode
        self.flash_relative_threshold = flash_relative_threshold
        self.flash_absolute_threshold = flash_absolute_threshold
        self.routing_rule = routing_rule
        self.router_num_heads = router_num_heads
        self.connector_dropout = connector_dropout
        super().__init__(vision_config, text_config, downsample_ratio=downsample_ratio, **kwargs)
        if routing_rule not in ("relative+absolute", "absolute"):
            raise ValueError(f"`routing_rule` must be 'relative+absolute' or 'absolute', got {routing_rule!r}.")
        if not 0 <= flash_relative_threshold <= 1:
            raise ValueError(f"`flash_relative_threshold` is a quantile in [0, 1], got {flash_relative_threshold}.")
        if self.vision_config.hidden_size % router_num_heads:
            raise ValueError(
                f"The tower's `hidden_size` ({self.vision_config.hidden_size}) must be a multiple of "
                f"`router_num_heads` ({router_num_heads})."
            )

    def _tokens_per_tile(self) -> int:
        grid, factor = self.patches_per_side, self.shuffle_factor
        if factor < 2:
            raise ValueError(
                f"`downsample_ratio` must be 1/2, 1/3, ...: ViCO has two connectors. Got {self.downsample_ratio}."
            )
        if grid % factor**2:
            raise ValueError(
                f"A side of the tower's grid ({grid} patches) must be a multiple of {factor**2} for pixel shuffle by "
                f"{factor} and {factor**2}. Change `image_size`, `patch_size` or `downsample_ratio`."
            )
        return super()._tokens_per_tile()

    @property
    def compressed_seq_length(self) -> int:
        """Visual tokens of a compressed tile (64 where `image_seq_length` is 256)."""
        return self.image_seq_length // self.shuffle_factor**2

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        """At level i of an image, i of its tiles are compressed."""
        full, saved = self.image_seq_length, self.image_seq_length - self.compressed_seq_length
        return [range(full * tiles, full * tiles - saved * tiles - 1, -saved) for tiles in sizes.num_tiles.tolist()]

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        return -1 if self.flash_mode else 0
