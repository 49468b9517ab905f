"""Part f: the decoder under torch.compile and CUDA graphs, with prompts rounded up to few lengths.

A compressed prompt is short, and launching kernels from Python then takes longer than running them. Prompts get tokens
on the right, which no earlier one sees in a causal decoder, so that few lengths have to be compiled or captured.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from .models import build, inputs_of
from .work import Proof

METHOD = "avg_llava"
# of prompts that compression left over, in tokens; and what they are rounded up to
LENGTHS, BUCKET = (68, 100, 130, 212, 250, 410, 500), 128
# for generate with a static cache, whose whole forward pass is compiled
NUM_LAYERS = 8
_NEW_TOKENS = 48
# bfloat16, and kernels for another length: of the largest state
TOLERANCE = 3e-2

Prefill = Callable[[torch.Tensor], torch.Tensor]


def run(proof: Proof) -> None:
    gains = proof.attempt("prefill of the decoder", "all", functools.partial(prefills, proof), needs=15) or {}
    proof.attempt("decoding with a static cache", "all", functools.partial(static_cache, proof), needs=15)
    proof.headline(", ".join(f"{name} {gain:.2f}x over eager" for name, gain in gains.items()))


def bucket_of(length: int, bucket: int) -> int:
    return -(-length // bucket) * bucket


def padded(embeds: torch.Tensor, length: int) -> torch.Tensor:
    """Embeddings `(1, L, D)` with zeros on the right, up to a length."""
    return torch.nn.functional.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


class Graphed:
    """A CUDA graph per bucket, captured when the bucket is first asked for."""

    def __init__(self, decoder: torch.nn.Module):
        self.decoder = decoder
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, embeds: torch.Tensor) -> torch.Tensor:
        length = embeds.shape[1]
        if length not in self.graphs:
            self.graphs[length] = self._capture(embeds)
        graph, given, states = self.graphs[length]
        given.copy_(embeds)
        graph.replay()
        return states

    def _capture(self, embeds: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        given = embeds.clone()
        # what libraries set up at first use cannot be captured
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                states_of(self.decoder, given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = states_of(self.decoder, given)
        return graph, given, states


def states_of(decoder: torch.nn.Module, embeds: torch.Tensor) -> torch.Tensor:
    """Last hidden states of a causal decoder, layer by layer, without a mask.

    transformers would build one while a graph is captured, for which there is only a slower attention.
    """
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    rotary = decoder.rotary_emb(embeds, positions)
    for layer in decoder.layers:
        embeds = layer(embeds, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return decoder.norm(embeds)


def num_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def prefills(proof: Proof) -> dict[str, float]:
    """Each way of running the whole decoder against eager PyTorch at the exact length; returns the mean gains."""
    decoder = build(METHOD, proof.device, proof.dtype, proof.dry).model.language_model
    lengths, bucket = ((5, 9, 16), 8) if proof.dry else (LENGTHS, BUCKET)
    width = decoder.config.hidden_size
    prompts = [torch.randn(1, length, width, device=proof.device, dtype=proof.dtype) for length in lengths]
    eager = functools.partial(states_of, decoder)
    expected = [eager(prompt) for prompt in prompts]
    base = [proof.seconds(functools.partial(eager, prompt), 10, 2) for prompt in prompts]
    gains: dict[str, float] = {}

    def compare(name: str, prefill: Prefill) -> None:
        gain = proof.attempt(
            "prefill of the decoder", name, lambda: _compare(proof, name, prefill, prompts, expected, base, bucket)
        )
        if gain is not None:
            gains[name] = gain

    compare("eager, bucketed", eager)
    if not proof.dry:
        compare("CUDA graph, bucketed", Graphed(decoder))
    # layer by layer: one graph serves all layers of a length
    for layer in decoder.layers:
        layer.compile(backend="eager" if proof.dry else "inductor", dynamic=False)
    compare("torch.compile, bucketed", eager)
    if not proof.dry:
        compare("torch.compile in a CUDA graph, bucketed", Graphed(decoder))
    return gains


def _compare(
    proof: Proof,
    name: str,
    prefill: Prefill,
    prompts: list[torch.Tensor],
    expected: list[torch.Tensor],
    base: list[float],
    bucket: int,
) -> float:
    """Rows of one way; returns the mean gain over eager PyTorch."""
    graphs = num_graphs()
    ratios, apart = [], 0.0
    for prompt, states, eager_seconds in zip(prompts, expected, base, strict=True):
        length = prompt.shape[1]
        given = padded(prompt, bucket_of(length, bucket))
        found = prefill(given)[:, :length]
        apart = max(apart, float((found - states).float().abs().max() / states.float().abs().max()))
        seconds = proof.seconds(functools.partial(prefill, given), 10, 1)
        ratios.append(eager_seconds / seconds)
        proof.record(
            "prefill of the decoder, by length",
            name,
            tokens=length,
            bucket=given.shape[1],
            milliseconds=round(1e3 * seconds, 3),
            eager_ms=round(1e3 * eager_seconds, 3),
            gain=round(ratios[-1], 2),
        )
    compiled = num_graphs() - graphs
    # other lengths of the same buckets must find everything made
    for prompt in prompts:
        prefill(padded(prompt[:, :-1], bucket_of(prompt.shape[1], bucket)))
    again = num_graphs() - graphs - compiled
    proof.record(
        "prefill of the decoder",
        name,
        ok=apart <= TOLERANCE and again == 0,
        mean_gain=round(statistics.mean(ratios), 2),
        states_to_largest=apart,
        graphs_compiled=compiled,
        recompiled_for_other_lengths=again,
    )
    return statistics.mean(ratios)


def static_cache(proof: Proof) -> None:
    """`generate` with a static cache, which transformers compiles on a GPU, against the ordinary cache."""
    model = build(METHOD, proof.device, proof.dtype, proof.dry, NUM_LAYERS)
    inputs = inputs_of(METHOD, proof.dry, 1, proof.device, proof.dtype)
    new_tokens = 4 if proof.dry else _NEW_TOKENS

    def answer(length: int = new_tokens, **cache: Any) -> torch.Tensor:
        return model.generate(**inputs, vtc_budget=0.25, max_new_tokens=length, do_sample=False, **cache)

    rows: dict[str, float] = {}
    expected = None
    for name, cache in (("dynamic", {}), ("static", {"cache_implementation": "static"})):
        graphs = num_graphs()
        found = answer(**cache)
        compiled = num_graphs() - graphs
        repeats = 1 if proof.dry else 3
        seconds = proof.seconds(functools.partial(answer, **cache), repeats, warmup=int(not proof.dry))
        first = proof.seconds(functools.partial(answer, 1, **cache), repeats, warmup=int(not proof.dry))
        rows[name] = (seconds - first) / (new_tokens - 1)
        expected = found if expected is None else expected
        proof.record(
            "decoding with a static cache",
            name,
            decoder_layers=model.config.text_config.num_hidden_layers,
            ms_per_token=round(1e3 * rows[name], 3),
            gain=round(rows["dynamic"] / rows[name], 2) if rows[name] > 0 else None,
            ids_equal=int((found == expected).sum()) - inputs["input_ids"].shape[1],
            new_tokens=new_tokens,
            graphs_compiled=compiled,
            recompiled_when_repeated=num_graphs() - graphs - compiled,
        )
