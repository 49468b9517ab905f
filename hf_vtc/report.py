"""What compression can save, and what it does save: `estimate` counts, `bench` measures.

Three numbers, never one: `ideal` (analytic, from FLOPs and bytes), `oracle` (measured, as if choosing and packing
were free) and `measured`. eta = oracle / measured is our overhead; phi = (full - measured) / (full - oracle) is the
share of the possible gain that arrives, which matters when the ideal is near 1.

Conventions of the analytic part: 2 FLOP per multiply-accumulate, gated feed-forward (three matrices) in the language
model and a plain one in the tower, causal attention (half of the square). Left out: embeddings, `lm_head`, norms,
launch and host time.
"""

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from .models.budget_vtc import Budget, budgets_per_image, largest_admissible
from .models.image_processing_vtc import VtcImageProcessor

__all__ = ["BenchReport", "DecoderShape", "Estimate", "Timing", "TowerShape", "bench", "estimate", "printed_flops"]

# NVIDIA H100 SXM, dense bfloat16
PEAK_FLOPS = 989e12
BANDWIDTH = 3.35e12
# an ideal speed-up below this is not worth a user's time, and the report says so
WORTHWHILE = 1.1


@dataclass(frozen=True)
class DecoderShape:
    """What a decoder's costs depend on.

    `query_width` = heads x head_dim, `kv_width` = key/value heads x head_dim, `ffn_width` of one expert where there
    are experts.
    """

    width: int
    num_layers: int
    query_width: int
    kv_width: int
    ffn_width: int
    vocab_size: int
    num_experts: int = 1
    experts_per_token: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DecoderShape":
        """Read a `text_config` as a dictionary; Llama, Qwen, Mistral and their mixtures of experts share the names."""
        heads = _field(config, "num_attention_heads")
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        experts = config.get("num_experts") or config.get("num_local_experts") or 1
        return cls(
            width=_field(config, "hidden_size"),
            num_layers=_field(config, "num_hidden_layers"),
            query_width=heads * head_dim,
            kv_width=(config.get("num_key_value_heads") or heads) * head_dim,
            ffn_width=(experts > 1 and config.get("moe_intermediate_size")) or _field(config, "intermediate_size"),
            vocab_size=_field(config, "vocab_size"),
            num_experts=experts,
            experts_per_token=config.get("num_experts_per_tok") or 1,
        )

    def layer_params(self, num_experts: float) -> float:
        """Weights of one layer of which `num_experts` experts are counted."""
        attention = 2 * self.width * (self.query_width + self.kv_width)
        return attention + 3 * self.width * self.ffn_width * num_experts

    @property
    def params(self) -> int:
        """Weights without embeddings and `lm_head`."""
        return round(self.num_layers * self.layer_params(self.num_experts))

    def prefill_flops(self, num_tokens: int) -> float:
        """FLOPs of one prompt."""
        linear = 2 * self.layer_params(self.experts_per_token) * num_tokens
        return self.num_layers * (linear + 2 * num_tokens**2 * self.query_width)

    def kv_cache_bytes(self, num_tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values of `num_tokens` positions, all layers."""
        return 2 * self.kv_width * self.num_layers * num_tokens * bytes_per_value

    def weight_bytes(self, num_tokens: int, bytes_per_value: int = 2) -> float:
        """Bytes of weights that a step over `num_tokens` tokens reads; with experts, those expected to be hit."""
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        layers = self.num_layers * self.layer_params(self.num_experts * (1 - missed))
        return bytes_per_value * (layers + self.vocab_size * self.width)


@dataclass(frozen=True)
class TowerShape:
    """What a plain ViT's costs depend on; `num_layers` up to the one whose features are read."""

    width: int
    num_layers: int
    ffn_width: int
    num_patches: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], feature_layer: int = -1) -> "TowerShape":
        """Read a `vision_config` as a dictionary; `feature_layer` as in `VtcConfig.vision_feature_layer`."""
        layers = _field(config, "num_hidden_layers")
        read = layers if feature_layer == -1 else feature_layer % (layers + 1)
        grid = _side(_field(config, "image_size")) // _side(_field(config, "patch_size"))
        return cls(_field(config, "hidden_size"), read, _field(config, "intermediate_size"), grid * grid)

    def flops(self) -> float:
        """FLOPs of one tile, its class token included."""
        num_tokens = self.num_patches + 1
        params = 4 * self.width**2 + 2 * self.width * self.ffn_width
        return self.num_layers * (2 * params * num_tokens + 4 * num_tokens**2 * self.width)


