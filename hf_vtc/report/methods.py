"""What a report must know about each method: one entry of `METHODS`, by `config.model_type`.

Costs count multiply-accumulates of matrices alone; means, norms and sorting are left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..models.configuration_llavolta import LlavoltaConfig
from ..models.layout_vtc import layout_of_images
from ..models.prompt_vtc import VisionInputs
from ..models.tiling_vtc import TileLayout, pooled_grid, unpadded_grids
from .costs import ConvTowerShape, DecoderShape, TowerShape, linear_flops


@dataclass(frozen=True)
class Workload:
    """One image and the model that sees it: what counts and costs depend on.

    Args:
        config (`Mapping`): content of the model's `config.json`.
        image_size (`tuple[int, int]`): (height, width) in pixels.
        num_tiles (`int`): tiles of the image, the thumbnail included.
        layout (`TileLayout`, *optional*): how it is cut; None where only `num_tiles` is known.
    """

    config: Mapping[str, Any]
    text: DecoderShape
    tower: TowerShape | ConvTowerShape
    image_size: tuple[int, int]
    num_tiles: int
    layout: TileLayout | None = None

    @property
    def shuffle_factor(self) -> int:
        """Side factor of the connector's pixel shuffle, 1 for none."""
        return round(1 / self.config.get("downsample_ratio", 1))

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile without compression."""
        given = self.config.get("image_seq_length")
        return self.tower.num_patches // self.shuffle_factor**2 if given is None else given

    @property
    def num_tokens(self) -> int:
        """Visual tokens of all tiles without compression."""
        return self.num_tiles * self.tokens_per_tile

    def map_tokens(self, tokens: tuple[int, int], rule: str) -> int:
        """Tokens of an image whose tiles, of (rows, columns) `tokens` each, are joined as LLaVA-NeXT does.

        Raises:
            ValueError: it is not known how the image is cut.
        """
        per_tile = tokens[0] * tokens[1]
        if self.layout is None:
            raise ValueError(
                "`num_tiles` alone does not tell the token count of a model that joins tiles to a map. Give "
                "`image_size`, and `image_processor` if it cuts images otherwise than the config says."
            )
        if self.num_tiles == 1:
            return per_tile
        size, grid = torch.tensor([self.layout.image_size]), torch.tensor([self.layout.grid])
        ((rows, columns),) = unpadded_grids(size, grid, tokens, rule).tolist()
        return per_tile + rows * (columns + 1)

    def projector_flops(self, num_tokens: int) -> float:
        """FLOPs of LLaVA's or InternVL's two linear layers for this many visual tokens."""
        return linear_flops(num_tokens, self.shuffle_factor**2 * self.tower.width, self.text.width, self.text.width)


class MethodReport(NamedTuple):
    """How a method differs from others in a report.

    Args:
        counts: visual tokens that it can give an image; the largest is what is reserved.
        compressor_flops: FLOPs of one image that are neither the plain tower's nor the language model's, given the
            kept tokens.
        layers: how many layers of the language model see how many visual tokens, as `(layers, tokens)` in order, from
            config, number of layers, reserved and kept tokens.
        connect: the connectors of an oracle: from base model and model output to a function that runs a batch of
            features through those that were needed. None: there is no oracle.
        auto: visual tokens that `vtc_budget="auto"` keeps. None: that depends on the pixels.
    """

    counts: Callable[[Workload], Sequence[int]]
    compressor_flops: Callable[[Workload, int], float]
    layers: Callable[[Mapping[str, Any], int, int, int], list[tuple[int, int]]]
    connect: Callable[[torch.nn.Module, Any], Callable[[torch.Tensor], Any]] | None
    auto: Callable[[Workload], int] | None = None


def any_count(workload: Workload) -> Sequence[int]:
    """A model of another package: as if its tokens could be dropped at will."""
    return range(1, workload.num_tokens + 1)


def unknown_flops(workload: Workload, num_kept: int) -> float:
    return 0.0


def project_all_flops(workload: Workload, num_kept: int) -> float:
    """The projector, which sees every token."""
    return workload.projector_flops(workload.num_tokens)


def same_in_every_layer(
    config: Mapping[str, Any], num_layers: int, num_reserved: int, num_kept: int
) -> list[tuple[int, int]]:
    return [(num_layers, num_kept)]


def vico_counts(workload: Workload) -> list[int]:
    full, tiles = workload.tokens_per_tile, workload.num_tiles
    saved = full - full // workload.shuffle_factor**2
    return [full * tiles - saved * compressed for compressed in range(tiles + 1)]


def vico_flops(workload: Workload, num_kept: int) -> float:
    """Both connectors and the router."""
    width, out, fold = workload.tower.width, workload.text.width, workload.shuffle_factor**2
    full = workload.tokens_per_tile
    small = full // fold
    num_compressed = (full * workload.num_tiles - num_kept) // (full - small)
    connectors = workload.projector_flops(full * (workload.num_tiles - num_compressed))
    connectors += linear_flops(small * num_compressed, fold**2 * width, 2 * out, 2 * out, out)
    # four attentions of one query, each of four projections and of all patches in every head; four feed-forwards
    router = linear_flops(16, width, width) + linear_flops(4, width, 4 * width, width)
    router += 4 * 4.0 * workload.config["router_num_heads"] * workload.tower.num_patches * width
    return connectors + workload.num_tiles * router


def vico_connect(base: torch.nn.Module, output: Any) -> Callable[[torch.Tensor], None]:
    """Each tile through the connector that it needs."""
    decisions, parts = output.router_decisions, []
    for connector, chosen in ((base.multi_modal_projector, ~decisions), (base.compressed_projector, decisions)):
        tiles = chosen.nonzero().flatten()
        if len(tiles) > 0:
            parts.append((connector, None if len(tiles) == len(decisions) else tiles))

    def run(features: torch.Tensor) -> None:
        for connector, tiles in parts:
            connector(features if tiles is None else features[tiles])

    return run


def avg_llava_counts(workload: Workload) -> list[int]:
    scales, config = workload.config["vis_token_granularity"], workload.config
    if config["mm_patch_merge_type"] == "flat":
        return [workload.num_tiles * scale for scale in scales]
    grids = [pooled_grid(math.isqrt(scales[-1]), scale) for scale in scales]
    counts = [workload.map_tokens(grid, config["unpad_rule"]) for grid in grids]
    # newlines can make a coarse map longer than the finest one
    return [count for count in counts if count <= counts[-1]]


def avg_llava_flops(workload: Workload, num_kept: int) -> float:
    """The projector of every token, and the router, which reads all granularities and the filtered text."""
    config, tiles, width = workload.config, workload.num_tiles, workload.text.width
    scales = config["vis_token_granularity"]
    length = sum(scales) + config["filtered_text_num"]
    # queries, keys, values, output and feed-forward; then the two layers that vote
    router = linear_flops(6 * tiles * length, width, width) + linear_flops(tiles * length, width, width, len(scales))
    pairs = tiles * length * (tiles if config["router_attention"] == "tiles" else length)
    return workload.projector_flops(workload.num_tokens) + router + 4.0 * pairs * width


def _llavolta(workload: Workload) -> tuple[LlavoltaConfig, int]:
    """Config, which knows the strides, and visual tokens of the image."""
    config = LlavoltaConfig.from_dict(dict(workload.config))
    if config.mm_patch_merge_type == "flat":
        return config, workload.num_tokens
    side = math.isqrt(config.image_seq_length)
    return config, workload.map_tokens((side, side), config.unpad_rule)


def llavolta_counts(workload: Workload) -> list[int]:
    config, length = _llavolta(workload)
    return [config.kept_tokens(length, stride) for stride in config.strides_of(length)]


def llavolta_auto(workload: Workload) -> int:
    config, length = _llavolta(workload)
    return config.kept_tokens(length, config.compress_stride) if config.compresses else length


def llavolta_layers(
    config: Mapping[str, Any], num_layers: int, num_reserved: int, num_kept: int
) -> list[tuple[int, int]]:
    """Layers before the one that shortens images see all of their tokens."""
    num_long = max(config["compress_layer_idx"], 0)
    parts = [(num_long, num_reserved), (num_layers - num_long, num_kept)]
    return [part for part in parts if part[0] > 0]


def vistog_counts(workload: Workload) -> list[int]:
    return [workload.num_tiles * workload.config["num_semantic_tokens"], workload.num_tokens]


def vistog_flops(workload: Workload, num_kept: int) -> float:
    """Semantic tokens in every layer of the tower, the grouping layer, and the projector of what is left."""
    config, tower, patches = workload.config, workload.tower, workload.tokens_per_tile
    groups, width = config["num_semantic_tokens"], tower.width
    projector = workload.projector_flops(num_kept)
    if num_kept == workload.num_tokens:
        return projector
    layer = linear_flops(groups, *[width] * 5) + linear_flops(groups, width, tower.ffn_width, width)
    layer += 4.0 * groups * (tower.num_patches + 1 + groups) * width
    # queries of groups, keys of patches, similarity, mean
    grouping = linear_flops(groups + patches, width, width) + 4.0 * groups * patches * width
    if config["merge"] == "projected":
        grouping += linear_flops(groups + patches, width, width)
    if config["mlp"]:
        grouping += linear_flops(groups, width, 4 * width, width)
    return projector + workload.num_tiles * (tower.num_layers * layer + grouping)


def vistog_auto(workload: Workload) -> int:
    return min(vistog_counts(workload))


def convllava_counts(workload: Workload) -> list[int]:
    """The tower's last map, which nothing shortens."""
    return [workload.tower.num_patches]


