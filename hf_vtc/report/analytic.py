"""The analytic part of a report: what compression can save at best."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from rich.console import Group
from transformers import PretrainedConfig, PreTrainedModel

from ..methods.costs import (
    PRINTED_CONVENTIONS,
    ConvTowerShape,
    DecoderShape,
    GridTowerShape,
    Workload,
    config_dict,
    decoder_of,
    printed_flops,
    side_of,
    sub_config,
    tower_of,
)
from ..methods.record import Costs, find_record
from ..models.host_vtc import grid_base_of
from ..models.image_processing_vtc import VtcImageProcessor
from ..models.prompt_vtc import BY_SCORES, Budget, budgets_per_image, level_within
from .hardware import Hardware, hardware_named
from .render import WORTHWHILE, as_table, as_text, binary_bytes, count, duration, flops

# height and width in pixels, where a caller gives none
IMAGE_SIZE = (896, 1344)


@dataclass
class Estimate:
    """Analytic costs of one call, without and with compression. Token counts are per image, the rest per batch.

    Args:
        num_tiles (`int`): tiles of one image, the thumbnail included.
        num_reserved, num_kept (`int`): visual tokens of one image before and after compression.
        kv_cache_bytes, full_kv_cache_bytes (`int`): after the prefill.
        prefill_flops, full_prefill_flops (`float`): of the language model.
        printed_prefill_flops, full_printed_prefill_flops (`dict[str, float]`): the same as papers on pruning print it,
            by the name of their convention, see `printed_flops`.
        tower_flops (`float`): of the vision tower up to the layer that is read; it sees every tile in any case.
        compressor_flops (`float`): of connectors and, where it runs, router; not part of any ideal. 0 for models of
            other packages.
        router_flops (`float`): share of it that a router takes, 0 where none runs.
        ttft_seconds, full_ttft_seconds (`float`): to the first token on `hardware` at its best.
        prefill_speedup (`float`): ideal, language model alone, bound by arithmetic.
        ttft_speedup (`float`): ideal, tower and prefill, bound by arithmetic.
        end_to_end_speedup (`float`): ideal of the whole call on `hardware`.
        decode_share (`float`): share of the compressed call that goes into decoding, on the same hardware.
        notes (`list[str]`): what a reader of the numbers should know, in words.
    """

    model_type: str
    image_size: tuple[int, int]
    vtc_budget: Budget
    batch_size: int
    num_text_tokens: int
    max_new_tokens: int
    hardware: Hardware
    num_tiles: int
    num_reserved: int
    num_kept: int
    full_kv_cache_bytes: int
    kv_cache_bytes: int
    full_prefill_flops: float
    prefill_flops: float
    full_printed_prefill_flops: dict[str, float]
    printed_prefill_flops: dict[str, float]
    tower_flops: float
    compressor_flops: float
    router_flops: float
    full_ttft_seconds: float
    ttft_seconds: float
    prefill_speedup: float
    ttft_speedup: float
    end_to_end_speedup: float
    decode_share: float
    notes: list[str] = field(default_factory=list)

    @property
    def compression_ratio(self) -> float:
        """Visual tokens before / after."""
        return self.num_reserved / self.num_kept

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        return {**asdict(self), "compression_ratio": self.compression_ratio}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, uncompressed, compressed, ratio) in words."""
        pairs = [
            ("visual tokens per image", self.num_reserved, self.num_kept, count),
            ("KV cache after the prefill", self.full_kv_cache_bytes, self.kv_cache_bytes, binary_bytes),
            ("prefill FLOPs", self.full_prefill_flops, self.prefill_flops, flops),
        ]
        for name, matrices in PRINTED_CONVENTIONS.items():
            formula = f"- {_AUTHORS[name]}'s 4nd^2 + 2n^2d + {matrices}ndm"
            pairs.append((formula, self.full_printed_prefill_flops[name], self.printed_prefill_flops[name], flops))
        pairs += [
            ("vision tower FLOPs", self.tower_flops, self.tower_flops, flops),
            ("first token, at best", self.full_ttft_seconds, self.ttft_seconds, duration),
        ]
        rows = [(name, show(full), show(kept), f"{full / kept:.2f}") for name, full, kept, show in pairs]
        if self.compressor_flops:
            name = "connectors and router FLOPs" if self.router_flops else "connectors FLOPs"
            rows.append((name, "", flops(self.compressor_flops), ""))
        for name, value in (
            ("ideal speed-up, prefill", self.prefill_speedup),
            ("ideal speed-up, first token", self.ttft_speedup),
            ("ideal speed-up, whole call", self.end_to_end_speedup),
        ):
            rows.append((name, "", "", f"{value:.2f}"))
        return rows

    def title(self) -> str:
        """What was estimated, in a line."""
        height, width = self.image_size
        return (
            f"{self.model_type}: batch {self.batch_size}, {height} x {width} px in {self.num_tiles} tiles, "
            f"{self.num_text_tokens} text tokens, {self.max_new_tokens} new, budget {self.vtc_budget}, on "
            f"{self.hardware}"
        )

    def __str__(self) -> str:
        return as_text(self.title(), ("", "full", "compressed", "ratio"), self.rows(), self.notes)

    def __rich__(self) -> Group:
        return as_table(self.title(), ("", "full", "compressed", "ratio"), self.rows(), self.notes)


