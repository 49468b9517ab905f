"""What `--time` adds: seconds of the method's points on some of the user's own questions, and what they are worth."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from ..report.measured import in_turns, plain_features
from ..report.render import duration
from .points import Point
from .questions import Question
from .running import Asker, admitted
from .summary import FULL

# alone, as one user waits for it, and together, as a server answers
BATCH_SIZES = (1, 8)
ROUNDS, _WARM_UP = 5, 1
HEADER = ("point", "batch", "tower", "choice", "first token", "answer", "saved per 1,000 questions")


@dataclass(frozen=True)
class Times:
    """Seconds per question of one point at one batch size, medians over rounds in which all points take turns.

    `tower`: of the images through the tower alone; `choice`: from its features to visual tokens, which is scores,
    choice and connectors; `first_token`, `answer`: of `generate`, both of these in. `first_token_speedup` and
    `answer_speedup`: of full length's, medians over the rounds. `saved`: money per 1,000 questions, None where no
    price is known.
    """

    point: str
    batch_size: int
    tower: float
    choice: float
    first_token: float
    answer: float
    first_token_speedup: float
    answer_speedup: float
    saved: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The line of a table, by `HEADER`."""
        saved = "" if self.saved is None or self.point == FULL else f"{self.saved:+.3g}"
        own = (self.tower, self.choice)
        whole = ((self.first_token, self.first_token_speedup), (self.answer, self.answer_speedup))
        times = [*map(duration, own), *(f"{duration(seconds)} ({speedup:.2f}x)" for seconds, speedup in whole)]
        return (self.point, str(self.batch_size), *times, saved)


def measure_times(
    asker: Asker, questions: Sequence[Question], points: Sequence[Point], price_per_hour: float | None = None
) -> list[Times]:
    """Time the first questions that show an image or a video, alone and in a batch.

    Args:
        asker ([`Asker`]): that answers.
        questions (`Sequence[Question]`): in an order that says nothing.
        points (`Sequence[Point]`): of the method, full length first.
        price_per_hour (`float`, *optional*): of the machine.

    Raises:
        ValueError: no question shows an image or a video.
    """
    shown = [question for question in questions if question.num_shown]
    if not shown:
        raise ValueError(
            "`time` is measured on questions that show images or videos, but there are none. Leave it out."
        )
    sizes = sorted({min(size, len(shown)) for size in BATCH_SIZES})
    return [each for size in sizes for each in _at_batch_size(asker, shown[:size], points, price_per_hour)]


@torch.no_grad()
def _at_batch_size(
    asker: Asker, questions: Sequence[Question], points: Sequence[Point], price_per_hour: float | None
) -> list[Times]:
    inputs = asker.inputs_of(questions, *asker.media_of(questions))
    batch = asker.batch_of(questions, [point.budget for point in points])
    variants = {("", "tower"): plain_features(asker.head.model, inputs)}
    for point in points:
        generate = functools.partial(
            asker.generated, {**inputs, "vtc_budget": admitted(batch, point.budget)}, do_sample=False, num_beams=1
        )
        variants[point.name, "choice"] = functools.partial(asker.compress, batch, point.budget)
        variants[point.name, "first token"] = functools.partial(generate, max_new_tokens=1)
        variants[point.name, "answer"] = functools.partial(generate, max_new_tokens=asker.max_new_tokens)
    seconds = in_turns(variants, asker.model.device, ROUNDS, _WARM_UP)

    def each(name: str, what: str) -> float:
        return median(seconds[name, what]) / len(questions)

    def speedup(name: str, what: str) -> float:
        pairs = zip(seconds[FULL, what], seconds[name, what], strict=True)
        return median(full / own for full, own in pairs)

    return [
        Times(
            point.name,
            len(questions),
            each("", "tower"),
            *(each(point.name, what) for what in ("choice", "first token", "answer")),
            *(speedup(point.name, what) for what in ("first token", "answer")),
            saved=None
            if price_per_hour is None
            else money(each(FULL, "answer") - each(point.name, "answer"), price_per_hour),
        )
        for point in points
    ]


def money(seconds: float, price_per_hour: float) -> float:
    """What so many seconds of a question come to over 1,000 questions."""
    return 1000 * seconds * price_per_hour / 3600
