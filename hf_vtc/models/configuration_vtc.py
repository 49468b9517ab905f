"""What the configurations of all compressing models share."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import logging

from .grids_vtc import grid_positions, scaled_down
from .host_vtc import (
    PARTS_HAVE_OWN_DTYPE,
    PREFERS_INSTALLED_CODE,
    counts_seconds,
    grid_base_of,
    position_axes,
    require_base,
)
from .tiling_vtc import UNPAD_RULES, ImageSizes, best_canvases, refuse_wrong_tiles
from .videos_vtc import FRAME_SPLITS
from .window_vtc import note_on_newer

MERGE_TYPES = ("flat", "spatial_unpad")
# merge type and rule of maps that are scaled down
_LIMITED_MAPS = ("spatial_unpad", "true_aspect")

# said here, since whatever runs one of our models reads its config first; by one logger, so that copies of this file
# that travelled beside weights do not repeat it
if note := note_on_newer(transformers.__version__):
    logging.get_logger("hf_vtc").warning_once(note)


class VtcConfig(PretrainedConfig):
    """Configuration of a vision tower, a connector that compresses, and a language model.

    Abstract: a method derives one final class that sets `model_type` and its own fields.

    Args:
        vision_config (`dict` or `PretrainedConfig`): the tower; a dict needs `model_type`. Default: InternViT-300M.
            That of Qwen3-VL or Qwen2.5-VL sees images as grids of patches and has the connector in it; the fields of
            connector and tiles below are left out then.
        text_config (`dict` or `PretrainedConfig`): the decoder; a dict needs `model_type`. Default: Qwen3.
        image_token_id (`int`): id of the placeholder token in `input_ids`. It may lie beyond the vocabulary, which
            then has no row for it.
        video_token_id (`int`, *optional*): id of the placeholder of videos, for a tower that sees grids or frames of
            LLaVA-OneVision, which not every method takes; None where videos are not taken.
        frame_split (`str`): how the budget of a video is split over its frames: `"uniform"`, as many tokens of each,
            or `"change"`, more of those that differ more from the frame before.
        image_seq_length (`int`, *optional*): reserved placeholders per tile, derived from the tower if not given:
            `(image_size / patch_size)^2 * downsample_ratio^2` (256 for 448 px, patch 14, ratio 0.5).
        vision_feature_layer (`int`): hidden state of the tower that is read, counted as in LLaVA: -1 is what the last
            layer gives, without the norm behind it. InternViT's -1 is its output, with that norm, as in InternVL.
        vision_feature_select_strategy (`str`): `"default"` drops the class token, `"full"` keeps every token.
        projector_hidden_act (`str`): activation of the connectors.
        downsample_ratio (`float`): side ratio of the connector's pixel shuffle, 1 for none (LLaVA).
            `1 / downsample_ratio` must be a whole number.
        ps_version (`str`): channel order of the pixel shuffle, `"v2"` (InternVL3.5) or `"v1"`.
        mm_patch_merge_type (`str`): `"flat"`: InternVL, LLaVA-1.5, the tiles of an image one after the other.
            `"spatial_unpad"`: LLaVA-NeXT, the view of the whole image, then the tiles as one map without its padding,
            `image_newline` at the end of each row; not for every method.
        max_map_tiles (`int`, *optional*): for `"spatial_unpad"`, as in LLaVA-OneVision (`anyres_max_9`): a map with a
            fifth more tokens than so many tiles is scaled down to them, and a newline stands behind a single tile.
        image_grid_pinpoints (`list[list[int]]`, *optional*): for `"spatial_unpad"`, the canvases of the image
            processor, (height, width) in pixels. Official files have (width, height).
        unpad_rule (`str`): for `"spatial_unpad"`, what the aspect ratio of the image is compared with to find the
            padding: `"token_grid"`, the rows and columns of tokens, which distorts where a token is not square, or
            `"true_aspect"`, the canvas.
        tie_word_embeddings (`bool`): whether `lm_head` shares the weight of the input embeddings.

    Raises:
        ValueError: a field is outside of its range.
    """

    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # why a method does not fit a base whose tower sees grids, by the `model_type` of the base
    refused_bases = {}
    # whether an image is one tile unless `num_tiles` says otherwise
    one_tile_per_image = False
    # whether the tiles of an image can be joined to one map
    joins_tiles = False
    # whether frames of videos can be tiles whose tokens are pooled, as those of LLaVA-OneVision
    takes_tiled_videos = False
    # whether a single tile of LLaVA-NeXT is followed by a newline
    newline_behind_single_tile = False
    # whether a caller can decide in place of the method, by `router_decisions`
    takes_decisions = False
    # whether only scores tell which visual tokens stay, and not their number
    chooses_by_scores = False
    keys_to_ignore_at_inference = [
        # its two names: transformers 5.24 renamed it
        "past_key_values",
        "cache",
        "image_hidden_states",
        "router_logits",
        "router_decisions",
        "kept_mask",
        "kept_index",
        "num_visual_tokens",
    ]

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        image_token_id: int = 151667,
        video_token_id: int | None = None,
        frame_split: str = "uniform",
        image_seq_length: int | None = None,
        vision_feature_layer: int = -1,
        vision_feature_select_strategy: str = "default",
        projector_hidden_act: str = "gelu",
        downsample_ratio: float = 1.0,
        ps_version: str = "v2",
        mm_patch_merge_type: str = "flat",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        unpad_rule: str = "true_aspect",
        max_map_tiles: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        self.vision_config = _sub_config(vision_config, "internvl_vision")
        self.text_config = _sub_config(text_config, "qwen3")
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.frame_split = frame_split
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.projector_hidden_act = projector_hidden_act
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.mm_patch_merge_type = mm_patch_merge_type
        self.image_grid_pinpoints = None if image_grid_pinpoints is None else [list(p) for p in image_grid_pinpoints]
        self.unpad_rule = unpad_rule
        self.max_map_tiles = max_map_tiles
        if vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                "`vision_feature_select_strategy` must be 'default' (drop the class token) or 'full', got "
                f"{vision_feature_select_strategy!r}."
            )
        if ps_version not in ("v1", "v2"):
            raise ValueError(f"`ps_version` must be 'v1' or 'v2' (InternVL3.5 uses 'v2'), got {ps_version!r}.")
        self._check_downsample_ratio()
        self._check_merge_type()
        self._check_grid_base()
        self._check_videos()
        derived = self._tokens_per_tile()
        if image_seq_length not in (None, derived):
            raise ValueError(
                f"`image_seq_length` must be {derived}, which tower and connector give for a tile, got "
                f"{image_seq_length}. Leave it out."
            )
        self.image_seq_length = derived
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        if PARTS_HAVE_OWN_DTYPE and self.dtype is not None:
            # files say of parts how they were made, which is not how they were saved
            self.vision_config.dtype = self.text_config.dtype = self.dtype

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids of placeholders in `input_ids`, of images and, if they are taken, of videos."""
        return (self.image_token_id,) if self.video_token_id is None else (self.image_token_id, self.video_token_id)

    @property
    def grid_base(self) -> str | None:
        """The `model_type` of the base whose tower sees images as grids of patches; None for towers that do not."""
        return grid_base_of(self.vision_config.model_type)

    @property
    def sees_tiles(self) -> bool:
        """Whether the tower sees square tiles of one size, or each image whole, at its own."""
        return self.grid_base is None

    @property
    def token_stride(self) -> int:
        """Pixels that one visual token covers in each direction, of a tower that sees images whole."""
        return self.vision_config.patch_size * self.vision_config.spatial_merge_size

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return _side(self.vision_config.image_size)

    @property
    def smallest_image(self) -> tuple[int, int]:
        """(height, width) in pixels of the smallest image that the tower takes."""
        side = self.tile_size if self.grid_base is None else self.token_stride
        return side, side

    @property
    def shuffle_factor(self) -> int:
        """Side factor of the connector's pixel shuffle, 1 for none."""
        return round(1 / self.downsample_ratio)

    @property
    def patches_per_side(self) -> int:
        """Side of the tower's grid of patches."""
        return _side(self.vision_config.image_size) // _side(self.vision_config.patch_size)

    def _check_downsample_ratio(self) -> None:
        ratio = self.downsample_ratio
        if not 0 < ratio <= 1 or abs(self.shuffle_factor * ratio - 1) > 1e-6:
            raise ValueError(f"`downsample_ratio` must be 1, 1/2, 1/3, ... so that 1/ratio is whole, got {ratio}.")

    def _check_grid_base(self) -> None:
        base = self.grid_base
        if base is None:
            return
        if base in self.refused_bases:
            raise ValueError(f"{self.model_type} does not fit {base}: {self.refused_bases[base]}.")
        # what the tower has in it already
        neutral = {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "downsample_ratio": 1.0,
            "mm_patch_merge_type": "flat",
        }
        for name, only in neutral.items():
            if getattr(self, name) != only:
                raise ValueError(f"`{name}` must be {only!r} for {base}, got {getattr(self, name)!r}. Leave it out.")
        width, given = self.text_config.hidden_size, self.vision_config.out_hidden_size
        if width != given:
            raise ValueError(
                f"`out_hidden_size` of the tower must be the width of the decoder, {width}, got {given}: its "
                "connector gives visual tokens. Use tower and decoder of one model."
            )

    def _check_videos(self) -> None:
        if self.frame_split not in FRAME_SPLITS:
            raise ValueError(f"`frame_split` must be one of {', '.join(FRAME_SPLITS)}, got {self.frame_split!r}.")
        if self.video_token_id is None:
            if self.frame_split != "uniform":
                raise ValueError(
                    "`frame_split` is for videos, which need a `video_token_id`. Give one, or leave it out."
                )
        elif not self.takes_videos:
            raise ValueError(
                f"`video_token_id` is of no use for {self.model_type} on {self.vision_config.model_type}: videos need "
                "a tower that sees grids, or LLaVA-OneVision (`max_map_tiles`) and a method for its frames. Leave it "
                "out."
            )
        elif self.video_token_id == self.image_token_id:
            raise ValueError(f"`video_token_id` must differ from `image_token_id`, both are {self.image_token_id}.")

    def _tokens_per_tile(self) -> int:
        """Reserved placeholders of a tile. A method whose towers have another geometry overrides it."""
        if self.grid_base is not None:
            # of the smallest image
            return 1
        grid, factor = self.patches_per_side, self.shuffle_factor
        if grid % factor:
            raise ValueError(
                f"A side of the tower's grid ({grid} patches) must be a multiple of {factor} for a pixel shuffle by "
                f"{factor}. Change `image_size`, `patch_size` or `downsample_ratio`."
            )
        return (grid // factor) ** 2

    def _check_merge_type(self) -> None:
        for name, values in (("mm_patch_merge_type", MERGE_TYPES), ("unpad_rule", UNPAD_RULES)):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        limit = self.max_map_tiles
        if limit is not None and (limit < 1 or (self.mm_patch_merge_type, self.unpad_rule) != _LIMITED_MAPS):
            raise ValueError(
                "`max_map_tiles` must be a positive number of tiles and needs `mm_patch_merge_type='spatial_unpad'` "
                f"with `unpad_rule='true_aspect'`, got {limit}, {self.mm_patch_merge_type!r} and {self.unpad_rule!r}."
            )
        if self.mm_patch_merge_type == "flat":
            return
        if not self.joins_tiles:
            raise ValueError(f"`mm_patch_merge_type` must be 'flat' for {self.model_type}, whose tiles have no map.")
        size, sides = self.tile_size, [side for pair in self.image_grid_pinpoints or [] for side in pair]
        if not sides or any(side < size or side % size for side in sides):
            raise ValueError(
                f"`mm_patch_merge_type='spatial_unpad'` needs `image_grid_pinpoints`, (height, width) pairs in "
                f"multiples of the tower's tile ({size} pixels), got {self.image_grid_pinpoints}."
            )

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of visual tokens of a tile without compression."""
        side = self.patches_per_side // self.shuffle_factor
        return side, side

    def joined_sizes(self, num_tiles: Any, image_sizes: Any) -> ImageSizes:
        """Sizes of images whose tiles are joined to maps, as LLaVA-NeXT does.

        Args:
            num_tiles (`torch.LongTensor` of shape `(num_images,)`): on the CPU.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): (height, width) in pixels.

        Raises:
            ValueError: an image has other tiles than its size asks for.
        """
        grids = best_canvases(image_sizes, self.image_grid_pinpoints) // self.tile_size
        refuse_wrong_tiles(image_sizes, grids, num_tiles.tolist())
        return ImageSizes(num_tiles, image_sizes, grids)

    def tiles_of_joined(self, image_sizes: Any, num_given: int) -> Any:
        """Tiles of each image whose tiles are joined, `(num_images,)`, if `num_given` were given for all together."""
        if num_given == len(image_sizes):
            return image_sizes.new_ones(len(image_sizes))
        grids = best_canvases(image_sizes, self.image_grid_pinpoints) // self.tile_size
        return 1 + grids.prod(-1)

    @property
    def takes_videos(self) -> bool:
        """Whether videos can be shown, if `video_token_id` says where."""
        return self.grid_base is not None or self.takes_tiled_videos and self.max_map_tiles is not None

    @property
    def frame_grid(self) -> tuple[int, int]:
        """(rows, columns) of visual tokens of a frame that is a tile, half of `token_grid`, rounded up."""
        rows, columns = self.token_grid
        return -(-rows // 2), -(-columns // 2)

    def sizes_of(self, num_tiles: Any, image_sizes: Any) -> ImageSizes:
        """Sizes of images as a processor gives them, without a model.

        Args:
            num_tiles (`torch.LongTensor` of shape `(num_images,)`): on the CPU; of no meaning for whole images.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): (height, width) in pixels.
        """
        if self.grid_base is not None:
            return ImageSizes(None, image_sizes, None, image_sizes // self.token_stride)
        if not self.sees_tiles:
            return ImageSizes(None, image_sizes, None)
        if self.mm_patch_merge_type == "spatial_unpad":
            return self.joined_sizes(num_tiles, image_sizes)
        return ImageSizes(num_tiles, image_sizes, None)

    @property
    def single_tile_newlines(self) -> int:
        """Newlines behind an image of a single tile."""
        return int(self.newline_behind_single_tile or self.max_map_tiles is not None)

    def tokens_of_images(self, sizes: ImageSizes, token_grid: tuple[Any, Any]) -> Any:
        """Visual tokens of each image, `(num_images,)`, whose tiles have (rows, columns) `token_grid` of them.

        For G grids at once they are tensors `(G, 1)`, and the counts `(G, num_images)`.
        """
        per_tile = token_grid[0] * token_grid[1]
        if sizes.grids is None:
            return sizes.num_tiles * per_tile
        kept = sizes.kept(token_grid, self.unpad_rule)
        rows, columns = scaled_down(kept, token_grid, self.max_map_tiles).unbind(-1)
        joined = per_tile + rows * (columns + 1)
        return joined.where(sizes.num_tiles > 1, per_tile + self.single_tile_newlines)

    def reserved_tokens(self, sizes: ImageSizes) -> Any:
        """Visual tokens of each image without compression, `(num_images,)` on the CPU."""
        if sizes.tokens is not None:
            return sizes.tokens.prod(-1)
        counts = self.tokens_of_images(sizes, self.token_grid)
        return counts if sizes.frames is None else counts.where(sizes.frames == 0, sizes.frames)

    def sizes_of_grids(self, image_grid_thw: Any) -> Any:
        """(height, width) in pixels of images of the grids `(num_images, 3)`, patches in time, height and width.

        Raises:
            ValueError: a grid is none of an image of this tower.
        """
        merge = self.vision_config.spatial_merge_size
        for image_idx, grid in enumerate(image_grid_thw.tolist()):
            if grid[0] != 1 or min(grid) < 1 or any(side % merge for side in grid[1:]):
                raise ValueError(
                    f"`image_grid_thw` of image {image_idx} must be 1 and two multiples of {merge}, patches in time, "
                    f"height and width, got {grid}. Pass what the processor returned; videos are not supported here, "
                    "but in `pixel_values_videos` and `video_grid_thw`."
                )
        return image_grid_thw[:, 1:] * self.vision_config.patch_size

    def levels(self, sizes: ImageSizes) -> list[Sequence[int]]:
        """Visual tokens of each image that leave the model's compression at each of its levels, all of them first.

        From sizes alone: processors, engines and reports use it without a model. Of equal counts the first one is
        taken. A level says how many tokens stay, and not always which.
        """
        return [(count,) for count in self.reserved_tokens(sizes).tolist()]

    def own_level(self, counts: Sequence[int], image_idx: int = 0) -> int:
        """The level of an image under `vtc_budget="auto"`, -1 where only scores of its pixels can tell.

        Args:
            counts (`Sequence[int]`): its `levels`.
            image_idx (`int`): which image of the call, for error messages.
        """
        return 0

    def level_entering(self, level: int) -> int:
        """The level whose tokens enter the language model where those of `level` leave it: another one where images
        get shorter between its layers."""
        return level

    def positions(self, layout: Any) -> Any:
        """Positions `(A, B, L)` of a prompt for a decoder whose positions have several axes, None for one that counts.

        Args:
            layout ([`Layout`]): of the prompt. On the CPU, as what is given back.
        """
        if self.grid_base is None or not position_axes(self.text_config):
            return None
        if layout.is_exact:
            self.check_exact()
        windows = [self.window_of(level) for level in layout.levels] if layout.is_exact else None
        seen = layout.placeholder_mask, layout.attention_mask, layout.sizes.tokens, windows
        if layout.videos is None or not counts_seconds(self.grid_base):
            return grid_positions(*seen)
        per_second = self.vision_config.tokens_per_second
        return grid_positions(*seen, *layout.videos.steps_in_time(layout.sizes.tokens, layout.order, per_second))

    def check_exact(self) -> None:
        """Raise a ValueError where a prompt cannot be written for just the tokens of a budget."""
        if self.chooses_by_scores and self.grid_base is not None:
            raise ValueError(
                f"A prompt cannot be written for a `vtc_budget` of {self.model_type} on {self.grid_base}: kept tokens "
                "keep their places in the image, and only scores tell which stay. Leave `vtc_budget` out of the "
                "processor's call, and give it to the model."
            )

    @property
    def frames_joined(self) -> int:
        """Frames of a video that have tokens in common where it is compressed."""
        return 1

    def window_of(self, level: int) -> tuple[int, int]:
        """(high, wide) of what enters the language model as one visual token of a grid, at a level of its image."""
        return 1, 1

    def __getattr__(self, name: str) -> Any:
        # trainers of others ask which auto class loads a model whose class transformers does not have; no attribute
        # of the object, which would be saved and promise files that are not there
        if name == "auto_map" and PREFERS_INSTALLED_CODE:
            return self.remote_code_map()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def remote_code_map(self) -> dict[str, str]:
        """`auto_map` of a checkpoint folder that carries its own code: auto class -> `file.Class`."""
        name = type(self).__name__.removesuffix("Config")
        method = self.model_type.removeprefix("vtc_")
        head = f"modeling_{method}.{name}ForConditionalGeneration"
        return {
            "AutoConfig": f"configuration_{method}.{name}Config",
            "AutoModel": f"modeling_{method}.{name}Model",
            "AutoModelForImageTextToText": head,
            "AutoModelForVision2Seq": head,
        }


def _sub_config(config: dict | PretrainedConfig | None, default_type: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    fields = dict(config or {})
    model_type = fields.pop("model_type", default_type)
    base = grid_base_of(model_type)
    if base is not None:
        return _tower_config_class(base)(**fields)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`model_type` {model_type!r} of a sub-config is unknown to the installed transformers. Upgrade it, or "
            "use a tower or decoder that it has."
        )
    return CONFIG_MAPPING[model_type](**with_both_ropes(fields))


@lru_cache
def _tower_config_class(base: str) -> type[PretrainedConfig]:
    require_base(base, CONFIG_MAPPING)
    # 4.57 knows it by no name of its own
    return type(CONFIG_MAPPING[base]().vision_config)


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


def with_both_ropes(fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in both spellings: `rope_theta` and `rope_scaling` (4.57), `rope_parameters` (5.x).

    4.57 would read a folder of 5.x with its default `rope_theta`, without a word.
    """
    parameters = fields.get("rope_parameters")
    scaling = fields.get("rope_scaling") or {}
    if parameters and "rope_theta" in parameters:
        scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
        if set(scaling) <= {"rope_type"} and scaling.get("rope_type", "default") == "default":
            scaling = None
        return {**fields, "rope_theta": parameters["rope_theta"], "rope_scaling": scaling}
    if "rope_theta" in fields:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        # the older name of a plain one that has sections for several axes
        kind = "default" if kind == "mrope" else kind
        parameters = {**scaling, "rope_theta": fields["rope_theta"], "rope_type": kind}
        return {**fields, "rope_parameters": parameters}
    return dict(fields)