def estimate(
    model_or_config: PreTrainedModel | PretrainedConfig | Mapping[str, Any],
    image_size: tuple[int, int] = IMAGE_SIZE,
    num_text_tokens: int = 64,
    vtc_budget: Budget = 0.5,
    batch_size: int = 1,
    max_new_tokens: int = 32,
    *,
    num_tiles: int | None = None,
    image_processor: VtcImageProcessor | None = None,
    hardware: Hardware | str = "h100",
) -> Estimate:
    """What compression can save at best, from a config alone: one image per prompt, choosing tokens free of charge.

    Args:
        model_or_config: a model, its config, or the content of a `config.json`. Besides models of hf_vtc, every
            configuration with a ViT or ConvNeXt and a decoder works, so that the gain is known before anything is
            converted.
        image_size (`tuple[int, int]`): (height, width) in pixels.
        num_text_tokens (`int`): tokens of a prompt that are not visual.
        vtc_budget (`Budget`): as in `forward`; `"auto"` only where it does not depend on the pixels.
        batch_size (`int`): prompts of the call.
        max_new_tokens (`int`): length of each answer, in tokens.
        num_tiles (`int`, *optional*): tiles of the image, thumbnail included. Default: as `image_processor` cuts it.
        image_processor (`VtcImageProcessor`, *optional*): default: as the base of the model cuts images, InternVL with
            at most 12 tiles and a thumbnail, LLaVA-NeXT with the canvases of its config, LLaVA 1.5 with one tile.
        hardware (`Hardware` or `str`): what the call runs on, or a name: `"h100"`, `"a100"`, `"l4"`, `"rtx4090"`, or
            `"cpu"` for this machine's CPU, which is measured.

    Raises:
        ValueError: the config has no tower or decoder that is known, the budget cannot be met, or no hardware has this
            name.
    """
    config = config_dict(model_or_config)
    workload = _workload(config, image_size, num_tiles, image_processor)
    costs = costs_of(config, "`estimate`")
    reserved, kept = _visual_tokens(config, workload, vtc_budget)
    workload = replace(workload, wants_all=reserved == kept and isinstance(vtc_budget, str))
    hardware = hardware_named(hardware) if isinstance(hardware, str) else hardware
    tower_flops = batch_size * workload.num_tiles * workload.tower.flops()
    full, compressed = (
        _call(workload, costs, num_text_tokens, reserved, count, batch_size, max_new_tokens, hardware)
        for count in (reserved, kept)
    )
    first = [tower_flops / hardware.peak_flops + call.prefill_seconds for call in (full, compressed)]
    whole = [seconds + call.decode_seconds for seconds, call in zip(first, (full, compressed))]
    router_flops = batch_size * _router_flops(costs, workload)
    result = Estimate(
        model_type=config.get("model_type", "unknown"),
        image_size=workload.image_size,
        vtc_budget=vtc_budget,
        batch_size=batch_size,
        num_text_tokens=num_text_tokens,
        max_new_tokens=max_new_tokens,
        hardware=hardware,
        num_tiles=workload.num_tiles,
        num_reserved=reserved,
        num_kept=kept,
        full_kv_cache_bytes=full.kv_cache_bytes,
        kv_cache_bytes=compressed.kv_cache_bytes,
        full_prefill_flops=full.prefill_flops,
        prefill_flops=compressed.prefill_flops,
        full_printed_prefill_flops=full.printed_flops,
        printed_prefill_flops=compressed.printed_flops,
        tower_flops=tower_flops,
        compressor_flops=batch_size * costs.compressor_flops(workload, kept) + router_flops,
        router_flops=router_flops,
        full_ttft_seconds=first[0],
        ttft_seconds=first[1],
        prefill_speedup=full.prefill_flops / compressed.prefill_flops,
        ttft_speedup=(tower_flops + full.prefill_flops) / (tower_flops + compressed.prefill_flops),
        end_to_end_speedup=whole[0] / whole[1],
        decode_share=compressed.decode_seconds / whole[1],
    )
    result.notes = _notes(result, compressed.bound_by_weights, costs, workload)
    return result


