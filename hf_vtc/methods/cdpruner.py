"""CDPruner: the visual tokens of an image that are most diverse, given the question. Training-free."""

import torch

from ..models.configuration_cdpruner import CdprunerConfig
from ..models.modeling_cdpruner import CdprunerForConditionalGeneration, CdprunerModel
from .baselines import Baseline, Baselines, Instead, Met
from .costs import Workload
from .drawing import PAPER, Drawing, Kept, Tile, colour_of, kept_line, token_map
from .record import Base, Costs, Record, Sharding, connect_all, connector_names, register
from .shapes import of_llava


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """The projector of every token, since projected ones are compared, their kernel, and its Cholesky factor."""
    projector, tokens = workload.projector_flops(workload.num_features), workload.num_features
    if num_kept >= tokens:
        return projector
    return projector + 2.0 * tokens**2 * workload.text.width + 1.0 * tokens * num_kept**2


def draw(kept: Kept) -> Drawing:
    """The tokens that stay, in a colour of their own."""
    config, layout = kept.config, kept.layout
    grid = config.token_grid if config.grid_base is None else layout.token_grid
    stays = kept.decisions("one truth value per visual token", torch.bool, 1)
    joined = config.mm_patch_merge_type == "spatial_unpad"
    places = token_map(layout, grid, config.unpad_rule if joined else None)
    order = places.order
    if not joined and config.grid_base is None:
        stays = kept.own_tiles(stays.unflatten(0, (-1, config.image_seq_length))).flatten()
    elif kept.image_idx != 0 or len(stays) != len(order):
        raise ValueError(
            f"Image {kept.image_idx} has {len(order)} visual tokens by its processor, but the output is of "
            f"{len(stays)}. `overlay` needs the output of a call with one image, but for rows of equal tiles."
        )
    count, compressed = int(stays.sum()), not bool(stays.all())
    cells = places.cells_of(order[stays], torch.arange(count))
    if config.shuffle_factor > 1 and config.ps_version == "v1":
        # InternVL's first pixel shuffle counts by columns
        cells = [each.T for each in cells]
    colour = colour_of(compressed)
    legend = [(colour, "most diverse, given the question" if compressed else "no compression")]
    legend.append(kept_line(count, len(stays)))
    if compressed:
        legend.append((PAPER, "no colour: dropped"))
    return Drawing([Tile(colour, each, filled=compressed) for each in cells], legend)


def tokens_by_lot(met: Met) -> Instead:
    """As many visual tokens of each image, whichever they are."""
    images = met.decisions.split([counts[0] for counts in met.counts])
    decisions = [own[torch.randperm(len(own), generator=met.generator)] for own in images]
    return Instead(met.num_kept, {"router_decisions": torch.cat(decisions)})


RECORD = register(
    Record(
        CdprunerConfig,
        CdprunerModel,
        CdprunerForConditionalGeneration,
        costs=Costs(compressor_flops),
        oracle=connect_all,
        draw=draw,
        baselines=Baselines(random=Baseline(tokens_by_lot, is_drawn=True)),
        compressor=connector_names,
        base=Base(kinds=("internvl", "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")),
        sharding=Sharding(),
        trainers=(),
        recipes=(),
        shapes=of_llava(),
    )
)