def convllava_flops(workload: Workload, num_kept: int) -> float:
    return workload.projector_flops(num_kept)


def convllava_auto(workload: Workload) -> int:
    return workload.tower.num_patches


def connect_all(base: torch.nn.Module, output: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Every feature through the projector."""
    return base.multi_modal_projector


def connect_kept(base: torch.nn.Module, output: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """As many features through the projector as there are visual tokens afterwards."""
    kept = int(output.num_visual_tokens.sum())
    return lambda features: base.multi_modal_projector(features.flatten(0, 1)[:kept])


METHODS = {
    "vtc_vico": MethodReport(vico_counts, vico_flops, same_in_every_layer, vico_connect),
    "vtc_avg_llava": MethodReport(avg_llava_counts, avg_llava_flops, same_in_every_layer, connect_all),
    "vtc_llavolta": MethodReport(llavolta_counts, project_all_flops, llavolta_layers, connect_all, llavolta_auto),
    "vtc_vistog": MethodReport(vistog_counts, vistog_flops, same_in_every_layer, connect_kept, vistog_auto),
    "vtc_convllava": MethodReport(convllava_counts, convllava_flops, same_in_every_layer, connect_all, convllava_auto),
}
_OTHER = MethodReport(any_count, unknown_flops, same_in_every_layer, None)


def report_of(config: Mapping[str, Any]) -> MethodReport:
    """The entry of a model's method, given the content of its `config.json`."""
    return METHODS.get(config.get("model_type"), _OTHER)


def decoder_parts(
    config: Mapping[str, Any], text: DecoderShape, num_text_tokens: int, num_reserved: int, num_kept: int
) -> list[tuple[DecoderShape, int]]:
    """The decoder cut where its length changes: each part, and the tokens that it sees."""
    layers = report_of(config).layers(config, text.num_layers, num_reserved, num_kept)
    return [(replace(text, num_layers=count), num_text_tokens + visual) for count, visual in layers]


def plain_features(base: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that runs the tower without anything that a method adds to it; sizes are on the host before."""
    names = ("num_tiles", "image_sizes")
    vision = VisionInputs(inputs["pixel_values"], vtc_budget="full", **{name: inputs.get(name) for name in names})
    layout = layout_of_images(base.config, vision)
    return lambda: base.encode(inputs["pixel_values"], layout)
