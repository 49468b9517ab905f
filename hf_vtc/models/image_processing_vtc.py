"""Images to tiles, on PIL and numpy alone, bit for bit as the published models were trained.

One class serves every method; the field `tiling` says how an image is cut, see `tiling_vtc.py`. The original code
rescales and normalises in float32, and so do we.
"""

import json
import os
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import IMAGE_PROCESSOR_NAME

from .host_processor_vtc import ImageProcessorBase
from .image_loading_vtc import alone_in_rows, flattened, has_unit_range, load_images
from .padding_vtc import PaddedImages
from .pixels_vtc import as_patches, cut, stacked
from .tiling_vtc import TileLayout, TilingSettings, refuse_misnamed, refuse_unknown, square_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# (height, width), as in transformers' LLaVA-NeXT; the original LLaVA code writes (width, height)
LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

# kinds of `tiling` that cut an image into several tiles
_SEVERAL_TILES = ("anyres", "dynamic")
# how many times as many pixels a large batch may have by its padding
_MOST_PADDING = 4
# fields of a single base each, which files of the others do not name
_OF_SOME_BASES = ("patch_size", "min_pixels", "max_pixels", "max_map_tiles")
# keys of `preprocessor_config.json` that are no fields
_WRITTEN_BY_HOSTS = ("auto_map", "image_processor_type", "processor_class", "feature_extractor_type")


class VtcImageProcessorKwargs(TypedDict, total=False):
    """Fields of `VtcImageProcessor` that a single call may override."""

    tiling: str | None
    size: int | dict[str, int] | None
    resample: int | None
    image_mean: list[float] | tuple[float, ...] | None
    image_std: list[float] | tuple[float, ...] | None
    do_rescale: bool | None
    do_normalize: bool | None
    min_tiles: int | None
    max_tiles: int | None
    use_thumbnail: bool | None
    image_grid_pinpoints: list | tuple | None
    token_stride: int | None
    patch_size: int | None
    min_pixels: int | None
    max_pixels: int | None
    max_map_tiles: int | None
    crop_to_patches: bool | None
    input_data_format: str | None
    return_tensors: str | None


