"""What compression can save, and what it does save: `estimate` counts, `bench` measures.

Three numbers, never one: `ideal` (analytic, from FLOPs and bytes), `oracle` (measured, as if choosing and packing
were free) and `measured`. eta = oracle / measured is our overhead; phi = (full - measured) / (full - oracle) is the
share of the possible gain that arrives, which matters when the ideal is near 1.

What a method adds to either stands in its record in `hf_vtc.methods`.
"""

from ..methods.costs import ConvTowerShape, DecoderShape, TowerShape, printed_flops
from .analytic import Estimate, default_budget, estimate
from .gain import Gain, measure_gain, shape_of_gain
from .hardware import HARDWARE_NAMES, Hardware, hardware_named
from .measured import BenchReport, Timing, bench
from .shapes import config_of_shape, inputs_of_shape, model_of_shape, shape_names

__all__ = [
    "BenchReport",
    "ConvTowerShape",
    "DecoderShape",
    "Estimate",
    "Gain",
    "HARDWARE_NAMES",
    "Hardware",
    "Timing",
    "TowerShape",
    "bench",
    "default_budget",
    "config_of_shape",
    "estimate",
    "hardware_named",
    "inputs_of_shape",
    "measure_gain",
    "model_of_shape",
    "printed_flops",
    "shape_names",
    "shape_of_gain",
]
