"""Part d: how many kernels, copies and synchronisations a prefill and a decoded token take, and where Python waits."""

import functools
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .models import METHODS, build, inputs_of
from .work import Proof

# what is counted, per layer alike: a shallow decoder leaves time for all methods
NUM_LAYERS = 8
_NEW_TOKENS = 8
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_GREEDY = {"do_sample": False, "use_cache": True}

Call = Callable[[], Any]


def run(proof: Proof) -> None:
    for method in METHODS:
        proof.attempt("per prefill", method, functools.partial(count, proof, method), needs=5)
    proof.headline()


def events_of(trace: dict[str, Any]) -> Counter:
    """Kernels, copies by direction, memory that is set, and waits of the host, in a trace of torch.profiler."""
    counts: Counter = Counter()
    for event in trace["traceEvents"]:
        kind, name = event.get("cat"), event.get("name", "")
        if kind == "kernel":
            counts["kernels"] += 1
        elif kind == "gpu_memset":
            counts["memsets"] += 1
        elif kind == "gpu_memcpy":
            counts["to_device" if "HtoD" in name else "to_host" if "DtoH" in name else "on_device"] += 1
        elif kind in ("cuda_runtime", "cuda_driver") and name in _WAITS:
            counts["waits"] += 1
        elif kind == "cpu_op":
            counts["cpu_ops"] += 1
    return counts


def profiled(proof: Proof, call: Call) -> Counter:
    """Events of one call; the profiler's own are in those of an empty one, too."""
    activities = [ProfilerActivity.CPU]
    if proof.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    proof.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with profile(activities=activities) as recorded:
            call()
            proof.synchronize()
        recorded.export_chrome_trace(str(file))
        return events_of(json.loads(file.read_text(encoding="utf-8")))


def waiting_places(proof: Proof, call: Call) -> Counter:
    """Lines of Python in which the host waits for the device."""
    if proof.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        if proof.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return places_of(caught)


def places_of(caught: list[warnings.WarningMessage]) -> Counter:
    """File and line of each warning about a synchronising operation."""
    waits = [each for each in caught if "synchronizing" in str(each.message)]
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waits)


def count(proof: Proof, method: str) -> None:
    """Rows of one method at batch 1: compressed, and uncompressed for comparison."""
    model = build(method, proof.device, proof.dtype, proof.dry, NUM_LAYERS)
    inputs = inputs_of(method, proof.dry, 1, proof.device, proof.dtype)

    def answer(budget: Any, length: int) -> Call:
        return lambda: model.generate(**inputs, vtc_budget=budget, max_new_tokens=length, **_GREEDY)

    own = profiled(proof, lambda: None)
    for budget in ("auto", "full"):
        # what is compiled or tuned at first use is no part of a prefill
        answer(budget, 1 + _NEW_TOKENS)()
        first = profiled(proof, answer(budget, 1))
        all_tokens = profiled(proof, answer(budget, 1 + _NEW_TOKENS))
        name = f"{method}, {budget}"
        layers = model.config.text_config.num_hidden_layers
        per_token = {key: round((all_tokens[key] - first[key]) / _NEW_TOKENS, 2) for key in all_tokens | first}
        proof.record("per prefill", name, decoder_layers=layers, **_without(first, own))
        proof.record("per decoded token", name, decoder_layers=layers, **per_token)
        places = waiting_places(proof, answer(budget, 1))
        proof.record("where a prefill waits for the device", name, waits=sum(places.values()), places=dict(places))


def _without(counts: Counter, own: Counter) -> dict[str, int]:
    return {key: max(0, counts[key] - own[key]) for key in counts}
