"""From answers to rows: what each point keeps, how right it is, and how it differs from full length."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..models.configuration_vtc import VtcConfig
from .costs import Costs, prompt_costs
from .points import Point
from .questions import Question
from .running import Answer
from .statistics import Difference, Interval, bootstrap, design_effect, difference, score_interval

# hard questions below which no share of them is given
ENOUGH_HARD = 30
FULL = "full"
# batches below which nothing is said of how well a time is known
_ENOUGH_BATCHES = 5


@dataclass(frozen=True)
class Settings:
    """What the statistics of a report go by.

    `tolerance`: by how much the score may fall, as a share of that of full length if `relative`; `confidence`: of
    intervals and claims; `seed`: of resampling.
    """

    tolerance: float = 0.01
    confidence: float = 0.95
    relative: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One line of a report; scores are None where no reference is known, differences also for full length itself.

    `tokens`: visual tokens per image, mean, and its 10th and 90th percentile over images; `share`: of those reserved;
    `num_clipped`: images that got more than the budget because they admit no less. `difference`: score minus that of
    full length, on the same questions. `same_answer`: share of answers that are those of full length. `seconds`: per
    question to the whole answer, tower included; `speedup`: of full length's. `costs`: counted, see [`Costs`];
    `ideal_speedup`: of the language model's prompt, bound by arithmetic. `draws`: scores of each draw of a
    baseline by lot, whose mean the row shows. `hard`: of the questions that are right at full length and wrong with a
    smaller image of as many tokens, how many there are and how many are right here.
    """

    point: str
    family: str
    beside: str
    num: int
    tokens: float
    tokens_p10: float
    tokens_p90: float
    share: float
    num_clipped: int
    truncated: int
    score: float | None
    interval: Interval | None
    difference: Difference | None
    same_answer: float | None
    seconds: float | None
    speedup: float | None
    speedup_interval: Interval | None
    costs: Costs | None = None
    ideal_speedup: float | None = None
    design_effect: float | None = None
    hard: tuple[int, int] | None = None
    draws: tuple[float, ...] = ()
    kinds: dict[str, "Row"] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class Arm:
    """The answers of one line: of a point, or of all draws of a baseline, question by question."""

    def __init__(
        self,
        points: Sequence[Point],
        questions: Sequence[Question],
        answers: Mapping[tuple[str, str], Answer],
        seconds: Mapping[tuple[str, str], tuple[float, int]],
    ):
        self.points, self.questions = points, list(questions)
        self.answers = [[answers[point.name, question.key] for question in questions] for point in points]
        timed = [
            [seconds[point.name, question.key] for point in points if (point.name, question.key) in seconds]
            for question in questions
        ]
        self.seconds = [[value for value, _ in each] for each in timed]
        self.batches = [str(each[0][1]) if each else "" for each in timed]

    @property
    def is_drawn(self) -> bool:
        return len(self.points) > 1

    def scores(self, draw: int | None = None) -> np.ndarray:
        """Scores of the questions with references: of one draw, or the means over draws."""
        chosen = self.answers if draw is None else [self.answers[draw]]
        return np.mean([[answer.score for answer in each if answer.score is not None] for each in chosen], axis=0)

    def mean_seconds(self) -> np.ndarray | None:
        if not all(self.seconds):
            return None
        return np.array([np.mean(each) for each in self.seconds])

    def of(self, chosen: Sequence[int]) -> "Arm":
        """The same for some of the questions, by their places."""
        part = object.__new__(Arm)
        part.points = self.points
        part.questions = [self.questions[idx] for idx in chosen]
        part.answers = [[each[idx] for idx in chosen] for each in self.answers]
        part.seconds = [self.seconds[idx] for idx in chosen]
        part.batches = [self.batches[idx] for idx in chosen]
        return part


def rows_of(arms: Mapping[str, Arm], settings: Settings, config: VtcConfig) -> list[Row]:
    """The lines of all arms; questions are hard by the smaller image beside the same point."""
    rows = []
    for name, arm in arms.items():
        smaller = arms.get(f"smaller beside {arm.points[0].beside or name}")
        rows.append(row_of(arm, arms[FULL], settings, smaller=smaller, config=config))
    return rows


