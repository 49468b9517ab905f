"""Part c: five methods at 7B shapes: time to the first token, memory, decoding.

Held against the oracle of `hf_vtc.bench`, and against the plain model of transformers with the same weights.
"""

import functools
import importlib.util
import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_vtc
import hf_vtc.ops

from .models import METHODS, build, inputs_of, shape_of
from .work import Proof, reason_of

BUDGETS = ("auto", 0.25, 0.5, "full")
# of oracle / ours
GOAL = 0.95
_NEW_TOKENS = 16
# random weights in bfloat16, kernels of another shape: of the largest logit
PLAIN_TOLERANCE = 2e-2
_GREEDY = {"do_sample": False, "use_cache": True}


def run(proof: Proof) -> None:
    etas: list[float] = []
    ops = hf_vtc.ops.load(proof.device.type)
    proof.record("ops", "what runs", kind="plain PyTorch" if ops is None else "compiled")
    for method in METHODS:
        name = f"{method}, {attention_of('sdpa')}"
        proof.attempt("time to first token", name, functools.partial(measure, proof, method, etas), needs=20)
        summarise(proof, etas)
    if importlib.util.find_spec("flash_attn") is None:
        proof.skip("time to first token", "flash attention", "flash_attn is not installed")
    else:
        flash = functools.partial(measure_flash, proof, etas)
        proof.attempt("time to first token", "flash attention", flash, needs=15)
    summarise(proof, etas)


def summarise(proof: Proof, etas: list[float]) -> None:
    """The headline so far."""
    met = sum(eta >= GOAL for eta in etas)
    proof.headline(
        f"oracle / ours {min(etas):.3f} to {max(etas):.3f}, median {statistics.median(etas):.3f}, at least {GOAL} "
        f"in {met} of {len(etas)} rows"
        if etas
        else ""
    )


def attention_of(implementation: str) -> str:
    return {"sdpa": "SDPA", "flash_attention_2": "FlashAttention 2"}[implementation]


def measure(proof: Proof, method: str, etas: list[float]) -> None:
    """All rows of one method; the most telling ones first."""
    start = time.perf_counter()
    model = build(method, proof.device, proof.dtype, proof.dry)
    proof.synchronize()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = shape_of(method, proof.dry)
    proof.record(
        "models",
        method,
        parameters=parameters,
        tower=shape.vision["model_type"],
        decoder=shape.text["model_type"],
        decoder_layers=model.config.text_config.num_hidden_layers,
        build_seconds=round(time.perf_counter() - start, 1),
    )
    # a dry run needs each way once, one that a method refuses among them
    budgets_of = {2: ("auto", 0.25)} if proof.dry else {1: BUDGETS, 8: BUDGETS[:-1]}
    for batch_size, budgets in budgets_of.items():
        inputs = inputs_of(method, proof.dry, batch_size, proof.device, proof.dtype)
        for budget in budgets:
            work = functools.partial(first_token, proof, model, method, inputs, budget, etas)
            proof.attempt("time to first token", f"{method}, batch {batch_size}, {budget}", work, needs=4)
        for budget in budgets[:1] if proof.dry else ("auto", "full"):
            work = functools.partial(decode, proof, model, method, inputs, budget)
            proof.attempt("decoding", f"{method}, batch {batch_size}, {budget}", work, needs=4)
    proof.attempt("plain transformers", method, functools.partial(against_plain, proof, model, method), needs=6)


def measure_flash(proof: Proof, etas: list[float]) -> None:
    """The method with the longest prompts, with FlashAttention."""
    attention = "flash_attention_2"
    model = build("avg_llava", proof.device, proof.dtype, proof.dry, attention=attention)
    inputs = inputs_of("avg_llava", proof.dry, 1, proof.device, proof.dtype)
    for budget in ("auto", "full"):
        first_token(proof, model, f"avg_llava, {attention_of(attention)}", inputs, budget, etas)


