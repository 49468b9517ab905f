"""Engines that run stock models by backends for transformers, which would serve these without any compression."""

import copy

import pytest
import torch
from factories import METHODS, tiny_config
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_vtc.methods import record_named

pytestmark = pytest.mark.window


@pytest.fixture(params=["vllm", "sglang"])
def engine(request, monkeypatch):
    """The name of an engine, which has registered its attention as it does in its own process."""
    attention = dict(ALL_ATTENTION_FUNCTIONS)["sdpa"]
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, request.param, attention)
    return request.param


def built_by(engine, config):
    """The model as such a backend builds it: on no device, with the engine's attention in its decoder."""
    config = copy.deepcopy(config)
    config.text_config._attn_implementation = engine
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_cannot_leave_the_compression_out(method, engine):
    config = tiny_config(method)
    if method == "convllava":
        # its tower compresses, whoever runs it
        assert type(built_by(engine, config)) is record_named(method).model
        return
    with pytest.raises(
        ValueError, match=f"{engine} would serve this vtc_{method} model uncompressed.*With hf_vtc beside it vLLM"
    ):
        built_by(engine, config)


def test_an_engine_may_run_what_is_compressed_nowhere(engine):
    config = tiny_config("llavolta")
    config.set_compression(config.text_config.num_hidden_layers, 1)
    built_by(engine, config)
