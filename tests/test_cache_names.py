"""A cache has two names over the window of transformers, and callers may use either on every version."""

import functools
import warnings

import pytest
import torch
from contract_samples import settled
from factories import CONTRACTED, budgets_of, random_batch, tiny_model, uncompressed
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from hf_vtc.models.head_vtc import VtcCausalLMOutputWithPast, VtcModelOutputWithPast
from hf_vtc.models.host_vtc import CACHE_NAME, cache_of

NAMES = ("past_key_values", "cache")
GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}

pytestmark = pytest.mark.window


@pytest.fixture(scope="module", params=CONTRACTED)
def model(request):
    return tiny_model(request.param)


def batch_of(model, seed=51):
    return random_batch(model.config, torch.Generator().manual_seed(seed), num_rows=1, images_per_row=[1])


def filled_cache(model, batch, budget="full"):
    with torch.no_grad():
        return cache_of(model(**batch, vtc_budget=budget, use_cache=True))


@pytest.mark.parametrize("name", NAMES)
def test_forward_continues_a_cache_under_either_name(model, name):
    batch, step = batch_of(model), torch.tensor([[9]])
    whole = {**batch, "input_ids": torch.cat([batch["input_ids"], step], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    for part in (model, model.model):
        with torch.no_grad():
            cache = cache_of(part(**batch, vtc_budget="full", use_cache=True))
            out = part(input_ids=step, attention_mask=whole["attention_mask"], **{name: cache})
            expected = part(**whole, vtc_budget="full")
        torch.testing.assert_close(out[0][:, -1], expected[0][:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_checks_of_a_filled_cache_see_either_name(model, name):
    batch = batch_of(model)
    cache = filled_cache(model, batch)
    with pytest.raises(ValueError, match="filled cache"):
        model(**batch, **{name: cache})
    with pytest.raises(ValueError, match="holds"):
        model.generate(**batch, **GREEDY, vtc_budget="full", **{name: cache})


def test_two_caches_are_refused_and_one_under_both_names_is_not(model):
    batch = batch_of(model)
    cache = DynamicCache(config=model.config.text_config)
    with pytest.raises(ValueError, match="two names"):
        model(**batch, past_key_values=cache, cache=DynamicCache(config=model.config.text_config))
    with pytest.raises(ValueError, match="two names"):
        model.generate(**batch, past_key_values=cache, cache=DynamicCache(config=model.config.text_config))
    with torch.no_grad():
        assert cache_of(model(**batch, past_key_values=cache, cache=cache, use_cache=True)) is cache


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_a_cache_under_either_name(model, name):
    batch = batch_of(model)
    fixed = settled(model, batch, budgets_of(model.config)[0])
    first = model.generate(**batch, **GREEDY, **fixed, return_dict_in_generate=True)
    whole = {**batch, "input_ids": torch.cat([first.sequences, torch.tensor([[9, 11]])], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    expected = model.generate(**whole, **GREEDY, **fixed)
    again = model.generate(**whole, **GREEDY, **fixed, **{name: cache_of(first)})
    assert torch.equal(again, expected)


def test_outputs_are_the_hosts_own():
    assert issubclass(VtcModelOutputWithPast, BaseModelOutputWithPast)
    assert issubclass(VtcCausalLMOutputWithPast, CausalLMOutputWithPast)
    cache = DynamicCache()
    assert cache_of(VtcCausalLMOutputWithPast(**{CACHE_NAME: cache})) is cache


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a device to tell a number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def reads_per_step(model, monkeypatch, **inputs):
    """Reads of each forward pass of `generate`."""
    counts, forward = [], model.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        with HostReads() as reads:
            out = forward(*args, **kwargs)
        counts.append(reads.count)
        return out

    monkeypatch.setattr(model, "forward", counted)
    model.generate(**inputs, **GREEDY)
    return counts


def test_a_decoding_step_reads_no_more_than_a_stock_decoders(model, monkeypatch):
    # of the bases whose decoder is no model with a head of its own, the whole model
    whole = model.config.grid_base is not None
    stock = uncompressed(model) if whole else AutoModelForCausalLM.from_config(model.config.text_config).eval()
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = reads_per_step(stock, monkeypatch, **text)
    counts = reads_per_step(model, monkeypatch, **batch_of(model), vtc_budget=budgets_of(model.config)[0])
    assert len(counts) == GREEDY["max_new_tokens"]
    assert all(count <= most for count, most in zip(counts[1:], expected[1:], strict=True)), (counts, expected)


def test_nothing_warns_of_old_names(model, caplog, monkeypatch):
    # the host warns once in a process; other tests may have used its once
    logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        batch = batch_of(model)
        model.generate(**batch, **GREEDY, vtc_budget="full", return_dict_in_generate=True)
        with torch.no_grad():
            model(**batch, vtc_budget="full", use_cache=True).to_tuple()
    assert not [record.message for record in caplog.records if "deprecated" in record.message]
