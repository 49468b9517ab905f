"""The measured part of a report: the time to the first token, beside what was possible."""

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Group
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel

from ..methods.costs import GridTowerShape, TowerShape, config_dict, decoder_of, sub_config, tower_of
from ..methods.record import record_of
from ..models.host_vtc import named_cache, position_axes
from ..models.layout_vtc import layout_of_prompt
from ..models.prompt_vtc import Budget, VisionInputs
from .analytic import costs_of, decoder_parts
from .render import WORTHWHILE, as_table, as_text


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
        num_tiles (`int`): of all images; where images are seen whole, images and frames of videos.
        num_reserved, num_kept (`list[int]`): visual tokens per image, and of each whole video.
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
        """Every figure and all that follows from them, for JSON."""
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
        """What was measured, in a line."""
        reserved, kept = sum(self.num_reserved), sum(self.num_kept)
        return (
            f"Time to first token: batch {self.batch_size}, {self.num_tiles} tiles, {kept} of {reserved} visual "
            f"tokens kept ({reserved / kept:.2f} x fewer), {self.num_text_tokens} text tokens"
        )

    def notes(self) -> list[str]:
        """What a reader of the figures should know, in words."""
        notes = [
            "Oracle: the same tower, the connectors that were needed, and the stock language model on embeddings that "
            "are packed already: what this machine could do if choosing and packing cost nothing. Ideal: the same "
            "counted in FLOPs.",
            f"eta = oracle / measured time = {self.eta:.3f} (median of rounds {self.paired_eta:.3f}): 1 if choosing "
            "and packing cost nothing.",
            "phi, the share of the possible gain (full - oracle) that arrives, "
            + ("is not defined, since the oracle gains nothing." if self.phi is None else f"= {self.phi:.2f}."),
            ", ".join(f"{name} {value}" for name, value in self.environment.items()),
        ]
        if self.ideal_speedup < WORTHWHILE:
            notes.append(f"The ideal speed-up is {self.ideal_speedup:.2f}: hardly anything can be gained here.")
        return notes

    def __str__(self) -> str:
        return as_text(self.title(), ("", "median", "p90", "speed-up"), self.rows(), self.notes())

    def __rich__(self) -> Group:
        return as_table(self.title(), ("", "median", "p90", "speed-up"), self.rows(), self.notes())


@torch.no_grad()
def bench(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    vtc_budget: Budget | Sequence[Budget] = 0.5,
    repeats: int = 10,
    warmup: int = 2,
    entry: str | None = None,
    on_round: Callable[[int], None] | None = None,
) -> BenchReport:
    """Measure the time to the first token: full, compressed and oracle, in turns within one run.

    The oracle knows the decisions and finds embeddings packed already: it runs the tower, the connectors that are
    needed, and then the stock language model for one token. Loading and tiling of images is not measured.

    Args:
        model: a model of hf_vtc in eval mode.
        inputs (`Mapping`): what the processor gives, with at least one image or video.
        vtc_budget: as in `forward`.
        repeats (`int`): rounds; each runs every variant once, in rotating order.
        warmup (`int`): rounds before, not counted.
        entry (`str`, *optional*): `"generate"`: everyone runs `generate(max_new_tokens=1)`, the oracle that of
            transformers, so that our bookkeeping counts and that of transformers cancels out. `"forward"`: everyone
            runs one forward pass with logits of the last position, the oracle that of the language model. Default:
            `"generate"`; `"forward"` where images get shorter inside of the decoder (LLaVolta) or positions have
            several axes (Qwen's bases), since no `generate` of transformers knows that for embeddings: the oracle then
            runs the decoder's layers alone, on what they were given.
        on_round (`Callable`, *optional*): called with the number of rounds that are done, those of the warm-up too.

    Raises:
        ValueError: there is no image or video, no oracle is known for this model or `entry`, the model is in training
            mode, or a number is too small.
    """
    for part in ("oracle", "costs"):
        record_of(model.config).need(part, "`bench`")
    if model.training:
        raise ValueError(
            "The model is in training mode, which runs the router and every connector. Call `model.eval()`."
        )
    if repeats < 1 or warmup < 0:
        raise ValueError(f"`repeats` must be at least 1 and `warmup` at least 0, got {repeats} and {warmup}.")
    if entry not in ("generate", "forward", None):
        raise ValueError(f"`entry` must be 'generate' or 'forward', got {entry!r}.")
    if inputs.get("pixel_values") is None and inputs.get("pixel_values_videos") is None:
        raise ValueError(
            "`inputs` must hold `pixel_values`, or `pixel_values_videos`. Build them from a prompt with an image or a "
            "video."
        )
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    oracle = Oracle(model, inputs, vtc_budget)
    if entry == "generate" and oracle.replay is not None:
        raise ValueError(
            "`entry='generate'` has no oracle where images get shorter inside of the decoder, or where positions have "
            "several axes. Leave it out."
        )
    if entry is None:
        entry = "generate" if oracle.replay is None else "forward"
    if entry == "generate":
        ours, ideal = functools.partial(model.generate, **inputs, **ONE_TOKEN), oracle.generate
    else:
        ours, ideal = functools.partial(_next_token, model, inputs), oracle.forward
    variants = {
        "full": lambda: ours(vtc_budget="full"),
        "measured": lambda: ours(vtc_budget=vtc_budget),
        "oracle": ideal,
    }
    seconds = in_turns(variants, model.device, repeats, warmup, on_round)
    return BenchReport(
        **{name: Timing(values) for name, values in seconds.items()},
        ideal_speedup=oracle.ideal_speedup(),
        vtc_budget=vtc_budget,
        batch_size=oracle.kept_mask.shape[0],
        num_tiles=_num_tiles(inputs),
        num_reserved=oracle.num_reserved,
        num_kept=oracle.num_kept,
        num_text_tokens=int((oracle.kept_mask & ~oracle.placeholders).sum()),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        environment={"entry": entry, "rounds": repeats, "warm-up": warmup, **_environment(model)},
    )


