"""VisionZip: dominant tokens of each tile, and means of the others. Training-free."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..models.configuration_visionzip import VisionzipConfig
from ..models.modeling_visionzip import VisionzipForConditionalGeneration, VisionzipModel
from .baselines import Baseline, Baselines, groups_by_lot
from .costs import Workload, linear_flops
from .drawing import Drawing, Kept, Tile, colour_of, kept_line
from .record import Base, Costs, Record, Sharding, connector_names, register
from .shapes import of_llava


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """The projector of what is kept; attention that is read, products of keys, and means."""
    config, tiles, width, patches = (
        workload.config,
        workload.num_tiles,
        workload.tower.width,
        workload.tower.num_patches,
    )
    flops = workload.projector_flops(num_kept)
    if workload.wants_all:
        return flops
    rows, columns = (1, patches + 1) if config.has_class_token else (patches, patches)
    flops += linear_flops(tiles * rows, width, columns)
    if num_kept < workload.num_features:
        per_tile, folded = config.image_seq_length, width * config.shuffle_factor**2
        flops += linear_flops(tiles * per_tile, width, per_tile)
        # as many of each tile as the first one has
        flops += linear_flops(tiles * math.ceil(num_kept / tiles), per_tile, folded)
    return flops


def oracle(base: torch.nn.Module, output: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """As many tokens through the projector as there are visual tokens afterwards."""
    kept = int(output.num_visual_tokens.sum())

    def run(features: dict[str, torch.Tensor]) -> torch.Tensor:
        patches = features["features"]
        per_token = patches.shape[1] // base.config.image_seq_length
        some = patches.flatten(0, 1)[: kept * per_token]
        return base.multi_modal_projector(some.unflatten(0, (kept, per_token)))

    return run


def draw(kept: Kept) -> Drawing:
    """Visual tokens in colours: dominant ones are single cells, contextual ones all that was merged."""
    groups = kept.own_tiles(kept.decisions("the visual token of each token of each tile", torch.long, 2))
    whole, tiles = bool((groups == torch.arange(groups.shape[1])).all()), []
    for own in groups:
        cells = own.reshape(kept.config.token_grid)
        # InternVL's first pixel shuffle counts by columns
        cells = cells.T if kept.config.ps_version == "v1" and kept.config.shuffle_factor > 1 else cells
        tiles.append(Tile(colour_of(not whole), cells.numpy(), str(int(own.max()) + 1), filled=not whole))
    count = int((groups.amax(1) + 1).sum())
    colour = colour_of(not whole)
    legend = [
        (colour, "no compression" if whole else "dominant tokens, and what is merged"),
        kept_line(count, groups.numel()),
    ]
    if not whole:
        legend.append(("many", "a colour: the cells of one visual token; without colour: dropped"))
    return Drawing(tiles, legend)


RECORD = register(
    Record(
        VisionzipConfig,
        VisionzipModel,
        VisionzipForConditionalGeneration,
        costs=Costs(compressor_flops),
        oracle=oracle,
        draw=draw,
        baselines=Baselines(random=Baseline(groups_by_lot, is_drawn=True)),
        compressor=connector_names,
        base=Base(kinds=("internvl", "llava")),
        sharding=Sharding(),
        trainers=(),
        recipes=(),
        shapes=of_llava(),
    )
)
