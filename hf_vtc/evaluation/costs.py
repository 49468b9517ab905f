"""What a prompt costs the language model, counted: arithmetic and memory, which time on one machine does not say."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..methods import record_of
from ..methods.costs import DecoderShape
from ..models.configuration_vtc import VtcConfig
from .running import Answer

# families in which the method's own layers see what it sees there
_AS_THE_METHOD = ("method", "random", "pool", "fixed")


class Costs(NamedTuple):
    """Means per question: FLOPs of the prompt, and bytes of keys and values behind it in 16 bits; and how many visual
    tokens a layer sees on average for each that is left, more than one where images get shorter between layers."""

    prefill_flops: float
    kv_cache_bytes: float
    tokens_in_layers: float


def prompt_costs(config: VtcConfig, family: str, answers: Sequence[Answer]) -> Costs:
    """Costs of the prompts that were answered, by the formulas of `estimate`."""
    shape = DecoderShape.from_config(config.text_config.to_dict())
    layers_of = record_of(config).need("costs", "`evaluate`").layers
    rows = []
    for answer in answers:
        reserved = answer.reserved if family in _AS_THE_METHOD else answer.tokens
        parts = layers_of(config, shape.num_layers, reserved, answer.tokens)
        # (share of the layers, tokens of the prompt in them)
        prompts = [(layers / shape.num_layers, answer.text_tokens + tokens) for layers, tokens in parts]
        rows.append(
            (
                sum(share * shape.prefill_flops(length) for share, length in prompts),
                sum(share * shape.kv_cache_bytes(length) for share, length in prompts),
                sum(share * (length - answer.text_tokens) for share, length in prompts),
                answer.tokens,
            )
        )
    flops, kv_bytes, in_layers, left = np.mean(rows, axis=0)
    return Costs(float(flops), float(kv_bytes), float(in_layers / left) if left else 1.0)
