"""LLaVolta: images get shorter before a decoder layer."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..models.configuration_llavolta import WINDOWS, LlavoltaConfig
from ..models.grids_vtc import grid_windows
from ..models.modeling_compressors_llavolta import consecutive_windows, square_windows, strided_picks
from ..models.modeling_llavolta import LlavoltaForConditionalGeneration, LlavoltaModel
from ..models.tiling_vtc import TileLayout
from .baselines import Baseline, Baselines, Instead, Met, between
from .costs import Workload
from .drawing import Drawing, Kept, Swatch, Tile, colour_of, kept_line, token_map
from .record import Base, Costs, Record, Sharding, connect_all, connector_names, register
from .shapes import of_llava


def compressor_flops(workload: Workload, num_kept: int) -> float:
    """The projector, which sees every token."""
    return workload.projector_flops(workload.num_features)


def layers(config: LlavoltaConfig, num_layers: int, num_reserved: int, num_kept: int) -> list[tuple[int, int]]:
    """Layers before the one that shortens images see all of their tokens."""
    num_long = max(config.compress_layer_idx, 0)
    parts = [(num_long, num_reserved), (num_layers - num_long, num_kept)]
    return [part for part in parts if part[0] > 0]


def draw(kept: Kept) -> Drawing:
    """The patches that become one token, in a colour of their own."""
    config, layout, count = kept.config, kept.layout, kept.num_tokens
    grid = layout.token_grid if config.grid_base is not None else (math.isqrt(config.image_seq_length),) * 2
    rule = config.unpad_rule if config.mm_patch_merge_type == "spatial_unpad" else None
    places = token_map(layout, grid, rule)
    order = places.order
    stride = _stride_of(config, layout, len(order), count, kept.num_frames)
    own = config.stride_of_frame(stride)
    # the other compressors choose by content, of which the output says nothing
    known = config.compressor in ("avgpool1d", "uniform", "avgpool2d")
    members, widths = _windows(config, grid, len(order), own if known else 1)
    tokens = torch.arange(len(widths)).repeat_interleave(widths)
    cells = places.cells_of(order[members], tokens)
    compressed = stride > 1
    layer_idx = config.compress_layer_idx
    where = f"before layer {layer_idx}" if layer_idx >= 0 else "before the decoder"
    legend = [
        (colour_of(compressed), f"{config.compressor} by {stride} {where}" if compressed else "no compression"),
        kept_line(count, kept.num_frames * len(order)),
    ]
    if compressed:
        legend.append(_what_colours_mean(config.compressor, known, len(widths), own, kept.num_frames))
    counts = [len(np.unique(each[each >= 0])) for each in cells]
    # spans can run on from tile to tile, which then have no counts of their own
    labels = [str(each) if sum(counts) == len(widths) else None for each in counts]
    filled = known and compressed
    tiles = [Tile(colour_of(compressed), each, label, filled=filled) for each, label in zip(cells, labels)]
    return Drawing(tiles, legend)


def _stride_of(config: LlavoltaConfig, layout: TileLayout, length: int, count: int, num_frames: int) -> int:
    """The first stride by which an image of `length` tokens, or frames that share windows, becomes `count`."""
    if config.grid_base is None:
        return next(stride for stride in range(1, length + 1) if config.kept_tokens(length, stride) == count)
    tokens = torch.tensor([layout.token_grid])
    (counts,) = config.levels(config.sizes_of(None, tokens * config.token_stride))
    return config.stride_of(counts.index(count, int(num_frames > 1)))


def _windows(
    config: LlavoltaConfig, grid: tuple[int, int], length: int, stride: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Members of all that stays of an image, one after the other, and how many become each."""
    if config.grid_base is not None and config.compressor in WINDOWS:
        return grid_windows(length, grid[1], *WINDOWS[config.compressor](stride))
    if config.compressor == "uniform":
        members = strided_picks(length, stride)
    elif config.compressor == "avgpool2d":
        members = square_windows(length, stride, grid[1])
    else:
        members = consecutive_windows(length, stride)
    return members.flatten(), torch.full((len(members),), members.shape[1])


