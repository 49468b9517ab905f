"""How fast the compiled ops are, against eager PyTorch, torch.compile and the bandwidth of a copy.

    python examples/benchmark_ops.py
    OMP_NUM_THREADS=2 python examples/benchmark_ops.py --repeats 40 --json

Sizes are those of real models: visual tokens of five tiles, a batch of four packed prompts of a 7B model, twelve tiles
of InternVL. All candidates take turns in one run, so that a machine that slows down slows all of them: what counts are
the ratios, medians over turns. Every candidate is checked against float64 first, and nothing is printed if one is
wrong. Bytes are those that no implementation can avoid: inputs read once, outputs written once.
"""

import argparse
import ctypes
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# relative to the largest value: eager forms round intermediate results to the dtype, several times
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GOAL, FLOOR = 1.5, 0.95
DEFAULT_REPEATS = 20
# written before each call on a GPU: more than its caches hold, and long enough for Python to queue the call behind it
_FLUSHED_BYTES = 1 << 30

Tensors = list[torch.Tensor]
Form = Callable[[], Tensors]


@dataclass
class Problem:
    """One op at one size.

    `ours` runs the compiled op, `reference` is what torch.compile gets, `eager` are the forms of eager PyTorch by
    name, `exact` what all of them should give, in float64; `num_bytes` is what has to be moved.
    """

    ours: Form
    reference: Form
    eager: dict[str, Form]
    exact: Form
    num_bytes: int


@dataclass
class Row:
    """What was measured: milliseconds are medians, `speedup` the time of each candidate as a multiple of ours."""

    op: str
    size: str
    dtype: str
    milliseconds: float
    gigabytes_per_second: float
    of_copy: float
    speedup: dict[str, float] = field(default_factory=dict)
    best_eager: str = ""
    over_best_eager: float = 0.0