_GRIDS = ("image_grid_thw", "video_grid_thw")


def _num_tiles(inputs: Mapping[str, torch.Tensor]) -> int:
    """Tiles of all images, or images where they are seen whole, and frames of videos."""
    of_images = inputs.get("image_grid_thw", inputs.get("pixel_values", ()))
    return len(of_images) + (int(inputs["video_grid_thw"][:, 0].sum()) if "video_grid_thw" in inputs else 0)


ONE_TOKEN = {"max_new_tokens": 1, "do_sample": False}


def _next_token(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], vtc_budget: Any) -> torch.Tensor:
    return model(**inputs, vtc_budget=vtc_budget, logits_to_keep=1, use_cache=True).logits.argmax(-1)


class Oracle:
    """The first token of a batch as if routing and packing were free: decisions and packed embeddings are prepared.

    Args:
        model, vtc_budget: as in `bench`.
        inputs (`dict`): what the processor gives, on the model's device; `router_decisions` in place of a budget.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], vtc_budget: Any):
        self.model, self.config = model, config_dict(model)
        replay = _Replay(model.model.language_model)
        with replay.recording():
            out = model(**inputs, vtc_budget=vtc_budget, logits_to_keep=1)
        # no `generate` of transformers gives embeddings positions of several axes
        replays = replay.is_interrupted or position_axes(model.config.text_config)
        self.replay = replay if replays else None
        undecided = {name: value for name, value in inputs.items() if name != "router_decisions"}
        full = model.count_visual_tokens(**undecided, vtc_budget="full")
        self.num_reserved, self.num_kept = full.tolist(), out.num_visual_tokens.tolist()
        mask = inputs.get("attention_mask")
        self.real = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).bool().cpu()
        self.kept_mask = out.kept_mask.cpu()
        self.placeholders = _placeholders(model.config, inputs["input_ids"].cpu())
        self.tower_flops = _tower_flops(self.config, inputs)
        self.encode = plain_features(model.model, inputs)
        self.connect = record_of(model.config).need("oracle", "`bench`")(model.model, out)
        self._pack(inputs["input_ids"], out.image_hidden_states)

    def _pack(self, input_ids: torch.Tensor, visual: torch.Tensor) -> None:
        # written apart from `pack_visual_tokens`, row by row, so that neither can hide a mistake of the other
        embeds = self.model.get_input_embeddings()(self.model.model.ids_with_embeddings(input_ids))
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

    def logits(self) -> torch.Tensor:
        """Logits `(B, 1, V)` of the last position, from the language model itself."""
        self.connect(self.encode())
        if self.replay is not None:
            return self.model.lm_head(self.replay.run()[:, -1:])
        outputs = self.model.model.language_model(
            inputs_embeds=self.embeds,
            attention_mask=self.attention_mask if self.padded else None,
            position_ids=self.position_ids if self.padded else None,
            use_cache=True,
        )
        return self.model.lm_head(outputs.last_hidden_state[:, -1:])

    def forward(self) -> torch.Tensor:
        """Next token of every row, `(B, 1)`, from the language model itself."""
        return self.logits().argmax(-1)

    def generate(self) -> torch.Tensor:
        """Next token of every row, `(B, 1)`, from the stock loop of transformers."""
        self.connect(self.encode())
        return GenerationMixin.generate(
            self.model, inputs_embeds=self.embeds, attention_mask=self.attention_mask, **ONE_TOKEN
        )

    def ideal_speedup(self) -> float:
        text, costs = decoder_of(self.config), costs_of(self.config, "`bench`")
        own, reserved, kept = (
            mask.sum(1).tolist()
            for mask in (
                self.real & ~self.placeholders,
                self.real & self.placeholders,
                self.kept_mask & self.placeholders,
            )
        )
        full, compressed = (
            sum(
                part.prefill_flops(length)
                for row in zip(own, reserved, counts, strict=True)
                for part, length in decoder_parts(costs, self.model.config, text, *row)
            )
            for counts in (reserved, kept)
        )
        return (self.tower_flops + full) / (self.tower_flops + compressed)


class _Replay:
    """A decoder's layers on what they were given once: nothing is chosen, shortened or masked anew."""

    def __init__(self, decoder: torch.nn.Module):
        self.decoder = decoder
        # layer -> its input, where that is not what the layer before gave
        self.given: dict[int, torch.Tensor] = {}
        # further arguments of each layer: those of attention and of recurrence have other masks
        self.arguments: dict[int, dict[str, Any]] = {}

    @property
    def is_interrupted(self) -> bool:
        """Whether something happened between two layers."""
        return len(self.given) > 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note what the layers are given while the body runs."""
        last = None

        def before(layer_idx: int, args: tuple, kwargs: dict[str, Any]) -> None:
            self.arguments[layer_idx] = kwargs
            if args[0] is not last:
                self.given[layer_idx] = args[0]

        def after(output: torch.Tensor) -> None:
            nonlocal last
            last = output

        handles = []
        for layer_idx, layer in enumerate(self.decoder.layers):
            note = functools.partial(before, layer_idx)
            handles.append(
                layer.register_forward_pre_hook(lambda _, *given, note=note: note(*given), with_kwargs=True)
            )
            handles.append(layer.register_forward_hook(lambda module, args, output: after(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self) -> torch.Tensor:
        """Last hidden states, `(B, L, D)` at the length of the last layer."""
        cache, states = named_cache(DynamicCache(config=self.decoder.config)), None
        for layer_idx, layer in enumerate(self.decoder.layers):
            states = layer(self.given.get(layer_idx, states), **{**self.arguments[layer_idx], **cache})
            # those of Qwen2.5-VL in 4.57 and 5.0
            states = states[0] if isinstance(states, tuple) else states
        return self.decoder.norm(states)


def plain_features(base: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that runs the tower without anything that a method adds to it; sizes are on the host before."""
    told = {name: inputs[name] for name in VisionInputs.__dataclass_fields__ if name in inputs}
    vision = VisionInputs(**{**told, "router_decisions": None, "vtc_budget": "full"})
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    video_mask = base.find_videos(ids, None) if vision.has_videos else None
    layout = layout_of_prompt(base.config, _placeholders(base.config, ids), mask, vision, video_mask=video_mask)
    return lambda: base.encode_of(vision, layout)


