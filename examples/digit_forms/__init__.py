"""Forms filled in by hand: pages, questions and tokenizer for training and measuring tiny vision-language models.

Put `examples/` on `sys.path` (scripts in `examples/` have it there) and import from `digit_forms`.
"""

from .dataset import (
    PATCH_LABELS,
    EvaluationItem,
    PagePool,
    evaluation_set,
    page_rng,
    patch_labels,
    score,
    write_dataset,
)
from .digits import load_split, split_indices
from .pages import (
    BOX_COLOURS,
    FIELD_SIZE,
    GRIDS,
    MAX_TILES,
    PAGE_COLOURS,
    PATCH_SIZE,
    Box,
    Page,
    draw_page,
    tile_grid,
    tile_page,
)
from .questions import EVALUATED_KINDS, Question
from .text import SPECIAL_TOKENS, TOKENS_PER_TILE, VOCAB_SIZE, build_tokenizer, format_prompt

__all__ = [
    "BOX_COLOURS",
    "EVALUATED_KINDS",
    "FIELD_SIZE",
    "GRIDS",
    "MAX_TILES",
    "PAGE_COLOURS",
    "PATCH_LABELS",
    "PATCH_SIZE",
    "SPECIAL_TOKENS",
    "TOKENS_PER_TILE",
    "VOCAB_SIZE",
    "Box",
    "EvaluationItem",
    "Page",
    "PagePool",
    "Question",
    "build_tokenizer",
    "draw_page",
    "evaluation_set",
    "format_prompt",
    "load_split",
    "page_rng",
    "patch_labels",
    "score",
    "split_indices",
    "tile_grid",
    "tile_page",
    "write_dataset",
]
