"""Time and memory to the first token: a method at its budgets, its oracle, and plain transformers.

The oracle is `hf_vtc.report`'s: the same tower, the connectors that were needed, and the stock language model on
embeddings that are packed already. AVG-LLaVA's router reads all granularities at the width of the decoder, whoever
implements it: under `"auto"` its oracle also does the router's matrix products, as released, and nothing else of it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_vtc.report.measured import ONE_TOKEN, Oracle

from .cases import build, inputs_of_plain, plain_of, prompts, shape_of
from .rounds import Limits, Rounds, peak_bytes, take_turns

# largest difference of logits to the largest logit
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class DifferentOutputs(RuntimeError):
    """What is compared does not compute the same."""


class Compared(NamedTuple):
    """One budget: what it keeps, and its oracle."""

    budget: Any
    kept: int
    oracle: Oracle
    beside: Callable[[], None]


def require_equal(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """How far two tensors are apart, as a share of the largest value.

    Raises:
        DifferentOutputs: too far.
    """
    expected = expected.float()
    apart = float((found.float() - expected).abs().max() / expected.abs().max())
    # NaN is not equal to anything
    if not apart <= tolerance:
        raise DifferentOutputs(
            f"{what}: apart by {apart:.1e} of the largest value, at most {tolerance:.0e} is allowed."
        )
    return apart


def arguments_of(module: nn.Module, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[tuple, dict]:
    """What a module of the router is called with under `"auto"`."""
    given = []
    handle = module.register_forward_pre_hook(lambda _, *arguments: given.append(arguments), with_kwargs=True)
    try:
        model(**inputs, vtc_budget="auto", logits_to_keep=1)
    finally:
        handle.remove()
    return given[0]


def router_alone(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
    """The router on what it reads of these inputs."""
    router = model.model.router
    args, kwargs = arguments_of(router, model, inputs)
    return lambda: router(*args, **kwargs)


def released_products(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """The matrix products of AVG-LLaVA's router as released, on memory that is there already."""
    router, config = model.model.router, model.config
    heads, num_choices = config.router_num_heads, len(config.vis_token_granularity)
    (states, members), _ = arguments_of(router.merger, model, inputs)
    width, num_rows = states.shape[-1], states[..., 0].numel()
    places = {"dtype": model.dtype, "device": model.device}
    rows, square = torch.randn(num_rows, width, **places), torch.randn(width, width, **places)
    votes, out = torch.randn(width, num_choices, **places), torch.empty(num_rows, width, **places)
    last = torch.empty(num_rows, num_choices, **places)
    if states.ndim == 2:
        # attention within images that are grids
        attended = [(heads, length) for length in members]
    else:
        # of the tiles at each place, or of the places of each tile
        num_tiles, length = states.shape[:2]
        attended = [(length * heads, num_tiles) if router.merger.across_tiles else (num_tiles * heads, length)]
    queries = [torch.randn(*shape, width // heads, **places) for shape in attended]
    scores = [torch.empty(*shape, shape[1], **places) for shape in attended]
    mixed = [torch.empty_like(each) for each in queries]

    def run() -> None:
        # queries, keys, values, output, two of the feed-forward, and the first of the two layers that vote
        for _ in range(7):
            torch.mm(rows, square, out=out)
        torch.mm(rows, votes, out=last)
        for query, score, result in zip(queries, scores, mixed):
            torch.bmm(query, query.transpose(1, 2), out=score)
            torch.bmm(score, query, out=result)

    return run


def compared_budgets(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], budgets: Sequence[Any]
) -> tuple[list[Compared], dict[Any, str]]:
    """The budgets that differ from each other, and why others are left out.

    Raises:
        DifferentOutputs: model and oracle do not agree.
    """
    found, left_out, seen = [], {}, {}
    for budget in budgets:
        try:
            out = model(**inputs, vtc_budget=budget, logits_to_keep=1)
        except ValueError as refusal:
            left_out[budget] = f"refused: {str(refusal).split('.')[0]}"
            continue
        kept, routed = tuple(out.num_visual_tokens.tolist()), out.router_logits is not None
        if (kept, routed) in seen:
            left_out[budget] = f"as {seen[kept, routed]}"
            continue
        seen[kept, routed] = budget
        oracle = Oracle(model, dict(inputs), budget)
        require_equal(f"{budget} and its oracle", out.logits[:, -1], oracle.logits()[:, -1], TOLERANCES[model.dtype])
        # at the width of the decoder
        routes = model.model.routes_by_text and routed
        beside = released_products(model, inputs) if routes else lambda: None
        found.append(Compared(budget, sum(kept), oracle, beside))
    return found, left_out


def variants_of(
    model: PreTrainedModel,
    plain: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    compared: Sequence[Compared],
) -> dict[str, Callable[[], Any]]:
    """What takes turns; `generate` where it has an oracle (`hf_vtc.report.bench` says where it has none)."""
    own = inputs_of_plain(plain, inputs, model)
    if any(each.oracle.replay is not None for each in compared):
        ours = functools.partial(model, **inputs, logits_to_keep=1, use_cache=True)
        variants = {"plain": lambda: plain(**own, logits_to_keep=1, use_cache=True)}
        oracles = {each.budget: each.oracle.forward for each in compared}
    else:
        ours = functools.partial(model.generate, **inputs, **ONE_TOKEN)
        variants = {"plain": lambda: plain.generate(**own, **ONE_TOKEN)}
        oracles = {each.budget: each.oracle.generate for each in compared}
    variants["full"] = lambda: ours(vtc_budget="full")
    for each in compared:
        variants[f"oracle {each.budget}"] = lambda each=each: (each.beside(), oracles[each.budget]())
        variants[str(each.budget)] = lambda each=each: ours(vtc_budget=each.budget)
    return variants


@torch.no_grad()
def measure(
    method: str,
    size: str,
    batch_size: int,
    dtype: torch.dtype,
    budgets: Sequence[Any],
    limits: Limits,
) -> list[dict[str, Any]]:
    """Rows of one method at one batch size, the first that of `"full"`.

    Raises:
        DifferentOutputs: plain transformers, model and oracle do not agree.
    """
    shape = shape_of(method, size)
    model = build(method, shape, dtype, limits.device)
    inputs, plain = prompts(model, shape, batch_size), plain_of(model)
    full = model(**inputs, vtc_budget="full", logits_to_keep=1)
    expected = plain(**inputs_of_plain(plain, inputs, model)).logits[:, -1]
    apart = require_equal("full and plain transformers", full.logits[:, -1], expected, TOLERANCES[dtype])
    compared, left_out = compared_budgets(model, inputs, budgets)
    variants = variants_of(model, plain, inputs, compared)
    pairs = [("plain", "full"), *((f"oracle {each.budget}", str(each.budget)) for each in compared)]
    if model.model.routes_by_text and "auto" in budgets:
        products = released_products(model, inputs)
        variants |= {"router's products": products, "router": router_alone(model, inputs)}
        pairs.append(("router", "router's products"))
    rounds = take_turns(variants, pairs, limits)
    memory = {name: peak_bytes(variants[name], limits.device) for name in variants}
    common = {
        "part": "first token",
        "method": method,
        "batch": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "reserved": int(full.num_visual_tokens.sum()),
        "rounds": len(rounds.seconds["full"]),
    }
    rows = [{**common, "budget": "full", "kept": common["reserved"], "apart": apart, **_figures(rounds, memory)}]
    for each in compared:
        own = {"budget": each.budget, "kept": each.kept, **_figures(rounds, memory, each.budget)}
        rows.append({**common, **own})
    if "router" in variants:
        rows[0]["router_to_its_products"] = vars(rounds.ratio("router", "router's products"))
    rows += [{**common, "budget": budget, "left_out": why} for budget, why in left_out.items()]
    return rows


def _figures(rounds: Rounds, memory: Mapping[str, int], budget: Any = None) -> dict[str, Any]:
    """Seconds, ratios and bytes of a budget, or of `"full"`, whose oracle is plain transformers."""
    name = "full" if budget is None else str(budget)
    oracle = "plain" if budget is None else f"oracle {budget}"
    figures = {
        "seconds": vars(rounds.spread(name)),
        "oracle_seconds": vars(rounds.spread(oracle)),
        "plain_seconds": vars(rounds.spread("plain")),
        "eta": vars(rounds.ratio(oracle, name)),
        "bytes": memory[name],
        "oracle_bytes": memory[oracle],
        "plain_bytes": memory["plain"],
        "over_plain": vars(rounds.ratio("plain", name)),
    }
    return figures
