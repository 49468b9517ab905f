"""Batches and budgets that tests of the contracts share."""

import torch
from factories import budgets_of, random_batch
from torch import nn

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def batch_of(model, seed, **kwargs):
    return random_batch(model.config, torch.Generator().manual_seed(seed), **kwargs)


def some_budget(model):
    """A budget that every image of the tiny model can meet, and that compresses if the method can."""
    return budgets_of(model.config)[0]


def resolved(budget, model):
    return some_budget(model) if budget == "some" else budget


def settled(model, batch, budget):
    """What fixes which visual tokens stay, whatever text comes behind: the budget, or what it made of this batch."""
    if "pixel_values" not in batch:
        return {}
    # an answer behind the question is text that such a router reads too
    by_text = model.model.routes_by_text and budget == "auto"
    if budget == "full" or model.model.budgets_settle and not by_text:
        return {"vtc_budget": budget}
    with torch.no_grad():
        return {"router_decisions": model(**batch, vtc_budget=budget).router_decisions}


def first_part(tower):
    """What looks at the pixels."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    return next(module for module in tower.modules() if isinstance(module, kinds))
