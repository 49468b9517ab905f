"""Inputs that are easily got wrong, for every op: empty, single, odd, strided, repeated; and each op as loops."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_vtc.models.ops_vtc import assign_segment_mean, pool_pyramid, segment_mean, unshuffle_layernorm

# of the dtype itself: one rounding of the result, and float32 inside
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 4e-3},
    torch.float16: {"rtol": 1e-3, "atol": 5e-4},
}


@dataclass(frozen=True)
class Input:
    """One argument of an op: `differentiable` tensors are leaves, and the op gets what `seen_as` makes of them."""

    value: Any
    differentiable: bool = False
    seen_as: Callable[[torch.Tensor], torch.Tensor] | None = None

    def to_float64(self) -> "Input":
        floating = isinstance(self.value, torch.Tensor) and self.value.is_floating_point()
        return replace(self, value=self.value.double()) if floating else self


@dataclass(frozen=True)
class Case:
    """`function(*inputs)` for inputs of some dtype, and the same by loops over elements."""

    name: str
    make: Callable[[torch.dtype], list[Input]]
    function: Callable
    by_loops: Callable

    def inputs(self, dtype: torch.dtype) -> list[Input]:
        torch.manual_seed(0)
        return self.make(dtype)


def outputs_of(case: Case, inputs: list[Input]) -> list[torch.Tensor]:
    """Outputs of the op as a flat list."""
    seen = [each.value if each.seen_as is None else each.seen_as(each.value) for each in inputs]
    outputs = case.function(*seen)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def gradients_of(case: Case, inputs: list[Input]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and gradients of a fixed weighted sum of them with respect to all differentiable inputs."""
    leaves = [
        replace(each, value=each.value.detach().clone().requires_grad_()) if each.differentiable else each
        for each in inputs
    ]
    outputs = outputs_of(case, leaves)
    torch.manual_seed(1)
    total = sum(
        (output.double() * torch.randn(output.shape).double().to(output.device)).sum()
        for output in outputs
        if output.grad_fn
    )
    values = [each.value for each in leaves if each.differentiable]
    return [output.detach() for output in outputs], list(torch.autograd.grad(total, values))


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def _every_other_column(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _without_first_token(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :1], x], 1)[:, 1:]


# ---- segment_mean


def _segments(rows: int, width: int, lengths: list[int], repeated: bool = False, seen_as=None):
    def make(dtype: torch.dtype) -> list[Input]:
        total = sum(lengths)
        index = torch.randint(rows, (total,)) if repeated else torch.randperm(rows)[:total]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        return [Input(_random(rows, width, dtype=dtype), True, seen_as), Input(index), Input(offsets)]

    return make


def _segment_mean_by_loops(x, index, offsets):
    rows = [x[index[begin:end]] for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist())]
    return [torch.stack([own.mean(0) if len(own) else torch.zeros_like(x[0]) for own in rows])]


SEGMENTS = {
    "random": _segments(40, 64, [1, 4, 0, 9, 1, 1, 16]),
    "odd width": _segments(11, 37, [2, 3, 1, 5]),
    "one column": _segments(5, 1, [2, 1]),
    "wide": _segments(9, 200, [1, 8]),
    "only empty segments": _segments(4, 8, [0, 0, 0]),
    "empty at both ends": _segments(6, 20, [0, 3, 0, 0, 2, 0]),
    "rows in several segments": _segments(7, 33, [6, 1, 5, 2], repeated=True),
    "one row in one segment": _segments(1, 16, [1]),
    "strided": _segments(12, 24, [3, 1, 2], seen_as=_every_other_column),
    "rows apart": _segments(12, 24, [3, 1, 2], seen_as=lambda x: torch.cat([x, x[:, :5]], 1)[:, :24]),
}


# ---- unshuffle_layernorm


def _grids(num_tiles: int, side: int, width: int, factor: int, version="v2", tiles=None, seen_as=None, shift=0.0):
    def make(dtype: torch.dtype) -> list[Input]:
        folded = factor * factor * width
        return [
            Input(_random(num_tiles, side * side, width, dtype=dtype) + shift, True, seen_as),
            Input(factor),
            Input(_random(folded, dtype=dtype), True),
            Input(_random(folded, dtype=dtype), True),
            Input(1e-5),
            Input(version),
            Input(None if tiles is None else torch.tensor(tiles)),
        ]

    return make


def _unshuffle_layernorm_by_loops(features, factor, weight, bias, eps, version, tiles):
    num_tokens = features.shape[1]
    side = round(num_tokens**0.5)
    small = side // factor
    out = []
    for tile in range(len(features)) if tiles is None else tiles.tolist():
        rows = torch.empty(small * small, len(weight), dtype=features.dtype)
        for i in range(small):
            for j in range(small):
                parts = [
                    features[tile, (i * factor + down) * side + j * factor + right]
                    for down in range(factor)
                    for right in range(factor)
                ]
                row = torch.cat(parts)
                normed = (row - row.mean()) / (row.var(correction=0) + eps).sqrt()
                rows[j * small + i if version == "v1" else i * small + j] = normed * weight + bias
        out.append(rows)
    return [torch.stack(out)]