# who began a convention of `PRINTED_CONVENTIONS`, as they write it
_AUTHORS = {"fastv": "FastV", "pyramiddrop": "PyramidDrop"}


def _router_flops(costs: Costs, workload: Workload) -> float:
    """Of one image; what a router decides by itself cannot be estimated, so that here it ranks or does not run."""
    runs = costs.router_flops is not None and costs.router_ranks and not workload.wants_all
    return costs.router_flops(workload) if runs else 0.0


# a model of another package, as if tokens were dropped behind its tower
_OTHER = Costs(lambda workload, num_kept: 0.0)


def costs_of(config: PretrainedConfig | Mapping[str, Any], tool: str) -> Costs:
    """What a model's method adds to the costs of its parts.

    Args:
        tool (`str`): who asks, for messages.

    Raises:
        ValueError: the method's record does not say.
    """
    record = find_record(config)
    return _OTHER if record is None else record.need("costs", tool)


def decoder_parts(
    costs: Costs, config: Any, text: DecoderShape, num_text_tokens: int, num_reserved: int, num_kept: int
) -> list[tuple[DecoderShape, int]]:
    """The decoder cut where its length changes: each part, and the tokens that it sees."""
    layers = costs.layers(config, text.num_layers, num_reserved, num_kept)
    return [(replace(text, num_layers=count), num_text_tokens + visual) for count, visual in layers]


class _Call(NamedTuple):
    """What the language model does in one call, for the whole batch."""

    kv_cache_bytes: int
    prefill_flops: float
    printed_flops: dict[str, float]
    prefill_seconds: float
    decode_seconds: float
    bound_by_weights: bool


def _call(
    workload: Workload,
    costs: Costs,
    num_text_tokens: int,
    num_reserved: int,
    num_kept: int,
    batch_size: int,
    max_new_tokens: int,
    hardware: Hardware,
) -> _Call:
    text, width = workload.text, hardware.bytes_per_value
    parts = decoder_parts(costs, workload.config, text, num_text_tokens, num_reserved, num_kept)
    flops = batch_size * sum(part.prefill_flops(length) for part, length in parts)
    weights = text.weight_bytes(batch_size * parts[0][1], width) / hardware.bandwidth
    # every step reads all weights, and the cache as it has grown by then
    read = (max_new_tokens - 1) * text.weight_bytes(batch_size, width)
    for part, length in parts:
        read += batch_size * part.kv_cache_bytes(sum(range(length, length + max_new_tokens - 1)), width)
    return _Call(
        kv_cache_bytes=batch_size * sum(part.kv_cache_bytes(length, width) for part, length in parts),
        prefill_flops=flops,
        printed_flops={
            name: batch_size * sum(printed_flops(part, length, name) for part, length in parts)
            for name in PRINTED_CONVENTIONS
        },
        prefill_seconds=max(flops / hardware.peak_flops, weights),
        decode_seconds=read / hardware.bandwidth,
        bound_by_weights=weights > flops / hardware.peak_flops,
    )


def _notes(result: Estimate, bound_by_weights: bool, costs: Costs, workload: Workload) -> list[str]:
    notes = [
        "FLOPs: 2 per multiply-accumulate, three feed-forward matrices, causal attention as half of its square. "
        "Papers on pruning print multiply-accumulates, attention as a whole square, and two or three matrices."
    ]
    if costs.router_flops is not None and not result.router_flops:
        notes.append(
            f"The router, {flops(result.batch_size * costs.router_flops(workload))} FLOPs, does not run with this "
            "budget and is not counted."
        )
    if result.ttft_speedup < WORTHWHILE:
        share = result.tower_flops / (result.tower_flops + result.full_prefill_flops)
        notes.append(
            f"The ideal speed-up of the first token is {result.ttft_speedup:.2f}, below {WORTHWHILE}: hardly anything "
            f"can be gained there. The vision tower takes {share:.0%} of the arithmetic, and it sees every tile."
        )
    if result.end_to_end_speedup < WORTHWHILE:
        notes.append(
            f"The ideal speed-up of the whole call is {result.end_to_end_speedup:.2f}, below {WORTHWHILE}: no user "
            f"will notice it. Decoding takes {result.decode_share:.0%} of the time and reads all weights for every "
            "token, however short the prompt is. Larger batches, more tiles or shorter answers gain more."
        )
    if bound_by_weights:
        notes.append(
            "On this hardware the compressed prefill is bound by reading the weights, not by arithmetic, so the ideal "
            "speed-ups of prefill and first token by arithmetic are out of reach at this batch size; the time to the "
            "first token above counts that."
        )
    return notes


