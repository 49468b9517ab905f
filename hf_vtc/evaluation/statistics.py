"""Statistics of two arms that answer the same questions: how large a difference is, and whether it is small enough.

Scores of 0 and 1: Tango's score interval of the difference (Statistics in Medicine 17, 1998), which keeps its level at
any number of questions, and the exact test of McNemar. Graded scores, and questions that share images: the bootstrap
(BCa) over images, since questions about one picture are not independent.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

_RESAMPLES = 10_000
# resamples that are in memory at a time
_BATCH = 250
# images below which a bootstrap interval is known to be too narrow
FEW_IMAGES = 100


class Interval(NamedTuple):
    """Lower and upper bound."""

    low: float
    high: float


class Paired(NamedTuple):
    """Right and wrong of two arms on the same questions: both right, lost, gained, both wrong."""

    both: int
    lost: int
    gained: int
    neither: int

    @property
    def num(self) -> int:
        return sum(self)

    @property
    def difference(self) -> float:
        """How much more of the questions the second arm answers right."""
        return (self.gained - self.lost) / self.num

    @property
    def discordance(self) -> float:
        """Share of the questions about which the arms disagree."""
        return (self.gained + self.lost) / self.num


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Counts of two arms' scores of 0 and 1, question by question."""
    before, after = (np.asarray(scores) >= 0.5 for scores in (first, second))
    if before.shape != after.shape:
        raise ValueError(f"Both arms must answer the same questions, got {len(before)} and {len(after)} answers.")
    cells = (before & after, before & ~after, ~before & after, ~before & ~after)
    return Paired(*(int(cell.sum()) for cell in cells))


def z_of(confidence: float, sided: int) -> float:
    """Quantile of the normal distribution for bounds on one side or on both."""
    return NormalDist().inv_cdf(1 - (1 - confidence) / sided)


def tango(lost: int, gained: int, num: int, z: float) -> Interval:
    """Tango's score interval of (gained - lost) / num.

    Its bounds are where (gained - lost - n t)^2 = z^2 n (2 q + t (1 - t)), q being the most likely share of lost
    questions if the difference is t.
    """
    difference = (gained - lost) / num

    def surplus(t: float) -> float:
        half = (2 * num - gained + lost) * t - lost - gained
        q = (math.sqrt(max(half * half + 8 * num * lost * t * (1 - t), 0.0)) - half) / (4 * num)
        variance = max(num * (2 * q + t * (1 - t)), 0.0)
        return (gained - lost - num * t) ** 2 - z * z * variance

    return Interval(_root(surplus, -1.0, difference), _root(surplus, 1.0, difference))


def _root(surplus: Callable[[float], float], outside: float, inside: float) -> float:
    """Where `surplus` changes sign on the way from the estimate, where it is not positive, to an end of the range."""
    if surplus(outside) <= 0:
        return outside
    for _ in range(100):
        middle = (outside + inside) / 2
        if surplus(middle) > 0:
            outside = middle
        else:
            inside = middle
    return inside


def wilson(right: int, num: int, z: float) -> Interval:
    """Wilson's score interval of a share."""
    share, shrink = right / num, 1 + z * z / num
    centre = (share + z * z / (2 * num)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))


def scipy_stats() -> Any:
    """`scipy.stats`, which is not among what a plain install brings.

    Raises:
        ImportError: it is missing.
    """
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError("`evaluate` needs scipy: `pip install 'hf-vtc[eval]'`.") from error
    return scipy.stats


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of "the arms are equally right". It tests whether they differ, not whether they are close."""
    if lost + gained == 0:
        return 1.0
    return float(scipy_stats().binomtest(min(lost, gained), lost + gained).pvalue)


def bootstrap(values: Sequence[float], images: Sequence[str], confidence: float, seed: int = 0) -> Interval:
    """BCa interval, two-sided, of the mean of `values`, one per question, from resampled images.

    Values that are all the same have no spread to resample: then the bounds are that value.
    """
    sums, counts = _per_image(values, images)
    means = sums / counts
    if len(sums) < 2 or np.ptp(means) < 1e-12:
        mean = float(sums.sum() / counts.sum())
        return Interval(mean, mean)
    found = (
        scipy_stats()
        .bootstrap(
            (sums, counts),
            lambda total, number, axis=-1: total.sum(axis) / number.sum(axis),
            paired=True,
            vectorized=True,
            confidence_level=confidence,
            n_resamples=_RESAMPLES,
            batch=_BATCH,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return Interval(float(found.low), float(found.high))


def _per_image(values: Sequence[float], images: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of the values of each image."""
    _, image_of = np.unique(np.asarray(images), return_inverse=True)
    return np.bincount(image_of, np.asarray(values, float)), np.bincount(image_of).astype(float)


