"""Part b: every op at the sizes of real models, against a copy, the best eager form and torch.compile.

Forward passes are those of `benchmark_ops.py`, which checks every candidate against float64 first. Backward passes are
held against the gradient of the reference.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import benchmark_ops
import torch
import torch.nn.functional as F

from hf_vtc.models.ops_vtc import (
    assign_segment_mean,
    assign_segment_mean_reference,
    compiled_ops,
    pool_pyramid,
    pool_pyramid_reference,
    segment_mean,
    segment_mean_reference,
    unshuffle_layernorm,
    unshuffle_layernorm_reference,
)

from .work import Proof

Tensors = list[torch.Tensor]
Forms = dict[str, Callable[[], Tensors]]

_TINY = [
    ("segment_mean", "tiny", lambda *at: benchmark_ops.segment_mean_problem(*at, 2, 24, 16)),
    ("unshuffle_layernorm", "tiny", lambda *at: benchmark_ops.unshuffle_layernorm_problem(*at, 4, 8, 8)),
    ("pool_pyramid", "tiny", lambda *at: benchmark_ops.pool_pyramid_problem(*at, 2, 8, 16)),
    ("assign_segment_mean", "tiny", lambda *at: benchmark_ops.assign_segment_mean_problem(*at, 2, 16, 8, 4)),
]


def run(proof: Proof) -> None:
    problems = _TINY if proof.dry else benchmark_ops.PROBLEMS
    options = argparse.Namespace(
        device=proof.device.type, no_compile=proof.dry, repeats=2 if proof.dry else benchmark_ops.DEFAULT_REPEATS
    )
    rows: list[benchmark_ops.Row] = []
    for dtype in (torch.bfloat16, torch.float32):
        for op, size, make in problems:
            work = partial(forward, proof, op, size, dtype, make, options)
            row = proof.attempt("forward", f"{op}, {size}", work, needs=5)
            if row is not None:
                rows.append(row)
                summarise(proof, rows)
    for dtype in (torch.bfloat16, torch.float32):
        for op in BACKWARD:
            proof.attempt("backward", op, partial(backward, proof, op, dtype), needs=3)
    if rows:
        summarise(proof, rows)


def summarise(proof: Proof, rows: list[benchmark_ops.Row]) -> None:
    """The headline so far."""
    fast = sum(row.over_best_eager >= benchmark_ops.GOAL for row in rows)
    slowest, shares = min(row.over_best_eager for row in rows), [row.of_copy for row in rows]
    proof.headline(
        f"{fast} of {len(rows)} forward rows at {benchmark_ops.GOAL}x or more over the best eager form, the slowest "
        f"{slowest:.2f}x; {min(shares):.0%} to {max(shares):.0%} of a copy's bandwidth"
    )


def forward(proof: Proof, op: str, size: str, dtype: torch.dtype, make: Callable, options) -> benchmark_ops.Row:
    torch.manual_seed(0)
    try:
        with torch.no_grad(), compiled_ops(True):
            row = benchmark_ops.measure(op, size, dtype, make(dtype, proof.device.type), options)
    except SystemExit as wrong:
        # the script ends where a candidate is wrong; here others still count
        raise RuntimeError(str(wrong)) from None
    figures = asdict(row)
    figures["speedup"] = {name: round(value, 2) for name, value in row.speedup.items()}
    # tiny sizes on a CPU have nothing to meet
    ok = None if proof.dry else row.over_best_eager >= benchmark_ops.FLOOR
    proof.record("forward", f"{figures.pop('op')}, {figures.pop('size')}", ok, **figures)
    return row


# ---- backward passes


def _leaf(proof: Proof, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=proof.device, dtype=dtype, requires_grad=True)


def _segment_mean(proof: Proof, dtype: torch.dtype) -> tuple[Tensors, Forms]:
    """Groups of four rows out of three quarters of the batch, single ones of the rest."""
    rows, width = (64, 16) if proof.dry else (12288, 4096)
    x = _leaf(proof, rows, width, dtype=dtype)
    lengths = torch.cat([torch.full((rows * 3 // 16,), 4), torch.ones(rows // 4).long()])
    index = torch.arange(rows, device=proof.device)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(proof.device)
    return [x], {
        "ours": lambda: [segment_mean(x, index, offsets)],
        "reference": lambda: [segment_mean_reference(x, index, offsets)],
    }


def _unshuffle_layernorm(proof: Proof, dtype: torch.dtype) -> tuple[Tensors, Forms]:
    tiles, side, width = (2, 4, 8) if proof.dry else (12, 32, 1024)
    features = _leaf(proof, tiles, side * side, width, dtype=dtype)
    weight, bias = (_leaf(proof, 4 * width, dtype=dtype) for _ in range(2))
    return [features, weight, bias], {
        "ours": lambda: [unshuffle_layernorm(features, 2, weight, bias, 1e-5)],
        "reference": lambda: [unshuffle_layernorm_reference(features, 2, weight, bias, 1e-5)],
    }


def _pool_pyramid(proof: Proof, dtype: torch.dtype) -> tuple[Tensors, Forms]:
    tiles, side, width = (2, 8, 16) if proof.dry else (5, 24, 4096)
    features = _leaf(proof, tiles, side * side, width, dtype=dtype)
    scales = [side * side >> level for level in range(1, 4 if proof.dry else 5)]
    return [features], {
        "ours": lambda: pool_pyramid(features, scales),
        "reference": lambda: pool_pyramid_reference(features, scales),
    }


def _assign_segment_mean(proof: Proof, dtype: torch.dtype) -> tuple[Tensors, Forms]:
    tiles, rows, width, groups = (2, 16, 8, 4) if proof.dry else (5, 576, 1024, 64)
    logits = _leaf(proof, tiles, groups, rows, dtype=torch.float32)
    values = _leaf(proof, tiles, rows, width, dtype=dtype)
    return [logits, values], {
        "ours": lambda: [assign_segment_mean(logits, values)[0]],
        "reference": lambda: [assign_segment_mean_reference(logits, values)[0]],
    }


BACKWARD = {
    "segment_mean": _segment_mean,
    "unshuffle_layernorm": _unshuffle_layernorm,
    "pool_pyramid": _pool_pyramid,
    "assign_segment_mean": _assign_segment_mean,
}


def backward(proof: Proof, op: str, dtype: torch.dtype) -> None:
    """Time of the backward pass alone, in turns; every turn has a graph of its own."""
    torch.manual_seed(0)
    leaves, forms = BACKWARD[op](proof, dtype)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(3 if proof.dry else 22):
        for name, form in forms.items():
            with compiled_ops(name == "ours"):
                outputs = form()
            grads = [torch.ones_like(output) for output in outputs]
            proof.synchronize()
            work = partial(torch.autograd.grad, outputs, leaves, grads)
            taken = benchmark_ops.milliseconds(work, proof.device.type)
            # the first turns warm up
            if turn >= 2:
                times[name].append(taken)
    own = statistics.median(times["ours"])
    ratio = statistics.median(theirs / ours for theirs, ours in zip(times["reference"], times["ours"], strict=True))
    proof.record("backward", op, dtype=str(dtype)[6:], milliseconds=own, over_reference=ratio)