def _workload(
    config: Mapping[str, Any],
    image_size: tuple[int, int] = IMAGE_SIZE,
    num_tiles: int | None = None,
    image_processor: VtcImageProcessor | None = None,
) -> Workload:
    record = find_record(config)
    # the config of ours knows what follows from its fields
    own = config if record is None else record.config.from_dict(dict(config))
    text, tower, layout, seen = decoder_of(config), tower_of(config), None, image_size
    if num_tiles is None:
        processor = image_processor or _default_processor(config)
        layout = processor.get_tile_layout(*image_size)
        num_tiles = layout.num_tiles
        # a tower without a fixed size goes by what it sees
        seen = tuple(processor.size.values()) if processor.tiling == "crop" else layout.resized_size
        tower = tower_of(config, seen)
    elif isinstance(tower, GridTowerShape):
        raise ValueError(
            "`num_tiles` says nothing of a tower that sees every image at its own size. Give `image_size`, and "
            "`image_processor` if its limits are others than those of the published checkpoints."
        )
    elif isinstance(tower, ConvTowerShape):
        seen = tower.image_size
    height, width = image_size
    return Workload(own, text, tower, (int(height), int(width)), seen, num_tiles, layout)


# of the processors of published checkpoints: smallest and largest image, in pixels
_PIXEL_LIMITS = {"qwen2_5_vl": (56 * 56, 28 * 28 * 16384), "qwen3_vl": (2**16, 2**24), "qwen3_5": (2**16, 2**24)}


def _default_processor(config: Mapping[str, Any]) -> VtcImageProcessor:
    """LLaVA-NeXT's or LLaVA-OneVision's tiling where the config has canvases, InternVL's where it has InternVL's
    tower or pixel shuffle, Qwen's where it has such a tower, else LLaVA 1.5's."""
    vision, canvases = sub_config(config, "vision_config"), config.get("image_grid_pinpoints")
    base = grid_base_of(str(vision.get("model_type")))
    if base is not None:
        patch, (smallest, largest) = vision["patch_size"], _PIXEL_LIMITS[base]
        stride = patch * vision["spatial_merge_size"]
        return VtcImageProcessor(
            "patches", token_stride=stride, patch_size=patch, min_pixels=smallest, max_pixels=largest
        )
    size = side_of(config.get("force_image_size") or vision["image_size"])
    # official files hold them as text, and as (width, height)
    if isinstance(canvases, (list, tuple)):
        limit = config.get("max_map_tiles")
        return VtcImageProcessor("anyres", size, image_grid_pinpoints=canvases, max_map_tiles=limit)
    internvl = config.get("downsample_ratio", 1) < 1 or str(vision.get("model_type")).startswith("intern")
    return VtcImageProcessor("dynamic" if internvl else "pad", size)


def _levels(config: Mapping[str, Any], workload: Workload) -> Sequence[int]:
    """Counts of visual tokens that an image can have, all of them first."""
    if find_record(config) is not None:
        (levels,) = workload.config.levels(workload.sizes())
        return levels
    # of another package, whose tokens are dropped at will
    per_tile = config.get("image_seq_length")
    if per_tile is None:
        per_tile = workload.tower.num_patches // round(1 / config.get("downsample_ratio", 1)) ** 2
    return range(workload.num_tiles * per_tile, 0, -1)


def _own_level(config: Mapping[str, Any], workload: Workload, levels: Sequence[int]) -> int:
    """The level of `"auto"`, `BY_SCORES` where only pixels can tell."""
    return BY_SCORES if find_record(config) is None else workload.config.own_level(levels)


def _visual_tokens(config: Mapping[str, Any], workload: Workload, vtc_budget: Budget) -> tuple[int, int]:
    """Reserved and kept visual tokens of one image."""
    (budget,) = budgets_per_image(vtc_budget, 1)
    levels = _levels(config, workload)
    level = _own_level(config, workload, levels) if budget == "auto" else level_within(budget, levels)
    if level == BY_SCORES:
        raise ValueError(
            "`vtc_budget='auto'` cannot be estimated, because the router decides from the pixels. Give a share or a "
            "count, or call `count_visual_tokens` on real inputs."
        )
    return levels[0], levels[level]


def default_budget(config: PretrainedConfig | Mapping[str, Any]) -> Budget:
    """`"auto"`, or half of the tokens where `"auto"` keeps all although it need not, or `estimate` cannot tell."""
    config = config_dict(config)
    if find_record(config) is None:
        return 0.5
    workload = _workload(config)
    levels = _levels(config, workload)
    return "auto" if _own_level(config, workload, levels) > 0 or len(levels) == 1 else 0.5
