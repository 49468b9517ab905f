"""Every op once, forward and backward, at the sizes of part b: what Nsight Compute watches."""

import argparse
import sys

import torch

from hf_vtc.models.ops_vtc import compiled_ops

from .op_speed import BACKWARD
from .work import Proof


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    options = parser.parse_args()
    proof = Proof(None, float("inf"), options.device == "cpu")
    with compiled_ops(True):
        for problem in BACKWARD.values():
            leaves, forms = problem(proof, torch.float32 if proof.dry else torch.bfloat16)
            outputs = forms["ours"]()
            torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    proof.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
