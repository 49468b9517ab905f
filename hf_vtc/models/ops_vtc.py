"""Tensor operations of the compressors: the readable reference of each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .tiling_vtc import pooled_grid


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


def pool_pyramid(features: torch.Tensor, scales: Sequence[int]) -> list[torch.Tensor]:
    """Average-pool a square grid of features to each scale, every one directly from the full grid.

    Args:
        features (`torch.Tensor` of shape `(T, N, D)`): row-major grids, `N = side * side`.
        scales (`Sequence[int]`): tokens per grid at each scale, `N` divided by 1, 2, 4, ...: columns and rows are
            halved in turns, columns first.

    Returns:
        One row-major tensor of shape `(T, scales[i], D)` per scale; the scale `N` gives `features` itself.

    Raises:
        ValueError: halving the sides of the grid does not lead to a scale.

    Source: DeepLearnXMU/AVG-LLaVA@3685bc8 `llava_arch.py` `matryoshka_vis_token_process`.
    """
    num_tiles, num_tokens, width = features.shape
    side = round(num_tokens**0.5)
    pooled = []
    for scale in scales:
        rows, columns = pooled_grid(side, scale)
        if scale == num_tokens:
            pooled.append(features)
            continue
        blocks = features.reshape(num_tiles, rows, side // rows, columns, side // columns, width)
        pooled.append(blocks.mean((2, 4)).flatten(1, 2))
    return pooled


def assign_segment_mean(
    logits: torch.Tensor,
    values: torch.Tensor,
    eps: float = 1e-6,
    empty_eps: float | None = None,
    tau: float = 1.0,
    group_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put each row of `values` into its best group, and average the members of each group.

    The gradient with respect to `logits` is straight-through: that of the softmax over groups at temperature `tau`,
    through numerator and denominator. Everything is computed in float32.

    Args:
        logits (`torch.Tensor` of shape `(T, G, N)`): affinity of group and row; noise is the caller's business.
        values (`torch.Tensor` of shape `(T, N, C)`): what is averaged.
        eps (`float`): added to the number of members; 1.0 makes it GroupViT's sum / (count + 1).
        empty_eps (`float`, *optional*): the same for a group without members. Its mean is 0 with any value, but its
            gradient is divided by it: 1e-6 gives gradients a million times too large. Default: `eps`.
        tau (`float`): temperature, which no output depends on, but the gradient does.
        group_idx (`torch.LongTensor` of shape `(T, N)`, *optional*): the groups, in place of the best ones.

    Returns:
        Means `(T, G, C)` in the dtype of `values`, zero for an empty group, and the groups `(T, N)`; of equally good
        groups the one of lowest index.

    Source: transformers 4.37.2 `GroupViTAssignAttention` (`hard_softmax`, `assign_eps`).
    """
    if group_idx is None:
        group_idx = logits.argmax(1)
    assignment = F.one_hot(group_idx, logits.shape[1]).transpose(1, 2).float()
    if logits.requires_grad:
        soft = (logits.float() / tau).softmax(1)
        # exactly the one-hot values, with the gradient of the softmax
        assignment = assignment + (soft - soft.detach())
    return segment_mean_of(assignment, values, eps, empty_eps), group_idx


def segment_mean_of(
    assignment: torch.Tensor, values: torch.Tensor, eps: float = 1e-6, empty_eps: float | None = None
) -> torch.Tensor:
    """Weighted means `(T, G, C)` of `values` `(T, N, C)` by `assignment` `(T, G, N)`; `eps` as above, over weights."""
    with torch.autocast(values.device.type, enabled=False):
        weights, rows = assignment.float(), values.float()
        totals = weights.sum(-1, keepdim=True)
        if empty_eps is not None:
            eps = torch.where(totals.detach() == 0, empty_eps, eps)
        # divided before the product, as in the original, whose gradients are large where a group is empty
        return ((weights / (totals + eps)) @ rows).to(values.dtype)
