"""How right an answer is, from 0 to 1: one pure function per metric, of an answer and the references of a question.

Where a question has several references the best one counts, except for `vqa`, which asks how many agree.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

try:
    from rapidfuzz.distance.Levenshtein import distance as _fast_distance
except ImportError:
    # the same numbers, slower
    _fast_distance = None

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_BOX_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_NUMBER_WORDS = {"none": "0"} | {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = frozenset(("a", "an", "the"))
_VQA_REFERENCES = 10
_VQA_ENOUGH = 3


def plain(text: str) -> str:
    """Without case, white space around and a final full stop; inner white space is one blank."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference, up to case, white space and a final full stop."""
    return float(plain(answer) in map(plain, references))


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if a reference occurs in the answer as whole words."""
    said = plain(answer)
    return float(any(re.search(rf"(?<!\w){re.escape(plain(each))}(?!\w)", said) for each in references))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of single characters."""
    if _fast_distance is not None:
        return _fast_distance(first, second)
    row = list(range(len(second) + 1))
    for idx, character in enumerate(first, start=1):
        replaced = [before + (character != other) for before, other in zip(row, second)]
        following = [idx]
        for other_idx, cost in enumerate(replaced, start=1):
            following.append(min(cost, following[-1] + 1, row[other_idx] + 1))
        row = following
    return row[-1]


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of DocVQA: nothing where half of the characters or more differ."""

    def similarity(reference: str) -> float:
        said, wanted = (" ".join(text.lower().split()) for text in (answer, reference))
        ratio = edit_distance(said, wanted) / max(len(said), len(wanted), 1)
        return 1 - ratio if ratio < 0.5 else 0.0

    return max(map(similarity, references))


def number_in(text: str) -> float | None:
    """The number that a text is, None if it is none. "%" divides by 100, "$" and "," do not count."""
    bare = "".join(text.split()).replace("$", "").replace(",", "").removesuffix(".")
    digits = bare.removesuffix("%")
    if not _NUMBER.fullmatch(digits):
        return None
    return float(digits) / (100 if bare.endswith("%") else 1)


def relaxed(answer: str, references: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: numbers within 5 % of the reference, anything else exact.

    Unlike the original, "$" and "," are left out of numbers.
    """

    def is_right(reference: str) -> bool:
        said, wanted = number_in(answer), number_in(reference)
        if said is None or wanted is None:
            return exact(answer, [reference]) == 1
        return abs(said - wanted) <= 0.05 * abs(wanted)

    return float(any(map(is_right, references)))


def vqa_plain(text: str) -> str:
    """VQA's normal form: number words as digits, no articles, no punctuation, contractions without apostrophe."""
    text = re.sub(r"(?<=\d),(?=\d)|['’`]|\.(?!\d)", "", text.lower())
    words = re.sub(r"[^\w\s.]|_", " ", text).split()
    return " ".join(_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy: right if three people say so; with ten references the mean over leaving one of them out."""
    said, wanted = vqa_plain(answer), [vqa_plain(each) for each in references]
    matches = wanted.count(said)
    if len(wanted) != _VQA_REFERENCES:
        return min(1.0, matches / min(_VQA_ENOUGH, len(wanted)))
    rounds = [min(1.0, (matches - (each == said)) / _VQA_ENOUGH) for each in wanted]
    return sum(rounds) / len(rounds)


def f1(answer: str, references: Sequence[str]) -> float:
    """SQuAD's F1 of the bags of words, without case, punctuation and articles."""

    def bag(text: str) -> Counter[str]:
        return Counter(word for word in re.sub(r"[^\w\s]|_", "", text.lower()).split() if word not in _ARTICLES)

    def overlap(reference: str) -> float:
        said, wanted = bag(answer), bag(reference)
        if not said or not wanted:
            return float(said == wanted)
        return 2 * (said & wanted).total() / (said.total() + wanted.total())

    return max(map(overlap, references))


def box_in(text: str) -> tuple[float, ...] | None:
    """The four numbers left, top, right, bottom that a text holds, None if it holds others."""
    numbers = tuple(map(float, _BOX_NUMBER.findall(text)))
    return numbers if len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3] else None


def iou(answer: str, references: Sequence[str]) -> float:
    """1 if the box that the answer names overlaps a reference by half of their union or more."""

    def overlaps(reference: str) -> bool:
        said, wanted = box_in(answer), box_in(reference)
        if said is None or wanted is None:
            return False
        sides = [max(0.0, min(said[i + 2], wanted[i + 2]) - max(said[i], wanted[i])) for i in (0, 1)]
        shared = sides[0] * sides[1]
        union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (said, wanted)) - shared
        return shared / union >= 0.5

    return float(any(map(overlaps, references)))


def option_in(text: str, choices: Sequence[str]) -> int | None:
    """Which option a text names: by its letter alone, its letter in brackets or its whole text; None for none."""
    said = plain(text)
    for found in (re.fullmatch(r"([a-z])[).:]?", said), re.search(r"\(([a-z])\)", said)):
        if found and ord(found[1]) - ord("a") < len(choices):
            return ord(found[1]) - ord("a")
    options = list(map(plain, choices))
    return options.index(said) if said in options else None


def choice(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """1 if the answer names the option that a reference names."""
    named = option_in(answer, choices)
    return float(named is not None and named in [option_in(each, choices) for each in references])


@dataclass(frozen=True)
class Metric:
    """A score of answers.

    Args:
        name (`str`): as the report says it.
        function (`(answer, references) -> float`): from 0 to 1; `choice` takes the options as well.
        graded (`bool`): whether there are scores between wrong and right.
    """

    name: str
    function: Callable[..., float]
    graded: bool = False

    def score(self, answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        """The score of one answer.

        Raises:
            ValueError: a function of the caller's gave no number from 0 to 1.
        """
        given = (answer, references, choices) if self.function is choice else (answer, references)
        value = self.function(*given)
        if isinstance(value, str) or not 0 <= (number := float(value)) <= 1:
            raise ValueError(f"`metric` {self.name!r} must give a number from 0 to 1, got {value!r} for {answer!r}.")
        return number


METRICS = {
    "exact": Metric("exact", exact),
    "contains": Metric("contains", contains),
    "choice": Metric("choice", choice),
    "anls": Metric("anls", anls, graded=True),
    "relaxed": Metric("relaxed", relaxed),
    "vqa": Metric("vqa", vqa, graded=True),
    "f1": Metric("f1", f1, graded=True),
    "iou@0.5": Metric("iou@0.5", iou),
}


def find_metric(given: Any) -> Metric:
    """A metric by its name, by `module:function` of the caller's, or the function itself.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(given, Metric):
        return given
    if callable(given):
        return Metric(f"{given.__module__}:{given.__qualname__}", given, graded=True)
    if isinstance(given, str) and given in METRICS:
        return METRICS[given]
    module, _, function = str(given).partition(":")
    if not function:
        raise ValueError(f"`metric` must be auto, one of {', '.join(METRICS)}, or module:function, got {given!r}.")
    try:
        return Metric(str(given), getattr(import_module(module), function), graded=True)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`metric` {given!r} cannot be imported ({error}). Check module and function.") from error