def design_effect(values: Sequence[float], images: Sequence[str]) -> float:
    """How many times larger the variance of a mean is because questions share images; 1 if they do not."""
    values = np.asarray(values, float)
    residuals, _ = _per_image(values - values.mean(), images)
    simple = float(((values - values.mean()) ** 2).sum())
    return float((residuals**2).sum()) / simple if simple > 0 else 1.0


class Difference(NamedTuple):
    """How two arms differ on the same questions.

    `value`: second minus first, in score; `interval`: two-sided; `lower`: one-sided bound at the same confidence, on
    which claims rest; `counts`: of scores of 0 and 1, None for graded ones; `p_value`: McNemar's, None likewise.
    """

    value: float
    interval: Interval
    lower: float
    counts: Paired | None
    p_value: float | None
    discordance: float


def difference(
    first: Sequence[float],
    second: Sequence[float],
    images: Sequence[str],
    confidence: float,
    graded: bool = False,
    seed: int = 0,
) -> Difference:
    """Compare the scores of two arms on the same questions.

    Args:
        first, second (`Sequence[float]`): scores, question by question.
        images (`Sequence[str]`): what each question is about; questions about one image are resampled together.
        confidence (`float`): of the interval, and of the one-sided bound.
        graded (`bool`): whether scores lie between 0 and 1 too.
    """
    deltas = np.asarray(second, float) - np.asarray(first, float)
    counts = None if graded else paired(first, second)
    discordance = float((np.abs(deltas) > 1e-12).mean())
    num_images = len(set(images))
    if discordance == 0:
        # what nobody has seen happen may still happen: as for 0 and 1, in as many independent questions
        bounds = [tango(0, 0, num_images, z_of(confidence, sided)) for sided in (2, 1)]
    elif not graded and num_images == len(deltas):
        bounds = [tango(counts.lost, counts.gained, counts.num, z_of(confidence, sided)) for sided in (2, 1)]
    else:
        levels = (confidence, 2 * confidence - 1)
        bounds = [bootstrap(deltas, images, level, seed) for level in levels]
    p_value = None if counts is None else mcnemar(counts.lost, counts.gained)
    return Difference(float(deltas.mean()), bounds[0], bounds[1].low, counts, p_value, discordance)


def score_interval(
    scores: Sequence[float], images: Sequence[str], confidence: float, graded: bool = False, seed: int = 0
) -> Interval:
    """Two-sided interval of a mean score."""
    num = len(scores)
    if not graded and len(set(images)) == num:
        return wilson(int(round(sum(scores))), num, z_of(confidence, 2))
    if np.ptp(np.asarray(scores, float)) < 1e-12:
        independent = len(set(images))
        return wilson(round(float(np.mean(scores)) * independent), independent, z_of(confidence, 2))
    return bootstrap(scores, images, confidence, seed)


def margin_of(tolerance: float, full_score: float, relative: bool) -> float:
    """By how much the score may fall: `tolerance`, or that share of what full length has."""
    return tolerance * full_score if relative else tolerance


def questions_needed(discordance: float, margin: float, confidence: float, power: float = 0.8) -> int:
    """Questions with which a claim of non-inferiority comes out in `power` of all cases if nothing is lost in truth.

    Args:
        discordance (`float`): share of the questions about which the arms disagree.
        margin (`float`): by how much the score may fall.
    """
    z = z_of(confidence, 1)
    # the bound of no disagreement at all must lie inside of the margin too
    least = math.ceil(z * z * (1 - margin) / margin)
    return max(math.ceil((z + z_of(power, 1)) ** 2 * discordance / margin**2), least)
