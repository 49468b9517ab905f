"""Pruning: the visual tokens of an image that are least like their tile."""

import torch

from ..models.configuration_pruning import PruningConfig
from ..models.modeling_pruning import PruningForConditionalGeneration, PruningModel
from .costs import Workload
from .drawing import Drawing, Kept, Tile, colour_of, kept_line
from .record import Base, Costs, Record, Sharding, connect_all, register


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """The projector of every token, since projected ones are compared."""
    return workload.projector_flops(workload.num_features)


def draw(kept: Kept) -> Drawing:
    """The tokens that stay, in a colour of their own."""
    stays = kept.decisions("one truth value per visual token", torch.bool, 1)
    own = kept.own_tiles(stays.unflatten(0, (-1, kept.config.image_seq_length)))
    colour = colour_of(not bool(own.all()))
    cells = torch.where(own, own.flatten().cumsum(0).unflatten(0, own.shape) - 1, -1)
    cells = cells.unflatten(1, kept.config.token_grid).numpy()
    legend = [(colour, "farthest from the mean of their tile"), kept_line(int(own.sum()), own.numel())]
    return Drawing([Tile(colour, each, filled=not bool(own.all())) for each in cells], legend)


RECORD = register(
    Record(
        PruningConfig,
        PruningModel,
        PruningForConditionalGeneration,
        costs=Costs(compressor_flops),
        oracle=connect_all,
        draw=draw,
        compressor=lambda config: ("model.multi_modal_projector",),
        base=Base(kinds=("internvl", "llava")),
        sharding=Sharding(),
        trainers=(),
    )
)