def printed_flops(shape: DecoderShape, num_tokens: int) -> float:
    """What papers on token pruning print as FLOPs of a prefill.

    They count multiply-accumulates, and two feed-forward matrices although there are three.

    Source: FastV (arXiv 2403.06764), `4 n d^2 + 2 n^2 d + 2 n d m` per layer; DivPrune, HoliTom and DyCoke follow it.
    """
    width = shape.width
    per_layer = 4 * num_tokens * width**2 + 2 * num_tokens**2 * width + 2 * num_tokens * width * shape.ffn_width
    return shape.num_layers * per_layer


@dataclass
class Estimate:
    """Analytic costs of one call, without and with compression. Token counts are per image, the rest per batch.

    Args:
        num_tiles (`int`): tiles of one image, the thumbnail included.
        num_reserved, num_kept (`int`): visual tokens of one image before and after compression.
        kv_cache_bytes, full_kv_cache_bytes (`int`): after the prefill.
        prefill_flops, full_prefill_flops (`float`): of the language model.
        printed_prefill_flops, full_printed_prefill_flops (`float`): the same as papers on pruning print it.
        tower_flops (`float`): of the vision tower, which sees every tile in any case.
        compressor_flops (`float`): of connectors and router; not part of any ideal. 0 where unknown.
        prefill_speedup (`float`): ideal, language model alone, bound by arithmetic.
        ttft_speedup (`float`): ideal, tower and prefill, bound by arithmetic.
        end_to_end_speedup (`float`): ideal of the whole call on hardware of `peak_flops` and `bandwidth`.
        decode_share (`float`): share of the compressed call that goes into decoding, on the same hardware.
        notes (`list[str]`): what a reader of the numbers should know, in words.
    """

    model_type: str
    image_size: tuple[int, int]
    vtc_budget: Budget
    batch_size: int
    num_text_tokens: int
    max_new_tokens: int
    peak_flops: float
    bandwidth: float
    num_tiles: int
    num_reserved: int
    num_kept: int
    full_kv_cache_bytes: int
    kv_cache_bytes: int
    full_prefill_flops: float
    prefill_flops: float
    full_printed_prefill_flops: float
    printed_prefill_flops: float
    tower_flops: float
    compressor_flops: float
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
        return {**asdict(self), "compression_ratio": self.compression_ratio}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, uncompressed, compressed, ratio) in words."""
        pairs = [
            ("visual tokens per image", self.num_reserved, self.num_kept, _count),
            ("KV cache after the prefill", self.full_kv_cache_bytes, self.kv_cache_bytes, _bytes),
            ("prefill FLOPs", self.full_prefill_flops, self.prefill_flops, _flops),
            ("the same as papers print it", self.full_printed_prefill_flops, self.printed_prefill_flops, _flops),
            ("vision tower FLOPs", self.tower_flops, self.tower_flops, _flops),
        ]
        rows = [(name, show(full), show(kept), f"{full / kept:.2f}") for name, full, kept, show in pairs]
        if self.compressor_flops:
            rows.append(("connectors and router FLOPs", "", _flops(self.compressor_flops), ""))
        for name, value in (
            ("ideal speed-up, prefill", self.prefill_speedup),
            ("ideal speed-up, first token", self.ttft_speedup),
            ("ideal speed-up, whole call", self.end_to_end_speedup),
        ):
            rows.append((name, "", "", f"{value:.2f}"))
        return rows

    def title(self) -> str:
        height, width = self.image_size
        return (
            f"{self.model_type}: batch {self.batch_size}, {height} x {width} px in {self.num_tiles} tiles, "
            f"{self.num_text_tokens} text tokens, {self.max_new_tokens} new, budget {self.vtc_budget}"
        )

    def __str__(self) -> str:
        return _as_text(self.title(), ("", "full", "compressed", "ratio"), self.rows(), self.notes)

    def __rich__(self) -> Group:
        return _as_table(self.title(), ("", "full", "compressed", "ratio"), self.rows(), self.notes)


def estimate(
    model_or_config: PreTrainedModel | PretrainedConfig | Mapping[str, Any],
    image_size: tuple[int, int] = (896, 1344),
    num_text_tokens: int = 64,
    vtc_budget: Budget = 0.5,
    batch_size: int = 1,
    max_new_tokens: int = 32,
    *,
    num_tiles: int | None = None,
    image_processor: VtcImageProcessor | None = None,
    bytes_per_value: int = 2,
    peak_flops: float = PEAK_FLOPS,
    bandwidth: float = BANDWIDTH,
) -> Estimate:
    """What compression can save at best, from a config alone: one image per prompt, choosing tokens free of charge.

    Args:
        model_or_config: a model, its config, or the content of a `config.json`. Besides models of hf_vtc, every
            configuration with a ViT and a decoder works, so that the gain is known before anything is converted.
        image_size (`tuple[int, int]`): (height, width) in pixels.
        num_text_tokens (`int`): tokens of a prompt that are not visual.
        vtc_budget (`Budget`): as in `forward`, but not `"auto"`, which depends on the pixels.
        batch_size (`int`): prompts of the call.
        max_new_tokens (`int`): length of each answer, in tokens.
        num_tiles (`int`, *optional*): tiles of the image, thumbnail included. Default: as `image_processor` cuts it.
        image_processor (`VtcImageProcessor`, *optional*): default: InternVL's tiling with at most 12 tiles and a
            thumbnail, or one tile for LLaVA 1.5.
        bytes_per_value (`int`): of weights and KV cache.
        peak_flops (`float`), bandwidth (`float`): of the hardware, in FLOP/s and bytes/s, for the whole call. Default:
            NVIDIA H100 SXM in bfloat16.

    Raises:
        ValueError: the config has no tower or decoder that is known, or the budget cannot be met.
    """
    config = _config_dict(model_or_config)
    text = DecoderShape.from_config(_sub_config(config, "text_config", "llm_config"))
    tower = TowerShape.from_config(_sub_config(config, "vision_config"), _feature_layer(config))
    if num_tiles is None:
        processor = image_processor or _default_tiling(config)
        num_tiles = processor.get_tile_layout(*image_size).num_tiles
    reserved, kept = _visual_tokens(config, tower, num_tiles, vtc_budget)

    lengths = [num_text_tokens + count for count in (reserved, kept)]
    prefill = [batch_size * text.prefill_flops(length) for length in lengths]
    cache = [batch_size * text.kv_cache_bytes(length, bytes_per_value) for length in lengths]
    tower_flops = batch_size * num_tiles * tower.flops()
    first, decoding = [], []
    for length, flops in zip(lengths, prefill):
        weights = text.weight_bytes(batch_size * length, bytes_per_value)
        first.append(tower_flops / peak_flops + max(flops / peak_flops, weights / bandwidth))
        steps = range(length, length + max_new_tokens - 1)
        read = len(steps) * text.weight_bytes(batch_size, bytes_per_value)
        read += batch_size * text.kv_cache_bytes(sum(steps), bytes_per_value)
        decoding.append(read / bandwidth)
    result = Estimate(
        model_type=config.get("model_type", "unknown"),
        image_size=(int(image_size[0]), int(image_size[1])),
        vtc_budget=vtc_budget,
        batch_size=batch_size,
        num_text_tokens=num_text_tokens,
        max_new_tokens=max_new_tokens,
        peak_flops=peak_flops,
        bandwidth=bandwidth,
        num_tiles=num_tiles,
        num_reserved=reserved,
        num_kept=kept,
        full_kv_cache_bytes=cache[0],
        kv_cache_bytes=cache[1],
        full_prefill_flops=prefill[0],
        prefill_flops=prefill[1],
        full_printed_prefill_flops=batch_size * printed_flops(text, lengths[0]),
        printed_prefill_flops=batch_size * printed_flops(text, lengths[1]),
        tower_flops=tower_flops,
        compressor_flops=batch_size * _compressor_flops(config, tower, text, num_tiles, kept),
        prefill_speedup=prefill[0] / prefill[1],
        ttft_speedup=(tower_flops + prefill[0]) / (tower_flops + prefill[1]),
        end_to_end_speedup=(first[0] + decoding[0]) / (first[1] + decoding[1]),
        decode_share=decoding[1] / (first[1] + decoding[1]),
    )
    weights = text.weight_bytes(batch_size * lengths[1], bytes_per_value)
    result.notes = _notes(result, weights / bandwidth > prefill[1] / peak_flops)
    return result


def _notes(result: Estimate, bound_by_weights: bool) -> list[str]:
    notes = []
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
            "speed-ups of prefill and first token are out of reach at this batch size."
        )
    return notes


def _config_dict(source: PreTrainedModel | PretrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, PreTrainedModel):
        source = source.config
    if isinstance(source, PretrainedConfig):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(source)
    raise ValueError(
        f"`model_or_config` must be a model, a config or a dictionary, got {type(source).__name__}. Load a path by "
        "`AutoConfig.from_pretrained`."
    )


def _sub_config(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        if config.get(name):
            return config[name]
    raise ValueError(
        f"The config needs {' or '.join(f'`{name}`' for name in names)}, got {sorted(config)[:12]}. Give the config "
        "of a vision-language model."
    )


def _field(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ValueError(
            f"The sub-config of type {config.get('model_type')!r} has no `{name}`, so its costs are unknown. Only "
            "plain ViTs and decoders of the Llama, Qwen and Mistral families can be estimated."
        )
    return config[name]


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else int(size[0])


def _feature_layer(config: Mapping[str, Any]) -> int:
    layer = config.get("vision_feature_layer", config.get("select_layer", -1))
    return layer if isinstance(layer, int) else max(layer)


def _default_tiling(config: Mapping[str, Any]) -> VtcImageProcessor:
    tile = _side(config.get("force_image_size") or _field(_sub_config(config, "vision_config"), "image_size"))
    return VtcImageProcessor(tiling="pad" if config.get("model_type") == "llava" else "dynamic", size=tile)


def _visual_tokens(
    config: Mapping[str, Any], tower: TowerShape, num_tiles: int, vtc_budget: Budget
) -> tuple[int, int]:
    """Reserved and kept visual tokens of one image."""
    per_tile = config.get("image_seq_length")
    if per_tile is None:
        per_tile = round(tower.num_patches * config.get("downsample_ratio", 1) ** 2)
    reserved = num_tiles * per_tile
    (budget,) = budgets_per_image(vtc_budget, 1)
    if budget == "auto":
        raise ValueError(
            "`vtc_budget='auto'` cannot be estimated, because the router decides from the pixels. Give a share or a "
            "count, or call `count_visual_tokens` on real inputs."
        )
    if config.get("model_type") in _ADMISSIBLE_COUNTS:
        counts = _ADMISSIBLE_COUNTS[config["model_type"]](config, num_tiles)
    else:
        counts = range(1, reserved + 1)
    return reserved, largest_admissible(budget, counts)


def _vico_counts(config: Mapping[str, Any], num_tiles: int) -> list[int]:
    full = config["image_seq_length"]
    saved = full - round(full * config["downsample_ratio"] ** 2)
    return [full * num_tiles - saved * compressed for compressed in range(num_tiles + 1)]


# visual tokens that a method can give an image of `num_tiles` tiles; any number where a method is not listed
_ADMISSIBLE_COUNTS: dict[str, Callable[[Mapping[str, Any], int], Sequence[int]]] = {"vtc_vico": _vico_counts}


def _compressor_flops(
    config: Mapping[str, Any], tower: TowerShape, text: DecoderShape, num_tiles: int, num_kept: int
) -> float:
    """FLOPs of ViCO's connectors and router for one image; 0 for other models."""
    if config.get("model_type") != "vtc_vico":
        return 0.0
    width, out, ratio = tower.width, text.width, config["downsample_ratio"]
    full_tokens = config["image_seq_length"]
    compressed_tokens = round(full_tokens * ratio**2)
    num_compressed = (full_tokens * num_tiles - num_kept) // (full_tokens - compressed_tokens)
    fold = round(1 / ratio) ** 2
    full = full_tokens * (fold * width * out + out * out)
    compressed = compressed_tokens * (fold**2 * width * 2 * out + 2 * out * 2 * out + 2 * out * out)
    # keys and values of two attentions for every patch; queries, outputs and feed-forwards for one token per tile
    router = 4 * tower.num_patches * width**2 + 4 * (2 + 8) * width**2
    return 2.0 * ((num_tiles - num_compressed) * full + num_compressed * compressed + num_tiles * router)