def _placeholders(config: PretrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Where a prompt has placeholders, of images and of videos."""
    return torch.isin(input_ids, input_ids.new_tensor(config.placeholder_ids))


def _tower_flops(config: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> float:
    tower = tower_of(config)
    if isinstance(tower, GridTowerShape):
        patch_size = sub_config(config, "vision_config")["patch_size"]
        grids = [grid for name in _GRIDS if name in inputs for grid in inputs[name].tolist()]
        # a frame of a video is to the tower what an image is
        return sum(
            frames * tower_of(config, (rows * patch_size, columns * patch_size)).flops()
            for frames, rows, columns in grids
        )
    if isinstance(tower, TowerShape):
        return _num_tiles(inputs) * tower.flops()
    pixel_values = inputs["pixel_values"]
    sizes = inputs.get("image_sizes")
    sizes = [pixel_values.shape[-2:]] * pixel_values.shape[0] if sizes is None else sizes.tolist()
    return sum(tower_of(config, tuple(size)).flops() for size in sizes)


def in_turns(
    variants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    warmup: int,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each variant per round; the order rotates, so that none always follows the same other.

    Args:
        variants (`Mapping[str, Callable]`): what is measured, by name.
        device (`torch.device`): that is waited for before and after each call.
        repeats (`int`): rounds that count.
        warmup (`int`): rounds before, which do not.
        on_round (`Callable`, *optional*): called with the number of rounds that are done.
    """
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
        if on_round is not None:
            on_round(round_idx + 1)
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