def first_token(
    proof: Proof, model: PreTrainedModel, method: str, inputs: dict[str, Any], budget: Any, etas: list[float]
) -> None:
    """One row: full, ours and oracle in turns, and the memory of the whole call."""
    batch_size = len(inputs["input_ids"])
    name = f"{method}, batch {batch_size}, {budget}"
    rounds = 1 if proof.dry else 5 if batch_size == 1 else 2
    try:
        report = hf_vtc.bench(model, inputs, budget, repeats=rounds, warmup=int(not proof.dry))
    except ValueError as refusal:
        # some methods have few counts to choose from
        return proof.skip("time to first token", name, reason_of(refusal))
    peak, weights = proof.peak_gib(lambda: model.generate(**inputs, vtc_budget=budget, max_new_tokens=1, **_GREEDY))
    if not proof.dry:
        etas.append(report.paired_eta)
    proof.record(
        "time to first token",
        name,
        tokens=f"{sum(report.num_kept)} of {sum(report.num_reserved)}",
        ours_ms=round(1e3 * report.measured.median, 2),
        p90_ms=round(1e3 * report.measured.p90, 2),
        oracle_ms=round(1e3 * report.oracle.median, 2),
        full_ms=round(1e3 * report.full.median, 2),
        eta=round(report.paired_eta, 3),
        # a tiny model on a CPU has nothing to meet
        meets_goal=None if proof.dry else report.paired_eta >= GOAL,
        speedup=round(report.speedup, 2),
        ideal_speedup=round(report.ideal_speedup, 2),
        phi=None if report.phi is None else round(report.phi, 2),
        peak_gib=peak,
        weights_gib=weights,
        entry=report.environment["entry"],
    )
    return None


def decode(proof: Proof, model: PreTrainedModel, method: str, inputs: dict[str, Any], budget: Any) -> None:
    """Tokens per second behind the first, and the memory of it all."""
    new_tokens = 4 if proof.dry else _NEW_TOKENS

    def answer(length: int) -> torch.Tensor:
        return model.generate(**inputs, vtc_budget=budget, max_new_tokens=length, **_GREEDY)

    # which warms up what comes next
    peak, _ = proof.peak_gib(lambda: answer(1 + new_tokens))
    first = proof.seconds(lambda: answer(1), repeats=2, warmup=0)
    all_seconds = proof.seconds(lambda: answer(1 + new_tokens), repeats=1, warmup=0)
    batch_size = len(inputs["input_ids"])
    per_token = (all_seconds - first) / new_tokens
    proof.record(
        "decoding",
        f"{method}, batch {batch_size}, {budget}",
        tokens_per_second=round(batch_size / per_token, 1) if per_token > 0 else None,
        ms_per_token=round(1e3 * per_token, 3),
        peak_gib=peak,
    )


def against_plain(proof: Proof, model: PreTrainedModel, method: str) -> None:
    """`"full"` against the stock model of transformers with the same weights, in turns."""
    # the tests know which model that is
    from factories import stock_inputs, uncompressed

    inputs = inputs_of(method, proof.dry, 1, proof.device, proof.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(proof.dtype)
    try:
        with torch.device(proof.device):
            stock = uncompressed(model)
    finally:
        torch.set_default_dtype(before)
    # rotary frequencies stay in float32
    stock = stock.to(proof.device).eval()
    if hasattr(stock, "generation_config"):
        stock.generation_config = model.generation_config
    own = stock_inputs(stock, inputs)
    with torch.no_grad():
        expected = stock(**own).logits[:, -1].float()
        found = model(**inputs, vtc_budget="full").logits[:, -1].float()
    apart = float((found - expected).abs().max() / expected.abs().max())
    variants = {
        "ours": lambda: model.generate(**inputs, vtc_budget="full", max_new_tokens=1, **_GREEDY),
        "plain": lambda: stock.generate(**own, max_new_tokens=1, **_GREEDY),
        "auto": lambda: model.generate(**inputs, vtc_budget="auto", max_new_tokens=1, **_GREEDY),
    }
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(1 if proof.dry else 5):
        for name, variant in variants.items():
            seconds = proof.seconds(variant, repeats=1, warmup=int(turn == 0))
            taken[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    proof.record(
        "plain transformers",
        method,
        # NaN is not equal to anything
        ok=apart <= PLAIN_TOLERANCE,
        logits_to_largest=apart,
        bit_equal=bool(torch.equal(found, expected)),
        plain_ms=round(1e3 * medians["plain"], 2),
        ours_full_ms=round(1e3 * medians["ours"], 2),
        ours_auto_ms=round(1e3 * medians["auto"], 2),
        plain_to_ours_full=round(medians["plain"] / medians["ours"], 3),
    )
