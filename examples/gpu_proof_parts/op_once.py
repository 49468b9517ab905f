"""Every op once, forward and backward, at the sizes of part b: what Nsight Compute watches."""

import torch

from hf_vtc.models.ops_vtc import compiled_ops

from .op_speed import BACKWARD
from .work import Proof


def run(proof: Proof) -> None:
    with compiled_ops(True):
        for problem in BACKWARD.values():
            leaves, forms = problem(proof, proof.dtype)
            outputs = forms["ours"]()
            torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    proof.synchronize()


if __name__ == "__main__":
    run(Proof(None, float("inf"), dry=False))
