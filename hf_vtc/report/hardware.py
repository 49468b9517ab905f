"""What a call runs on: arithmetic and bandwidth of cards by name, from their data sheets, and of this machine's CPU,
measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """What the ideal time of a call depends on.

    Args:
        name (`str`): in words.
        peak_flops (`float`): FLOP/s of a dense matrix product.
        bandwidth (`float`): bytes/s from memory.
        bytes_per_value (`int`): of weights and KV cache.
    """

    name: str
    peak_flops: float
    bandwidth: float
    bytes_per_value: int = 2

    def __str__(self) -> str:
        return f"{self.name}, {_per_second(self.peak_flops, 'FLOP')}, {_per_second(self.bandwidth, 'B')}"


CARDS = {
    "h100": Hardware("NVIDIA H100 SXM, dense bfloat16", 989e12, 3.35e12),
    "a100": Hardware("NVIDIA A100 SXM 80 GB, dense bfloat16", 312e12, 2.039e12),
    "l4": Hardware("NVIDIA L4, dense bfloat16", 121e12, 300e9),
    "rtx4090": Hardware("NVIDIA RTX 4090, dense bfloat16", 165.2e12, 1.008e12),
}
"""By the name that `--gpu` takes; figures of the makers' data sheets, without sparsity."""

HARDWARE_NAMES = (*CARDS, "cpu")
# of the sides of square matrices whose product is timed, and values that are read; enough to be far from any cache
_SIDE, _VALUES, _SECONDS = 1536, 32 * 2**20, 0.3


def hardware_named(name: str) -> Hardware:
    """A card by its name, or with `"cpu"` this machine's CPU, measured now in about a second.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "cpu":
        return _this_cpu()
    if name not in CARDS:
        raise ValueError(f"`gpu` must be one of {', '.join(HARDWARE_NAMES)}, got {name!r}.")
    return CARDS[name]


def _this_cpu() -> Hardware:
    square, values = torch.ones(_SIDE, _SIDE), torch.ones(_VALUES)
    flops = 2 * _SIDE**3 / _fastest(lambda: square @ square)
    bandwidth = values.numel() * values.element_size() / _fastest(values.sum)
    threads = torch.get_num_threads()
    name = f"this machine's CPU with {threads} thread{'s' * (threads > 1)} in float32, as measured now"
    return Hardware(name, flops, bandwidth, bytes_per_value=4)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, the first of which does not count."""
    run()
    seconds, end = [], time.perf_counter() + _SECONDS
    while not seconds or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _per_second(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}/s"
    return f"{value / 1e6:.4g} M{unit}/s"
