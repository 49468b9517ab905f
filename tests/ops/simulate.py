"""Run the CUDA kernels on the CPU, through the ops' own autograd, against the references in float64.

`python simulate.py LIBRARY TASK`: LIBRARY holds the .cu files and their binding, compiled against `hostsim.h` and
registered for tensors on the CPU; TASK is `trap`, or the beginning of the names of cases. It is a process of its own,
since sanitizers must be there before Python and a fault ends the process.
"""

import sys

import torch

from hf_vtc.models.ops_vtc import compiled_ops, segment_mean
from ops.cases import CASES, TOLERANCES, gradients_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_cases(beginning: str) -> int:
    """Cases in every dtype; what is not written stays NaN and is found out. Returns how many there were."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    chosen = [case for case in CASES if case.name.startswith(beginning)]
    for case in chosen:
        for dtype in _DTYPES:
            inputs = case.inputs(dtype)
            with compiled_ops(True):
                outputs, gradients = gradients_of(case, inputs)
            expected, exact_gradients = gradients_of(case, [each.to_float64() for each in inputs])
            for output, exact in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output.to(exact.dtype), exact, **TOLERANCES[dtype], msg=case.name)
            for gradient, exact in zip(gradients, exact_gradients, strict=True):
                scale = exact.abs().max().clamp(min=1) if exact.numel() else 1
                close = {**TOLERANCES[dtype], "msg": f"gradient of {case.name}"}
                torch.testing.assert_close(gradient.double() / scale, exact / scale, **close)
    return len(chosen)


def main() -> None:
    path, task = sys.argv[1:]
    torch.set_num_threads(1)
    torch.ops.load_library(path)
    if task == "trap":
        with compiled_ops(True):
            segment_mean(torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([0, 2]))
    else:
        print(f"{check_cases(task)} cases agree")


if __name__ == "__main__":
    main()
