"""Configuration of LLaVolta / Visual Context Compressor."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .configuration_vtc import VtcConfig
from .tiling_vtc import UNPAD_RULES

COMPRESSORS = ("avgpool1d", "uniform", "random", "avgpool2d", "kmeans", "attention")


class LlavoltaConfig(VtcConfig):
    """A LLaVA-type model whose decoder shortens every image before one of its layers. No parameters are added.

    A span of V visual tokens (an image, all of its tiles together) becomes floor(V / `compress_stride`) tokens before
    decoder layer `compress_layer_idx`; trailing tokens that fill no window are dropped by the windowed compressors.

    What a `vtc_budget` means when the count differs by layer: it bounds the visual tokens that layers from
    `compress_layer_idx` on see (`num_visual_tokens` of the outputs; earlier layers always see V). The smallest stride
    that fits is taken for each image, so every V / 1, V / 2, V / 3, ... (rounded down) is admissible. `"auto"` is
    `compress_stride`, `"full"` is stride 1, the stock model. Where the config compresses nowhere
    (`compress_layer_idx` is the number of layers), a budget that does not hold all tokens raises a ValueError.

    Args:
        compress_layer_idx (`int`): decoder layers before this one see all visual tokens, from -1 to the number of
            layers N. 0 shortens the embeddings and leaves gaps between the positions; -1 shortens the projected
            features before the sequence is built, so that positions have no gaps; N compresses nowhere.
        compress_stride (`int`): visual tokens that become one, 1 for no compression. The paper trains with 8 and 2.
        compressor (`str`): how V tokens become floor(V / stride):
            `"avgpool1d"`: means of consecutive tokens, the paper's; `"uniform"`: every stride-th token; `"random"`: a
            random subset, drawn anew in training and fixed by the layout in eval mode; `"avgpool2d"`: means of windows
            of side sqrt(stride) of the token grid, a tile at a time; `"kmeans"`: centroids in the order of their mean
            positions; `"attention"`: the tokens to which the last text token of the prompt attends most in layer
            `compress_layer_idx - 1`, mean over heads.
        mm_patch_merge_type (`str`): `"flat"`: tiles one after the other; `"spatial_unpad"`: LLaVA-NeXT, the whole
            view, then the tiles as one map without its padding, `image_newline` at the end of each row.
        image_grid_pinpoints (`list`, *optional*): for `"spatial_unpad"`, (height, width) canvases of the image
            processor.
        unpad_rule (`str`): for `"spatial_unpad"`, see `tiling_vtc.unpadded_grids`.

    The other fields are those of `VtcConfig`.
    """

    model_type = "vtc_llavolta"

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        compress_layer_idx: int = 2,
        compress_stride: int = 8,
        compressor: str = "avgpool1d",
        mm_patch_merge_type: str = "flat",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        unpad_rule: str = "true_aspect",
        **kwargs: Any,
    ):
        self.compress_layer_idx = compress_layer_idx
        self.compress_stride = compress_stride
        self.compressor = compressor
        self.mm_patch_merge_type = mm_patch_merge_type
        self.image_grid_pinpoints = None if image_grid_pinpoints is None else [list(p) for p in image_grid_pinpoints]
        self.unpad_rule = unpad_rule
        super().__init__(vision_config, text_config, **kwargs)
        for name, values in (
            ("compressor", COMPRESSORS),
            ("mm_patch_merge_type", ("flat", "spatial_unpad")),
            ("unpad_rule", UNPAD_RULES),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if mm_patch_merge_type == "spatial_unpad" and not image_grid_pinpoints:
            raise ValueError("`mm_patch_merge_type='spatial_unpad'` needs `image_grid_pinpoints`.")
        self.set_compression(compress_layer_idx, compress_stride)

    def set_compression(self, layer_idx: int, stride: int) -> None:
        """Compress by `stride` before decoder layer `layer_idx` from now on.

        Raises:
            ValueError: out of range, or not possible with the compressor.
        """
        num_layers = self.text_config.num_hidden_layers
        if not -1 <= layer_idx <= num_layers:
            raise ValueError(
                f"`compress_layer_idx` must be from -1 (before the sequence is built) to {num_layers} (never, in a "
                f"decoder of {num_layers} layers), got {layer_idx}."
            )
        if stride < 1:
            raise ValueError(f"`compress_stride` must be at least 1 (no compression), got {stride}.")
        if self.compressor == "attention" and layer_idx < 1:
            raise ValueError(
                "`compressor='attention'` needs a decoder layer that has attended: `compress_layer_idx` must be at "
                f"least 1, got {layer_idx}."
            )
        if self.compressor == "avgpool2d":
            side = math.isqrt(self.image_seq_length)
            if math.isqrt(stride) ** 2 != stride or math.isqrt(stride) > side or side**2 != self.image_seq_length:
                raise ValueError(
                    "`compressor='avgpool2d'` needs a square grid and a square `compress_stride` whose side fits into "
                    f"it: got {self.image_seq_length} tokens per tile and stride {stride}."
                )
            if self.mm_patch_merge_type != "flat":
                raise ValueError("`compressor='avgpool2d'` needs `mm_patch_merge_type='flat'`: rows of one length.")
        self.compress_layer_idx = layer_idx
        self.compress_stride = stride

    @property
    def compresses(self) -> bool:
        """Whether `vtc_budget="auto"` makes images shorter."""
        return self.compress_stride > 1 and self.compress_layer_idx < self.text_config.num_hidden_layers

    def kept_tokens(self, length: int, stride: int) -> int:
        """Visual tokens that stay of an image of `length` tokens."""
        if self.compressor != "avgpool2d" or stride == 1:
            return length // stride
        return length // self.image_seq_length * (math.isqrt(self.image_seq_length) // math.isqrt(stride)) ** 2

    def strides_of(self, length: int) -> list[int]:
        """Strides that leave something of an image of `length` tokens, rising."""
        if self.compress_layer_idx == self.text_config.num_hidden_layers:
            return [1]
        if self.compressor == "avgpool2d":
            return [edge * edge for edge in range(1, math.isqrt(self.image_seq_length) + 1)]
        return list(range(1, length + 1))