@dataclass
class Timing:
    """Wall-clock seconds of one variant, one entry per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def p90(self) -> float:
        """90th percentile, nearest rank."""
        return sorted(self.seconds)[math.ceil(0.9 * len(self.seconds)) - 1]


@dataclass
class BenchReport:
    """Measured time to the first token of one batch, beside its oracle and its ideal.

    Args:
        full, measured, oracle (`Timing`): uncompressed, compressed by the model, and as if routing and packing were
            free.
        ideal_speedup (`float`): FLOPs of tower and prefill, full / compressed, over the real tokens of each row.
        num_reserved, num_kept (`list[int]`): visual tokens per image.
        num_text_tokens (`int`): tokens of the batch that are neither visual nor padding.
        environment (`dict[str, Any]`): device, dtype, attention, versions, threads, warm-up and rounds.
    """

    full: Timing
    measured: Timing
    oracle: Timing
    ideal_speedup: float
    vtc_budget: Any
    batch_size: int
    num_tiles: int
    num_reserved: list[int]
    num_kept: list[int]
    num_text_tokens: int
    num_parameters: int
    environment: dict[str, Any]

    @property
    def eta(self) -> float:
        """Oracle / measured time: 1 where routing and packing cost nothing."""
        return self.oracle.median / self.measured.median

    @property
    def paired_eta(self) -> float:
        """Median over the rounds of oracle / measured: steadier than `eta` on a machine that drifts."""
        return median(oracle / own for oracle, own in zip(self.oracle.seconds, self.measured.seconds))

    @property
    def speedup(self) -> float:
        """Full / measured time."""
        return self.full.median / self.measured.median

    @property
    def oracle_speedup(self) -> float:
        """Full / oracle time: what this machine could gain at best."""
        return self.full.median / self.oracle.median

    @property
    def phi(self) -> float | None:
        """Share of the possible gain that arrives; None where the oracle gains less than a hundredth."""
        possible = self.full.median - self.oracle.median
        if possible < 0.01 * self.full.median:
            return None
        return (self.full.median - self.measured.median) / possible

    def to_dict(self) -> dict[str, Any]:
        derived = ("eta", "paired_eta", "speedup", "oracle_speedup", "phi")
        content = {**asdict(self), **{name: getattr(self, name) for name in derived}}
        for name in ("full", "measured", "oracle"):
            timing = getattr(self, name)
            content[name] |= {"median": timing.median, "p90": timing.p90}
        return content

    def rows(self) -> list[tuple[str, ...]]:
        """(variant, median, 90th percentile, speed-up) in words."""
        rows = []
        for name, timing, speedup in (
            ("full", self.full, 1.0),
            (f"budget {self.vtc_budget}", self.measured, self.speedup),
            ("oracle", self.oracle, self.oracle_speedup),
        ):
            rows.append((name, f"{1e3 * timing.median:.1f} ms", f"{1e3 * timing.p90:.1f} ms", f"{speedup:.2f}"))
        return [*rows, ("ideal (FLOPs)", "", "", f"{self.ideal_speedup:.2f}")]

    def title(self) -> str:
        reserved, kept = sum(self.num_reserved), sum(self.num_kept)
        return (
            f"Time to first token: batch {self.batch_size}, {self.num_tiles} tiles, {kept} of {reserved} visual "
            f"tokens kept ({reserved / kept:.2f} x fewer), {self.num_text_tokens} text tokens"
        )

    def notes(self) -> list[str]:
        phi = "not defined, since the oracle gains nothing" if self.phi is None else f"{self.phi:.2f}"
        notes = [
            f"eta = oracle / measured = {self.eta:.3f} (median of rounds {self.paired_eta:.3f}); phi = {phi}",
            ", ".join(f"{name} {value}" for name, value in self.environment.items()),
        ]
        if self.ideal_speedup < WORTHWHILE:
            notes.append(f"The ideal speed-up is {self.ideal_speedup:.2f}: hardly anything can be gained here.")
        return notes

    def __str__(self) -> str:
        return _as_text(self.title(), ("", "median", "p90", "speed-up"), self.rows(), self.notes())

    def __rich__(self) -> Group:
        return _as_table(self.title(), ("", "median", "p90", "speed-up"), self.rows(), self.notes())


@torch.no_grad()
def bench(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    vtc_budget: Budget | Sequence[Budget] = 0.5,
    repeats: int = 10,
    warmup: int = 2,
    entry: str = "generate",
) -> BenchReport:
    """Measure the time to the first token: full, compressed and oracle, in turns within one run.

    The oracle knows the decisions and finds embeddings packed already: it runs the tower, the connectors that are
    needed, and then the stock language model for one token. Loading and tiling of images is not measured.

    Args:
        model: a model of hf_vtc in eval mode.
        inputs (`Mapping`): what the processor gives, with at least one image.
        vtc_budget: as in `forward`.
        repeats (`int`): rounds; each runs every variant once, in rotating order.
        warmup (`int`): rounds before, not counted.
        entry (`str`): `"generate"`: everyone runs `generate(max_new_tokens=1)`, the oracle that of transformers, so
            that our bookkeeping counts and that of transformers cancels out. `"forward"`: everyone runs one forward
            pass with logits of the last position, the oracle that of the language model.

    Raises:
        ValueError: there is no image, no oracle is known for this model, it is in training mode, or a number is too
            small.
    """
    model_type = model.config.model_type
    if model_type not in _NEEDED_CONNECTORS:
        raise ValueError(
            f"No oracle is known for models of type {model_type!r}, only for {sorted(_NEEDED_CONNECTORS)}. Load a "
            "model of hf_vtc."
        )
    if model.training:
        raise ValueError(
            "The model is in training mode, which runs the router and every connector. Call `model.eval()`."
        )
    if repeats < 1 or warmup < 0:
        raise ValueError(f"`repeats` must be at least 1 and `warmup` at least 0, got {repeats} and {warmup}.")
    if entry not in ("generate", "forward"):
        raise ValueError(f"`entry` must be 'generate' or 'forward', got {entry!r}.")
    if inputs.get("pixel_values") is None:
        raise ValueError("`inputs` must hold `pixel_values`. Build them from a prompt with an image.")
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    oracle = _Oracle(model, inputs, vtc_budget)
    if entry == "generate":
        ours, ideal = functools.partial(model.generate, **inputs, **_ONE_TOKEN), oracle.generate
    else:
        ours, ideal = functools.partial(_next_token, model, inputs), oracle.forward
    variants = {
        "full": lambda: ours(vtc_budget="full"),
        "measured": lambda: ours(vtc_budget=vtc_budget),
        "oracle": ideal,
    }
    seconds = _in_turns(variants, model.device, repeats, warmup)
    return BenchReport(
        **{name: Timing(values) for name, values in seconds.items()},
        ideal_speedup=oracle.ideal_speedup(),
        vtc_budget=vtc_budget,
        batch_size=oracle.kept_mask.shape[0],
        num_tiles=inputs["pixel_values"].shape[0],
        num_reserved=oracle.num_reserved,
        num_kept=oracle.num_kept,
        num_text_tokens=int((oracle.kept_mask & ~oracle.placeholders).sum()),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        environment={"entry": entry, "rounds": repeats, "warm-up": warmup, **_environment(model)},
    )


_ONE_TOKEN = {"max_new_tokens": 1, "do_sample": False}


def _next_token(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], vtc_budget: Any) -> torch.Tensor:
    return model(**inputs, vtc_budget=vtc_budget, logits_to_keep=1, use_cache=True).logits.argmax(-1)


class _Oracle:
    """The first token of a batch as if routing and packing were free: decisions and packed embeddings are prepared."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], vtc_budget: Any):
        self.model, self.pixel_values = model, inputs["pixel_values"]
        out = model(**inputs, vtc_budget=vtc_budget, logits_to_keep=1)
        full = model.count_visual_tokens(**inputs, vtc_budget="full")
        self.num_reserved, self.num_kept = full.tolist(), out.num_visual_tokens.tolist()
        mask = inputs.get("attention_mask")
        self.real = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).bool().cpu()
        self.kept_mask = out.kept_mask.cpu()
        self.placeholders = inputs["input_ids"].cpu() == model.config.image_token_id
        self.connectors = _NEEDED_CONNECTORS[model.config.model_type](model.model, out.router_decisions)
        self._pack(inputs["input_ids"], out.image_hidden_states)

    def _pack(self, input_ids: torch.Tensor, visual: torch.Tensor) -> None:
        # written apart from `pack_visual_tokens`, row by row, so that neither can hide a mistake of the other
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds[(self.kept_mask & self.placeholders).to(embeds.device)] = visual.to(embeds.dtype)
        rows = [row[kept.to(row.device)] for row, kept in zip(embeds, self.kept_mask)]
        longest = max(len(row) for row in rows)
        pads = [longest - len(row) for row in rows]
        self.embeds = torch.stack(
            [torch.cat([row.new_zeros(pad, row.shape[1]), row]) for pad, row in zip(pads, rows, strict=True)]
        )
        positions = torch.arange(longest).expand(len(rows), -1) - torch.tensor(pads)[:, None]
        self.attention_mask = (positions >= 0).long().to(embeds.device)
        self.position_ids = positions.clamp(min=0).to(embeds.device)
        self.padded = any(pads)

    def forward(self) -> torch.Tensor:
        """Next token of every row, `(B, 1)`, from the language model itself."""
        self.connectors(self.model.model.encode(self.pixel_values))
        outputs = self.model.model.language_model(
            inputs_embeds=self.embeds,
            attention_mask=self.attention_mask if self.padded else None,
            position_ids=self.position_ids if self.padded else None,
            use_cache=True,
        )
        return self.model.lm_head(outputs.last_hidden_state[:, -1:]).argmax(-1)

    def generate(self) -> torch.Tensor:
        """Next token of every row, `(B, 1)`, from the stock loop of transformers."""
        self.connectors(self.model.model.encode(self.pixel_values))
        return GenerationMixin.generate(
            self.model, inputs_embeds=self.embeds, attention_mask=self.attention_mask, **_ONE_TOKEN
        )

    def ideal_speedup(self) -> float:
        config = _config_dict(self.model)
        text = DecoderShape.from_config(config["text_config"])
        tower = TowerShape.from_config(config["vision_config"], _feature_layer(config))
        vision = self.pixel_values.shape[0] * tower.flops()
        full, kept = (
            vision + sum(map(text.prefill_flops, mask.sum(1).tolist())) for mask in (self.real, self.kept_mask)
        )
        return full / kept


