"""Tiny models of LLaVolta on Qwen's bases, which their tests share."""

import torch
from factories import random_batch, tiny_model

from hf_vtc.models.host_vtc import GRID_BASES

BASES = tuple(GRID_BASES)


def model_of(base, layer_idx=1, compressor="avgpool1d", stride=4):
    name = f"llavolta on {base}"
    return tiny_model(name, compress_layer_idx=layer_idx, compressor=compressor, compress_stride=stride)


def batch_of(model, seed, **kwargs):
    return random_batch(model.config, torch.Generator().manual_seed(seed), **kwargs)