class VtcImageProcessor(ImageProcessorBase):
    """Turns images into tiles of normalised float32 pixels.

    Every image becomes 8-bit RGB first, as in the original code: alpha is dropped, not composited; palettes, CMYK,
    grey and 1-bit images are converted; 16-bit values are divided by 257 (PIL alone would clip them); the EXIF
    orientation is applied to PIL images and files. Float arrays hold 0..1.

    Args:
        tiling (`str`): `"single"`, `"pad"`, `"anyres"`, `"dynamic"`, `"crop"`, `"keep_aspect"` or `"patches"`, see
            `tiling_vtc.py`.
        size (`int` or `dict`): side of a tile in pixels, also as `{"height": S, "width": S}`; for `"keep_aspect"` the
            short side of the image; of no meaning for `"patches"`.
        resample (`int`): PIL filter of every resize, 3 is bicubic.
        image_mean (`Sequence[float]`): mean per channel of pixels in 0..1; for `"pad"` also the padding colour.
        image_std (`Sequence[float]`): standard deviation per channel.
        do_rescale (`bool`): divide by 255.
        do_normalize (`bool`): subtract the mean, divide by the standard deviation.
        min_tiles (`int`): smallest grid of `"dynamic"`, in tiles without the thumbnail.
        max_tiles (`int`): largest grid of `"dynamic"`, in tiles without the thumbnail.
        use_thumbnail (`bool`): whether `"dynamic"` appends the whole image when there is more than one tile.
        image_grid_pinpoints (`Sequence[Sequence[int]]`): canvases of `"anyres"`, (height, width) in pixels.
        token_stride (`int`, *optional*): side in pixels of one visual token, for models whose token count follows from
            the pixels of the image (ConvLLaVA: 64, Qwen3-VL: 32). `image_sizes` are then processed sizes.
        patch_size (`int`, *optional*): for `"patches"`, side in pixels of one patch of the tower.
        min_pixels, max_pixels (`int`, *optional*): for `"patches"`, between which the size of an image is left alone.
        max_map_tiles (`int`, *optional*): for `"anyres"`, as LLaVA-OneVision does it: the tiles' worth of tokens above
            which the model scales the map of an image down. An image that shares its prompt with others, by being
            in a list of its own with them, is then one tile, padded as for `"pad"`.

    Raises:
        ValueError: a field is outside of its range.
    """

    valid_kwargs = VtcImageProcessorKwargs

    def __init__(
        self,
        tiling: str = "dynamic",
        size: int | dict[str, int] = 448,
        resample: int = int(Image.Resampling.BICUBIC),
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        do_rescale: bool = True,
        do_normalize: bool = True,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        image_grid_pinpoints: Sequence[Sequence[int]] = LLAVA_NEXT_PINPOINTS,
        token_stride: int | None = None,
        patch_size: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_map_tiles: int | None = None,
        **kwargs: Any,
    ):
        known = (*TilingSettings.__dataclass_fields__, *_WRITTEN_BY_HOSTS)
        refuse_unknown(kwargs, known, "`VtcImageProcessor`")
        # written by `save_pretrained`, never kept: whether code travels is decided at each save
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.tiling = tiling
        self.size = square_size(size)
        self.resample = int(resample)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_rescale = do_rescale
        self.do_normalize = do_normalize
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.image_grid_pinpoints = [list(pair) for pair in image_grid_pinpoints]
        self.token_stride = token_stride
        self.patch_size = patch_size
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.max_map_tiles = max_map_tiles
        self.settings()

    @property
    def model_input_names(self) -> list[str]:
        """What `preprocess` returns with these fields."""
        if self.tiling == "patches":
            return ["pixel_values", "image_grid_thw"]
        num_tiles = ["num_tiles"] if self.tiling in _SEVERAL_TILES else []
        return ["pixel_values", *num_tiles, "image_sizes"]

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; fields beside the folder are checked as those of the constructor are."""
        known = TilingSettings.__dataclass_fields__
        # a processor hands on the arguments of its tokenizer too, so that not every other name is a mistake
        refuse_misnamed(kwargs, known, "`VtcImageProcessor`")
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        return super().from_dict({**image_processor_dict, **given}, **kwargs)

    def settings(self, **overrides: Any) -> TilingSettings:
        """The fields of this processor, with those of a call."""
        fields = {name: getattr(self, name) for name in TilingSettings.__dataclass_fields__}
        refuse_unknown(overrides, fields, "`VtcImageProcessor`")
        fields.update((name, value) for name, value in overrides.items() if value is not None)
        return TilingSettings(**{**fields, "size": square_size(fields["size"])})

    def get_tile_layout(self, height: int, width: int, alone: bool = True, **overrides: Any) -> TileLayout:
        """Grid, tile count and tile boxes of an image, without its pixels.

        Args:
            height (`int`): of the upright image, in pixels.
            width (`int`): of the upright image, in pixels.
            alone (`bool`): whether no other image is in its prompt, which matters with `max_map_tiles`.
            **overrides: fields of this processor for this call.

        Raises:
            ValueError: the image has no pixels, or is so long and thin that the resized one would exhaust memory.
        """
        return _bounded_layout(height, width, self.settings(**overrides).of_image(alone))

    def get_model_size(self, height: int, width: int, **overrides: Any) -> tuple[int, int]:
        """(height, width) in pixels that the model is told of an image of this size, as `image_sizes`.

        Args and errors: as `get_tile_layout`.
        """
        settings = self.settings(**overrides)
        return _model_size(_bounded_layout(height, width, settings), settings)

    def padded_size(self, image_sizes: Sequence[tuple[int, int]], **overrides: Any) -> tuple[int, int]:
        """(height, width) in pixels of what holds each of these images in one call: that of the largest sides.

        Args:
            image_sizes (`Sequence[tuple[int, int]]`): (height, width) in pixels of upright images, at least one.
            **overrides: fields of this processor for this call.

        Raises:
            ValueError: as `get_tile_layout`.
        """
        settings = self.settings(**overrides)
        sizes = [settings.processed_size(_bounded_layout(*size, settings)) for size in image_sizes]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def check_padded_size(self, height: int, width: int) -> None:
        """Raise a `ValueError` if images of this height and this width cannot share a call, as `padded_size` says."""
        if _is_too_large(height, width):
            raise ValueError(
                f"Images that share a call are padded to the largest sides, here {height} x {width} pixels (height x "
                f"width), more than twice `PIL.Image.MAX_IMAGE_PIXELS` ({Image.MAX_IMAGE_PIXELS}). Crop the longest "
                "ones, or keep them apart."
            )

    def check_sizes(self, image_sizes: Sequence[tuple[int, int]], **overrides: Any) -> None:
        """Raise the `ValueError` that `preprocess` would raise for the sizes of these images, without their pixels.

        Args:
            image_sizes (`Sequence[tuple[int, int]]`): (height, width) in pixels of upright images.
            **overrides: fields of this processor for this call.
        """
        settings = self.settings(**overrides)
        layouts = [_bounded_layout(*size, settings) for size in image_sizes]
        if layouts and settings.tiling != "patches":
            self._check_padding([settings.processed_size(layout) for layout in layouts])

    def _check_padding(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise for processed images that cannot share a call: too large together, and mostly for their padding."""
        height, width = max(height for height, _ in sizes), max(width for _, width in sizes)
        self.check_padded_size(height, width)
        padded, own = len(sizes) * height * width, sum(height * width for height, width in sizes)
        if _is_too_large(len(sizes) * height, width) and padded > _MOST_PADDING * own:
            raise ValueError(
                f"{len(sizes)} images that share a call are padded to the largest sides, here {height} x {width} "
                f"pixels (height x width): {padded} pixels, of which the images themselves fill {own}. Crop the "
                "longest ones, or keep them apart."
            )

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Tiles of an image of this size in pixels, or its patches, under the name that serving engines call."""
        overrides = {key: value for key, value in (images_kwargs or {}).items() if key not in _CALL_ONLY}
        _check_crop_to_patches((images_kwargs or {}).get("crop_to_patches"), self.settings(**overrides))
        layout, settings = self.get_tile_layout(height, width, **overrides), self.settings(**overrides)
        if settings.tiling == "patches":
            return layout.resized_size[0] * layout.resized_size[1] // settings.patch_size**2
        return layout.num_tiles

    def check_rescaling(self, images: Any, do_rescale: bool | None = None) -> None:
        """Raise where images in 0..1 are not to be rescaled: they become 8-bit, of which 0..1 is left by that alone.

        Args:
            images: whatever `fetch_images` takes.
            do_rescale (`bool`, *optional*): of this call, in place of this processor's.

        Raises:
            ValueError: `do_rescale=False` with floats or booleans.
        """
        if not (self.do_rescale if do_rescale is None else do_rescale) and has_unit_range(images):
            raise ValueError(
                "`do_rescale=False` keeps pixels in 0..255, but `images` holds floats or booleans, which are taken as "
                "0..1 and become 8-bit pixels first, as in the original code. Leave `do_rescale` out: nothing is "
                "divided twice. For pixels in 0..255 give 8-bit arrays."
            )

    def fetch_images(self, image_url_or_urls: Any, input_data_format: str | None = None) -> Any:
        """Load and convert images to upright 8-bit RGB, keeping the nesting of lists.

        Args:
            image_url_or_urls: a path, URL, data URI, base64 string, PIL image, array or tensor, or (lists of) lists
                of these; an array with four dimensions is a list of images, `None` in a batch an empty row.
            input_data_format (`str`): as in `preprocess`.

        Raises:
            OSError: a file or URL cannot be read.
            ValueError: the content is no usable image.
        """
        return load_images(image_url_or_urls, "images", input_data_format)

    def preprocess(
        self,
        images: Any,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
        crop_to_patches: bool | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Tiles of all images, in order.

        Args:
            images: whatever `fetch_images` takes; images of one prompt may stand in a list of their own.
            input_data_format (`str`): `"channels_first"` or `"channels_last"` of arrays. Default: the only reading
                that gives 1 to 4 channels; if both do, last for numpy and first for torch.
            return_tensors (`str`): `"pt"` or `"np"`. Default: numpy arrays.
            crop_to_patches (`bool`): InternVL's word for cutting an image into tiles, by which trainers ask how many
                there are. It is refused where it is not what `tiling` does.
            **overrides: fields of this processor for this call.

        Returns:
            `pixel_values` of shape `(total_tiles, 3, S, S)`, float32, for `"keep_aspect"` `(num_images, 3, H, W)` with
            zeros on the right and at the bottom of smaller images; `image_sizes` of shape `(num_images, 2)`, (height,
            width) of the originals, or of the processed images if `token_stride` is set; and for `"anyres"` and
            `"dynamic"` `num_tiles` of shape `(num_images,)`. Who gives `crop_to_patches` gets that as `num_patches`
            too, under InternVL's name. For `"patches"` `pixel_values` are `(patches, values)` of all images, and
            `image_grid_thw` `(num_images, 3)` their numbers in time, height and width: what the processors of
            Qwen2.5-VL and Qwen3-VL return.

        Raises:
            OSError: a file or URL cannot be read.
            ValueError: no image, an image without pixels or with an impossible shape, or a field outside its range.
        """
        settings = self.settings(**overrides)
        _check_crop_to_patches(crop_to_patches, settings)
        self.check_rescaling(images, overrides.get("do_rescale"))
        images = load_images(images, "images", input_data_format)
        of_images = [settings.of_image(alone) for alone in alone_in_rows(images)]
        images = flattened(images)
        if not images:
            raise ValueError("`images` must hold at least one image, got none. Leave it out for text alone.")
        layouts = [_bounded_layout(image.height, image.width, own) for image, own in zip(images, of_images)]
        if settings.tiling == "patches":
            return BatchFeature(as_patches(images, layouts, settings), tensor_type=return_tensors)
        self._check_padding([settings.processed_size(layout) for layout in layouts])
        tiles = [tile for image in zip(images, layouts, of_images) for tile in cut(*image)]
        data = {
            "pixel_values": stacked(tiles, settings),
            "image_sizes": np.array([_model_size(layout, settings) for layout in layouts], dtype=np.int64),
        }
        if settings.tiling in _SEVERAL_TILES:
            data["num_tiles"] = np.array([layout.num_tiles for layout in layouts], dtype=np.int64)
        if crop_to_patches is not None:
            data["num_patches"] = np.array([layout.num_tiles for layout in layouts], dtype=np.int64)
        features = BatchFeature(data, tensor_type=return_tensors)
        if settings.tiling == "keep_aspect" and isinstance(features["pixel_values"], torch.Tensor):
            features["pixel_values"] = features["pixel_values"].as_subclass(PaddedImages)
        return features

    def to_dict(self) -> dict[str, Any]:
        """The fields, as every supported version of transformers writes and reads them."""
        # files that older versions read too do not name what is newer than these
        left_out = [name for name in _OF_SOME_BASES if getattr(self, name) is None]
        fields = super().to_dict().items()
        return {name: value for name, value in fields if not name.startswith("_") and name not in left_out}

    def remote_code_map(self) -> dict[str, str]:
        """`auto_map` of a folder that carries its own code: auto class -> `file.Class`."""
        return {"AutoImageProcessor": f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"}

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, save_code: bool = True, **kwargs: Any
    ) -> list[str]:
        """Write `preprocessor_config.json`, and the code that reads it.

        Args:
            save_directory (`str` or `os.PathLike`): made if missing.
            push_to_hub (`bool`): upload as well; `kwargs` then go to `push_to_hub` (`repo_id`, `token`, ...).
            save_code (`bool`): write the `auto_map` key and copy the code files, so that the folder works with
                `trust_remote_code=True` where hf_vtc is not installed.
        """
        os.makedirs(save_directory, exist_ok=True)
        config = self.to_dict()
        if save_code:
            config["auto_map"] = self.remote_code_map()
        file = os.path.join(save_directory, IMAGE_PROCESSOR_NAME)
        write_json(file, config)
        if save_code:
            custom_object_save(self, save_directory)
        if push_to_hub:
            push_copy(self, save_directory, save_code, **kwargs)
        return [file]


