"""Scores of answers, against cases by hand and, where it is installed, against the reference of ANLS."""

import math
import random

import pytest

from hf_vtc.evaluation import scores
from hf_vtc.evaluation.scores import METRICS, edit_distance, find_metric


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("exact", " Two  Words. ", ["two words"], 1),
        ("exact", "two", ["three", "TWO"], 1),
        ("exact", "12", ["1 2"], 0),
        ("exact", "", ["x"], 0),
        ("contains", "it is the red box.", ["red"], 1),
        ("contains", "it is reddish", ["red"], 0),
        ("contains", "costs 1.5 euro", ["1.5"], 1),
        ("anls", "hello", ["hello"], 1),
        ("anls", "helo", ["hello"], 0.8),
        ("anls", "help", ["hello"], 0.6),
        ("anls", "hall", ["hello wide world"], 0),
        # half of the characters differ: nothing
        ("anls", "ab", ["ax"], 0),
        ("anls", "A  B", ["a b"], 1),
        ("anls", "far", ["near", "fare"], 0.75),
        ("relaxed", "104", ["100"], 1),
        ("relaxed", "106", ["100"], 0),
        ("relaxed", "95.0", ["$100"], 1),
        ("relaxed", "0.5", ["50%"], 1),
        ("relaxed", "1,049", ["1000"], 1),
        ("relaxed", "0.01", ["0"], 0),
        ("relaxed", "0", ["0"], 1),
        ("relaxed", "-97", ["-100"], 1),
        ("relaxed", "97", ["-100"], 0),
        ("relaxed", "Red", ["red"], 1),
        ("vqa", "two", ["2", "2", "2"], 1),
        ("vqa", "the dog", ["dog", "cat", "cow"], 1 / 3),
        ("vqa", "dont know", ["don't know"], 1),
        ("vqa", "yes", ["yes"] * 3 + ["no"] * 7, 0.9),
        ("vqa", "yes", ["yes"] * 10, 1),
        ("vqa", "yes", ["yes"] + ["no"] * 9, 0.3),
        ("vqa", "1,000", ["1000"], 1),
        ("f1", "the red box", ["red box"], 1),
        ("f1", "red red", ["red"], 2 / 3),
        ("f1", "blue", ["red"], 0),
        ("iou@0.5", "[0, 0, 10, 10]", ["0 0 10 10"], 1),
        ("iou@0.5", "0,0,10,10", ["0,0,10,20"], 1),
        ("iou@0.5", "0,0,10,10", ["0,0,10,21"], 0),
        ("iou@0.5", "nowhere", ["0,0,1,1"], 0),
    ],
)
def test_scores_by_hand(metric, answer, references, expected):
    assert METRICS[metric].score(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("b.", 1),
        ("(B)", 1),
        ("The answer is (B).", 1),
        ("cat", 1),
        ("Cat.", 1),
        ("A", 0),
        ("a dog", 0),
        ("", 0),
    ],
)
def test_a_choice_is_named_by_letter_or_text(answer, expected):
    choices = ("dog", "cat", "cow")
    assert METRICS["choice"].score(answer, ["B"], choices) == expected
    assert METRICS["choice"].score(answer, ["cat"], choices) == expected


def test_a_letter_beyond_the_options_names_none():
    assert METRICS["choice"].score("D", ["A"], ("dog", "cat")) == 0


def test_edit_distance_is_the_same_with_and_without_the_library(monkeypatch):
    drawn = random.Random(0)
    pairs = [["".join(drawn.choices("abc ", k=drawn.randrange(8))) for _ in range(2)] for _ in range(200)]
    found = [edit_distance(*pair) for pair in pairs]
    monkeypatch.setattr(scores, "_fast_distance", None)
    assert found == [edit_distance(*pair) for pair in pairs]
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3


def test_anls_is_that_of_the_reference():
    reference = pytest.importorskip("anls_star", reason="`pip install anls-star` for the comparison with its ANLS")
    drawn = random.Random(1)
    for _ in range(300):
        answer, *wanted = ("".join(drawn.choices("ab c", k=drawn.randrange(1, 9))).strip() or "a" for _ in range(3))
        expected = reference.anls_score(tuple(wanted), answer)
        # where just half of the characters differ it gives a half; the definition of DocVQA gives nothing
        expected = 0 if expected == 0.5 else expected
        assert math.isclose(METRICS["anls"].score(answer, wanted), expected, abs_tol=1e-12)


def shouting(answer, references):
    return float(answer.upper() in references)


def test_a_function_of_the_caller_is_a_metric():
    assert find_metric(shouting).score("yes", ["YES"]) == 1
    found = find_metric("math:isclose")
    assert found.function is math.isclose and found.graded


@pytest.mark.parametrize("value", [2, -0.1, math.nan, "1"])
def test_a_score_outside_of_its_range_is_refused(value):
    with pytest.raises(ValueError, match="must give a number from 0 to 1"):
        find_metric(lambda answer, references: value).score("a", ["a"])


@pytest.mark.parametrize("name", ["anlss", "nowhere:function", "math:nothing"])
def test_an_unknown_metric_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        find_metric(name)
