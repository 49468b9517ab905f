"""Images from wherever they are to upright 8-bit RGB, in the one place that opens, downloads and converts them.

As in the original code alpha is dropped, not composited; palettes, CMYK, grey and 1-bit images are converted; 16-bit
values are divided by 257 (PIL alone would clip them); the EXIF orientation is applied. Float arrays hold 0..1.
"""

import base64
import http.client
import io
import os
import time
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

_EXIF_ORIENTATION = 0x0112
# orientations that swap height and width
_TURNED = (5, 6, 7, 8)
# of a download, altogether
DOWNLOAD_SECONDS = 60
MOST_DOWNLOADED_BYTES = 256 * 2**20
_PIECE_BYTES = 2**16


def load_images(source: Any, where: str = "images", input_data_format: str | None = None) -> Any:
    """Load and convert images, keeping the nesting of lists.

    Args:
        source: a path, URL, data URI, base64 string, PIL image, array or tensor, or (lists of) lists of these; an
            array with four dimensions is a list of images, `None` in a batch an empty row.
        where (`str`): what messages call the source.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"` of arrays. Default: the only
            reading that gives 1 to 4 channels; if both do, last for numpy and first for torch.

    Raises:
        OSError: a file or URL cannot be read.
        ValueError: the content is no usable image.
    """
    if isinstance(source, (list, tuple)) or (isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4):
        items = [(f"{where}[{index}]", item) for index, item in enumerate(source)]
        return [[] if item is None else load_images(item, place, input_data_format) for place, item in items]
    if isinstance(source, (str, os.PathLike)):
        return _read(source, where)
    if isinstance(source, Image.Image):
        return upright_rgb(source, where, "the given PIL image")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(source, where, input_data_format)
    raise ValueError(
        f"`{where}` must be a path, URL, base64 string, PIL image, numpy array or torch tensor, got "
        f"{type(source).__name__}. Decode other formats to one of these first."
    )


def _read(source: str | os.PathLike, where: str) -> Image.Image:
    source = os.fspath(source)
    if os.path.isfile(source):
        shown, stream = source, source
    else:
        shown = source if len(source) <= 100 else f"{source[:97]}..."
        stream = io.BytesIO(_fetched(source, where, shown))
    try:
        image = Image.open(stream)
    except OSError as error:
        raise OSError(
            f"`{where}`: no image could be read from {shown!r} ({error}). Check the file's content."
        ) from error
    with image:
        return upright_rgb(image, where, repr(shown))


def _fetched(source: str, where: str, shown: str) -> bytes:
    """What an address or a base64 string holds."""
    if "://" in source[:10]:
        try:
            return download(source)
        except (OSError, ValueError) as error:
            raise OSError(f"`{where}`: {shown!r} could not be downloaded ({error}). Check the address.") from error
    try:
        return decode_base64(source.partition(",")[2] if source.startswith("data:") else source)
    except ValueError:
        raise FileNotFoundError(
            f"`{where}`: {shown!r} is no existing file, URL, data URI or base64 string. Check the path."
        ) from None


def download(url: str) -> bytes:
    """What an address holds; neither a slow nor an endless answer is waited for.

    Raises:
        OSError: it cannot be read, is too large, or takes too long.
        ValueError: it is no address.
    """
    # some hosts refuse the default agent of urllib
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (hf_vtc)"})
    # the timeout of a socket starts anew with every byte
    end, content = time.monotonic() + DOWNLOAD_SECONDS, bytearray()
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            while piece := response.read1(_PIECE_BYTES):
                content += piece
                if len(content) > MOST_DOWNLOADED_BYTES:
                    raise OSError(f"it is larger than {MOST_DOWNLOADED_BYTES} bytes")
                if time.monotonic() > end:
                    raise OSError(f"it takes longer than {DOWNLOAD_SECONDS} seconds")
            promised = response.headers.get("Content-Length")
    except http.client.HTTPException as error:
        raise OSError(f"the answer is none of HTTP, {type(error).__name__}") from error
    if promised is not None and int(promised) != len(content):
        raise OSError(f"only {len(content)} of {promised} bytes came")
    return bytes(content)