def write_json(file: str | os.PathLike, content: dict) -> None:
    """Write a configuration file as transformers formats it."""
    Path(file).write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# arguments of `preprocess` that say nothing about the layout
_CALL_ONLY = ("input_data_format", "return_tensors", "crop_to_patches")


def _check_crop_to_patches(crop_to_patches: bool | None, settings: TilingSettings) -> None:
    cuts = settings.tiling in _SEVERAL_TILES
    if crop_to_patches is not None and bool(crop_to_patches) != cuts:
        raise ValueError(
            f"`crop_to_patches` must be {cuts} or left out, got {crop_to_patches}: with `tiling={settings.tiling!r}` "
            f"an image {'is cut into tiles' if cuts else 'stays one tile'}. Set `tiling` to change that."
        )


def push_copy(saver: Any, save_directory: str | os.PathLike, save_code: bool, **kwargs: Any) -> None:
    """Upload what `saver.save_pretrained(..., save_code=save_code)` writes.

    Args:
        saver: a processor with `save_pretrained` and `push_to_hub`.
        save_directory (`str` or `os.PathLike`): its last part is the default of `repo_id`.
        save_code (`bool`): as in `save_pretrained`.
        **kwargs: arguments of `push_to_hub`.
    """
    pusher = copy(saver)
    # transformers' `push_to_hub` calls `save_pretrained` without a way to pass an argument of ours
    pusher.save_pretrained = partial(saver.save_pretrained, save_code=save_code)
    pusher.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)


