"""Configuration of LLaVolta / Visual Context Compressor."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from transformers import PretrainedConfig

from .configuration_vtc import VtcConfig
from .host_vtc import is_recurrent
from .tiling_vtc import ImageSizes

# of bases whose tower sees grids, and why not
_NO_COORDINATES = "a mean of tokens that lie anywhere has no row and column"
_NOT_ON_GRIDS = {
    ("qwen3_vl", "kmeans"): _NO_COORDINATES,
    ("qwen3_5", "kmeans"): _NO_COORDINATES,
    ("qwen2_5_vl", "kmeans"): _NO_COORDINATES,
    ("qwen2_5_vl", "attention"): "its rotary embedding is put together inside of the attention, which is not read",
}
COMPRESSORS = ("avgpool1d", "uniform", "random", "avgpool2d", "kmeans", "attention")
# (high, wide) of windows of a grid, by how many of its tokens become one
WINDOWS: dict[str, Callable[[int], tuple[int, int]]] = {
    "avgpool1d": lambda stride: (1, stride),
    "avgpool2d": lambda stride: (math.isqrt(stride), math.isqrt(stride)),
}


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
        compress_frames (`int`): frames of a video in which the `compress_stride` tokens that become one lie, as many
            in each, on a base whose tower sees grids. With 2 and a stride of 2 they are those at one place of two
            frames, with 2 and 8 four of each. What stays of a window stands in its last frame. Needs `"avgpool1d"` or
            `"avgpool2d"`, and a `compress_stride` that is 1 or a multiple. Images are one frame.
        float16_positions (`bool`): whether positions of pooled tokens are averaged in float16, as in the released
            code: up to 1023 that changes nothing, from there on means between two places get the even one, and from
            2048 on only even places are left. Prompts of several images get that far. For comparisons with numbers
            that the released code gave; needs `"avgpool1d"`, and a `compress_layer_idx` of at least 1 where images get
            shorter behind the embeddings (the released code cannot decode at 0).

    On a base whose tower sees grids (Qwen3-VL, Qwen2.5-VL) windows stay inside of an image's grid: `"avgpool1d"` takes
    `compress_stride` neighbours of a row, `"avgpool2d"` squares, and those at an edge are means of what is there. With
    h x w tokens the admissible counts are h * ceil(w / S), and ceil(h / s) * ceil(w / s) for sides s; a larger
    `compress_stride` leaves one token of each row, or of the image. With `compress_frames` T other than 1 a video of n
    frames has ceil(n / T) times as many, besides all of its tokens. Positions are places in an image there and are
    kept: -1 is refused, as are `"kmeans"`, and on Qwen2.5-VL `"attention"`.

    The other fields are those of `VtcConfig`.
    """

    model_type = "vtc_llavolta"
    one_tile_per_image = True
    joins_tiles = True
    takes_tiled_videos = True

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        compress_layer_idx: int = 2,
        compress_stride: int = 8,
        compressor: str = "avgpool1d",
        compress_frames: int = 1,
        float16_positions: bool = False,
        **kwargs: Any,
    ):
        self.compress_layer_idx = compress_layer_idx
        self.compress_stride = compress_stride
        self.compressor = compressor
        self.compress_frames = compress_frames
        self.float16_positions = float16_positions
        super().__init__(vision_config, text_config, **kwargs)
        if compressor not in COMPRESSORS:
            raise ValueError(f"`compressor` must be one of {', '.join(COMPRESSORS)}, got {compressor!r}.")
        if float16_positions and compressor != "avgpool1d":
            raise ValueError(
                "`float16_positions` is how the released code rounds, which has `compressor='avgpool1d'` alone, got "
                f"{compressor!r}. Set one of them."
            )
        self._check_frames()
        self.set_compression(compress_layer_idx, compress_stride)

    def _check_frames(self) -> None:
        frames = self.compress_frames
        if frames == 1:
            return
        if frames < 1:
            raise ValueError(f"`compress_frames` must be at least 1 (each frame by itself), got {frames}.")
        if self.video_token_id is None:
            raise ValueError(
                f"`compress_frames` ({frames}) is for videos, which need a `video_token_id`. Give one, or leave the "
                "other out."
            )
        if self.grid_base is None:
            raise ValueError(
                f"`compress_frames` ({frames}) needs a tower that sees grids, at whose places frames are averaged, "
                f"got {self.vision_config.model_type}. Leave it out: each frame is compressed by itself."
            )
        if self.compressor not in WINDOWS:
            raise ValueError(
                f"`compress_frames` ({frames}) needs a `compressor` that takes means of windows, one of "
                f"{', '.join(WINDOWS)}, got {self.compressor!r}. Set one of them."
            )
        if self.frame_split != "uniform":
            raise ValueError(
                f"`frame_split={self.frame_split!r}` gives each frame tokens of its own, which `compress_frames` "
                f"({frames}) takes from several together. Set one of them."
            )

    def set_compression(self, layer_idx: int, stride: int) -> None:
        """Compress by `stride` before decoder layer `layer_idx` from now on.

        Raises:
            ValueError: out of range, or not possible with the compressor.
        """
        num_layers, base = self.text_config.num_hidden_layers, self.grid_base
        if not -1 <= layer_idx <= num_layers:
            raise ValueError(
                f"`compress_layer_idx` must be from -1 (before the sequence is built) to {num_layers} (never, in a "
                f"decoder of {num_layers} layers), got {layer_idx}."
            )
        if stride < 1:
            raise ValueError(f"`compress_stride` must be at least 1 (no compression), got {stride}.")
        if base is not None and layer_idx == -1:
            raise ValueError(
                f"`compress_layer_idx` must not be -1 on {base}: it closes gaps between positions, which are places "
                "in an image there and are kept. Take 0, which shortens the same tokens."
            )
        if is_recurrent(self.text_config) and 0 < layer_idx < num_layers:
            raise ValueError(
                f"`compress_layer_idx` must be 0 on {base}, or {num_layers} to compress nowhere, got {layer_idx}: "
                "most layers of its decoder are recurrent, between which no images were tried to get shorter."
            )
        if (base, self.compressor) in _NOT_ON_GRIDS:
            raise ValueError(
                f"`compressor={self.compressor!r}` does not fit {base}: {_NOT_ON_GRIDS[base, self.compressor]}."
            )
        if self.compressor == "attention" and layer_idx < 1:
            raise ValueError(
                "`compressor='attention'` needs a decoder layer that has attended: `compress_layer_idx` must be at "
                f"least 1, got {layer_idx}."
            )
        own = self.stride_of_frame(stride)
        if stride > 1 and stride % self.frames_joined:
            raise ValueError(
                f"`compress_stride` must be 1 or a multiple of `compress_frames` ({self.frames_joined}), in each of "
                f"which a window has as many tokens, got {stride}."
            )
        if self.compressor == "avgpool2d" and base is not None and math.isqrt(own) ** 2 != own:
            raise ValueError(
                f"`compressor='avgpool2d'` needs a square `compress_stride`, got {stride}."
                if self.frames_joined == 1
                else f"`compressor='avgpool2d'` needs a `compress_stride` of `compress_frames` ({self.frames_joined}) "
                f"times a square, got {stride}."
            )
        if self.compressor == "avgpool2d" and base is None:
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

    @property
    def compresses_nowhere(self) -> bool:
        """Whether every layer sees every visual token, whatever the stride."""
        return self.compress_layer_idx == self.text_config.num_hidden_layers

    @property
    def frames_joined(self) -> int:
        # whoever compares compressors may set another one for a while
        return self.compress_frames if self.compressor in WINDOWS else 1

    def stride_of_frame(self, stride: int) -> int:
        """How many of the `stride` tokens that become one are of one frame."""
        return max(stride // self.frames_joined, 1)

    def kept_tokens(self, length: int, stride: int) -> int:
        """Visual tokens that stay of an image of `length` tokens."""
        if self.compressor != "avgpool2d" or stride == 1:
            return length // stride
        return length // self.image_seq_length * (math.isqrt(self.image_seq_length) // math.isqrt(stride)) ** 2

    def strides_of(self, length: int) -> list[int]:
        """Strides that leave something of an image of `length` tokens, rising."""
        if self.compresses_nowhere:
            return [1]
        if self.compressor == "avgpool2d":
            return [edge * edge for edge in range(1, math.isqrt(self.image_seq_length) + 1)]
        return list(range(1, length + 1))

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        """At level i an image is shortened by the i-th of its `strides_of`."""
        if sizes.tokens is not None and self.compressor in ("avgpool1d", "avgpool2d"):
            rule = (self.compressor == "avgpool2d", self.compresses_nowhere, self.frames_joined > 1)
            return [_counts_of_grid(rows, columns, *rule) for rows, columns in sizes.tokens.tolist()]
        rule = (self.compressor == "avgpool2d", self.image_seq_length, self.compresses_nowhere)
        return [_counts_by_stride(length, *rule) for length in self.reserved_tokens(sizes).tolist()]

    def stride_of(self, level: int) -> int:
        """The stride at a level of an image, over all frames of a window."""
        frames = self.frames_joined
        if level == 0:
            return 1
        # frames that share windows may do so place by place, which is a level more
        edge = level + 1 if frames == 1 else level
        return frames * (edge**2 if self.compressor == "avgpool2d" else edge)

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        if not self.compresses:
            return 0
        # strides rise by one, or with windows of a grid by their sides
        own = self.stride_of_frame(self.compress_stride)
        level = (math.isqrt(own) if self.compressor == "avgpool2d" else own) - int(self.frames_joined == 1)
        if level >= len(counts) and self.grid_base is not None:
            # windows there are cut at the edges of an image, down to one that holds it
            return len(counts) - 1
        if level >= len(counts):
            raise ValueError(
                f"`compress_stride` ({self.compress_stride}) is larger than image {image_idx} allows, which has "
                f"{counts[0]} visual tokens. Lower it, or give a `vtc_budget`."
            )
        return level

    def level_entering(self, level: int) -> int:
        # only before the sequence is built are there fewer tokens in it
        return level if self.compress_layer_idx == -1 else 0


@lru_cache(maxsize=256)
def _counts_of_grid(rows: int, columns: int, by_windows: bool, nowhere: bool, joined: bool) -> tuple[int, ...]:
    if nowhere:
        return (rows * columns,)
    # before windows of several frames with one token of each there is no window at all
    whole = (rows * columns,) if joined else ()
    if not by_windows:
        return whole + tuple(rows * -(-columns // wide) for wide in range(1, columns + 1))
    return whole + tuple(-(-rows // edge) * -(-columns // edge) for edge in range(1, max(rows, columns) + 1))


@lru_cache(maxsize=256)
def _counts_by_stride(length: int, by_windows: bool, per_tile: int, nowhere: bool) -> tuple[int, ...]:
    if nowhere:
        return (length,)
    if not by_windows:
        return tuple(length // stride for stride in range(1, length + 1))
    side = math.isqrt(per_tile)
    return (length, *(length // per_tile * (side // edge) ** 2 for edge in range(2, side + 1)))