GRIDS = {
    "random": _grids(3, 8, 16, 2),
    "factor 4": _grids(2, 8, 24, 4),
    "some tiles": _grids(5, 4, 16, 2, tiles=[3, 0, 4]),
    "one tile of several": _grids(3, 4, 5, 4, tiles=[2]),
    "odd width and grid": _grids(2, 6, 7, 3),
    "one row of one element": _grids(1, 2, 1, 2),
    "factor 1": _grids(2, 3, 10, 1),
    "version 1": _grids(2, 8, 12, 2, version="v1", tiles=[1, 0]),
    "strided": _grids(2, 4, 16, 2, seen_as=_every_other_column),
    "tower with a class token": _grids(3, 4, 20, 2, tiles=[2, 1], seen_as=_without_first_token),
    "tokens apart": _grids(2, 4, 20, 2, seen_as=lambda x: torch.cat([x, x[..., :3]], -1)[..., :20]),
    "far from zero": _grids(2, 4, 64, 2, shift=8.0),
}


# ---- pool_pyramid


def _pyramid(num_tiles: int, side: int, width: int, scales: list[int], seen_as=None):
    def make(dtype: torch.dtype) -> list[Input]:
        return [Input(_random(num_tiles, side * side, width, dtype=dtype), True, seen_as), Input(scales)]

    return make


def _pool_pyramid_by_loops(features, scales):
    num_tiles, num_tokens, width = features.shape
    side = round(num_tokens**0.5)
    pooled = []
    for scale in scales:
        grid, columns_next = features.reshape(num_tiles, side, side, width), True
        while grid.shape[1] * grid.shape[2] > scale:
            grid = (grid[:, :, ::2] + grid[:, :, 1::2]) / 2 if columns_next else (grid[:, ::2] + grid[:, 1::2]) / 2
            columns_next = not columns_next
        pooled.append(grid.flatten(1, 2))
    return pooled


PYRAMIDS = {
    "all levels": _pyramid(2, 8, 32, [4, 8, 16, 32, 64]),
    "paper's grid": _pyramid(1, 24, 19, [36, 72, 144, 288, 576]),
    "out of order": _pyramid(2, 8, 3, [4, 64, 8]),
    "one level": _pyramid(3, 4, 48, [4]),
    "one scale twice": _pyramid(2, 4, 5, [8, 8, 16]),
    "columns only": _pyramid(2, 6, 17, [18]),
    "wider than a chunk": _pyramid(1, 4, 300, [8, 4, 2, 1]),
    "one column": _pyramid(1, 2, 1, [1]),
    "strided": _pyramid(2, 4, 32, [8, 2], seen_as=_every_other_column),
    "tower with a class token": _pyramid(2, 4, 16, [8, 2], seen_as=_without_first_token),
}


# ---- assign_segment_mean


def _groups(
    num_tiles: int, num_groups: int, rows: int, width: int, given=False, seen_as=None, eps=1e-6, empty=1.0, ties=False
):
    def make(dtype: torch.dtype) -> list[Input]:
        logits = torch.randn(num_tiles, num_groups, rows)
        if ties:
            logits = logits.round()
        # a group that no row chooses, where there are several
        logits[:, -1] -= 100.0 * (num_groups > 1)
        group_idx = torch.randint(num_groups, (num_tiles, rows)) if given else None
        values = _random(num_tiles, rows, width, dtype=dtype)
        return [
            Input(logits, True),
            Input(values, True, seen_as),
            Input(eps),
            Input(empty),
            Input(0.7),
            Input(group_idx),
        ]

    return make


def _assign_segment_mean_by_loops(logits, values, eps, empty_eps, tau, group_idx):
    chosen = logits.argmax(1) if group_idx is None else group_idx
    means = torch.zeros(*logits.shape[:2], values.shape[2], dtype=values.dtype)
    for tile in range(logits.shape[0]):
        for group in range(logits.shape[1]):
            own = values[tile, chosen[tile] == group]
            means[tile, group] = own.sum(0) / (len(own) + eps) if len(own) else 0
    return [means, chosen]


GROUPS = {
    "random": _groups(3, 5, 40, 32),
    "more groups than rows": _groups(2, 9, 4, 16),
    "one group": _groups(2, 1, 7, 20),
    "one row": _groups(1, 3, 1, 5),
    "odd": _groups(2, 4, 13, 37),
    "sum over count + 1": _groups(2, 4, 30, 24, eps=1.0, empty=None),
    "groups given": _groups(2, 4, 15, 16, given=True),
    "many rows": _groups(1, 6, 700, 8),
    "equally good groups": _groups(2, 5, 40, 8, ties=True),
    "strided": _groups(2, 3, 10, 16, seen_as=_every_other_column),
    "tower with a class token": _groups(2, 3, 10, 16, seen_as=_without_first_token),
}


CASES = [
    *(Case(f"segment_mean, {name}", make, segment_mean, _segment_mean_by_loops) for name, make in SEGMENTS.items()),
    *(
        Case(f"unshuffle_layernorm, {name}", make, unshuffle_layernorm, _unshuffle_layernorm_by_loops)
        for name, make in GRIDS.items()
    ),
    *(Case(f"pool_pyramid, {name}", make, pool_pyramid, _pool_pyramid_by_loops) for name, make in PYRAMIDS.items()),
    *(
        Case(f"assign_segment_mean, {name}", make, assign_segment_mean, _assign_segment_mean_by_loops)
        for name, make in GROUPS.items()
    ),
]
