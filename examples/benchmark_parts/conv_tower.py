"""ConvLLaVA's tower against transformers' `ConvNextModel` with the same weights, in the same run.

Weights are random, with a layer scale of 0.1, so that every block shows in the outputs. Besides ours: in channels-last
memory (between stages, maps are kept so in any case), with the layer scale multiplied into the weights, both, and both
by torch.compile.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import ConvNextModel, PretrainedConfig

from hf_vtc.models.configuration_convllava import ConvllavaConfig
from hf_vtc.models.modeling_convllava import ConvNextTower

from .cases import shape_of
from .first_token import require_equal
from .rounds import Limits, peak_bytes, take_turns

_TOLERANCE = 1e-5
_LAYER_SCALE = 0.1


def tower_of(module: nn.Module, config: PretrainedConfig) -> ConvNextTower:
    """A tower with the weights of another module, in the same memory."""
    with torch.device("meta"):
        tower = ConvNextTower(config).eval()
    loaded = tower.load_state_dict(module.state_dict(), strict=False, assign=True)
    assert not loaded.missing_keys and set(loaded.unexpected_keys) <= {"layernorm.weight", "layernorm.bias"}
    return tower


def variants_of(
    stock: nn.Module, config: PretrainedConfig, pixel_values: torch.Tensor, compiled: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that give the last stage's map `(B, C, h, w)`, by name; weights exist twice, folded and not."""
    tower = tower_of(stock, config)
    folded = copy.deepcopy(tower).fold_layer_scale()
    channels_last = tower_of(tower, tower.config).to(memory_format=torch.channels_last)
    both = tower_of(folded, folded.config).to(memory_format=torch.channels_last)
    pixels_last = pixel_values.contiguous(memory_format=torch.channels_last)
    variants = {
        "stock": lambda: stock(pixel_values).last_hidden_state,
        "ours": lambda: tower(pixel_values)[0],
        "channels-last": lambda: channels_last(pixels_last)[0],
        "folded": lambda: folded(pixel_values)[0],
        "both": lambda: both(pixels_last)[0],
    }
    if compiled:
        program = torch.compile(both)
        variants["compiled"] = lambda: program(pixels_last)[0]
    return variants


@torch.inference_mode()
def measure(size: str, batch_size: int, limits: Limits, compiled: bool = False) -> list[dict[str, Any]]:
    """A row for each variant.

    Raises:
        DifferentOutputs: a variant does not give the map of the stock model.
    """
    vision = {**shape_of("convllava", size).vision, "layer_scale_init_value": _LAYER_SCALE}
    side, config = vision["image_size"], ConvllavaConfig(vision).vision_config
    torch.manual_seed(0)
    with limits.device:
        stock = ConvNextModel(config).eval()
    pixel_values = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)).to(limits.device)
    variants = variants_of(stock, config, pixel_values, compiled)
    expected = variants["stock"]()
    apart = {name: require_equal(name, run(), expected, _TOLERANCE) for name, run in variants.items()}
    rounds = take_turns(variants, [("ours", "stock")], limits)
    return [
        {
            "part": "tower",
            "method": "convllava",
            "batch": batch_size,
            "tower": name,
            "rounds": len(rounds.seconds[name]),
            "seconds": vars(rounds.spread(name)),
            "to_stock": vars(rounds.ratio(name, "stock")),
            "apart": apart[name],
            "bytes": peak_bytes(run, limits.device),
        }
        for name, run in variants.items()
    ]
