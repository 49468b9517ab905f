"""Matrix products that an objective demands beside tower, connectors and language model, whoever implements it.

An oracle does these too, on memory that is there already, and nothing else of what they belong to.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from hf_vtc.models.tower_vtc import tower_path


class Product(NamedTuple):
    """Of matrices `(rows, inner)` and `(inner, columns)`, `batch` times."""

    batch: int
    rows: int
    inner: int
    columns: int


def run_of(products: Sequence[Product], like: torch.Tensor) -> Callable[[], None]:
    """A function that multiplies; equal products share their memory."""
    memory = {}
    for batch, rows, inner, columns in products:
        shapes = (batch, rows, inner), (batch, inner, columns), (batch, rows, columns)
        memory[batch, rows, inner, columns] = [like.new_ones(shape) for shape in shapes]

    @torch.no_grad()
    def run() -> None:
        for product in products:
            left, right, out = memory[product]
            torch.bmm(left, right, out=out)

    return run


def of_linear(rows: int, width: int, columns: int, to_input: bool, trains: bool) -> list[Product]:
    """A linear layer on `(rows, width)`, forward, and back to its input and its weight."""
    products = [Product(1, rows, width, columns)]
    products += [Product(1, rows, columns, width)] if to_input else []
    return products + ([Product(1, columns, rows, width)] if trains else [])


def semantic_products(model: PreTrainedModel, num_tiles: int) -> Callable[[], None]:
    """What VisToG's semantic tokens demand of a training step: their rows through a frozen tower and back to their
    vectors, and the grouping layer, which trains."""
    config, tower = model.config, model.config.vision_config
    width, heads, groups = tower.hidden_size, tower.num_attention_heads, config.num_semantic_tokens
    patches, rows = config.image_seq_length, num_tiles * groups
    per_head, seen = width // heads, groups + patches + (config.vision_feature_select_strategy == "default")
    layer = [product for _ in range(4) for product in of_linear(rows, width, width, True, False)]
    layer += of_linear(rows, width, tower.intermediate_size, True, False)
    layer += of_linear(rows, tower.intermediate_size, width, True, False)
    every = num_tiles * heads
    # scores and mixed values; back to queries and to shares, of every key; to keys and values of the semantic tokens
    layer += 2 * [Product(every, groups, per_head, seen), Product(every, groups, seen, per_head)]
    layer += 2 * [Product(every, groups, groups, per_head)]
    products = layer * len(tower_path(model.model.vision_tower, config.vision_feature_layer).layers)
    # patches come out of a frozen tower, but through a norm that trains
    products += of_linear(rows, width, width, True, True) + of_linear(num_tiles * patches, width, width, True, True)
    if config.merge == "projected":
        products += of_linear(num_tiles * patches, width, width, True, True)
        products += of_linear(rows, width, width, True, True)
    if config.mlp:
        products += of_linear(rows, width, 4 * width, True, True) + of_linear(rows, 4 * width, width, True, True)
    products += [Product(num_tiles, groups, width, patches), Product(num_tiles, groups, patches, width)]
    products += [Product(num_tiles, patches, groups, width)]
    # shares of each patch, which are averages of values and whose gradients compare values
    products += [Product(num_tiles, groups, width, patches)]
    # back through the projector to what the groups became
    products += [Product(1, rows, config.text_config.hidden_size, width)]
    return run_of(products, model.model.semantic_tokens.weight)
