"""Tensor operations of the compressors: a readable reference of each, and the one switch to its compiled form.

An op `name` comes as `name`, which models call, `name_reference`, which runs everywhere, and `torch.ops.hf_vtc.name`,
whose kernels (C++, CUDA) the installed package builds, see `kernels_vtc.py`. Without them, and for what they do
not take (other devices and dtypes, tensor subclasses), the reference runs. Both compute in float32 and agree up to
rounding, not bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .grids_vtc import pooled_grid
from .kernels_vtc import has_kernel, set_forced

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# levels of a pyramid that one kernel makes: those of the paper
_MAX_HALVINGS = 4


@contextmanager
def compiled_ops(enabled: bool | None) -> Iterator[None]:
    """For tests and measurements: run the compiled kernels where there are any (True), never (False), or by the
    environment variable `HF_VTC_OPS` (None). True raises a RuntimeError where no compiled kernel is found."""
    before = set_forced(enabled)
    try:
        yield
    finally:
        set_forced(before)


def _takes(name: str, *tensors: torch.Tensor) -> bool:
    """Whether the compiled kernel of op `name` exists and takes tensors of these kinds, the first one's device."""
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    known = all(tensor.dtype in _DTYPES and tensor.device == tensors[0].device for tensor in tensors)
    return plain and known and has_kernel(name, tensors[0].device.type)


def segment_mean(x: torch.Tensor, index: torch.LongTensor, offsets: torch.LongTensor) -> torch.Tensor:
    """Means of gathered rows, as many of them as each segment names: pooling, copying and compaction in one pass.

    Args:
        x (`torch.Tensor` of shape `(N, D)`): the rows.
        index (`torch.LongTensor` of shape `(M,)`): rows that are averaged, segment after segment.
        offsets (`torch.LongTensor` of shape `(S + 1,)`): where each segment begins in `index`, and M.

    Returns:
        `(S, D)` in the dtype of `x`: a segment of one row is a copy of it, an empty one is zero.
    """
    if _takes("segment_mean", x):
        return torch.ops.hf_vtc.segment_mean(x, index, offsets)
    return segment_mean_reference(x, index, offsets)


def segment_mean_reference(x: torch.Tensor, index: torch.LongTensor, offsets: torch.LongTensor) -> torch.Tensor:
    """`segment_mean` in plain PyTorch."""
    return F.embedding_bag(index, x, offsets, mode="mean", include_last_offset=True)


def unshuffle_layernorm(
    features: torch.Tensor,
    factor: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    version: str = "v2",
    tiles: torch.LongTensor | None = None,
) -> torch.Tensor:
    """Fold `factor` x `factor` neighbours of some square grids into channels, then LayerNorm over them.

    Args:
        features (`torch.Tensor` of shape `(T, N, C)`): row-major grids, `N = side * side`, `side` divisible by
            `factor`.
        factor (`int`): side of the folded neighbourhood.
        weight, bias (`torch.Tensor` of shape `(factor * factor * C,)`): affine part of the LayerNorm.
        eps (`float`): as in `torch.nn.LayerNorm`.
        version (`str`): `"v2"`; `"v1"` transposes the folded grid (InternVL's first pixel shuffle).
        tiles (`torch.LongTensor` of shape `(T',)`, *optional*): the grids that are folded, no one twice; default all.

    Returns:
        `(T', N / factor^2, factor^2 * C)`, channel `(dh * factor + dw) * C + c` from neighbour `(dh, dw)`.

    Source: OpenGVLab/InternVL@2410d1d `pixel_shuffle` and the first module of `mlp1`.
    """
    # under autocast on CUDA a LayerNorm takes half precision in and gives float32 out, which the kernel does not
    widens = features.is_cuda and features.dtype != torch.float32 and torch.is_autocast_enabled("cuda")
    if not widens and _takes("unshuffle_layernorm", features, weight, bias):
        transposed = version == "v1"
        return torch.ops.hf_vtc.unshuffle_layernorm(features, tiles, weight, bias, factor, transposed, eps)[0]
    return unshuffle_layernorm_reference(features, factor, weight, bias, eps, version, tiles)


