"""What compression can save, and what it does save: `estimate` counts, `bench` measures.

Three numbers, never one: `ideal` (analytic, from FLOPs and bytes), `oracle` (measured, as if choosing and packing
were free) and `measured`. eta = oracle / measured is our overhead; phi = (full - measured) / (full - oracle) is the
share of the possible gain that arrives, which matters when the ideal is near 1.

What a method adds to either stands in its record in `hf_vtc.methods`.
"""

from ..methods.costs import ConvTowerShape, DecoderShape, TowerShape, printed_flops
from .analytic import Estimate, default_budget, estimate
from .measured import BenchReport, Timing, bench

__all__ = [
    "BenchReport",
    "ConvTowerShape",
    "DecoderShape",
    "Estimate",
    "Timing",
    "TowerShape",
    "bench",
    "default_budget",
    "estimate",
    "printed_flops",
]
