"""AVG-LLaVA: every tile at one of several granularities, by image and question."""

import torch

from ..models.configuration_avg_llava import AvgLlavaConfig
from ..models.grids_vtc import grid_windows
from ..models.modeling_avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaModel
from .baselines import Baseline, Baselines, Instead, Met
from .costs import Workload, linear_flops
from .drawing import PAPER, Drawing, Kept, Tile, cells_of, colour_of, kept_line, token_map
from .record import Base, Costs, Record, Sharding, connect_all, connector_names, register
from .shapes import of_llava


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """The projector, which sees every token."""
    return workload.projector_flops(workload.num_features)


def router_flops(workload: Workload) -> float:
    """The router, which reads all granularities and the filtered text."""
    config, tiles, width = workload.config, workload.num_tiles, workload.text.width
    scales = config.vis_token_granularity
    if config.grid_base is None:
        length = sum(scales) + config.filtered_text_num
    else:
        (counts,) = config.levels(workload.sizes())
        length = sum(counts[-len(scales) :]) + config.filtered_text_num
    # queries, keys, values, output and feed-forward; then the two layers that vote
    router = linear_flops(6 * tiles * length, width, width) + linear_flops(tiles * length, width, width, len(scales))
    pairs = tiles * length * (tiles if config.router_attention == "tiles" else length)
    return router + 4.0 * pairs * width


def draw(kept: Kept) -> Drawing:
    """Every tile under the grid of the granularity that the image got."""
    config, layout = kept.config, kept.layout
    decisions = kept.decisions("one granularity per image", torch.long, 1)
    kept.check_image(len(decisions))
    if config.grid_base is not None:
        counts = None if isinstance(kept.output, (torch.Tensor, list, tuple)) else kept.output.num_visual_tokens
        if counts is not None and len(counts) != len(decisions):
            raise ValueError(
                f"`output` is of a prompt with a video: {len(decisions)} decisions for {len(counts)} images and "
                "videos. Draw a video by `hf_vtc.plot.filmstrip`, and images of a call without one."
            )
        return _draw_grid(kept, int(decisions[kept.image_idx]))
    granularity_idx, grids = int(decisions[kept.image_idx]), config.granularity_grids
    scales = [rows * columns for rows, columns in grids]
    rule = config.unpad_rule if config.mm_patch_merge_type == "spatial_unpad" else None
    places, finest = (token_map(layout, grid, rule) for grid in (grids[granularity_idx], grids[-1]))
    (high, wide), side = config.granularity_windows[granularity_idx], config.grid_side
    cells = places.cells_of(places.order, places.order)
    if side % 2:
        # windows at the edge are narrower
        cells = [each.repeat(high, 0).repeat(wide, 1)[:side, :side] for each in cells]
    compressed = granularity_idx < len(scales) - 1
    colour, label = colour_of(compressed), str(scales[granularity_idx])
    rows, columns = grids[granularity_idx]
    legend = [
        (
            colour,
            f"{label} token{'s' * (label != '1')} per tile ({rows} x {columns}), of {', '.join(map(str, scales))}",
        ),
        kept_line(len(places.order), len(finest.order)),
        (None, "a cell is one visual token"),
    ]
    if any((each < 0).any() for each in cells):
        legend.append((PAPER, "no token: padding, which is cut off"))
    return Drawing([Tile(colour, each, label) for each in cells], legend)


def _draw_grid(kept: Kept, granularity_idx: int) -> Drawing:
    """An image that is a grid of its own, under the windows of its granularity."""
    (rows, columns), (high, wide) = kept.layout.token_grid, kept.config.granularity_windows[granularity_idx]
    members, widths = grid_windows(rows * columns, columns, high, wide)
    tokens = torch.arange(len(widths)).repeat_interleave(widths)
    colour, label = colour_of(high * wide > 1), str(len(widths))
    legend = [
        (colour, f"windows of {high} x {wide} visual tokens, each of which becomes one"),
        kept_line(len(widths), rows * columns),
        (None, "a cell is one visual token"),
    ]
    return Drawing([Tile(colour, *cells_of(members, tokens, 1, (rows, columns)), label)], legend)


def granularities_of(met: Met) -> list[int]:
    """The granularity of each image at a point, coarse first, by what it keeps."""
    return [len(counts) - 1 - counts.index(kept) for counts, kept in zip(met.counts, met.num_kept, strict=True)]


def exchanged(met: Met) -> Instead:
    """The granularities of a batch, shared out among its images by lot: of each as many as at the point.

    An image of which newlines make a coarse map longer than the finest one keeps its own.
    """
    own = granularities_of(met)
    shared = [own[idx] for idx in torch.randperm(len(own), generator=met.generator).tolist()]
    return _at(met, [new if _kept(each, new) <= each[0] else old for each, new, old in zip(met.counts, shared, own)])


def one_granularity(idx: int) -> Baseline:
    """Every image at one granularity, the finest where newlines make its map longer than that."""

    def make(met: Met) -> Instead:
        return _at(met, [idx if _kept(counts, idx) <= counts[0] else len(counts) - 1 for counts in met.counts])

    return Baseline(make)


def _kept(counts: tuple[int, ...], idx: int) -> int:
    return counts[len(counts) - 1 - idx]


def _at(met: Met, decisions: list[int]) -> Instead:
    kept = [_kept(counts, idx) for counts, idx in zip(met.counts, decisions, strict=True)]
    return Instead(kept, {"router_decisions": torch.tensor(decisions, dtype=torch.long)})


BASELINES = Baselines(
    random=Baseline(exchanged, is_drawn=True, of_choice=True),
    pool_problem="the method itself pools, so that its fixed granularities are that baseline: ask for `fixed`",
    fixed=lambda config: {
        f"{scale} {'per tile' if config.grid_base is None else 'of 16'}": one_granularity(idx)
        for idx, scale in enumerate(config.all_granularities)
    },
)

RECORD = register(
    Record(
        AvgLlavaConfig,
        AvgLlavaModel,
        AvgLlavaForConditionalGeneration,
        costs=Costs(compressor_flops, router_flops=router_flops),
        oracle=connect_all,
        draw=draw,
        baselines=BASELINES,
        compressor=lambda config: (*connector_names(config), "model.router"),
        untaught=("model.router",),
        base=Base(
            kinds=("internvl", "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"),
            fresh_modules=("model.router",),
            # the original LLaVA-NeXT code measures padding on the grid of tokens, right while tokens are square
            fresh_fields={"router_select": False, "unpad_rule": "true_aspect"},
            fresh_note="A base checkpoint: the router is freshly initialised and does not choose "
            "(`router_select=False`), and the model has seen its finest granularity only. Train both, in this order, "
            "before switching it on.",
        ),
        sharding=Sharding(),
        trainers=("AvgLlavaGranularityTrainer", "AvgLlavaRouterTrainer"),
        # of the paper's four: a base has been through the first two
        recipes=("avg_llava_stage3", "avg_llava_stage4"),
        shapes=of_llava(),
    )
)
