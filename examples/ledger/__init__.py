"""Pages of an account book whose fields differ in density: data on which the choice of visual tokens matters.

Put `examples/` on `sys.path` (`PYTHONPATH=examples`) and import from `ledger`.
"""

from .dataset import KINDS, PATCH_LABELS, EvaluationItem, PagePool, evaluation_set, patch_labels, records_of, tile_page
from .pages import COLOURS, FIELD_SIZE, MAX_TILES, PAPERS, Field, Page, draw_page, field_bits
from .questions import EVALUATED_KINDS, Question

__all__ = [
    "COLOURS",
    "EVALUATED_KINDS",
    "FIELD_SIZE",
    "KINDS",
    "MAX_TILES",
    "PAPERS",
    "PATCH_LABELS",
    "EvaluationItem",
    "Field",
    "Page",
    "PagePool",
    "Question",
    "draw_page",
    "evaluation_set",
    "field_bits",
    "patch_labels",
    "records_of",
    "tile_page",
]