def _is_too_large(height: int, width: int) -> bool:
    limit = Image.MAX_IMAGE_PIXELS
    return limit is not None and height * width > 2 * limit


def _bounded_layout(height: int, width: int, settings: TilingSettings) -> TileLayout:
    """The layout of an image, none of whose resized or padded forms is larger than PIL would open.

    Raises:
        ValueError: the image has no pixels, or is too long and thin.
    """
    layout = settings.layout(height, width)
    if settings.tiling == "pad" and height != width:
        verb, (rows, columns) = "pad", (max(height, width),) * 2
    elif settings.tiling in ("crop", "keep_aspect", "patches"):
        verb, (rows, columns) = "resize", layout.resized_size
    else:
        return layout
    if _is_too_large(rows, columns):
        raise ValueError(
            f"`tiling={settings.tiling!r}` would {verb} an image of {height} x {width} pixels (height x width) to "
            f"{rows} x {columns}, more than twice `PIL.Image.MAX_IMAGE_PIXELS` ({Image.MAX_IMAGE_PIXELS}). Crop or "
            "shrink the image first."
        )
    return layout


def _model_size(layout: TileLayout, settings: TilingSettings) -> tuple[int, int]:
    """(height, width) that the model is told: of the original, or of what it sees if tokens follow from that."""
    return layout.image_size if settings.token_stride is None else settings.processed_size(layout)
