"""Arguments that no op may follow into memory that is not theirs: a list by name, and as many more by a seed.

`python hostile.py LIBRARY` runs the cases in processes forked from one that has loaded LIBRARY, a new one after each
that ends it, and prints a line of JSON for each: its name, how it ended, and what was said. An argument is either
refused by an error, or means something; then the result must be that of the same values in fresh, contiguous memory,
and of the shape that the fake kernel promises. A process that dies or hangs is a fault, unless it is the trap of a
simulated kernel.
"""

import json
import os
import random
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ops.cases import TOLERANCES

SEED = 20261127
DRAWN_PER_OP = 40
SECONDS_PER_CASE = 60
# integers that are easily added to, multiplied with or shifted by something too many
INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 15, 16, 17, 31, 32, 63, 64, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
DTYPES = (torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.bfloat16)

VALID: dict[str, Callable[[], tuple]] = {
    "segment_mean": lambda: (torch.randn(5, 3), torch.tensor([4, 0, 0]), torch.tensor([0, 1, 1, 3])),
    "segment_mean_backward": lambda: (
        torch.randn(2, 3),
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 2, 2, 3]),
        torch.tensor([0, 1, 3]),
    ),
    "unshuffle_layernorm": lambda: (
        torch.randn(3, 16, 3),
        torch.tensor([2, 0]),
        torch.randn(12),
        torch.randn(12),
        2,
        True,
        1e-5,
    ),
    "unshuffle_layernorm_backward": lambda: (
        torch.randn(3, 4, 12),
        torch.randn(3, 16, 3),
        None,
        torch.randn(12),
        torch.randn(3, 4),
        torch.rand(3, 4),
        2,
        False,
    ),
    "pool_pyramid": lambda: (torch.randn(2, 16, 3), [1, 3]),
    "pool_pyramid_backward": lambda: ([torch.randn(2, 8, 3), torch.randn(2, 2, 3)], [1, 3]),
    "assign_segment_mean": lambda: (torch.randn(2, 3, 5), torch.randn(2, 5, 4), None, 1e-6, 1.0, 0.5),
    "assign_segment_mean_backward": lambda: (
        torch.randn(2, 3, 4),
        torch.randint(3, (2, 5)),
        torch.tensor([[2, 2, 1], [5, 0, 0]]),
        1e-6,
    ),
}


def opcheck_arguments(name: str) -> tuple:
    """What `torch.library.opcheck` tries an op with: of what a gradient can be asked, one is."""
    arguments = VALID[name]()
    if name.endswith("_backward"):
        return arguments
    return tuple(
        each.requires_grad_() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in arguments
    )


class Case(NamedTuple):
    """A call of an op. `refused` is what its error must say; None: anything that is right. `by_values`: what is wrong
    stands in a tensor, which a CUDA kernel finds out, and traps."""

    name: str
    op: str
    make: Callable[[], tuple]
    refused: str | None = None
    by_values: bool = False


def changed(op: str, position: int, value: Callable[[Any], Any]) -> Callable[[], tuple]:
    """Valid arguments but for one, which is made from the valid one."""

    def make() -> tuple:
        arguments = list(VALID[op]())
        arguments[position] = value(arguments[position])
        return tuple(arguments)

    return make


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


def to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(dtype)


def numbers(*values: int) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.tensor(values, dtype=torch.long)