def row_of(
    arm: Arm,
    full: Arm,
    settings: Settings,
    with_kinds: bool = True,
    smaller: Arm | None = None,
    config: VtcConfig | None = None,
) -> Row:
    """The line of an arm beside full length.

    Args:
        config ([`VtcConfig`], *optional*): of the model, by which costs are counted.
        smaller ([`Arm`], *optional*): of the smaller image with as many tokens, by which questions are hard.
    """
    point, questions = arm.points[0], arm.questions
    is_full = point.name == FULL
    flat = [answer for each in arm.answers for answer in each]
    shown = [answer for answer in flat if answer.num_images]
    per_image = np.array([answer.tokens / answer.num_images for answer in shown] or [0.0])
    weights = np.array([answer.num_images for answer in shown] or [1])
    reserved = sum(answer.reserved for answer in shown)
    scored = [question for question in questions if question.references]
    graded = arm.is_drawn or any(question.metric.graded for question in scored)
    images = [question.image for question in scored]
    common = {"confidence": settings.confidence, "graded": graded, "seed": settings.seed}
    scores, delta, effect, hard = None, None, None, None
    if scored:
        scores = arm.scores()
        if not is_full:
            delta = difference(full.scores(), scores, images, **common)
            effect = design_effect(scores - full.scores(), images)
            hard = _hard(scores, full.scores(), smaller)
    speedup, speedup_interval = _speedup(arm, full, settings)
    costs = None if config is None else prompt_costs(config, point.family, flat)
    of_full = None if config is None or is_full else prompt_costs(config, "method", full.answers[0])
    return Row(
        point=line_name(point),
        family=point.family,
        beside=point.beside,
        num=len(questions),
        tokens=float((per_image * weights).sum() / weights.sum()),
        tokens_p10=float(np.percentile(per_image, 10)),
        tokens_p90=float(np.percentile(per_image, 90)),
        share=sum(answer.tokens for answer in shown) / reserved if reserved else 1.0,
        num_clipped=sum(answer.num_clipped for answer in flat) // len(arm.points),
        truncated=sum(answer.truncated for answer in flat) // len(arm.points),
        score=None if scores is None else float(scores.mean()),
        interval=None if scores is None else score_interval(scores, images, **common),
        difference=delta,
        same_answer=None if is_full else _same_answers(arm, full),
        seconds=None if arm.mean_seconds() is None else float(arm.mean_seconds().mean()),
        speedup=speedup,
        speedup_interval=speedup_interval,
        costs=costs,
        ideal_speedup=None if of_full is None else of_full.prefill_flops / costs.prefill_flops,
        design_effect=effect,
        hard=hard,
        draws=tuple(float(arm.scores(draw).mean()) for draw in range(len(arm.points)))
        if scored and arm.is_drawn
        else (),
        kinds=_rows_of_kinds(arm, full, settings, smaller) if with_kinds else {},
    )


def line_name(point: Point) -> str:
    """What the line of a point is called; all draws of a baseline share one."""
    return f"{point.family} beside {point.beside}" if point.draw or point.name.endswith("#1") else point.name


def _same_answers(arm: Arm, full: Arm) -> float:
    same = [[a.answer == b.answer for a, b in zip(each, full.answers[0], strict=True)] for each in arm.answers]
    return float(np.mean(same))


def _hard(scores: np.ndarray, full: np.ndarray, smaller: Arm | None) -> tuple[int, int] | None:
    """How many questions are hard, and how many of them an arm has right; for scores of 0 and 1."""
    if smaller is None:
        return None
    hard = (full >= 1) & (smaller.scores() < 0.5)
    return int(hard.sum()), int(np.round((scores[hard] >= 0.5).sum()))


def _speedup(arm: Arm, full: Arm, settings: Settings) -> tuple[float | None, Interval | None]:
    """How many times faster than full length, and the interval of it over batches, if there are enough."""
    own, its = arm.mean_seconds(), full.mean_seconds()
    if own is None or its is None or arm.points[0].name == FULL:
        return None, None
    # of logarithms, since it is a ratio
    ratios = np.log(its / own)
    speedup, interval = float(np.exp(ratios.mean())), None
    if len(set(arm.batches)) >= _ENOUGH_BATCHES:
        found = bootstrap(ratios, arm.batches, settings.confidence, settings.seed)
        interval = Interval(*(float(np.exp(bound)) for bound in found))
    return speedup, interval


def _rows_of_kinds(arm: Arm, full: Arm, settings: Settings, smaller: Arm | None) -> dict[str, Row]:
    kinds = sorted({question.kind for question in arm.questions} - {""})
    rows = {}
    for kind in kinds:
        chosen = [idx for idx, question in enumerate(arm.questions) if question.kind == kind]
        less = None if smaller is None else smaller.of(chosen)
        rows[kind] = row_of(arm.of(chosen), full.of(chosen), settings, with_kinds=False, smaller=less)
    return rows
