"""ViCO: each tile through one of two connectors."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models.configuration_vico import VicoConfig
from ..models.modeling_vico import VicoForConditionalGeneration, VicoModel
from .baselines import Baseline, Baselines, Instead, Met
from .costs import Workload, linear_flops
from .drawing import Drawing, Kept, Tile, colour_of, kept_line
from .record import Base, Costs, Record, Sharding, register
from .shapes import of_internvl


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """Both connectors."""
    config, width, out = workload.config, workload.tower.width, workload.text.width
    full, small, fold = config.image_seq_length, config.compressed_seq_length, config.shuffle_factor**2
    num_compressed = (workload.num_features - num_kept) // (full - small)
    connectors = workload.projector_flops(full * (workload.num_tiles - num_compressed))
    return connectors + linear_flops(small * num_compressed, fold**2 * width, 2 * out, 2 * out, out)


def router_flops(workload: Workload) -> float:
    """The router, which reads the features of every tile."""
    config, width = workload.config, workload.tower.width
    heads, patches = config.router_num_heads, workload.tower.num_patches
    # four attentions of one query, folded with the projection of keys, over all patches; values of what a head pooled
    router = linear_flops(2 * 4 + 4 + 4 * heads, width, width) + 4 * 2.0 * (2 * heads) * patches * width
    router += linear_flops(4, width, 4 * width, width)
    # both layers tell what their projections are, once for all tiles
    return workload.num_tiles * router + linear_flops(2 * (width + 1), width, width)


@torch.no_grad()
def start_as_means(model: PreTrainedModel) -> None:
    """Let the compressed connector begin as means over what the full one gives, in place; ours.

    The papers do not say what its training starts from. From drawn values, a short training never gets as far as plain
    pooling of the full connector's output, which needs no training.

    A hidden unit of the full connector becomes two of the compressed one's, for the upper and the lower half of the
    blocks that are folded into a token: each sees the mean over its half. The next layer takes the mean of the two
    through the full connector's last one, and hands it on as `gelu(x) - gelu(-x)`, which is x. What differs from
    means of tokens beside the halves is the LayerNorm: one over all blocks, and not one for each.

    Raises:
        ValueError: the activation does not have that property.
    """
    full, compressed = model.model.multi_modal_projector, model.model.compressed_projector
    factor, act = model.config.shuffle_factor, model.config.projector_hidden_act
    if not act.startswith("gelu"):
        raise ValueError(f"`projector_hidden_act` must be a GELU for a start from means, got {act!r}.")

    def over_blocks(channels: torch.Tensor) -> torch.Tensor:
        """`(..., f * f * C)`, channels of one block, to `(..., f, f, f, f, C)`: (row of blocks, row in it, ...)."""
        inner = channels.unflatten(-1, (factor, factor, -1))[..., None, :, None, :, :]
        return inner.expand(*channels.shape[:-1], factor, factor, factor, factor, -1)

    for name in ("weight", "bias"):
        values = getattr(full.layer_norm, name)
        getattr(compressed.layer_norm, name).copy_(over_blocks(values).flatten())
    half_of_row = torch.arange(factor, device=model.device) * 2 // factor
    halves = torch.stack([half_of_row == 0, half_of_row == 1])[:, None, :, None, None, None, None]
    units = over_blocks(full.linear_1.weight) * halves * (2 / factor**2)  # (2, W, f, f, f, f, C)
    compressed.linear_1.weight.copy_(units.flatten(2).flatten(0, 1))
    compressed.linear_1.bias.copy_(full.linear_1.bias.repeat(2))
    out, offset = full.linear_2.weight.repeat(1, 2) / 2, full.linear_2.bias
    compressed.linear_2.weight.copy_(torch.cat([out, -out]))
    compressed.linear_2.bias.copy_(torch.cat([offset, -offset]))
    same = torch.eye(len(offset), dtype=out.dtype, device=out.device)
    compressed.linear_3.weight.copy_(torch.cat([same, -same], dim=1))
    compressed.linear_3.bias.zero_()


def oracle(base: torch.nn.Module, output: Any) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Each tile through the connector that it needs."""
    decisions, parts = output.router_decisions, []
    for connector, chosen in ((base.multi_modal_projector, ~decisions), (base.compressed_projector, decisions)):
        tiles = chosen.nonzero().flatten()
        if len(tiles) > 0:
            parts.append((connector, None if len(tiles) == len(decisions) else tiles))

    def run(features: torch.Tensor) -> list[torch.Tensor]:
        return [connector(features if tiles is None else features[tiles]) for connector, tiles in parts]

    return run


