"""Images of records that nobody has looked at: opened inside of one folder only, checked before they are decoded."""

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from ..models.image_loading_vtc import decode_base64, download, upright_rgb, upright_size

# PIL knows more, among them formats that start other programs (EPS) or name other files
_RASTER_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class ImageReader:
    """Opens what records name as an image.

    Takes paths, URLs, data URIs, `bytes`, PIL images, and the mappings of `bytes` and `path` that tables hold.

    Args:
        image_folder (`str` or `os.PathLike`, *optional*): where paths start, and all that they may reach: no `..`, no
            absolute path and no link that leads out of it. Without it no path is opened.
        allow_urls (`bool`): whether `http` and `https` addresses are downloaded.
        max_image_pixels (`int`): height times width of the largest image that is decoded.

    Raises:
        ValueError: `image_folder` is no folder, or `max_image_pixels` is not positive.
    """

    def __init__(self, image_folder: str | os.PathLike | None, allow_urls: bool, max_image_pixels: int):
        if image_folder is not None and not os.path.isdir(image_folder):
            raise ValueError(f"`image_folder` must be an existing folder, got {os.fspath(image_folder)!r}.")
        if max_image_pixels < 1:
            raise ValueError(f"`max_image_pixels` must be positive, got {max_image_pixels}.")
        self.image_folder = None if image_folder is None else os.path.realpath(image_folder)
        self.allow_urls = allow_urls
        self.max_image_pixels = max_image_pixels

    def read(self, source: Any) -> Image.Image:
        """Decode an image to upright 8-bit RGB.

        Raises:
            ValueError: `source` may not be opened, or holds no usable image.
        """
        with self._opened(source) as image:
            try:
                return upright_rgb(image, "images", "the image")
            except ValueError as error:
                raise ValueError(f"Image {shown(source)} cannot be used ({_reason(error)}).") from error

    def size(self, source: Any) -> tuple[int, int]:
        """(height, width) in pixels of the upright image, of most formats from their first bytes.

        Raises:
            ValueError: `source` may not be opened, or does not begin like a usable image.
        """
        with self._opened(source) as image:
            return upright_size(image)

    def check_header(self, source: Any) -> None:
        """Raise a `ValueError` if `source` may not be opened, or does not begin like a usable image.

        Addresses are not downloaded for it.
        """
        if isinstance(source, str) and _is_url(source):
            self._require_allowed(source)
            return
        with self._opened(source):
            pass

    @contextmanager
    def _opened(self, source: Any) -> Iterator[Image.Image]:
        """A PIL image whose pixels are still to be decoded; whatever goes wrong with it is a `ValueError`."""
        try:
            if isinstance(source, Image.Image):
                yield self._of_allowed_size(source, source)
                return
            with self._stream(source) as stream, Image.open(stream, formats=_raster_formats()) as image:
                yield self._of_allowed_size(image, source)
        except ValueError:
            raise
        # decoders report damage by exceptions of every kind
        except Exception as error:
            raise ValueError(f"Image {shown(source)} cannot be read ({_reason(error)}).") from error

    def _of_allowed_size(self, image: Image.Image, source: Any) -> Image.Image:
        if image.width * image.height > self.max_image_pixels:
            raise ValueError(
                f"Image {shown(source)} has {image.height} x {image.width} pixels (height x width), more than "
                f"`max_image_pixels` ({self.max_image_pixels}). Shrink it, or raise the limit."
            )
        return image

    def _stream(self, source: Any) -> BinaryIO:
        if isinstance(source, Mapping):
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if isinstance(source, bytes):
            return io.BytesIO(source)
        if not isinstance(source, str):
            raise ValueError(
                f"An image must be a path, URL, data URI, bytes or a PIL image, got {type(source).__name__}."
            )
        if source.startswith("data:"):
            return io.BytesIO(_decoded(source))
        if _is_url(source):
            self._require_allowed(source)
            return io.BytesIO(_downloaded(source))
        path = self.inside(source)
        try:
            # a pipe or device would be waited for
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"Image {shown(source)} is not an ordinary file.")
            return open(path, "rb")
        except OSError as error:
            raise ValueError(f"Image {shown(source)} cannot be opened ({_reason(error)}).") from error

    def inside(self, path: str) -> str:
        """The real path of a file in the image folder.

        Raises:
            ValueError: it may not be opened.
        """
        if self.image_folder is None:
            raise ValueError(f"Image {shown(path)} is a path. Give `image_folder`, where paths start.")
        if "\0" in path:
            raise ValueError(f"Image {shown(path)} is no path, since it holds a null character.")
        if ".." in re.split(r"[\\/]", path):
            raise ValueError(f"Image {shown(path)} must lie inside of `image_folder`, so its path may not hold `..`.")
        real = os.path.realpath(os.path.join(self.image_folder, path))
        if not Path(real).is_relative_to(self.image_folder):
            raise ValueError(
                f"Image {shown(path)} must lie inside of `image_folder`, but it is absolute, or a link that leads out "
                "of it. Give the folder that holds the files themselves."
            )
        return real

    def _require_allowed(self, url: str) -> None:
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"Image {shown(url)} must be a path or an http address.")
        if not self.allow_urls:
            raise ValueError(f"Image {shown(url)} is an address. Only `allow_urls=True` permits to download it.")


def shown(source: Any) -> str:
    """A short name of an image for messages."""
    if isinstance(source, Mapping):
        source = source.get("path") or "of a table"
    if not isinstance(source, str):
        return f"({type(source).__name__})"
    text = source if len(source) <= 100 else f"{source[:97]}..."
    return ascii(text)


def _reason(error: Exception) -> str:
    """The first line of an error, without the file that it speaks of: messages name that already."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    # what the processor says of an image, it says because of this
    error = error.__cause__ or error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (reason.splitlines() or [type(error).__name__])[0][:200]


@cache
def _raster_formats() -> tuple[str, ...]:
    """Those that the installed PIL can read."""
    Image.init()
    return tuple(name for name in _RASTER_FORMATS if name in Image.OPEN)


def _is_url(source: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def _decoded(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError(f"Image {shown(uri)} must be a data URI in base64.")
    try:
        return decode_base64(payload)
    except ValueError as error:
        raise ValueError(f"Image {shown(uri)} is damaged base64 ({error}).") from error


def _downloaded(url: str) -> bytes:
    try:
        return download(url)
    # HTTP clients add errors of their own to those of sockets
    except Exception as error:
        raise ValueError(f"Image {shown(url)} could not be downloaded ({_reason(error)}).") from error