def unshuffle_layernorm_reference(
    features: torch.Tensor,
    factor: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    version: str = "v2",
    tiles: torch.LongTensor | None = None,
) -> torch.Tensor:
    """`unshuffle_layernorm` in plain PyTorch."""
    features = features if tiles is None else features[tiles]
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
    """Average-pool a square grid of features to each scale, in float32 from the full grid on.

    Args:
        features (`torch.Tensor` of shape `(T, N, D)`): row-major grids, `N = side * side`.
        scales (`Sequence[int]`): tokens per grid at each scale: columns and rows are halved in turns, columns first,
            half of an odd side rounded up, whose last windows are means of what is there.

    Returns:
        One row-major tensor of shape `(T, scales[i], D)` per scale; the scale `N` gives `features` itself.

    Raises:
        ValueError: halving the sides of the grid does not lead to a scale.

    Source: DeepLearnXMU/AVG-LLaVA@3685bc8 `llava_arch.py` `matryoshka_vis_token_process`.
    """
    num_tokens = features.shape[1]
    side = round(num_tokens**0.5)
    for scale in scales:
        # raises for scales that halving does not reach
        pooled_grid(side, scale)
    pooled_scales = sorted({scale for scale in scales if scale != num_tokens}, reverse=True)
    halvings = [(num_tokens // scale).bit_length() - 1 for scale in pooled_scales]
    if not halvings or side % 2 or max(halvings) > _MAX_HALVINGS or not _takes("pool_pyramid", features):
        return pool_pyramid_reference(features, scales)
    levels = dict(zip(pooled_scales, torch.ops.hf_vtc.pool_pyramid(features, halvings)))
    return [features if scale == num_tokens else levels[scale] for scale in scales]


def pool_pyramid_reference(features: torch.Tensor, scales: Sequence[int]) -> list[torch.Tensor]:
    """`pool_pyramid` in plain PyTorch: each level is made of the sums of the level before."""
    num_tokens, dtype = features.shape[1], features.dtype
    side = round(num_tokens**0.5)
    for scale in scales:
        pooled_grid(side, scale)
    pooled, num_left, smallest = {num_tokens: features}, num_tokens, min(scales, default=num_tokens)
    sums = features.to(_wide(features)).unflatten(1, (side, side)) if smallest < num_tokens else features
    sizes = sums.new_ones(1, side, side, 1)
    while num_left > smallest:
        axis = 2 if sums.shape[1] == sums.shape[2] else 1
        sums, sizes = _sums_of_pairs(sums, axis), _sums_of_pairs(sizes, axis)
        num_left = sums.shape[1] * sums.shape[2]
        if num_left in scales:
            pooled[num_left] = (sums / sizes).to(dtype).flatten(1, 2)
    return [pooled[scale] for scale in scales]


def _sums_of_pairs(states: torch.Tensor, axis: int) -> torch.Tensor:
    """Neighbours along an axis of `(T, rows, columns, D)` added up; the last of an odd number stays alone."""
    if states.shape[axis] % 2:
        states = F.pad(states, (0, 0) * (3 - axis) + (0, 1))
    return torch.add(*states.unflatten(axis, (-1, 2)).unbind(axis + 1))


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
    if logits.dtype == torch.float32 and _takes("assign_segment_mean", values, logits):
        means, chosen, _ = torch.ops.hf_vtc.assign_segment_mean(logits, values, group_idx, eps, empty_eps, tau)
        return means, chosen
    return assign_segment_mean_reference(logits, values, eps, empty_eps, tau, group_idx)


def assign_segment_mean_reference(
    logits: torch.Tensor,
    values: torch.Tensor,
    eps: float = 1e-6,
    empty_eps: float | None = None,
    tau: float = 1.0,
    group_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`assign_segment_mean` in plain PyTorch."""
    if group_idx is None:
        group_idx = logits.argmax(1)
    assignment = F.one_hot(group_idx, logits.shape[1]).transpose(1, 2).to(_wide(logits))
    if logits.requires_grad:
        soft = (logits.to(_wide(logits)) / tau).softmax(1)
        # exactly the one-hot values, with the gradient of the softmax
        assignment = assignment + (soft - soft.detach())
    return segment_mean_of(assignment, values, eps, empty_eps), group_idx


def segment_mean_of(
    assignment: torch.Tensor, values: torch.Tensor, eps: float = 1e-6, empty_eps: float | None = None
) -> torch.Tensor:
    """Weighted means `(T, G, C)` of `values` `(T, N, C)` by `assignment` `(T, G, N)`; `eps` as above, over weights."""
    with torch.autocast(values.device.type, enabled=False):
        wide = _wide(values)
        weights, rows = assignment.to(wide), values.to(wide)
        totals = weights.sum(-1, keepdim=True)
        if empty_eps is not None:
            eps = torch.where(totals.detach() == 0, empty_eps, eps)
        # divided before the product, as in the original, whose gradients are large where a group is empty
        return ((weights / (totals + eps)) @ rows).to(values.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """float32, or float64 for those who ask for it."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
