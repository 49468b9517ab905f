"""Definitions of the compiled ops `torch.ops.hf_vtc.*`: schemas, shapes, gradients, and where their kernels come from.

The kernels lie in files that the installed package builds; this file may also travel beside weights, so it finds them
without importing hf_vtc, and a copy that travelled loads what is there and never starts a compiler. A schema that was
released does not change: a new signature is a new name.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# what `compiled_ops` asked for; None: the environment decides
_forced: bool | None = None


def set_forced(enabled: bool | None) -> bool | None:
    """Set what `has_kernel` answers, see `ops_vtc.compiled_ops`, and return what was set before."""
    global _forced
    before, _forced = _forced, enabled
    return before


@torch.compiler.assume_constant_result
def has_kernel(name: str, device_type: str) -> bool:
    """Whether the op `name` is to run compiled on a type of device; the first question may build the kernels."""
    if _forced is False or device_type not in _DISPATCH_KEYS:
        return False
    if not load_kernels(device_type) and not _forced:
        return False
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_vtc::{name}", _DISPATCH_KEYS[device_type])
    if _forced and not found:
        raise RuntimeError(
            f"No compiled kernel of `{name}` for {device_type} was found. Run `python -m hf_vtc.ops.build` where "
            "hf_vtc is installed, and do not set HF_VTC_OPS=off."
        )
    return found


@functools.cache
def load_kernels(device_type: str) -> bool:
    """Load the kernels for a type of device if the installed package has them, or, called from there, builds them."""
    finder = _installed_ops()
    if finder is None:
        if os.environ.get("HF_VTC_OPS") == "require":
            raise RuntimeError(
                "HF_VTC_OPS=require asks for compiled ops, but hf_vtc, which brings them, is not installed. Install "
                "it, or set HF_VTC_OPS=auto."
            )
        return False
    return finder.load(device_type, may_build=__package__ == "hf_vtc.models") is not None


def _installed_ops() -> ModuleType | None:
    """`hf_vtc.ops` of the installed package under a name of its own, or None.

    Importing it by its real name would import hf_vtc first, which registers the installed classes: then the second
    load of a checkpoint with remote code in this process would return another class than the first.
    """
    name = "_hf_vtc_ops"
    if name in sys.modules:
        return sys.modules[name]
    # no dot in the name, which would import the parent
    package = importlib.util.find_spec("hf_vtc")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0]) / "ops"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if not (folder / "__init__.py").is_file():
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # what was left half made would be taken for whole by the next call
        del sys.modules[name]
        raise
    return module


def _keep_for_segment_mean(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, index, offsets = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(index, offsets)


def _segment_mean_gradient(ctx: Any, grad: torch.Tensor) -> tuple:
    index, offsets = ctx.saved_tensors
    # the same plan the other way round: which segments each row of x is a member of
    places = torch.arange(index.shape[0], device=index.device)
    segments = torch.searchsorted(offsets, places, right=True) - 1
    by_row, order = index.sort(stable=True)
    row_offsets = torch.searchsorted(by_row, torch.arange(ctx.num_rows + 1, device=index.device))
    return torch.ops.hf_vtc.segment_mean_backward(grad, segments[order], row_offsets, offsets), None, None


def _keep_for_unshuffle_layernorm(ctx: Any, inputs: tuple, output: tuple) -> None:
    features, tiles, weight, bias, factor, transposed, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.factor, ctx.transposed = factor, transposed
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype
    ctx.save_for_backward(features, tiles, weight, mean, rstd)


def _unshuffle_layernorm_gradient(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    features, tiles, weight, mean, rstd = ctx.saved_tensors
    grad_features, grad_weight, grad_bias = torch.ops.hf_vtc.unshuffle_layernorm_backward(
        grad, features, tiles, weight, mean, rstd, ctx.factor, ctx.transposed
    )
    return grad_features, None, grad_weight.to(ctx.weight_dtype), grad_bias.to(ctx.bias_dtype), None, None, None


def _keep_for_pool_pyramid(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    _, ctx.halvings = inputs


def _pool_pyramid_gradient(ctx: Any, grads: list[torch.Tensor]) -> tuple:
    return torch.ops.hf_vtc.pool_pyramid_backward(grads, ctx.halvings), None


def _keep_for_assign_segment_mean(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, values, _, ctx.eps, ctx.empty_eps, ctx.tau = inputs
    _, group_idx, counts = output
    ctx.save_for_backward(logits, values, group_idx, counts)


def _assign_segment_mean_gradient(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    logits, values, group_idx, counts = ctx.saved_tensors
    grad_logits = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_logits = _assignment_gradient(grad, logits, values, group_idx, counts, ctx.eps, ctx.empty_eps, ctx.tau)
    if ctx.needs_input_grad[1]:
        grad_values = torch.ops.hf_vtc.assign_segment_mean_backward(grad, group_idx, counts, ctx.eps)
    return grad_logits, grad_values, None, None, None, None


def _assignment_gradient(
    grad: torch.Tensor,
    logits: torch.Tensor,
    values: torch.Tensor,
    group_idx: torch.Tensor,
    counts: torch.Tensor,
    eps: float,
    empty_eps: float | None,
    tau: float,
) -> torch.Tensor:
    """Gradient `(T, G, N)` of the means with respect to logits: a share moves its group's mean towards its row."""
    with torch.autocast(grad.device.type, enabled=False):
        divisors = counts.float() + eps
        if empty_eps is not None:
            divisors = torch.where(counts == 0, empty_eps, divisors)
        divisors = divisors[..., None]  # (T, G, 1)
        agreement = grad.float() @ values.float().transpose(1, 2)  # (T, G, N)
        members = group_idx[:, None] == torch.arange(counts.shape[1], device=counts.device)[:, None]
        # in the order of the reference's own gradient: empty groups make large terms, which cancel
        own = (agreement * (members / divisors / divisors)).sum(-1, keepdim=True)
        of_share = agreement / divisors - own
        soft = (logits / tau).softmax(1)
        return torch.ops.aten._softmax_backward_data(of_share, soft, 1, torch.float32) / tau


