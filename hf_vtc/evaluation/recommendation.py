"""Which budget to take: the smallest that keeps the score, with how much confidence, on how many questions.

A budget qualifies if the one-sided lower bound of its difference to full length lies above the margin. Budgets are
tested from the largest down and the first that fails ends it, so that nothing must be corrected for their number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .questions import Question
from .statistics import Difference, margin_of, questions_needed
from .summary import FULL, Arm, Row, Settings, row_of

# from so many questions on, a budget is chosen on one half and vouched for by the other
ENOUGH_TO_SPLIT = 1000
# questions of a kind below which it is not spoken of by itself
ENOUGH_OF_KIND = 100


@dataclass(frozen=True)
class Recommendation:
    """What to take and why.

    `point`: the recommended line, None if none qualifies. `sentence`: all that may be claimed. `num_chosen_on`,
    `num_vouched_on`: questions of either half, both all of them without a split. `needed`: questions with which a
    claim could be made, where none could.
    """

    point: str | None
    sentence: str
    num_chosen_on: int = 0
    num_vouched_on: int = 0
    needed: int | None = None


def qualifies(found: Difference, margin: float) -> bool:
    """Whether a difference is shown to be smaller than the margin."""
    return found.lower > -margin


def halves(questions: Sequence[Question], seed: int) -> tuple[list[int], list[int]]:
    """Places of the questions of two halves; questions about one image are in the same."""
    images = sorted({question.image for question in questions})
    order = np.random.default_rng(seed).permutation(len(images))
    first = {images[idx] for idx in order[: len(images) // 2]}
    chosen = [idx for idx, question in enumerate(questions) if question.image in first]
    return chosen, [idx for idx, question in enumerate(questions) if question.image not in first]


def recommend(
    arms: Mapping[str, Arm], rows: Sequence[Row], settings: Settings, holdout: bool | None = None
) -> Recommendation:
    """Choose among the method's points.

    Args:
        arms (`Mapping[str, Arm]`): of every line, by its name.
        rows (`Sequence[Row]`): of every line.
        holdout (`bool`, *optional*): whether to choose on one half of the images and vouch for it by the other.
            Default: from 1,000 questions on.
    """
    full = arms[FULL]
    if not any(question.references for question in full.questions):
        return Recommendation(None, "No reference is known, so that nothing can be said of what compression costs.")
    method = [row for row in rows if row.family == "method" and row.point != FULL]
    if not method:
        return Recommendation(None, "Only full length was asked for: there is nothing to recommend.")
    scored = [idx for idx, question in enumerate(full.questions) if question.references]
    arms, full = {name: arm.of(scored) for name, arm in arms.items()}, full.of(scored)
    holdout = len(scored) >= ENOUGH_TO_SPLIT if holdout is None else holdout
    chosen_on, vouched_on = halves(full.questions, settings.seed) if holdout else (None, None)

    def line(name: str, places: list[int] | None) -> Row:
        arm, whole = (arms[name], full) if places is None else (arms[name].of(places), full.of(places))
        return row_of(arm, whole, settings, with_kinds=places is vouched_on)

    full_score = float(full.scores().mean())
    margin = margin_of(settings.tolerance, full_score, settings.relative)
    passed = _passing([line(row.point, chosen_on) for row in method], margin)
    best = min(passed, key=lambda row: row.tokens, default=None)
    sizes = {
        "num_chosen_on": len(scored) if chosen_on is None else len(chosen_on),
        "num_vouched_on": len(scored) if vouched_on is None else len(vouched_on),
    }
    vouched = None if best is None else line(best.point, vouched_on)
    if vouched is None or not qualifies(vouched.difference, margin):
        # what a practitioner would hope for: the largest budget that saves anything
        hoped = max(method, key=lambda row: row.tokens if row.share < 1 else -1.0)
        discordance = max(hoped.difference.discordance, 1 / len(scored))
        needed = questions_needed(discordance, margin, settings.confidence) * (2 if holdout else 1)
        return Recommendation(None, _nothing(hoped, len(scored), margin, needed, settings), **sizes, needed=needed)
    own = next(row for row in method if row.point == best.point)
    sentence = _sentence(vouched, margin, settings) + _worst_kind(vouched) + better_baseline(own, rows)
    if holdout:
        sentence += f" It was chosen on the other {sizes['num_chosen_on']:,} questions."
    return Recommendation(best.point, sentence, **sizes)


def _passing(method: Sequence[Row], margin: float) -> list[Row]:
    """The method's own choice if it qualifies, and the budgets down to the first that does not."""
    passed = [row for row in method if row.point == "auto" and qualifies(row.difference, margin)]
    for row in sorted((row for row in method if row.point != "auto"), key=lambda row: -row.tokens):
        if not qualifies(row.difference, margin):
            break
        passed.append(row)
    return passed


def _points_of(value: float) -> str:
    """A score or a difference of scores, in points of a hundred."""
    return f"{100 * value:.1f}"


def _sentence(row: Row, margin: float, settings: Settings) -> str:
    found = row.difference
    counts = "" if found.counts is None else f" ({found.counts.lost} lost, {found.counts.gained} gained)"
    text = (
        f"Budget {row.point} keeps the score to within {_points_of(margin)} points with {settings.confidence:.0%} "
        f"confidence: {_points_of(row.score)} against {_points_of(row.score - found.value)} at full length, "
        f"difference {_points_of(found.value):s}, at least {_points_of(found.lower)}, on {row.num:,} questions"
        f"{counts}, with {row.tokens:.1f} visual tokens per image, {1 - row.share:.1%} fewer"
    )
    if row.speedup is not None:
        text += f", answers {row.speedup:.2f} times as fast"
    return text + "."


def _worst_kind(row: Row) -> str:
    enough = {kind: own for kind, own in row.kinds.items() if own.num >= ENOUGH_OF_KIND and own.difference}
    if not enough:
        return ""
    kind, own = min(enough.items(), key=lambda item: item[1].difference.lower)
    return (
        f" The worst kind is {kind}: difference {_points_of(own.difference.value)}, at least "
        f"{_points_of(own.difference.lower)}, on {own.num:,} questions."
    )


def better_baseline(row: Row, rows: Sequence[Row]) -> str:
    """What stands beside a point and does better with as many tokens, on all questions; empty for nothing."""
    better = [each for each in rows if each.beside == row.point and each.score > row.score]
    if not better:
        return ""
    best = max(better, key=lambda each: each.score)
    return f" But {best.family} has {_points_of(best.score)} with {best.tokens:.1f} tokens: the method is not why."


def _nothing(row: Row, num: int, margin: float, needed: int, settings: Settings) -> str:
    found = row.difference
    text = (
        f"No budget is shown to keep the score to within {_points_of(margin)} points with {settings.confidence:.0%} "
        f"confidence on {num:,} questions: at {row.point} the difference is {_points_of(found.value)}, perhaps as low "
        f"as {_points_of(found.lower)}."
    )
    if found.value > -margin:
        changed = f"{found.discordance:.1%}" if found.discordance else f"fewer than one in {num:,}"
        return text + (
            f" The scores of {changed} of the questions change; about {needed:,} questions would show it if nothing "
            "is lost in truth."
        )
    return text + " It loses more than that here."