def decode_base64(payload: str) -> bytes:
    """The bytes of a base64 string, whose white space does not count.

    Raises:
        ValueError: it is none.
    """
    return base64.b64decode("".join(payload.split()), validate=True)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels that an image has when it is upright; its pixels need not be decoded."""
    turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def upright_rgb(image: Image.Image, where: str, name: str) -> Image.Image:
    """An image decoded, upright and in 8-bit RGB.

    Args:
        image (`PIL.Image.Image`): any.
        where (`str`): what messages call the argument that it comes from.
        name (`str`): what messages call the image.

    Raises:
        OSError: it is damaged.
        ValueError: it has no pixels, or a mode without a conversion.
    """
    if image.width < 1 or image.height < 1:
        raise ValueError(
            f"`{where}` needs at least one pixel per side, got {image.height} x {image.width} (height x width) from "
            f"{name}. Remove it."
        )
    try:
        image.load()
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    # decoders report damage in all of these ways
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise OSError(f"`{where}`: {name} is damaged or truncated ({error}). Replace the file.") from error
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_rgb(image, where)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(
            f"`{where}` must have a PIL mode that converts to RGB, got {image.mode!r} from {name}. Convert it first."
        ) from error


def _wide_to_rgb(image: Image.Image, where: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        values = values.astype(np.uint16)
    elif image.mode == "I":
        # 32-bit integers: some versions of PIL open 16-bit PNG files so, others use the mode for plain grey levels
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"`{where}` of PIL mode 'I' must hold values in 0..255 or 0..65535, got {values.min()}.."
                f"{values.max()}. Rescale it first."
            )
        values = values.astype(np.uint8 if values.max() <= 255 else np.uint16)
    elif np.isfinite(values).all() and values.max() > 1:
        values = values / 255
    return Image.fromarray(_to_bytes(values, where)).convert("RGB")


def _array_to_rgb(array: np.ndarray | torch.Tensor, where: str, input_data_format: str | None) -> Image.Image:
    channels_first_wins = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if array.ndim not in (2, 3):
        raise ValueError(
            f"`{where}` must have 2 dimensions (grey), 3 (one image) or 4 (a list of images), got shape {array.shape}."
        )
    if array.ndim == 3:
        array = _channels_last(array, where, channels_first_wins, input_data_format)
    if 0 in array.shape:
        raise ValueError(f"`{where}` needs at least one pixel per side, got shape {array.shape}. Remove it.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_bytes(array, where))).convert("RGB")


def _channels_last(
    array: np.ndarray, where: str, channels_first_wins: bool, input_data_format: str | None
) -> np.ndarray:
    # the enum of transformers and its plain strings both come this far
    wanted = getattr(input_data_format, "value", input_data_format)
    first, last = array.shape[0] in (1, 2, 3, 4), array.shape[2] in (1, 2, 3, 4)
    if wanted is not None:
        first, last = first and wanted == "channels_first", last and wanted == "channels_last"
    if not (first or last):
        raise ValueError(
            f"`{where}` must have 1 to 4 channels first or last"
            f"{'' if wanted is None else f' (`input_data_format={wanted!r}`)'}, got shape {array.shape}."
        )
    return np.moveaxis(array, 0, -1) if first and (channels_first_wins or not last) else array


def _to_bytes(values: np.ndarray, where: str) -> np.ndarray:
    """Grey levels in 0..255 from booleans, 8 or 16-bit integers, or floats in 0..1."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return np.rint(values / 257).astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        if values.min() < 0 or values.max() > 255:
            raise ValueError(
                f"`{where}` holds integers of type {values.dtype} in {values.min()}..{values.max()}, must be 0..255. "
                "Pass 16-bit data as uint16."
            )
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"`{where}` must hold booleans, integers or floats, got type {values.dtype}.")
    if not np.isfinite(values).all():
        raise ValueError(f"`{where}` must hold finite values, got NaN or infinity. Clean the array first.")
    levels = np.rint(values.astype(np.float64) * 255)
    if levels.min() < 0 or levels.max() > 255:
        raise ValueError(
            f"`{where}` holds floats in {values.min():.4g}..{values.max():.4g}, must be 0..1. Divide by 255, or pass "
            "uint8; pixels that are normalised already belong into `pixel_values` of the model."
        )
    return levels.astype(np.uint8)


def has_unit_range(images: Any) -> bool:
    """Whether floats or booleans, which stand for 0..1, are among (lists of) images."""
    if isinstance(images, (list, tuple)):
        return any(has_unit_range(item) for item in images)
    if isinstance(images, torch.Tensor):
        return images.is_floating_point() or images.dtype == torch.bool
    if isinstance(images, np.ndarray):
        return images.dtype == np.bool_ or np.issubdtype(images.dtype, np.floating)
    return isinstance(images, Image.Image) and images.mode == "F"


def flattened(images: Any) -> list[Image.Image]:
    """The images of nested lists, in order."""
    if isinstance(images, list):
        return [image for item in images for image in flattened(item)]
    return [images]


def rows_or_flat(images: Any) -> list:
    """A flat list of images, or a list of lists if the caller gave rows; empty if there is no image."""
    images = images if isinstance(images, list) else [images]
    if any(isinstance(item, list) for item in images):
        rows = [item if isinstance(item, list) else [item] for item in images]
        return rows if any(rows) else []
    return images


def alone_in_rows(images: Any) -> list[bool]:
    """Whether each image of a list is alone in its prompt: in a list of one, or in none, as transformers reads it."""
    rows = images if isinstance(images, list) else [images]
    return [len(row) == 1 for row in map(flattened, rows) for _ in row]


def sizes_of_images(images: Any) -> list[tuple[int, int]]:
    """(height, width) in pixels of (lists of lists of) PIL images, as `fetch_images` gives them."""
    return [(image.height, image.width) for image in flattened(images)]