def size_in_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def segment_mean_problem(dtype: torch.dtype, device: str, batch_size: int, length: int, visual: int) -> Problem:
    """LLaVolta: in each row `visual` tokens become a quarter of them by means of four, the text is copied."""
    width, stride = 4096, 4
    x = torch.randn(batch_size * length, width, device=device, dtype=dtype)
    starts, text = torch.arange(batch_size) * length, (length - visual) // 2
    own = [torch.arange(text), torch.arange(text, text + visual), torch.arange(text + visual, length)]
    index = torch.cat([start + torch.cat(own) for start in starts])
    lengths = torch.cat([torch.ones(text), torch.full((visual // stride,), stride), torch.ones(len(own[2]))]).long()
    offsets = F.pad(lengths.repeat(batch_size).cumsum(0), (1, 0)).to(device)
    windows = torch.cat([start + own[1].reshape(-1, stride) for start in starts]).to(device)
    kept = torch.cat([start + torch.cat([own[0], own[1][::stride], own[2]]) for start in starts]).to(device)
    index = index.to(device)

    def fill_and_gather() -> Tensors:
        means = x.index_select(0, windows.flatten()).unflatten(0, windows.shape).mean(1)
        return [x.index_copy(0, windows[:, 0], means).index_select(0, kept)]

    def index_add() -> Tensors:
        segments = torch.repeat_interleave(torch.arange(len(kept), device=device), offsets.diff())
        totals = torch.zeros(len(kept), width, device=device, dtype=torch.float32)
        totals.index_add_(0, segments, x.index_select(0, index).float())
        return [(totals / offsets.diff()[:, None]).to(dtype)]

    return Problem(
        ours=lambda: [segment_mean(x, index, offsets)],
        reference=fill_and_gather,
        eager={
            "embedding_bag": lambda: [segment_mean_reference(x, index, offsets)],
            "mean, fill, gather": fill_and_gather,
            "index_add": index_add,
        },
        exact=lambda: [segment_mean_reference(x.double(), index, offsets)],
        num_bytes=size_in_bytes(x, index, offsets) + len(kept) * width * x.element_size(),
    )


def unshuffle_layernorm_problem(dtype: torch.dtype, device: str, num_tiles: int, side: int, width: int) -> Problem:
    """ViCO: some tiles folded 2 x 2, the others 4 x 4."""
    features = torch.randn(num_tiles, side * side, width, device=device, dtype=dtype)
    order = torch.randperm(num_tiles).to(device)
    routed = [(2, order[: num_tiles // 2].sort().values), (4, order[num_tiles // 2 :].sort().values)]
    affine = {f: [torch.randn(f * f * width, device=device, dtype=dtype) for _ in range(2)] for f, _ in routed}

    def gather_rows() -> Tensors:
        """The folding as a gather of rows, whose index is a plan and free of charge."""
        outputs = []
        for factor, tiles in routed:
            rows = features.flatten(0, 1).index_select(0, plans[factor])
            rows = rows.reshape(len(tiles), -1, factor * factor * width)
            outputs.append(F.layer_norm(rows, rows.shape[-1:], *affine[factor], 1e-5))
        return outputs

    plans = {}
    for factor, tiles in routed:
        grid = torch.arange(num_tiles * side * side, device=device).reshape(num_tiles, side, side)[tiles]
        small = side // factor
        plans[factor] = grid.reshape(-1, small, factor, small, factor).transpose(2, 3).flatten()

    def each(function: Callable, convert: Callable = lambda tensor: tensor) -> Tensors:
        inputs = convert(features)
        return [function(inputs, factor, *map(convert, affine[factor]), 1e-5, tiles=tiles) for factor, tiles in routed]

    return Problem(
        ours=lambda: each(unshuffle_layernorm),
        reference=lambda: each(unshuffle_layernorm_reference),
        eager={"index, permute, layer_norm": lambda: each(unshuffle_layernorm_reference), "gather rows": gather_rows},
        exact=lambda: each(unshuffle_layernorm_reference, torch.Tensor.double),
        num_bytes=2 * size_in_bytes(features),
    )


def pool_pyramid_problem(dtype: torch.dtype, device: str, num_tiles: int, side: int, width: int) -> Problem:
    """AVG-LLaVA: five granularities for the router."""
    features = torch.randn(num_tiles, side * side, width, device=device, dtype=dtype)
    scales = [side * side >> level for level in range(5)]

    def halve_in_turns() -> Tensors:
        grid, levels = features.unflatten(1, (side, side)), [features]
        for level in range(4):
            grid = grid.unflatten(1 + (level + 1) % 2, (-1, 2)).mean(2 + (level + 1) % 2)
            levels.append(grid.flatten(1, 2))
        return levels

    def avg_pool2d() -> Tensors:
        grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        kernels = [(1, 2), (2, 2), (2, 4), (4, 4)]
        return [features, *(F.avg_pool2d(grid, kernel).permute(0, 2, 3, 1).flatten(1, 2) for kernel in kernels)]

    return Problem(
        ours=lambda: pool_pyramid(features, scales),
        reference=lambda: pool_pyramid_reference(features, scales),
        eager={
            "means of blocks": lambda: pool_pyramid_reference(features, scales),
            "halve in turns": halve_in_turns,
            "avg_pool2d": avg_pool2d,
        },
        exact=lambda: pool_pyramid_reference(features.double(), scales),
        num_bytes=size_in_bytes(features) * 31 // 16,
    )


def assign_segment_mean_problem(
    dtype: torch.dtype, device: str, num_tiles: int, rows: int, width: int, groups: int
) -> Problem:
    """VisToG: every patch into its best group, and the mean of each group."""
    logits = torch.randn(num_tiles, groups, rows, device=device)
    values = torch.randn(num_tiles, rows, width, device=device, dtype=dtype)
    first = torch.arange(num_tiles, device=device)[:, None] * groups

    def index_add() -> Tensors:
        group_idx = logits.argmax(1)
        slots = (group_idx + first).flatten()
        totals = torch.zeros(num_tiles * groups, width, device=device)
        totals.index_add_(0, slots, values.flatten(0, 1).float())
        counts = torch.bincount(slots, minlength=num_tiles * groups)
        return [(totals / (counts[:, None] + 1e-6)).to(dtype).unflatten(0, (num_tiles, groups)), group_idx]

    def scatter_reduce() -> Tensors:
        group_idx = logits.argmax(1)
        means = torch.zeros(num_tiles, groups, width, device=device, dtype=dtype)
        index = group_idx[..., None].expand(-1, -1, width)
        return [means.scatter_reduce_(1, index, values, "mean", include_self=False), group_idx]

    def sort_and_embedding_bag() -> Tensors:
        group_idx = logits.argmax(1)
        slots, order = (group_idx + first).flatten().sort(stable=True)
        offsets = torch.searchsorted(slots, torch.arange(num_tiles * groups + 1, device=device))
        means = F.embedding_bag(order, values.flatten(0, 1), offsets, mode="mean", include_last_offset=True)
        return [means.unflatten(0, (num_tiles, groups)), group_idx]

    return Problem(
        ours=lambda: list(assign_segment_mean(logits, values)),
        reference=lambda: list(assign_segment_mean_reference(logits, values)),
        eager={
            "one-hot product": lambda: list(assign_segment_mean_reference(logits, values)),
            "index_add": index_add,
            "scatter_reduce": scatter_reduce,
            "sort, embedding_bag": sort_and_embedding_bag,
        },
        exact=lambda: list(assign_segment_mean_reference(logits, values.double())),
        num_bytes=size_in_bytes(logits, values) + num_tiles * (groups * width * values.element_size() + rows * 8),
    )


PROBLEMS: list[tuple[str, str, Callable[[torch.dtype, str], Problem]]] = [
    ("segment_mean", "4x3072x4096, stride 4", lambda *at: segment_mean_problem(*at, 4, 3072, 2304)),
    ("unshuffle_layernorm", "12x32x32x1024, 2x2 and 4x4", lambda *at: unshuffle_layernorm_problem(*at, 12, 32, 1024)),
    ("pool_pyramid", "5x576x1024", lambda *at: pool_pyramid_problem(*at, 5, 24, 1024)),
    ("pool_pyramid", "5x576x4096", lambda *at: pool_pyramid_problem(*at, 5, 24, 4096)),
    ("assign_segment_mean", "5x576x1024, 64 groups", lambda *at: assign_segment_mean_problem(*at, 5, 576, 1024, 64)),
    ("assign_segment_mean", "2880x1024, 256 groups", lambda *at: assign_segment_mean_problem(*at, 1, 2880, 1024, 256)),
    ("assign_segment_mean", "2880x4096, 256 groups", lambda *at: assign_segment_mean_problem(*at, 1, 2880, 4096, 256)),
]


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Time of one call, the device's work included.

    On a GPU it is the device's time, from empty caches: the call is queued while the device still writes elsewhere, so
    that what Python takes to launch kernels does not count, unless the call waits for the device itself.
    """
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flushed(device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _flushed(device: str) -> torch.Tensor:
    return torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)


def check(name: str, outputs: Tensors, exact: Tensors, dtype: torch.dtype) -> None:
    """End the run if a candidate is wrong: what it would have measured is worth nothing."""
    for output, expected in zip(outputs, exact, strict=True):
        error = (output.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not float(error) <= TOLERANCES[dtype]:
            sys.exit(f"{name} is wrong by {float(error):.2e} of the largest value in {dtype}; nothing was measured.")


def measure(op: str, size: str, dtype: torch.dtype, problem: Problem, options: argparse.Namespace) -> Row:
    """Let all candidates take turns."""
    candidates: dict[str, Form] = {"ours": problem.ours, **problem.eager}
    if not options.no_compile:
        torch._dynamo.reset()
        candidates["torch.compile"] = torch.compile(problem.reference)
    exact = problem.exact()
    for name, form in candidates.items():
        check(f"{op} ({name}, {size})", form(), exact, dtype)
    del exact

    # as much as a copy of what the op reads and writes: half of it is read
    source = torch.empty(problem.num_bytes // 2, dtype=torch.uint8, device=options.device).random_()
    target = torch.empty_like(source)
    candidates["copy"] = lambda: target.copy_(source)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(options.repeats + 2):
        for name, form in candidates.items():
            taken = milliseconds(form, options.device)
            # the first turns warm up
            if turn >= 2:
                times[name].append(taken)
    own = statistics.median(times["ours"])
    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(taken, times["ours"], strict=True))
        for name, taken in times.items()
        if name != "ours"
    }
    copy = ratios.pop("copy")
    best = min(problem.eager, key=ratios.__getitem__)
    return Row(op, size, str(dtype)[6:], own, problem.num_bytes / own / 1e6, copy, ratios, best, ratios[best])


def table_of(rows: list[Row]) -> Table:
    """The rows, with the best eager form and torch.compile as multiples of our time."""
    table = Table(pad_edge=False)
    for name in ("op", "size", "dtype", "ours", "GB/s", "of copy", "best eager", "", "torch.compile"):
        justify = "left" if name in ("op", "size", "dtype", "best eager") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        compiled = row.speedup.get("torch.compile")
        table.add_row(
            row.op,
            row.size,
            row.dtype,
            f"{row.milliseconds:.2f} ms",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.of_copy:.0%}",
            row.best_eager,
            f"{row.over_best_eager:.2f}x",
            "" if compiled is None else f"{compiled:.2f}x",
        )
    return table


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as it does in the long run, and map only what is larger than 32 MiB anew.

    Otherwise it gives memory back to the system now and then, and whoever comes next pays for getting it again: ratios
    of one and the same pair would differ by factors from run to run.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_THRESHOLD at its maximum, M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)
        mallopt(-1, 2**31 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the compiled ops.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument("--repeats", type=int, default=DEFAULT_REPEATS, help="turns that every candidate takes")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args()

    keep_freed_memory()
    rows = []
    with torch.no_grad(), compiled_ops(True):
        for op, size, build in PROBLEMS:
            for dtype in (DTYPES[name] for name in options.dtypes):
                if options.ops is None or op in options.ops:
                    torch.manual_seed(0)
                    rows.append(measure(op, size, dtype, build(dtype, options.device), options))
    fast = sum(row.over_best_eager >= GOAL for row in rows)
    slowest = min(row.over_best_eager for row in rows)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if options.json:
        facts = {"device": where, "torch": torch.__version__, "repeats": options.repeats}
        print(json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=2))
        return
    # wide enough for the table, also where the output is a file
    console = Console(width=150)
    console.print(table_of(rows))
    console.print(
        f"{where}, torch {torch.__version__}: {fast} of {len(rows)} rows at {GOAL}x or more over the best eager form, "
        f"the slowest {slowest:.2f}x (goals: three quarters, {FLOOR}x)"
    )


if __name__ == "__main__":
    main()
