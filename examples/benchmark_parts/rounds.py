"""Variants that take turns until a repeated run would agree, and the memory that one call takes."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# how far two runs may be apart, as a share of a ratio
AGREEMENT = 0.05
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60
# of 20 pairs of runs 19 are nearer than this many standard errors of their difference; the standard error of a median
# of n normal values is 1.2533 / sqrt(n) of their deviation, which is the distance of their quartiles / 1.349
_QUARTILES_TO_DIFFERENCE = 1.96 * 2**0.5 * 1.2533 / 1.349


def quantile(values: Iterable[float], share: float) -> float:
    """Between order statistics in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Spread:
    """Median, and the values that a tenth lie below and above."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), quantile(values, 0.1), quantile(values, 0.9))


@dataclass(frozen=True)
class Ratio(Spread):
    """A ratio of two variants, taken within each round.

    `repeat`: how far the median of a repeated run may be from this one, as a share of it, in 19 of 20 cases.
    """

    repeat: float = 0.0

    @classmethod
    def of(cls, values: list[float]) -> "Ratio":
        middle = statistics.median(values)
        quartiles = quantile(values, 0.75) - quantile(values, 0.25)
        repeat = _QUARTILES_TO_DIFFERENCE * quartiles / len(values) ** 0.5 / middle
        return cls(middle, quantile(values, 0.1), quantile(values, 0.9), repeat)

    @property
    def is_steady(self) -> bool:
        return self.repeat <= AGREEMENT

    def over(self, number: float) -> "Ratio":
        """The same, of all values divided by a number."""
        return Ratio(self.median / number, self.p10 / number, self.p90 / number, self.repeat)


@dataclass(frozen=True)
class Limits:
    """Where and how long variants take turns.

    Args:
        device (`torch.device`): that is waited for before and after each call.
        most_seconds (`float`): after which no round begins that is not one of the first `FEWEST_ROUNDS`.
        of_process (`bool`): count the seconds of this process on CPUs, and not those that pass: on a machine that has
            other work too they say what a call costs.
    """

    device: torch.device
    most_seconds: float
    of_process: bool = False

    def seconds_of(self, work: Callable[[], Any]) -> float:
        """Of one call, with all that it left to the device."""
        clock = time.process_time if self.of_process else time.perf_counter
        self._wait()
        start = clock()
        work()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@dataclass(frozen=True)
class Rounds:
    """Seconds of each variant, one entry per round."""

    seconds: dict[str, list[float]]

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, over: str, under: str) -> Ratio:
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return Ratio.of([one / other for one, other in pairs])


def take_turns(variants: Mapping[str, Callable[[], Any]], pairs: Iterable[tuple[str, str]], limits: Limits) -> Rounds:
    """Run all variants in turns, until every ratio of `pairs` is steady or the time is up.

    Variants that are compared should stand side by side: the order is turned around from round to round, so that they
    stay neighbours and neither always follows the other.

    Args:
        variants (`Mapping[str, Callable]`): what is measured, by name.
        pairs: names whose ratio must agree with that of a repeated run.
        limits ([`Limits`]): of all rounds together.
    """
    names, pairs, seconds = list(variants), list(pairs), {name: [] for name in variants}
    for name in names:
        variants[name]()
    begun = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for round_idx in range(MOST_ROUNDS):
            for name in names if round_idx % 2 == 0 else names[::-1]:
                seconds[name].append(limits.seconds_of(variants[name]))
            gc.collect()
            rounds = Rounds(seconds)
            steady = all(rounds.ratio(*pair).is_steady for pair in pairs)
            if round_idx + 1 >= FEWEST_ROUNDS and (steady or time.perf_counter() - begun > limits.most_seconds):
                break
    finally:
        gc.enable()
    return rounds


def multiplied(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products of a call, those of attention too, which is taken apart for it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that one call holds at once beyond those before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    # every allocation of torch, to the byte: what the process holds says more of its allocator than of the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