def _vico_connectors(base: torch.nn.Module, decisions: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Run features through the connector that each tile needs; what comes out is not used."""
    parts = []
    for connector, chosen in ((base.multi_modal_projector, ~decisions), (base.compressed_projector, decisions)):
        tiles = chosen.nonzero().flatten()
        if len(tiles) > 0:
            parts.append((connector, None if len(tiles) == len(decisions) else tiles))

    def run(features: torch.Tensor) -> None:
        for connector, tiles in parts:
            connector(features if tiles is None else features[tiles])

    return run


# what the oracle of a method runs between tower and language model
_NEEDED_CONNECTORS: dict[str, Callable[[torch.nn.Module, torch.Tensor], Callable[[torch.Tensor], None]]] = {
    "vtc_vico": _vico_connectors
}


def _in_turns(
    variants: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each variant per round; the order rotates, so that none always follows the same other."""
    names, seconds = list(variants), {name: [] for name in variants}
    for round_idx in range(warmup + repeats):
        shift = round_idx % len(names)
        for name in names[shift:] + names[:shift]:
            _synchronize(device)
            start = time.perf_counter()
            variants[name]()
            _synchronize(device)
            if round_idx >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _environment(model: PreTrainedModel) -> dict[str, Any]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.text_config._attn_implementation,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _count(value: float) -> str:
    return f"{value:,}"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 2**10:.1f} KiB"


def _flops(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e6:.2f} M"


def _as_text(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], notes: list[str]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    body = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        body.append("  ".join(cells).rstrip())
    return "\n".join([title, *body, *notes])


def _as_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], notes: list[str]) -> Group:
    table = Table()
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return Group(Text(title, style="bold"), table, *map(Text, notes))