def instead(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _named(op: str, *rows: tuple) -> Iterator[Case]:
    for position, what, value, refused, *by_values in rows:
        yield Case(f"{op}, argument {position}: {what}", op, changed(op, position, value), refused, bool(by_values))


def _ragged(op: str, members: int, ends: int, num_rows: int, names: tuple[str, str]) -> Iterator[Case]:
    """What can be wrong with members (3 of them) and with the ends of their segments (3 too)."""
    member, end = names
    yield from _named(
        op,
        (members, "int32", to(torch.int32), f"`{member}` must be int64"),
        (members, "floats", to(torch.float32), f"`{member}` must be int64"),
        (members, "a matrix", lambda x: x[None], f"`{member}` must have 1 dimensions"),
        (members, "a scalar", lambda x: x[0], f"`{member}` must have 1 dimensions"),
        (members, "freed", freed, f"memory of `{member}` was freed"),
        (members, "one too large", numbers(0, num_rows, 0), f"`{member}` must lie in 0 to {num_rows - 1}", True),
        (members, "one below zero", numbers(0, -1, 0), f"`{member}` must lie in 0 to {num_rows - 1}", True),
        (members, "the least", numbers(-(2**63), 0, 0), f"`{member}` must lie in", True),
        (members, "the greatest", numbers(0, 0, 2**63 - 1), f"`{member}` must lie in", True),
        (members, "fewer", lambda x: x[:-1], "must begin with 0 and end with 2", True),
        (ends, "int32", to(torch.int32), f"`{end}` must be int64"),
        (ends, "a matrix", lambda x: x[None], f"`{end}` must have 1 dimensions"),
        (ends, "none", lambda x: x[:0], f"`{end}` must hold the end of the last segment"),
        (ends, "freed", freed, f"memory of `{end}` was freed"),
        (ends, "shrunk", shrunk, f"memory of `{end}` was freed, or is smaller"),
        (ends, "late", numbers(1, 1, 1, 3), f"`{end}` must begin with 0", True),
        (ends, "beyond the end", numbers(0, 1, 1, 4), f"`{end}` must begin with 0 and end with 3", True),
        (ends, "far beyond the end", numbers(0, 1, 1, 2**62), f"`{end}` must begin with 0 and end with 3", True),
        (ends, "falling", numbers(0, 3, 1, 3), f"`{end}` must not fall", True),
        (ends, "below zero", numbers(0, -5, 1, 3), f"`{end}` must not fall", True),
        (ends, "out and back", numbers(0, 2**62, 2**62, 3), f"`{end}` must not fall", True),
    )


def _grids(op: str, features: int) -> Iterator[Case]:
    """What can be wrong with grids (3, 16, 3) and with what their folding by 2 needs."""
    tiles, weight, factor = (1, 2, 4) if features == 0 else (2, 3, 6)
    yield from _named(
        op,
        (features, "float64", to(torch.float64), "must|same dtype"),
        (features, "integers", to(torch.int64), "must|same dtype"),
        (features, "a matrix", lambda x: x[0], "`features` must have 3 dimensions"),
        (features, "15 tokens", lambda x: x[:, :15], "square number of tokens, got 15"),
        (features, "freed", freed, "memory of `features` was freed"),
        (features, "too many tokens", lambda x: x[:1, :1].expand(1, 2**60 - 1, 3), "square"),
        (features, "too many tiles", lambda x: x[:1].expand(2**56, 16, 3), "" if features else None),
        (tiles, "int32", instead(torch.tensor([0, 1, 2], dtype=torch.int32)), "`tiles` must be int64"),
        (tiles, "a matrix", instead(torch.tensor([[0, 1, 2]])), "`tiles` must have 1 dimensions"),
        (tiles, "one too large", numbers(0, 1, 3), "`tiles` must lie in 0 to 2", True),
        (tiles, "one below zero", numbers(0, 1, -1), "`tiles` must lie in 0 to 2", True),
        (tiles, "the least", numbers(-(2**63), 1, 0), "`tiles` must lie in 0 to 2", True),
        (tiles, "one twice", numbers(1, 0, 1), "`tiles` must name a tile once, but 1 comes twice", True),
        (tiles, "freed", lambda _: freed(torch.tensor([0, 1, 2])), "memory of `tiles` was freed"),
        (weight, "short", lambda x: x[:-1], "`weight` must have 12 entries"),
        (weight, "a matrix", lambda x: x[None], "`weight` must have 12 entries"),
        (weight, "freed", freed, "memory of `weight` was freed"),
        *(
            (factor, str(value), instead(value), "multiple of `factor`|too large")
            for value in (0, -1, 3, 8, 2**31, 2**62, -(2**63))
        ),
    )


NAMED = [
    *_named(
        "segment_mean",
        (0, "float64", to(torch.float64), "`x` must be float32, bfloat16 or float16"),
        (0, "integers", to(torch.int64), "`x` must be float32"),
        (0, "complex", to(torch.complex64), "`x` must be float32"),
        (0, "a vector", lambda x: x[0], "`x` must have 2 dimensions"),
        (0, "no rows", lambda x: x[:0], "must"),
        (0, "freed", freed, "memory of `x` was freed"),
        (0, "shrunk", shrunk, "memory of `x` was freed, or is smaller"),
        (0, "too wide", lambda x: x[:, :1].expand(5, 2**60), ""),
        (0, "sparse", lambda x: x.to_sparse(), ""),
    ),
    *_ragged("segment_mean", 1, 2, 5, ("index", "offsets")),
    *_named(
        "segment_mean_backward",
        (0, "float64", to(torch.float64), "`grad` must be float32"),
        (0, "a vector", lambda x: x[0], "`grad` must have 2 dimensions"),
        (0, "a row more", lambda x: torch.cat([x, x[:1]]), "`offsets` must have one entry more"),
        (0, "freed", freed, "memory of `grad` was freed"),
        (3, "int32", to(torch.int32), "`offsets` must be int64"),
        (3, "floats", to(torch.float32), "`offsets` must be int64"),
        (3, "a matrix", lambda x: x[None], "`offsets` must have 1 dimensions"),
        (3, "none", lambda x: x[:0], "`offsets` must hold"),
        (3, "short", lambda x: x[1:], "`offsets` must have one entry more"),
        (3, "freed", freed, "memory of `offsets` was freed"),
        (3, "falling", numbers(0, 4, 3), "`offsets` must not fall", True),
        (3, "a segment without members", numbers(0, 0, 3), "`segments` names segment 0, which has no members", True),
    ),
    *_ragged("segment_mean_backward", 1, 2, 2, ("segments", "row_offsets")),
    *_grids("unshuffle_layernorm", 0),
    *_named(
        "unshuffle_layernorm",
        (3, "short", lambda x: x[:-1], "`bias` must have 12 entries"),
        (3, "freed", freed, "memory of `bias` was freed"),
        (0, "no channels, too many tiles", lambda x: x[:1, :, :0].expand(2**56, 16, 0), ""),
    ),
    *_grids("unshuffle_layernorm_backward", 1),
    *_named(
        "unshuffle_layernorm_backward",
        (0, "another dtype", to(torch.bfloat16), "`grad` and `features` must have the same dtype"),
        (0, "short", lambda x: x[:2], "`grad` must have 12 rows of 12 elements"),
        (0, "freed", freed, "memory of `grad` was freed"),
        (4, "short", lambda x: x[:2], "`mean` and `rstd` must have 12 entries"),
        (5, "short", lambda x: x[:2], "`mean` and `rstd` must have 12 entries"),
        (4, "freed", freed, "memory of `mean` was freed"),
        (5, "freed", freed, "memory of `rstd` was freed"),
    ),
    *_named(
        "pool_pyramid",
        (0, "float64", to(torch.float64), "`features` must be float32"),
        (0, "a matrix", lambda x: x[0], "`features` must have 3 dimensions"),
        (0, "15 tokens", lambda x: x[:, :15], "square number of tokens, got 15"),
        (0, "freed", freed, "memory of `features` was freed"),
        (0, "too many tokens", lambda x: x[:1, :1].expand(1, 2**60, 3), ""),
        *((1, str(level), instead([level]), "`halvings` must lie in") for level in (0, -1, 17, 63, 64, 2**40)),
        *((1, str(level), instead([level]), "`halvings` must lie in") for level in (-(2**63), 2**63 - 1)),
        (1, "5", instead([5]), "cannot be halved 5 times|must lie in 1 to 4"),
        (1, "one twice", instead([2, 2]), "names 2 twice"),
    ),
    *_named(
        "pool_pyramid_backward",
        (0, "no levels", instead([]), ""),
        (0, "a level less", lambda x: x[:1], "one tensor per level"),
        (0, "two dtypes", lambda x: [x[0], x[1].bfloat16()], "all have one dtype"),
        (0, "float64", lambda x: [each.double() for each in x], "must be float32"),
        (0, "matrices", lambda x: [each[0] for each in x], "must have 3 dimensions"),
        (0, "another width", lambda x: [x[0], x[1][..., :2]], "number 1 is not"),
        (0, "fewer tokens", lambda x: [x[0], x[1][:, :1]], "number 1 is not"),
        (0, "fewer tiles", lambda x: [x[0], x[1][:1]], "number 1 is not"),
        (0, "the second is freed", lambda x: [x[0], freed(x[1])], "memory of `grads` was freed"),
        (0, "too many tokens", lambda x: [x[0][:0, :1].expand(0, 2**62, 3)] * 2, "too large"),
        *((1, f"{level}, 3", instead([level, 3]), "`halvings` must lie in") for level in (0, -1, 17, 63, 64, 2**40)),
        *((1, f"{level}, 3", instead([level, 3]), "`halvings` must lie in") for level in (-(2**63), 2**63 - 1)),
        (1, "the second below zero", instead([1, -3]), "`halvings` must lie in"),
        (1, "one twice", instead([1, 1]), "names 1 twice"),
        (1, "one more", instead([1, 3, 2]), "one tensor per level"),
        (1, "in another order", instead([3, 1]), "square number|number"),
    ),
    *_named(
        "assign_segment_mean",
        (0, "bfloat16", to(torch.bfloat16), "`logits` must be float32"),
        (0, "a matrix", lambda x: x[0], "`logits` must have 3 dimensions"),
        (0, "a tile less", lambda x: x[:1], "must agree in T and N"),
        (0, "a row less", lambda x: x[..., :-1], "must agree in T and N"),
        (0, "no groups", lambda x: x[:, :0], "at least one group"),
        (0, "freed", freed, "memory of `logits` was freed"),
        (0, "too many groups", lambda x: x[:, :1].expand(2, 2**56, 5), ""),
        (1, "integers", to(torch.int64), "`values` must be float32"),
        (1, "a matrix", lambda x: x[0], "`values` must have 3 dimensions"),
        (1, "freed", freed, "memory of `values` was freed"),
        (2, "int32", instead(torch.zeros(2, 5, dtype=torch.int32)), "`group_idx` must be int64"),
        (2, "another shape", instead(torch.zeros(5, 2, dtype=torch.int64)), r"`group_idx` must have shape \(2, 5\)"),
        (2, "freed", lambda _: freed(torch.zeros(2, 5, dtype=torch.int64)), "memory of `group_idx` was freed"),
        (2, "one too large", instead(torch.full((2, 5), 3)), "`group_idx` must lie in 0 to 2", True),
        (2, "one below zero", instead(torch.full((2, 5), -1)), "`group_idx` must lie in 0 to 2", True),
        (2, "the greatest", instead(torch.full((2, 5), 2**63 - 1)), "`group_idx` must lie in 0 to 2", True),
    ),
    *_named(
        "assign_segment_mean_backward",
        (0, "float64", to(torch.float64), "`grad` must be float32"),
        (0, "a matrix", lambda x: x[0], "`grad` must have 3 dimensions"),
        (0, "a tile less", lambda x: x[:1], "must agree in T and G"),
        (0, "no groups", lambda x: x[:, :0], "must agree in T and G"),
        (0, "freed", freed, "memory of `grad` was freed"),
        (1, "int32", to(torch.int32), "`group_idx` must be int64"),
        (1, "a vector", lambda x: x[0], "`group_idx` must have 2 dimensions"),
        (1, "one too large", lambda x: x + 3, "`group_idx` must lie in 0 to 2", True),
        (1, "one below zero", lambda x: x - 3, "`group_idx` must lie in 0 to 2", True),
        (1, "the least", lambda x: torch.full_like(x, -(2**63)), "`group_idx` must lie in 0 to 2", True),
        (1, "freed", freed, "memory of `group_idx` was freed"),
        (2, "int32", to(torch.int32), "`counts` must be int64"),
        (2, "short", lambda x: x[:1], "must agree in T and G"),
        (2, "freed", freed, "memory of `counts` was freed"),
    ),
    # torch asks the fake kernel then
    *(
        Case(
            f"{op}, argument {position}: without data", op, changed(op, position, lambda x: x.to("meta")), "must be on"
        )
        for op in VALID
        for position, value in enumerate(VALID[op]())
        if isinstance(value, torch.Tensor) and op != "pool_pyramid"
    ),
    # views that mean something: the stride of a dimension of size 1 is any number
    Case(
        "assign_segment_mean, tiles of a single row",
        "assign_segment_mean",
        lambda: (torch.randn(2, 3, 1), torch.randn(1, 2, 4).transpose(0, 1), None, 1e-6, 1.0, 0.5),
    ),
    Case(
        "assign_segment_mean, a single row with a stride of its own",
        "assign_segment_mean",
        lambda: (torch.randn(2, 3, 1), torch.randn(2, 4).as_strided((2, 1, 4), (4, 2**40, 1)), None, 1e-6, 1.0, 0.5),
    ),
]


def _another_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The tensor with something changed: kind, shape, strides, memory or a value."""
    sizes = list(tensor.shape)
    dim = rng.randrange(max(len(sizes), 1))

    def fill(value: float) -> torch.Tensor:
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
        return tensor

    def resized(size: int) -> torch.Tensor:
        return torch.zeros([size if each == dim else old for each, old in enumerate(sizes)], dtype=tensor.dtype)

    values = FLOATS if tensor.is_floating_point() else INTEGERS
    changes = [
        lambda: tensor.to(rng.choice(DTYPES)),
        lambda: tensor[None],
        lambda: tensor[0],
        lambda: tensor.flatten()[0],
        lambda: resized(0),
        lambda: resized(sizes[dim] + 1),
        lambda: resized(max(sizes[dim] - 1, 0)),
        lambda: tensor.narrow(dim, 0, 1),
        lambda: tensor.narrow(dim, 0, 1).expand(sizes),
        lambda: torch.empty([0 if each == dim else rng.choice((2**20, 2**40, 2**62)) for each in range(len(sizes))]),
        lambda: tensor.transpose(dim, -1),
        lambda: tensor.repeat_interleave(2, dim)[tuple([slice(None)] * dim + [slice(None, None, 2)])],
        lambda: tensor.flip(dim),
        lambda: freed(tensor),
        lambda: shrunk(tensor),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        # a value, more often than anything else
        *([lambda: fill(rng.choice(values))] * 6),
    ]
    return rng.choice(changes)()


def _another(value: Any, rng: random.Random) -> Any:
    if isinstance(value, torch.Tensor):
        return _another_tensor(value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, list):
        changes = [value[:-1], [*value, value[-1]], value[::-1], *([[_another(value[0], rng), *value[1:]]] * 3)]
        return rng.choice(changes)
    # nothing was given
    return torch.tensor(rng.choice([[0], [1, 0], [[0, 1]], [-1], [2**62], [], [0, 0, 1, 1, 2]]))


def drawn() -> Iterator[Case]:
    """Cases with one to three arguments changed; the same at every call."""
    for op in VALID:
        for number in range(DRAWN_PER_OP):

            def make(op: str = op, seed: str = f"{SEED} {op} {number}") -> tuple:
                rng = random.Random(seed)
                arguments = list(VALID[op]())
                for _ in range(rng.choice((1, 1, 2, 3))):
                    position = rng.randrange(len(arguments))
                    try:
                        arguments[position] = _another(arguments[position], rng)
                    except (IndexError, RuntimeError, ValueError):
                        # what was changed before does not allow this change as well
                        continue
                return tuple(arguments)

            yield Case(f"{op}, drawn {number}", op, make)


def _afresh(value: Any, device: str = "cpu") -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format).to(device)
    return [_afresh(each, device) for each in value] if isinstance(value, list) else value


def _flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _run(case: Case) -> tuple[str, str]:
    """How a call ends: `refused` or `right`, or `wrong` for a result that it should not have."""
    torch.manual_seed(0)
    arguments = case.make()
    op = getattr(torch.ops.hf_vtc, case.op)
    try:
        with torch.no_grad():
            results = _flat(op(*arguments))
    except Exception as error:
        return "refused", f"{type(error).__name__}: {error}"
    if any(result.device.type != "cpu" for result in results):
        return "right", "a result without data"
    try:
        fresh = [_afresh(each) for each in arguments]
    except RuntimeError:
        return "right", "too large for a copy"
    try:
        again = _flat(op(*fresh))
        promised = _flat(op(*(_afresh(each, "meta") for each in fresh)))
        for result, expected, shape in zip(results, again, promised, strict=True):
            assert (result.shape, result.dtype) == (shape.shape, shape.dtype), (result.shape, shape.shape)
            close = TOLERANCES.get(result.dtype, {"rtol": 0, "atol": 0})
            torch.testing.assert_close(result, expected, **close, equal_nan=True)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    return "right", ""


def outcomes_of(cases: list[Case]) -> Iterator[tuple[str, str]]:
    """`_run` of each case in a process forked for them; the case after a trap or a crash gets another."""
    while cases:
        with tempfile.TemporaryFile("w+") as errors:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.dup2(errors.fileno(), 2)
                with open(writer, "w") as pipe:
                    for case in cases:
                        signal.alarm(SECONDS_PER_CASE)
                        print(json.dumps(_run(case)), file=pipe, flush=True)
                os._exit(0)
            os.close(writer)
            finished = 0
            with open(reader) as pipe:
                for line in pipe:
                    finished += 1
                    yield tuple(json.loads(line))
            _, status = os.waitpid(child, 0)
            errors.seek(0)
            said = errors.read()[-3000:]
        cases = cases[finished:]
        if status == 0:
            return
        hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        yield "trapped" if "hostsim: trap" in said else "hung" if hung else "crashed", said
        cases = cases[1:]


def unexpected(answers: str, traps: bool) -> list[str]:
    """Of what `main` printed, every case that did not end as it should, or did not end."""
    outcomes = {answer["name"]: answer for answer in map(json.loads, answers.splitlines())}
    faults = []
    for case in (*NAMED, *drawn()):
        outcome, said = (outcomes[case.name][key] for key in ("outcome", "said"))
        if case.refused is None:
            fine = outcome in ("refused", "right") or (traps and outcome == "trapped")
        elif traps and case.by_values:
            fine = outcome == "trapped"
        else:
            fine = outcome == "refused" and re.search(case.refused, said) is not None
        if not fine:
            faults.append(f"{case.name}: {outcome}, {said}")
    return faults


def main() -> None:
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    # what is not written stays NaN, or the greatest integer
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    cases = [*NAMED, *drawn()]
    for case, (outcome, said) in zip(cases, outcomes_of(cases), strict=True):
        print(json.dumps({"name": case.name, "outcome": outcome, "said": said}), flush=True)


if __name__ == "__main__":
    from hf_vtc.models import kernels_vtc  # noqa: F401 (defines the ops)

    main()
