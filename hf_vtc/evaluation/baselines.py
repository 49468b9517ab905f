"""Baselines: other ways to spend as many visual tokens, image by image, as the method's point beside them.

`random`: the method's own decision by lot. `pool`: means of a regular grid. `smaller`: a smaller image, cut into
fewer tiles, none compressed. `subset`: tokens of full length by lot. `fixed`: one decision for all images. Names of
`comparators.py`: a training-free method on the same model. Where an image has no such count, its two neighbours are
mixed by lot so that the count is expected.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..methods import record_of
from ..methods.baselines import Baseline, Instead, Met, between
from ..models.configuration_vtc import VtcConfig
from ..models.packing_vtc import filled, first_slots, kept_positions, pack_visual_tokens
from ..models.prompt_vtc import VisionInputs
from .comparators import COMPARATORS, comparator
from .points import Point
from .questions import Question
from .running import Answer, Asker, Batch

NAMES = ("random", "pool", "smaller", "subset", "fixed", *COMPARATORS)
# why not with a base whose tower sees grids
_NO_PLACES = "a prompt of embeddings alone does not say where in an image or video its visual tokens stand"
_NOT_ON_GRIDS = {
    "subset": _NO_PLACES,
    "pool": _NO_PLACES,
    "smaller": "images and frames of this base have no tiles of which there could be fewer",
}


def baseline_points(
    asker: Asker, points: Sequence[Point], questions: Sequence[Question], names: Sequence[str], seeds: int
) -> tuple[list[Point], list[str]]:
    """The baselines beside each of the method's points, and notes on those that cannot be.

    Raises:
        ValueError: a name is that of none.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"`baselines` must be of {', '.join(NAMES)}, got {name!r}.")
    config, notes, found = asker.config, [], []
    methods = [point for point in points if point.budget != "full"]
    if not any(question.num_shown for question in questions) or not methods or not names:
        return [], []
    own = record_of(config).need("baselines", "`evaluate(..., baselines=...)`")
    for name in dict.fromkeys(names):
        if name == "fixed":
            found += [Point(each, "fixed", "full", "full") for each in own.fixed(config)]
            if not own.fixed(config):
                notes.append("No `fixed`: the method takes no decision that could be taken for all images alike.")
            continue
        problem = _problem(asker, name, questions)
        if problem:
            notes.append(f"No `{name}`: {problem}.")
            continue
        draws = seeds if _is_drawn(config, name) else 1
        chosen = methods
        if name == "random" and own.random.of_choice:
            chosen = [point for point in methods if point.budget == "auto"]
        for point in chosen:
            for draw in range(draws):
                number = f" #{draw + 1}" if draws > 1 else ""
                found.append(Point(f"{name} beside {point.name}{number}", name, point.budget, point.name, draw))
    return found, notes


def _is_drawn(config: VtcConfig, name: str) -> bool:
    """Whether draws of a baseline differ so much that several are taken."""
    own = record_of(config).baselines
    return name == "subset" or name == "random" and own.random is not None and own.random.is_drawn


def _problem(asker: Asker, name: str, questions: Sequence[Question]) -> str:
    """Why a baseline cannot be made with this model, empty if it can."""
    config, own = asker.config, record_of(asker.config).baselines
    if config.grid_base is not None and (name in ("subset", "smaller") or name == "pool" and own.pool is None):
        return _NOT_ON_GRIDS[name]
    if name == "random":
        return "the method takes no decision" if own.random is None else own.random.problem(config)
    if name == "pool" and own.pool_problem:
        return own.pool_problem
    if name == "pool" and own.pool is not None:
        return own.pool.problem(config)
    if name == "pool":
        return "" if config.mm_patch_merge_type == "flat" else "rows of joined tiles have no one length"
    if name in COMPARATORS:
        try:
            comparator(asker, name)
        except ValueError as error:
            return str(error).removesuffix(".")
    if name == "smaller" and any(question.num_videos for question in questions):
        return "frames of videos are cut into no tiles of which there could be fewer"
    sizes = [size for question in questions for size in question.image_sizes]
    if name == "smaller" and all(len(smaller_options(asker.processor, [size])) == 1 for size in sizes):
        return "the image processor cuts every image into as many tiles, however small it is"
    return ""


