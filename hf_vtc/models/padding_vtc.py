"""Images of different sizes, or of different numbers of tiles, in one tensor, which others join to larger ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

_JOINING = (torch.cat, torch.concat, torch.concatenate)
_MOVING = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.pin_memory)


class PaddedImages(torch.Tensor):
    """Pixels `(num_images, 3, H, W)`, with zeros on the right and at the bottom of smaller images.

    `torch.cat` along the images pads them to the largest sides, since pipelines of transformers join rows so. Copies
    on other devices and in other dtypes are of this class; whatever else is computed of it is a plain tensor, and so
    is what is pickled.
    """

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _JOINING:
                result = func(*args, **kwargs)
                return result.as_subclass(cls) if func in _MOVING else result
            tensors, *others = args or (kwargs.pop("tensors"),)
            dim = others[0] if others else kwargs.get("dim", 0)
            return func(padded_alike(tensors) if dim == 0 else tensors, *others, **kwargs).as_subclass(cls)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def padded_alike(images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors `(..., H, W)` with zeros on the right and at the bottom of all but the largest."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]


def places_apart(num_tiles: torch.LongTensor, most: int) -> torch.LongTensor:
    """Where the tiles of all images are, one after the other, among `most` places for each image, on the CPU."""
    return (torch.arange(most) < num_tiles[:, None]).flatten().nonzero().flatten()


def images_apart(tiles: Any, num_tiles: Any) -> Any:
    """Tiles `(total, 3, S, S)` as a block for each image, `(num_images, most, 3, S, S)`, with zeros behind its own."""
    pixels, num_tiles = torch.as_tensor(tiles), torch.as_tensor(num_tiles)
    most = int(num_tiles.max())
    apart = pixels.new_zeros(len(num_tiles) * most, *pixels.shape[1:])
    apart[places_apart(num_tiles, most)] = pixels
    apart = apart.unflatten(0, (-1, most))
    return apart if isinstance(tiles, torch.Tensor) else apart.numpy()
