"""Run the CUDA kernels on the CPU, through the ops' own autograd, against the references in float64.

`python simulate.py LIBRARY TASK`: LIBRARY holds the .cu files compiled against `hostsim.h`, TASK is `trap`, or the
beginning of the names of cases. It is a process of its own, since sanitizers must be there before Python and a fault
ends the process.
"""

import ctypes
import sys
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p

import torch
from cases import CASES, TOLERANCES, gradients_of

from hf_vtc.models import kernels_vtc
from hf_vtc.models.ops_vtc import compiled_ops, segment_mean

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Grids(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("num_tiles", "tile_stride", "row_stride", "side", "width")]

    @classmethod
    def of(cls, features: torch.Tensor) -> "Grids":
        side = round(features.shape[1] ** 0.5)
        return cls(features.shape[0], features.stride(0), features.stride(1), side, features.shape[2])


class Groups(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("num_tiles", "num_groups", "num_rows", "width")]


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """As the binding prepares what it gets."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def address(tensor: torch.Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(values: list[int]) -> ctypes.Array:
    return (c_int64 * len(values))(*values)


def addresses(tensors: list[torch.Tensor]) -> ctypes.Array:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class Kernels:
    """What `bind_cuda.cpp` does between an op and its launchers, for tensors on the CPU."""

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)

    def call(self, name: str, *arguments: object) -> None:
        prepared = [address(each) if each is None or isinstance(each, torch.Tensor) else each for each in arguments]
        status = getattr(self.library, f"vtc_{name}")(*prepared, c_void_p(None))
        assert status == 0, (name, status)

    def segment_mean(self, x, index, offsets):
        x = dense_rows(x)
        out = x.new_empty(len(offsets) - 1, x.shape[1])
        sizes = c_int64(len(out)), c_int64(x.shape[1])
        strides = c_int64(x.stride(0)), c_int64(len(x))
        self.call("segment_mean", c_int(_DTYPES[x.dtype]), x, *strides, index, offsets, *sizes, out)
        return out

    def segment_mean_backward(self, grad, segments, row_offsets, offsets):
        grad = dense_rows(grad)
        out = grad.new_empty(len(row_offsets) - 1, grad.shape[1])
        strides = c_int64(grad.stride(0)), c_int64(len(grad))
        plan = segments, row_offsets, offsets
        sizes = c_int64(len(out)), c_int64(grad.shape[1])
        self.call("segment_mean_backward", c_int(_DTYPES[grad.dtype]), grad, *strides, *plan, *sizes, out)
        return out

    def unshuffle_layernorm(self, features, tiles, weight, bias, factor, transposed, eps):
        features, weight, bias = dense_rows(features), weight.float(), bias.float()
        slots = len(features) if tiles is None else len(tiles)
        rows = features.shape[1] // factor**2
        out = features.new_empty(slots, rows, len(weight))
        mean, rstd = (features.new_empty(slots, rows, dtype=torch.float32) for _ in range(2))
        folding = tiles, c_int64(slots), c_int64(factor), c_bool(transposed)
        self.call(
            "unshuffle_layernorm",
            c_int(_DTYPES[features.dtype]),
            features,
            Grids.of(features),
            *folding,
            weight,
            bias,
            c_float(eps),
            out,
            mean,
            rstd,
        )
        return out, mean, rstd

    def unshuffle_layernorm_backward(self, grad, features, tiles, weight, mean, rstd, factor, transposed):
        features, weight, grad = dense_rows(features), weight.float(), grad.contiguous()
        slots = len(features) if tiles is None else len(tiles)
        num_rows, parts = mean.numel(), min(mean.numel(), 3)
        assert num_rows == slots * (features.shape[1] // factor**2)
        grad_features = torch.empty(features.shape, dtype=features.dtype)
        if tiles is not None:
            grad_features.zero_()
        partial = weight.new_empty(2, parts, len(weight))
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
        self.call(
            "unshuffle_layernorm_backward",
            c_int(_DTYPES[features.dtype]),
            grad,
            features,
            Grids.of(features),
            tiles,
            c_int64(slots),
            c_int64(factor),
            c_bool(transposed),
            weight,
            mean,
            rstd,
            c_int64(parts),
            partial,
            grad_features,
            grad_weight,
            grad_bias,
        )
        return grad_features, grad_weight, grad_bias

    def pool_pyramid(self, features, halvings):
        features = dense_rows(features)
        outs = [features.new_empty(len(features), features.shape[1] >> level, features.shape[2]) for level in halvings]
        dtype = c_int(_DTYPES[features.dtype])
        levels = numbers(halvings), addresses(outs), c_int(len(halvings))
        self.call("pool_pyramid", dtype, features, Grids.of(features), *levels)
        return outs

    def pool_pyramid_backward(self, grads, halvings):
        grads = [grad.contiguous() for grad in grads]
        num_tiles, num_tokens, width = grads[0].shape
        out = grads[0].new_empty(num_tiles, num_tokens << halvings[0], width)
        dtype = c_int(_DTYPES[out.dtype])
        self.call(
            "pool_pyramid_backward",
            dtype,
            addresses(grads),
            Grids.of(out),
            numbers(halvings),
            c_int(len(halvings)),
            out,
        )
        return out

    def assign_segment_mean(self, logits, values, group_idx, eps, empty_eps, tau):
        logits, values = dense_rows(logits), dense_rows(values)
        shape = Groups(*logits.shape, values.shape[2])
        groups = torch.empty(logits.shape[0], logits.shape[2], dtype=torch.long)
        counts = torch.empty(logits.shape[:2], dtype=torch.long)
        means = values.new_empty(*logits.shape[:2], values.shape[2])
        strides = c_int64(logits.stride(0)), c_int64(logits.stride(1))
        self.call("choose_groups", logits, *strides, shape, group_idx, groups)
        strides = c_int64(values.stride(0)), c_int64(values.stride(1))
        dtype = c_int(_DTYPES[values.dtype])
        self.call("group_mean", dtype, values, *strides, shape, groups, c_float(eps), means, counts)
        return means, groups, counts

    def assign_segment_mean_backward(self, grad, group_idx, counts, eps):
        grad = grad.contiguous()
        shape = Groups(grad.shape[0], grad.shape[1], group_idx.shape[1], grad.shape[2])
        out = grad.new_empty(*group_idx.shape, grad.shape[2])
        dtype = c_int(_DTYPES[grad.dtype])
        self.call("group_mean_backward", dtype, grad, shape, group_idx, counts, c_float(eps), out)
        return out


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
    kernels = Kernels(path)
    for name in kernels_vtc._OPS:
        torch.library.impl(f"hf_vtc::{name}", "CPU")(getattr(kernels, name))
    if task == "trap":
        with compiled_ops(True):
            segment_mean(torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([0, 2]))
    else:
        print(f"{check_cases(task)} cases agree")


if __name__ == "__main__":
    main()