def smaller_options(processor: Any, image_sizes: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Visual tokens of all images of a prompt together by the largest number of tiles; of equal ones the first."""
    cutter = processor.image_processor
    limits = range(cutter.min_tiles, cutter.max_tiles + 1) if cutter.tiling == "dynamic" else [cutter.max_tiles]
    options: dict[int, int] = {}
    for max_tiles in limits:
        alone = len(image_sizes) == 1
        count = sum(processor.reserved_tokens(*size, alone, max_tiles=max_tiles) for size in image_sizes)
        if count not in options.values():
            options[max_tiles] = count
    return options


@dataclass
class Rival:
    """A baseline's answers to the batches of a run."""

    asker: Asker
    seed: int
    comparators: dict[str, Asker] = field(default_factory=dict)

    def answer(self, batch: Batch, point: Point) -> tuple[list[Answer], float]:
        """Answers of a baseline's point, and seconds, the tower's included."""
        if not batch.items:
            return self.asker.answer(batch, point)
        if point.family == "smaller":
            return self._smaller(batch, point)
        if point.family in COMPARATORS:
            return self._compared(batch, point)
        own = record_of(self.asker.config).baselines
        if point.family == "fixed":
            return self._instead(batch, point, own.fixed(self.asker.config)[point.name])
        known = {"random": own.random, "pool": own.pool}.get(point.family)
        if known is not None:
            return self._instead(batch, point, known)
        return self._packed(batch, point, _some_tokens if point.family == "subset" else _pooled_tokens)

    def _generator(self, batch: Batch, point: Point) -> torch.Generator:
        """Chance of one point and batch, the same in every run with this seed."""
        name = f"{self.seed} {point.name} {batch.questions[0].key}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))

    def _met(self, batch: Batch, point: Point) -> Met:
        found = self.asker.compressed(batch, point.budget)
        decisions = found.visual.router_decisions
        return Met(
            self.asker.config,
            batch.num_tiles,
            batch.items,
            batch.counts,
            found.choice.num_kept.tolist(),
            None if decisions is None else decisions.cpu(),
            self._generator(batch, point),
        )

    def _instead(self, batch: Batch, point: Point, baseline: Baseline) -> tuple[list[Answer], float]:
        instead = baseline.make(self._met(batch, point))
        arguments = {
            name: value.to(self.asker.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in instead.arguments.items()
        }
        with _changed(self.asker.config, instead.fields):
            texts, truncated, seconds = self.asker.generate({**batch.given, **arguments})
        return self._answers(batch, point, texts, truncated, instead), seconds + batch.seconds

    def _answers(
        self, batch: Batch, point: Point, texts: Sequence[str], truncated: Sequence[bool], instead: Instead
    ) -> list[Answer]:
        kept = batch.per_question(instead.num_kept)
        return self.asker.as_answers(batch, point, texts, truncated, kept, batch.num_reserved)

    @torch.no_grad()
    def _packed(
        self, batch: Batch, point: Point, choose: Callable[[Met, list[torch.Tensor]], list[torch.Tensor]]
    ) -> tuple[list[Answer], float]:
        """Visual tokens of full length, of which `choose` makes fewer, given to the language model as they are."""
        met, full = self._met(batch, point), self.asker.compressed(batch, "full").visual.embeds
        reserved = [counts[0] for counts in batch.counts]
        tokens = choose(met, list(full.split(reserved)))
        kept = [len(each) for each in tokens]
        embeds, layout = self.asker.layout_of(batch, VisionInputs(**batch.vision, vtc_budget="full"))
        places = layout.positions_of(first_slots(torch.tensor(reserved), torch.tensor(kept)))
        keep = kept_positions(layout.placeholder_mask, places)
        embeds = filled(embeds, places.to(embeds.device), torch.cat(tokens))
        packed = pack_visual_tokens(embeds, keep, layout.attention_mask, align_left=True, expands=False)
        real = packed.attention_mask
        if real is None:
            real = torch.ones(packed.inputs_embeds.shape[:2], dtype=torch.long, device=embeds.device)
        texts, truncated, seconds = self.asker.generate(
            {"inputs_embeds": packed.inputs_embeds, "attention_mask": real.to(embeds.device)}
        )
        return self._answers(batch, point, texts, truncated, Instead(kept, {})), seconds + batch.seconds

    def _compared(self, batch: Batch, point: Point) -> tuple[list[Answer], float]:
        """The same model as a training-free method, from the pixels on."""
        if point.family not in self.comparators:
            self.comparators[point.family] = comparator(self.asker, point.family)
        asker, wanted = self.comparators[point.family], self._met(batch, point).num_kept
        # any share says that there is something to choose
        part = asker.batch_of(batch.questions, [0.5])
        asked = [sum(wanted[idx] for idx in pictures) for pictures in batch.items]
        budgets = [max(tokens, min(counts)) for tokens, counts in zip(asked, part.levels, strict=True)]
        _, layout = asker.layout_of(part, VisionInputs(**part.vision, vtc_budget=budgets))
        texts, truncated, seconds = asker.generate({**part.given, "vtc_budget": budgets})
        clipped = [0] * len(batch.questions)
        for pictures, tokens, budget in zip(batch.items, asked, budgets, strict=True):
            clipped[batch.rows[pictures[0]]] += int(budget > tokens)
        kept = batch.per_question(layout.num_leaving.tolist())
        answers = self.asker.as_answers(batch, point, texts, truncated, kept, batch.num_reserved, clipped)
        return answers, seconds + part.seconds

    def _smaller(self, batch: Batch, point: Point) -> tuple[list[Answer], float]:
        """Images cut into fewer tiles; questions whose images are cut alike are asked together."""
        met = self._met(batch, point)
        wanted, groups = batch.per_question(met.num_kept), {}
        for idx, question in enumerate(batch.questions):
            options = smaller_options(self.asker.processor, question.image_sizes)
            count = between(wanted[idx], list(options.values()), met.generator)
            limit = next(limit for limit, own in options.items() if own == count)
            groups.setdefault(limit, []).append(idx)
        answers: list[Any] = [None] * len(batch.questions)
        seconds, smallest = 0.0, self.asker.processor.image_processor.min_tiles
        for limit, members in sorted(groups.items()):
            some = [batch.questions[idx] for idx in members]
            part = self.asker.batch_of(some, ["full"], max_tiles=limit)
            found, spent = self.asker.answer(part, replace(point, budget="full"))
            seconds += spent
            for idx, answer in zip(members, found, strict=True):
                # an image that cannot be made that small
                clipped = answer.num_images * int(answer.tokens > wanted[idx] and limit == smallest)
                answers[idx] = replace(answer, reserved=batch.num_reserved[idx], num_clipped=clipped)
        return answers, seconds


@contextmanager
def _changed(config: VtcConfig, fields: Mapping[str, Any]) -> Iterator[None]:
    """Other fields of a configuration while the body runs."""
    before = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _some_tokens(met: Met, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """A subset of each image's visual tokens by lot, in order."""
    chosen = []
    for own, kept in zip(tokens, met.num_kept, strict=True):
        places = torch.randperm(len(own), generator=met.generator)[:kept].sort().values
        chosen.append(own[places.to(own.device)])
    return chosen


def _pooled_tokens(met: Met, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Means of each tile's grid of visual tokens: of grids as nearly square as possible, the two nearest sizes shared
    out among the tiles of an image by lot."""
    rows, columns = met.config.token_grid
    # (rows, columns) of coarser grids by how many tokens they have; the squarest of those of one number
    grids: dict[int, tuple[int, int]] = {}
    for pair in ((r, c) for r in range(1, rows + 1) for c in range(1, columns + 1) if abs(r - c) <= 1):
        grids.setdefault(pair[0] * pair[1], pair)
    pooled = []
    for own, num_tiles, kept in zip(tokens, met.num_tiles, met.num_kept, strict=True):
        maps = own.unflatten(0, (num_tiles, rows, columns)).permute(0, 3, 1, 2)
        order = torch.randperm(num_tiles, generator=met.generator).tolist()
        tiles: list[Any] = [None] * num_tiles
        left = kept
        for done, tile in enumerate(order):
            count = between(left / (num_tiles - done), sorted(grids), met.generator)
            left -= count
            small = F.adaptive_avg_pool2d(maps[tile].float(), grids[count]).to(own.dtype)
            tiles[tile] = small.flatten(1).T
        pooled += [torch.cat(tiles)]
    return pooled
