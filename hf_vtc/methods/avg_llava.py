"""AVG-LLaVA: every tile at one of several granularities, by image and question."""

import torch

from ..models.configuration_avg_llava import AvgLlavaConfig
from ..models.modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel
from .costs import Workload, linear_flops
from .drawing import Drawing, Kept, Tile, cells_of, colour_of, kept_line, token_sequence
from .record import Base, Costs, Record, Sharding, connect_all, register


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """The projector of every token, and the router, which reads all granularities and the filtered text."""
    config, tiles, width = workload.config, workload.num_tiles, workload.text.width
    scales = config.vis_token_granularity
    length = sum(scales) + config.filtered_text_num
    # queries, keys, values, output and feed-forward; then the two layers that vote
    router = linear_flops(6 * tiles * length, width, width) + linear_flops(tiles * length, width, width, len(scales))
    pairs = tiles * length * (tiles if config.router_attention == "tiles" else length)
    return workload.projector_flops(workload.num_features) + router + 4.0 * pairs * width


def draw(kept: Kept) -> Drawing:
    """Every tile under the grid of the granularity that the image got."""
    config, layout = kept.config, kept.layout
    decisions = kept.decisions("one granularity per image", torch.long, 1)
    kept.check_image(len(decisions))
    granularity_idx, grids = int(decisions[kept.image_idx]), config.granularity_grids
    scales = [rows * columns for rows, columns in grids]
    rule = config.unpad_rule if config.mm_patch_merge_type == "spatial_unpad" else None
    order, finest = (token_sequence(layout, grid, rule) for grid in (grids[granularity_idx], grids[-1]))
    cells = cells_of(order, order, layout.num_tiles, grids[granularity_idx])
    compressed = granularity_idx < len(scales) - 1
    colour, label = colour_of(compressed), str(scales[granularity_idx])
    rows, columns = grids[granularity_idx]
    legend = [
        (colour, f"{scales[granularity_idx]} tokens per tile ({rows} x {columns}), of {', '.join(map(str, scales))}"),
        kept_line(len(order), len(finest)),
    ]
    return Drawing([Tile(colour, each, label) for each in cells], legend)


RECORD = register(
    Record(
        AvgLlavaConfig,
        AvgLlavaModel,
        AvgLlavaForConditionalGeneration,
        costs=Costs(compressor_flops),
        oracle=connect_all,
        draw=draw,
        compressor=lambda config: ("model.multi_modal_projector", "model.router"),
        untaught=("model.router",),
        base=Base(
            kinds=("internvl", "llava", "llava_next"),
            fresh_modules=("model.router",),
            # the original LLaVA-NeXT code measures padding on the grid of tokens, right while tokens are square
            fresh_fields={"router_select": False, "unpad_rule": "true_aspect"},
            fresh_note="A base checkpoint: the router is freshly initialised and does not choose "
            "(`router_select=False`), and the model has seen its finest granularity only. Train both, in this order, "
            "before switching it on.",
        ),
        sharding=Sharding(),
        trainers=("AvgLlavaGranularityTrainer", "AvgLlavaRouterTrainer"),
    )
)
