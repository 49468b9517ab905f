"""The awkward cases of the tests, on a device: outputs and gradients of the compiled ops against float64.

    python -m gpu_proof_parts.op_cases --ops segment_mean --device cuda --records FILE

It is a process of its own, since a kernel that fails leaves a GPU unusable for its process, and since
compute-sanitizer watches processes. Cases and tolerances are those of `tests/ops/cases.py`.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ops.cases import CASES, TOLERANCES, Case, Input, gradients_of
from ops.hostile import VALID, opcheck_arguments

from hf_vtc.models.ops_vtc import compiled_ops, segment_mean

from .work import Proof, reason_of

OPS = ("segment_mean", "unshuffle_layernorm", "pool_pyramid", "assign_segment_mean")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def moved(value: Any, device: torch.device) -> Any:
    """An argument of an op on a device; a tensor that wants a gradient stays a leaf."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    return value


def worst(outputs: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype, scaled: bool) -> float:
    """The largest error as a share of what is tolerated: right is at most 1."""
    tolerance, largest = TOLERANCES[dtype], 0.0
    for output, exact in zip(outputs, expected, strict=True):
        if output.shape != exact.shape:
            raise AssertionError(f"shape {tuple(output.shape)} in place of {tuple(exact.shape)}")
        if not exact.numel():
            continue
        output, exact = output.double().cpu(), exact.double()
        # sums of many rounded products: their error follows the largest of them
        scale = exact.abs().max().clamp(min=1) if scaled else torch.ones(())
        allowed = tolerance["atol"] + tolerance["rtol"] * (exact / scale).abs()
        share = float(((output - exact).abs() / scale / allowed).max())
        # what was never written is NaN, and nothing is larger than that
        largest = max(largest, share) if share == share else float("inf")
    return largest


def error_of(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """Of one case, outputs and gradients; the inputs are made on the CPU, where the exact result is computed too."""
    inputs = case.inputs(dtype)
    placed: list[Input] = [replace(each, value=moved(each.value, device)) for each in inputs]
    with compiled_ops(True):
        outputs, gradients = gradients_of(case, placed)
    with compiled_ops(False):
        expected, exact_gradients = gradients_of(case, [each.to_float64() for each in inputs])
    return max(worst(outputs, expected, dtype, False), worst(gradients, exact_gradients, dtype, True))


def check_op(proof: Proof, op: str, dtype_name: str, device: torch.device) -> None:
    """One row per op and dtype, and one for each case that is wrong."""
    own, largest, right, start = [case for case in CASES if case.name.startswith(op)], 0.0, 0, time.perf_counter()
    for case in own:
        try:
            error = error_of(case, DTYPES[dtype_name], device)
        except Exception as failure:
            proof.record("wrong cases", case.name, ok=False, dtype=dtype_name, error=reason_of(failure))
            continue
        if error > 1:
            proof.record("wrong cases", case.name, ok=False, dtype=dtype_name, share_of_tolerance=error)
        right += error <= 1
        largest = max(largest, error)
    proof.record(
        "ops against float64, forward and backward",
        op,
        ok=right == len(own),
        dtype=dtype_name,
        cases=len(own),
        right=right,
        largest_error_to_tolerance=largest,
        seconds=round(time.perf_counter() - start, 2),
    )


def opcheck(proof: Proof, name: str, device: torch.device) -> None:
    """torch's own checks of an op: schema, fake kernel, autograd registration."""
    arguments = tuple(moved(each, device) for each in opcheck_arguments(name))
    try:
        torch.library.opcheck(getattr(torch.ops.hf_vtc, name).default, arguments)
    except Exception as failure:
        proof.record("opcheck", name, ok=False, error=reason_of(failure))
    else:
        proof.record("opcheck", name, ok=True)


def read_out_of_range(proof: Proof, device: torch.device) -> None:
    """Ask for a row that does not exist, which must end in an error; on a GPU this process is of no use afterwards."""
    x = torch.zeros(2, 3, device=device)
    index, offsets = (torch.tensor([0, 2], device=device) for _ in range(2))
    try:
        with compiled_ops(True):
            # reading the result waits for the kernel
            segment_mean(x, index, offsets).tolist()
    except RuntimeError as error:
        proof.record("reading beyond the input", "is an error", ok=True, said=reason_of(error)[:200])
    else:
        proof.record("reading beyond the input", "is an error", ok=False)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--records", type=Path, help="file that rows are added to")
    parser.add_argument("--only-cases", action="store_true", help="neither opcheck nor wrong inputs")
    options = parser.parse_args()
    proof, device = Proof(options.records, float("inf"), options.device == "cpu"), torch.device(options.device)
    # every `torch.empty` is NaN, so that what a kernel does not write is found out
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for op in options.ops:
        for dtype in options.dtypes:
            check_op(proof, op, dtype, device)
    if not options.only_cases:
        torch.use_deterministic_algorithms(False)
        for name in VALID:
            if name.removesuffix("_backward") in options.ops:
                opcheck(proof, name, device)
        if "segment_mean" in options.ops:
            read_out_of_range(proof, device)
    return int(proof.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