def _no_second_gradient(ctx: Any, *grads: Any) -> tuple:
    raise NotImplementedError(
        "Compiled ops have no second derivative. Wrap the call in `compiled_ops(False)` of ops_vtc, or set "
        "HF_VTC_OPS=off, to differentiate the reference instead."
    )


def _segment_mean_shape(x, index, offsets):
    return x.new_empty(offsets.shape[0] - 1, x.shape[1])


def _segment_mean_backward_shape(grad, segments, row_offsets, offsets):
    return grad.new_empty(row_offsets.shape[0] - 1, grad.shape[1])


def _unshuffle_layernorm_shape(features, tiles, weight, bias, factor, transposed, eps):
    num_tiles = features.shape[0] if tiles is None else tiles.shape[0]
    num_rows = features.shape[1] // factor**2
    mean = features.new_empty(num_tiles, num_rows, dtype=torch.float32)
    return features.new_empty(num_tiles, num_rows, weight.shape[0]), mean, torch.empty_like(mean)


def _unshuffle_layernorm_backward_shape(grad, features, tiles, weight, mean, rstd, factor, transposed):
    grad_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    return features.new_empty(features.shape), grad_weight, torch.empty_like(grad_weight)


def _check_halvings(halvings):
    # two to the power of any number would be a number that no memory holds
    if not all(0 < level < 64 for level in halvings):
        raise ValueError(f"`halvings` must be numbers of halvings of a grid, at least 1, got {list(halvings)}.")


