"""Configuration of ConvLLaVA."""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .configuration_vtc import VtcConfig
from .host_vtc import GRID_BASES
from .tiling_vtc import ImageSizes

# ConvNeXt-L with the fifth stage, as in `ConvLLaVA/ConvLLaVA-ConvNeXt-768`
_DEFAULT_TOWER = {"hidden_sizes": [192, 384, 768, 1536, 3072], "depths": [3, 3, 27, 3, 6], "image_size": 768}


class ConvllavaConfig(VtcConfig):
    """A ConvNeXt of five stages in place of the ViT: one visual token for each `token_stride` x `token_stride` pixels.

    Args:
        vision_config (`dict` or `ConvNextConfig`): the tower. `num_stages` may be left out of a dict and is counted
            then; `image_size` is the side in pixels of the square that `image_seq_length` counts, or the short side
            where the aspect ratio is kept. Default: the five-stage ConvNeXt-L of the published models at 768 pixels.
        image_seq_length (`int`, *optional*): derived, visual tokens of a square image, `(image_size / 64)^2`.

    The other fields are those of `VtcConfig`. Three of them have one value here: `downsample_ratio` 1.0 (no pixel
    shuffle), `vision_feature_layer` -1 and `vision_feature_select_strategy` `"full"` (there is no class token).

    Raises:
        ValueError: a field is outside of its range.
    """

    model_type = "vtc_convllava"
    refused_bases = dict.fromkeys(
        ("internvl", "llava", "llava_next", "llava_onevision", *GRID_BASES), "the method is its own tower"
    )
    sees_tiles = False

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        vision_feature_select_strategy: str = "full",
        **kwargs: Any,
    ):
        tower = _convnext_config(_DEFAULT_TOWER if vision_config is None else vision_config)
        super().__init__(tower, text_config, vision_feature_select_strategy=vision_feature_select_strategy, **kwargs)
        for name, only in (
            ("downsample_ratio", 1.0),
            ("vision_feature_layer", -1),
            ("vision_feature_select_strategy", "full"),
        ):
            if getattr(self, name) != only:
                raise ValueError(
                    f"`{name}` must be {only!r} for ConvLLaVA, got {getattr(self, name)!r}. Leave it out."
                )

    @property
    def token_stride(self) -> int:
        """Pixels that one visual token covers in each direction (64 for five stages and patches of 4)."""
        return self.vision_config.patch_size * 2 ** (self.vision_config.num_stages - 1)

    @property
    def patches_per_side(self) -> int:
        """Side of the last stage's map for a square of `image_size` pixels; a remainder of pixels is dropped."""
        side = self.vision_config.image_size // self.token_stride
        if side < 1:
            raise ValueError(
                f"The tower's `image_size` must be at least {self.token_stride} pixels, the side of one visual token, "
                f"got {self.vision_config.image_size}."
            )
        return side

    @property
    def smallest_image(self) -> tuple[int, int]:
        """An image of one visual token."""
        return self.token_stride, self.token_stride

    def reserved_tokens(self, sizes: ImageSizes) -> Any:
        """`floor(H / token_stride) * floor(W / token_stride)` of each image.

        Raises:
            ValueError: an image has less than one token.
        """
        stride = self.token_stride
        for image_idx, (height, width) in enumerate(sizes.image_sizes.tolist()):
            if min(height, width) < stride:
                raise ValueError(
                    f"Image {image_idx} has {height} x {width} pixels (height x width), but ConvLLaVA needs at least "
                    f"{stride} per side, the size of one visual token. Enlarge it, as the processor does."
                )
        return (sizes.image_sizes // stride).prod(-1)


def _convnext_config(config: dict | PretrainedConfig) -> PretrainedConfig:
    """The tower's configuration, checked, with `hidden_size` as other towers have it."""
    if isinstance(config, dict):
        fields = {"num_stages": len(config.get("depths") or ()) or 4, **config}
        model_type = fields.pop("model_type", "convnext")
        if model_type != "convnext":
            raise ValueError(
                f"The `model_type` of ConvLLaVA's tower must be 'convnext', got {model_type!r}. Use another method "
                "for other towers."
            )
        config = CONFIG_MAPPING[model_type](**fields)
    elif config.model_type != "convnext":
        raise ValueError(f"ConvLLaVA's tower must be a `ConvNextConfig`, got {type(config).__name__}.")
    stages = {"num_stages": config.num_stages, "depths": len(config.depths), "hidden_sizes": len(config.hidden_sizes)}
    if len(set(stages.values())) > 1:
        raise ValueError(
            f"`num_stages`, `depths` and `hidden_sizes` of the tower must count the same stages, got {stages}. Set "
            f"`num_stages={len(config.depths)}`: without it transformers builds four stages, whatever else is given."
        )
    if min(config.depths) < 1:
        raise ValueError(f"Every entry of `depths` must be at least 1 block, got {list(config.depths)}.")
    for name in ("image_size", "patch_size"):
        side = getattr(config, name)
        # transformers writes squares as pairs too
        pair = list(side) if isinstance(side, (list, tuple)) else [side, side]
        if len(pair) != 2 or pair[0] != pair[1]:
            raise ValueError(f"`{name}` of the tower is the side of a square in pixels, got {side}.")
        setattr(config, name, pair[0])
    config.depths, config.hidden_sizes = list(config.depths), list(config.hidden_sizes)
    config.hidden_size = config.hidden_sizes[-1]
    return config