def draw(kept: Kept) -> Drawing:
    """Full tiles as they are, compressed ones veiled under the grid of what they keep."""
    own = kept.own_tiles(kept.decisions("one truth value per tile", torch.bool, 1)).tolist()
    full, small = kept.tokens_per_tile or (None, None)
    if kept.config is not None:
        full, small = kept.config.image_seq_length, kept.config.compressed_seq_length
    grid = math.isqrt(small) if small else 4
    tiles = []
    for compressed in own:
        count = small if compressed else full
        label = None if count is None else str(count)
        cells = np.arange(grid**2).reshape(grid, grid) if compressed else None
        tiles.append(Tile(colour_of(compressed), cells, label, veiled=compressed))
    legend = []
    for compressed, name, each in ((False, "full", full), (True, "compressed", small)):
        count = own.count(compressed)
        where = ", one per cell" if compressed else ""
        tokens = f", {each} visual tokens each{where}" if each is not None and count else ""
        legend.append((colour_of(compressed), f"{name}: {count} of {len(own)} tiles{tokens}"))
    if full is not None and small is not None:
        legend.append(kept_line(full * own.count(False) + small * own.count(True), full * len(own)))
    return Drawing(tiles, legend)


def tiles_by_lot(met: Met) -> Instead:
    """As many tiles of each image compressed, whichever they are."""
    saved, decisions = met.config.image_seq_length - met.config.compressed_seq_length, []
    for num_tiles, counts, kept in zip(met.num_tiles, met.counts, met.num_kept, strict=True):
        order = torch.randperm(num_tiles, generator=met.generator)
        decisions.append(order < (counts[0] - kept) // saved)
    return Instead(met.num_kept, {"router_decisions": torch.cat(decisions)})


def all_tiles(compressed: bool) -> Baseline:
    """Every tile alike."""

    def make(met: Met) -> Instead:
        decisions = torch.full((sum(met.num_tiles),), compressed)
        return Instead([counts[-1 if compressed else 0] for counts in met.counts], {"router_decisions": decisions})

    return Baseline(make)


BASELINES = Baselines(
    random=Baseline(tiles_by_lot, is_drawn=True),
    fixed=lambda config: {
        f"{config.image_seq_length} per tile": all_tiles(False),
        f"{config.compressed_seq_length} per tile": all_tiles(True),
    },
)

RECORD = register(
    Record(
        VicoConfig,
        VicoModel,
        VicoForConditionalGeneration,
        costs=Costs(compressor_flops, router_flops=router_flops, router_ranks=True),
        oracle=oracle,
        draw=draw,
        compressor=lambda config: ("model.multi_modal_projector", "model.compressed_projector", "model.router"),
        untaught=("model.router",),
        base=Base(
            kinds=("internvl",),
            fresh_modules=("model.compressed_projector", "model.router"),
            fresh_fields={"flash_mode": False},
            fresh_note="A base checkpoint: the compressed connector and the router are freshly initialised and "
            "routing is off (`flash_mode=False`). Train them before switching it on.",
            warm_starts={"model.compressed_projector": start_as_means},
        ),
        # in evaluation a connector runs only if a tile needs it
        sharding=Sharding(),
        trainers=("VicoConsistencyTrainer", "VicoRouterTrainer"),
        baselines=BASELINES,
        recipes=("vico_consistency", "vico_router"),
        shapes=of_internvl({"router_num_heads": 4}),
    )
)