def _pool_pyramid_shape(features, halvings):
    _check_halvings(halvings)
    num_tiles, num_tokens, width = features.shape
    return [features.new_empty(num_tiles, num_tokens // 2**level, width) for level in halvings]


def _pool_pyramid_backward_shape(grads, halvings):
    _check_halvings(halvings)
    num_tiles, num_tokens, width = grads[0].shape
    return grads[0].new_empty(num_tiles, num_tokens * 2 ** halvings[0], width)


def _assign_segment_mean_shape(logits, values, group_idx, eps, empty_eps, tau):
    num_tiles, num_groups, num_rows = logits.shape
    means = values.new_empty(num_tiles, num_groups, values.shape[2])
    counts = logits.new_empty(num_tiles, num_groups, dtype=torch.long)
    return means, logits.new_empty(num_tiles, num_rows, dtype=torch.long), counts


def _assign_segment_mean_backward_shape(grad, group_idx, counts, eps):
    return grad.new_empty(*group_idx.shape, grad.shape[2])


class _Op(NamedTuple):
    """What torch must know of an op beside its kernels."""

    signature: str
    shape: Callable
    gradient: Callable = _no_second_gradient
    keep: Callable | None = None


def _on_one_device(shape: Callable) -> Callable:
    """A fake kernel that refuses what no kernel takes; torch asks it for a mixture of real and of meta tensors too."""

    def checked(*arguments: Any) -> Any:
        tensors = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
        devices = {str(each.device) for each in tensors if isinstance(each, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"All tensors of an op must be on one device, got {', '.join(sorted(devices))}.")
        return shape(*arguments)

    return checked


_OPS = {
    "segment_mean": _Op(
        "(Tensor x, Tensor index, Tensor offsets) -> Tensor",
        _segment_mean_shape,
        _segment_mean_gradient,
        _keep_for_segment_mean,
    ),
    "segment_mean_backward": _Op(
        "(Tensor grad, Tensor segments, Tensor row_offsets, Tensor offsets) -> Tensor",
        _segment_mean_backward_shape,
    ),
    "unshuffle_layernorm": _Op(
        "(Tensor features, Tensor? tiles, Tensor weight, Tensor bias, int factor, bool transposed, float eps) -> "
        "(Tensor, Tensor, Tensor)",
        _unshuffle_layernorm_shape,
        _unshuffle_layernorm_gradient,
        _keep_for_unshuffle_layernorm,
    ),
    "unshuffle_layernorm_backward": _Op(
        "(Tensor grad, Tensor features, Tensor? tiles, Tensor weight, Tensor mean, Tensor rstd, int factor, "
        "bool transposed) -> (Tensor, Tensor, Tensor)",
        _unshuffle_layernorm_backward_shape,
    ),
    "pool_pyramid": _Op(
        "(Tensor features, int[] halvings) -> Tensor[]",
        _pool_pyramid_shape,
        _pool_pyramid_gradient,
        _keep_for_pool_pyramid,
    ),
    "pool_pyramid_backward": _Op(
        "(Tensor[] grads, int[] halvings) -> Tensor",
        _pool_pyramid_backward_shape,
    ),
    "assign_segment_mean": _Op(
        "(Tensor logits, Tensor values, Tensor? group_idx, float eps, float? empty_eps, float tau) -> "
        "(Tensor, Tensor, Tensor)",
        _assign_segment_mean_shape,
        _assign_segment_mean_gradient,
        _keep_for_assign_segment_mean,
    ),
    "assign_segment_mean_backward": _Op(
        "(Tensor grad, Tensor group_idx, Tensor counts, float eps) -> Tensor",
        _assign_segment_mean_backward_shape,
    ),
}

for _name, _op in _OPS.items():
    # the package and a copy beside weights may both be loaded in one process, and an op is defined once
    if not hasattr(torch.ops.hf_vtc, _name):
        torch.library.define(f"hf_vtc::{_name}", _op.signature)
        torch.library.register_fake(f"hf_vtc::{_name}", _on_one_device(_op.shape))
        torch.library.register_autograd(f"hf_vtc::{_name}", _op.gradient, setup_context=_op.keep)
