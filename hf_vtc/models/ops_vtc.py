"""Tensor operations of the compressors: the readable reference of each."""

import torch
import torch.nn.functional as F


def unshuffle_layernorm(
    features: torch.Tensor, factor: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, version: str = "v2"
) -> torch.Tensor:
    """Fold `factor` x `factor` neighbours of a square grid into channels, then LayerNorm over them.

    Args:
        features (`torch.Tensor` of shape `(T, N, C)`): row-major grids, `N = side * side`, `side` divisible by
            `factor`.
        factor (`int`): side of the folded neighbourhood.
        weight, bias (`torch.Tensor` of shape `(factor * factor * C,)`): affine part of the LayerNorm.
        eps (`float`): as in `torch.nn.LayerNorm`.
        version (`str`): `"v2"`; `"v1"` transposes the folded grid (InternVL's first pixel shuffle).

    Returns:
        `(T, N / factor^2, factor^2 * C)`, channel `(dh * factor + dw) * C + c` from neighbour `(dh, dw)`.

    Source: OpenGVLab/InternVL@2410d1d `pixel_shuffle` and the first module of `mlp1`.
    """
    folded = pixel_unshuffle(features, factor, version)
    return F.layer_norm(folded, folded.shape[-1:], weight, bias, eps)


def pixel_unshuffle(features: torch.Tensor, factor: int, version: str = "v2") -> torch.Tensor:
    """The folding of `unshuffle_layernorm` alone: `(T, N, C)` to `(T, N / factor^2, factor^2 * C)`."""
    num_tiles, num_patches, width = features.shape
    side = round(num_patches**0.5)
    small = side // factor
    # (T, small, factor, small, factor, C): a block row, a row in it, a block column, a column in it
    blocks = features.reshape(num_tiles, small, factor, small, factor, width)
    blocks = blocks.permute(0, 1, 3, 2, 4, 5) if version == "v2" else blocks.permute(0, 3, 1, 2, 4, 5)
    return blocks.reshape(num_tiles, small * small, factor * factor * width)