def _what_colours_mean(
    compressor: str, known: bool, num_spans: int, stride: int, num_frames: int
) -> tuple[Swatch, str]:
    if not known:
        return None, f"{compressor} chooses by content, which is not drawn; a cell is one token before it"
    if compressor == "uniform":
        return "many", f"a colour: one of {num_spans} tokens that stay, of {stride} neighbours each"
    side = math.isqrt(stride)
    span = f"{side} x {side}" if compressor == "avgpool2d" and side**2 == stride else str(stride)
    frames = f" in each of {num_frames} frames" if num_frames > 1 else ""
    return "many", f"a colour: one of {num_spans} spans of {span} neighbours{frames}, which becomes one token"


def official_fields(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Settings where a file has them; the original code takes them from the command line."""
    if "grouping" not in config:
        return {}
    if config["grouping"] == "none":
        return {"compress_stride": 1}
    found = {"compress_layer_idx": config.get("layer"), "compress_stride": config.get("stride")}
    fields = {name: value for name, value in found.items() if value is not None}
    if "compress_layer_idx" in fields:
        # the original's default, 33, means never
        fields["compress_layer_idx"] = min(fields["compress_layer_idx"], num_layers)
    return fields


def by_random_tokens(met: Met) -> Instead:
    """As many tokens of each image as its compressor leaves, at the same layer, whichever they are; of the two nearest
    numbers that a lot can leave by lot, where windows of a grid leave another one. Frames of a video share equally."""
    kept, budgets = [0] * len(met.counts), []
    for pictures in met.items:
        reserved = [met.counts[idx][0] for idx in pictures]
        # of a video, each frame by the same stride
        shortened = [[max(count // stride, 1) for count in reserved] for stride in range(1, max(reserved) + 1)]
        options = {sum(counts): counts for counts in shortened}
        wanted = sum(met.num_kept[idx] for idx in pictures)
        budgets.append(between(wanted, sorted(options), met.generator))
        for idx, count in zip(pictures, options[budgets[-1]], strict=True):
            kept[idx] = count
    return Instead(kept, {"vtc_budget": budgets}, {"compressor": "random", "frame_split": "uniform"})


def by_windows(met: Met) -> Instead:
    """Means of square windows, at the same layer; of the two nearest sizes by lot, so that as many are expected."""
    side, kept = math.isqrt(met.config.image_seq_length), []
    for num_tiles, wanted in zip(met.num_tiles, met.num_kept, strict=True):
        options = [num_tiles * (side // edge) ** 2 for edge in range(1, side + 1)]
        kept.append(between(wanted, options, met.generator))
    return Instead(kept, {"vtc_budget": list(kept)}, {"compressor": "avgpool2d"})


def windows_problem(config: LlavoltaConfig) -> str:
    """Why tokens have no square windows, empty if they do."""
    if config.grid_base is not None:
        return "grids of every size have other counts of windows: compare with `compressor='avgpool2d'` by hand"
    if math.isqrt(config.image_seq_length) ** 2 != config.image_seq_length:
        return f"the {config.image_seq_length} tokens of a tile are no square"
    return "" if config.mm_patch_merge_type == "flat" else "rows of joined tiles have no one length"


BASELINES = Baselines(
    # its draw follows from the lengths alone
    random=Baseline(by_random_tokens),
    pool=Baseline(by_windows, is_drawn=True, problem=windows_problem),
)

RECORD = register(
    Record(
        LlavoltaConfig,
        LlavoltaModel,
        LlavoltaForConditionalGeneration,
        costs=Costs(compressor_flops, layers),
        oracle=connect_all,
        draw=draw,
        baselines=BASELINES,
        compressor=connector_names,
        base=Base(
            kinds=("internvl", "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5"),
            official_fields=official_fields,
        ),
        sharding=Sharding(),
        trainers=("LlavoltaTrainer",),
        # a base's projector is no fresh one, which is what the paper's pretraining is for
        recipes=("llavolta_finetune",),
        shapes=of_llava({"compress_layer_idx": 2, "compress_stride": 8}),
    )
)
