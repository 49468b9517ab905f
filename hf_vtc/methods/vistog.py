"""VisToG: semantic tokens run beside the tower, and patches are merged into them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.configuration_vistog import VistogConfig
from ..models.modeling_vistog import VistogForConditionalGeneration, VistogModel
from .baselines import Baseline, Baselines, Instead, Met, groups_by_lot
from .costs import Workload, linear_flops
from .drawing import Drawing, Kept, Tile, colour_of, kept_line
from .record import Base, Costs, Record, Sharding, register
from .shapes import of_llava


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """Semantic tokens in every layer of the tower, the grouping layer, and the projector of what is left."""
    config, tower, patches = workload.config, workload.tower, workload.config.image_seq_length
    groups, width = config.num_semantic_tokens, tower.width
    projector = workload.projector_flops(num_kept)
    if workload.wants_all:
        return projector
    layer = linear_flops(groups, *[width] * 5) + linear_flops(groups, width, tower.ffn_width, width)
    layer += 4.0 * groups * (tower.num_patches + 1 + groups) * width
    if num_kept == workload.num_features:
        # a share of all tokens is met without grouping, but semantic tokens have run by then
        return projector + workload.num_tiles * tower.num_layers * layer
    # queries of groups, keys of patches, similarity, mean
    grouping = linear_flops(groups + patches, width, width) + 4.0 * groups * patches * width
    if config.merge == "projected":
        grouping += linear_flops(groups + patches, width, width)
    if config.mlp:
        grouping += linear_flops(groups, width, 4 * width, width)
    return projector + workload.num_tiles * (tower.num_layers * layer + grouping)


def oracle(base: torch.nn.Module, output: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """As many patches through the projector as there are visual tokens afterwards."""
    kept = int(output.num_visual_tokens.sum())
    return lambda features: base.multi_modal_projector(features["patches"].flatten(0, 1)[:kept])


def draw(kept: Kept) -> Drawing:
    """The semantic groups of every tile as a segmentation; a tile that stays whole under the grid of its patches."""
    config = kept.config
    own = kept.own_tiles(kept.decisions("the group of each patch of each tile", torch.long, 2))
    side, tiles = math.isqrt(own.shape[1]), []
    for groups in own:
        grouped = bool((groups >= 0).all())
        cells = groups if grouped else torch.arange(len(groups))
        count = config.num_semantic_tokens if grouped else len(groups)
        tiles.append(Tile(colour_of(grouped), cells.reshape(side, side).numpy(), str(count), filled=grouped))
    num_grouped = int((own >= 0).all(1).sum())
    used = [len(groups.unique()) for groups in own if groups[0] >= 0]
    fewest = f", at least {min(used)} of them with patches" if used else ""
    total = num_grouped * config.num_semantic_tokens + (len(own) - num_grouped) * own.shape[1]
    legend = [
        (
            colour_of(num_grouped > 0),
            f"{num_grouped} of {len(own)} tiles in {config.num_semantic_tokens} semantic groups{fewest}",
        ),
        kept_line(total, own.numel()),
    ]
    if num_grouped:
        legend.append(("many", "a colour: the patches of one semantic group of a tile, which becomes one token"))
    if num_grouped < len(own):
        legend.append((None, "a cell without colour is one token"))
    return Drawing(tiles, legend)


def layers_of_the_tower(model: PreTrainedModel) -> set[str]:
    """Semantic tokens run through parts of the tower's layers, which are gathered as a whole only when called so."""
    return {type(module).__name__ for module in model.model.vision_tower.modules()}


def grid_cells(met: Met) -> Instead:
    """The patches of each tile in equal cells of a grid, as nearly square as their number allows."""
    side, groups = met.config.patches_per_side, met.config.num_semantic_tokens
    rows = max(divisor for divisor in range(1, math.isqrt(groups) + 1) if groups % divisor == 0)
    places = torch.arange(side)
    cells = (places * rows // side)[:, None] * (groups // rows) + places * (groups // rows) // side
    whole = (met.decisions < 0).all(1, keepdim=True)
    decisions = torch.where(whole, met.decisions, cells.flatten())
    return Instead(met.num_kept, {"router_decisions": decisions})


BASELINES = Baselines(random=Baseline(groups_by_lot, is_drawn=True), pool=Baseline(grid_cells))

RECORD = register(
    Record(
        VistogConfig,
        VistogModel,
        VistogForConditionalGeneration,
        costs=Costs(compressor_flops),
        oracle=oracle,
        draw=draw,
        baselines=BASELINES,
        compressor=lambda config: ("model.semantic_tokens", "model.grouping", "model.multi_modal_projector"),
        base=Base(
            kinds=("internvl", "llava"),
            fresh_modules=("model.semantic_tokens", "model.grouping"),
            # groups have no grid that a pixel shuffle could fold
            fresh_fields={"downsample_ratio": 1.0},
            fresh_note="A base checkpoint: semantic tokens and grouping layer are freshly initialised. Train them "
            "before asking for anything but `vtc_budget='full'`.",
        ),
        sharding=Sharding(left_out=layers_of_the_tower),
        trainers=("VistogTrainer",),
        recipes=("vistog_stage1", "vistog_stage2"),
        shapes=of_llava({"num_semantic_tokens": 64}),
    )
)
