"""Configuration of AVG-LLaVA."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .configuration_vtc import VtcConfig
from .grids_vtc import halved_grids, halved_window, pooled_grid
from .tiling_vtc import ImageSizes, stacked_grids

# side of what is pooled to granularities where images are grids of any size, in visual tokens
_BLOCK_SIDE = 4
ROUTER_ATTENTIONS = ("tiles", "tokens")
ROUTER_TEXTS = ("first_image", "row")


class AvgLlavaConfig(VtcConfig):
    """A pyramid of pooled granularities per image, and a router that chooses one from image and instruction.

    Names of fields follow the official `config.json` where it has one. Official weights were trained with
    `unpad_rule="token_grid"`, `router_attention="tiles"` and `router_text="first_image"`, which the converter sets;
    the defaults below are the corrected variants, for models that are trained anew.

    Args:
        vis_token_granularity (`list[int]`, *optional*): tokens per tile of each granularity that the router chooses
            from, coarse to fine: what is left of those that connector and tower give for a tile when columns and rows
            of their grid are halved in turns, half of an odd side rounded up (27 x 27, 27 x 14, 14 x 14, ...; windows
            at an edge are means of what is there). Default: up to four halvings, all tokens among them. Where all
            tokens are not among them, a budget can still ask for them.
        router_select (`bool`): whether `vtc_budget="auto"` routes; `False` keeps all tokens.
        filtered_text_num (`int`): text rows that the router reads, those most similar to the image.
        router_num_heads (`int`): heads of the router's attention.
        router_dropout (`float`): in the router's Transformer layer, in training.
        router_attention (`str`): `"tiles"`: a token attends to the tokens at its place in the other tiles; `"tokens"`:
            it attends to all granularities of its tile and to the text.
        router_text (`str`): `"row"`: every image is routed with the text of its own row; `"first_image"`: the first
            image of a row is, the others without any text (what the released code does at batch size 1).
        mm_patch_merge_type (`str`, *optional*): default: `"spatial_unpad"` if there are `image_grid_pinpoints`, else
            `"flat"`.
        base_tile (`str`, *optional*): where the view of the whole image is, which the text is compared with: `"first"`
            (LLaVA-NeXT) or `"last"` (InternVL) of the image's tiles. Default: as the merge type's model.

    On a base whose tower sees grids (Qwen3-VL, Qwen2.5-VL) a granularity says how many of every 4 x 4 visual tokens
    are left, `[1, 2, 4, 8, 16]` by default: windows of 4 x 4, 2 x 4, 2 x 2, 1 x 2 and 1 x 1 tokens become one each,
    those at an edge by the mean of what is there. Kept tokens stand at the mean place of their members. The router
    averages the votes of a granularity's tokens, since their places have no numbers; `router_attention` is `"tokens"`.

    The other fields are those of `VtcConfig`.

    Raises:
        ValueError: a field is outside of its range.
    """

    model_type = "vtc_avg_llava"
    refused_bases = {"qwen3_5": "it was not tried on a decoder most of whose layers are recurrent"}
    takes_decisions = True
    joins_tiles = True
    newline_behind_single_tile = True

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        vis_token_granularity: list[int] | None = None,
        router_select: bool = True,
        filtered_text_num: int = 32,
        router_num_heads: int = 8,
        router_dropout: float = 0.1,
        router_attention: str = "tokens",
        router_text: str = "row",
        image_grid_pinpoints: list[list[int]] | None = None,
        mm_patch_merge_type: str | None = None,
        base_tile: str | None = None,
        **kwargs: Any,
    ):
        self.router_select = router_select
        self.filtered_text_num = filtered_text_num
        self.router_num_heads = router_num_heads
        self.router_dropout = router_dropout
        self.router_attention = router_attention
        self.router_text = router_text
        joined = image_grid_pinpoints is not None and mm_patch_merge_type != "flat"
        self.base_tile = base_tile or ("first" if joined else "last")
        super().__init__(
            vision_config,
            text_config,
            mm_patch_merge_type=mm_patch_merge_type or ("spatial_unpad" if joined else "flat"),
            image_grid_pinpoints=image_grid_pinpoints,
            **kwargs,
        )
        for name, values in (
            ("router_attention", ROUTER_ATTENTIONS),
            ("router_text", ROUTER_TEXTS),
            ("base_tile", ("first", "last")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if self.grid_base is not None and router_attention != "tokens":
            raise ValueError(
                f"`router_attention` must be 'tokens' on {self.grid_base}, whose images have no tiles, got "
                f"{router_attention!r}. Leave it out."
            )
        self.vis_token_granularity = self._checked_granularities(vis_token_granularity)
        if filtered_text_num < 1:
            raise ValueError(f"`filtered_text_num` must be at least 1 text row, got {filtered_text_num}.")
        if not 0 <= router_dropout < 1:
            raise ValueError(f"`router_dropout` must lie in [0, 1), got {router_dropout}.")
        if self.text_config.hidden_size % router_num_heads:
            raise ValueError(
                f"The decoder's `hidden_size` ({self.text_config.hidden_size}) must be a multiple of "
                f"`router_num_heads` ({router_num_heads})."
            )
        if self.mm_patch_merge_type == "spatial_unpad" and self.base_tile != "first":
            raise ValueError("`mm_patch_merge_type='spatial_unpad'` needs the base tile first: `base_tile='first'`.")

    @property
    def grid_side(self) -> int:
        """Side of the grid of the finest granularity in a tile, or in what stands for one where there are none."""
        return math.isqrt(self.image_seq_length) if self.grid_base is None else _BLOCK_SIDE

    @property
    def finest_granularity(self) -> int:
        """All tokens of a tile, or of what stands for one."""
        return self.image_seq_length if self.grid_base is None else _BLOCK_SIDE**2

    @property
    def all_granularities(self) -> list[int]:
        """Tokens per tile that can be left, coarse to fine: the router's choices, then all of them, if not among
        these."""
        chosen = self.vis_token_granularity
        return chosen if chosen[-1] == self.finest_granularity else [*chosen, self.finest_granularity]

    @property
    def granularity_grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of tokens per tile of each of `all_granularities`."""
        return [pooled_grid(self.grid_side, granularity) for granularity in self.all_granularities]

    @property
    def granularity_windows(self) -> list[tuple[int, int]]:
        """(high, wide) of what becomes one token at each of `all_granularities`."""
        return [halved_window(self.grid_side, grid) for grid in self.granularity_grids]

    def window_of(self, level: int) -> tuple[int, int]:
        return self.granularity_windows[::-1][level]

    def _checked_granularities(self, granularities: list[int] | None) -> list[int]:
        finest = self.finest_granularity
        if granularities is None:
            return [rows * columns for rows, columns in reversed(halved_grids(self.grid_side)[:5])]
        granularities = [int(scale) for scale in granularities]
        if granularities != sorted(set(granularities)) or not granularities or granularities[-1] > finest:
            raise ValueError(
                f"`vis_token_granularity` must rise from coarse to fine, to at most the {finest} tokens that tower "
                f"and connector give for a tile, got {granularities}."
            )
        for scale in granularities:
            pooled_grid(self.grid_side, scale)
        return granularities

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        """Level i is that of `all_granularities` i steps below the finest. Newlines can make a coarse map longer than
        the finest one; nothing chooses it then."""
        if sizes.tokens is not None:
            windows = self.granularity_windows[::-1]
            return [
                tuple(-(-rows // high) * -(-columns // wide) for high, wide in windows)
                for rows, columns in sizes.tokens.tolist()
            ]
        grids = stacked_grids(self.granularity_grids[::-1])
        return list(zip(*self.tokens_of_images(sizes, grids).tolist()))

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        return -1 if self.router_select else 0
