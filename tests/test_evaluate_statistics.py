"""Statistics of paired answers, against published examples, closed forms, other implementations and simulation."""

import math

import numpy as np
import pytest

from hf_vtc.evaluation import statistics
from hf_vtc.evaluation.statistics import (
    bootstrap,
    design_effect,
    difference,
    mcnemar,
    paired,
    questions_needed,
    score_interval,
    tango,
    wilson,
    z_of,
)

TWO_SIDED = z_of(0.95, 2)


def alone(num):
    return [str(idx) for idx in range(num)]


def test_tangos_interval_of_the_published_example():
    low, high = tango(lost=1, gained=7, num=21, z=TWO_SIDED)
    assert round(low, 3) == 0.026 and round(high, 3) == 0.517


@pytest.mark.parametrize("num", [1, 10, 100, 5000])
@pytest.mark.parametrize("sided", [1, 2])
def test_tangos_bound_without_disagreement_has_a_closed_form(num, sided):
    z = z_of(0.95, sided)
    low, high = tango(0, 0, num, z)
    assert math.isclose(low, -z * z / (num + z * z), rel_tol=1e-9) and math.isclose(high, -low, rel_tol=1e-9)


@pytest.mark.parametrize(("lost", "gained", "num"), [(3, 1, 50), (0, 4, 30), (9, 0, 9), (0, 7, 7), (40, 60, 1000)])
def test_tangos_bounds_are_where_its_score_is_the_quantile(lost, gained, num):
    low, high = tango(lost, gained, num, TWO_SIDED)
    assert -1 <= low <= (gained - lost) / num <= high <= 1
    # arms exchanged
    assert tango(gained, lost, num, TWO_SIDED) == pytest.approx((-high, -low), abs=1e-9)
    for t in {low, high} - {-1.0, 1.0}:
        # the most likely shares of lost and gained questions whose difference is t, by search
        shares = np.linspace(max(0.0, -t), (1 - t) / 2, 200_001)[1:-1]
        with np.errstate(divide="ignore"):
            likelihood = lost * np.log(shares) + gained * np.log(shares + t)
            likelihood += (num - lost - gained) * np.log(1 - 2 * shares - t)
        best = shares[np.argmax(likelihood)]
        score = (gained - lost - num * t) / math.sqrt(num * (2 * best + t - t * t))
        assert abs(score) == pytest.approx(TWO_SIDED, rel=2e-3)


@pytest.mark.parametrize(
    ("num", "lost", "gained"), [(100, 0.06, 0.04), (300, 0.03, 0.01), (300, 0.10, 0.02), (1000, 0.02, 0.02)]
)
def test_the_interval_of_a_difference_covers_what_is_true(num, lost, gained):
    drawn = np.random.default_rng(7).multinomial(num, [lost, gained, 1 - lost - gained], size=20_000)
    pairs, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    covers = [low <= gained - lost <= high for low, high in (tango(*pair.tolist(), num, TWO_SIDED) for pair in pairs)]
    assert abs((np.array(covers) * times).sum() / 20_000 - 0.95) <= 0.01


@pytest.mark.parametrize(("num", "lost"), [(100, 0.03), (300, 0.03), (1000, 0.02)])
def test_the_bound_of_a_claim_is_wrong_no_more_often_than_it_says(num, lost):
    gained = 0.01
    drawn = np.random.default_rng(8).multinomial(num, [lost, gained, 1 - lost - gained], size=20_000)
    pairs, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    holds = [tango(*pair.tolist(), num, z_of(0.95, 1)).low <= gained - lost for pair in pairs]
    assert 0.94 <= (np.array(holds) * times).sum() / 20_000 <= 0.975


def test_the_interval_of_a_score_covers_what_is_true():
    right = np.random.default_rng(9).binomial(200, 0.9, size=20_000)
    covers = [wilson(int(each), 200, TWO_SIDED) for each in right]
    assert abs(np.mean([low <= 0.9 <= high for low, high in covers]) - 0.95) <= 0.01


def test_the_bootstrap_of_graded_scores_covers_what_is_true(monkeypatch):
    monkeypatch.setattr(statistics, "_RESAMPLES", 1000)
    drawn, runs, covered = np.random.default_rng(10), 500, 0
    for run in range(runs):
        values = drawn.beta(0.5, 0.5, size=120) - drawn.beta(0.5, 0.6, size=120)
        low, high = bootstrap(values, alone(120), 0.95, seed=run)
        covered += low <= 0.5 - 0.5 / 1.1 <= high
    # three standard errors of so many runs
    assert abs(covered / runs - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / runs)


def test_the_bootstrap_is_that_of_scipy_where_images_have_one_question():
    from scipy.stats import bootstrap as reference

    values = np.random.default_rng(3).normal(size=80)
    order = np.argsort([str(idx) for idx in range(80)])
    expected = reference(
        (values[order],), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap(values, alone(80), 0.95) == pytest.approx(tuple(expected), abs=1e-9)


def test_questions_about_one_image_count_as_one():
    drawn = np.random.default_rng(4)
    per_image = drawn.normal(size=60)
    values, images = np.repeat(per_image, 8), np.repeat(alone(60), 8)
    assert design_effect(values, images) == pytest.approx(8)
    assert design_effect(values, alone(480)) == pytest.approx(1)
    shared, apart = bootstrap(values, images, 0.95), bootstrap(values, alone(480), 0.95)
    once = bootstrap(per_image, alone(60), 0.95)
    assert (shared.high - shared.low) == pytest.approx(once.high - once.low, rel=0.02)
    assert (shared.high - shared.low) > 2 * (apart.high - apart.low)


def test_the_test_of_mcnemar_is_the_exact_one():
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(0, 0) == 1 == mcnemar(4, 4)


def test_a_difference_is_that_of_the_pairs():
    before, after = [1, 1, 1, 0, 0, 1] * 20, [1, 0, 1, 1, 0, 1] * 20
    found = difference(before, after, alone(120), 0.95)
    assert found.counts == (60, 20, 20, 20) and found.value == 0 and found.discordance == pytest.approx(1 / 3)
    assert found.interval == tango(20, 20, 120, TWO_SIDED)
    assert found.lower == tango(20, 20, 120, z_of(0.95, 1)).low
    # as many right, but not the same questions: what pairing knows is lost, and this test fails
    shuffled = np.random.default_rng(0).permutation(after)
    assert difference(before, shuffled, alone(120), 0.95).counts != found.counts


def test_arms_of_other_questions_are_refused():
    with pytest.raises(ValueError, match="the same questions"):
        paired([1, 0], [1, 0, 1])


def test_graded_differences_have_no_counts():
    found = difference([0.5, 1, 0.2] * 40, [0.5, 0.9, 0.4] * 40, alone(120), 0.95, graded=True)
    assert found.counts is None and found.p_value is None
    assert found.interval.low < found.lower < found.value < found.interval.high


def test_no_disagreement_is_no_certainty():
    for graded in (False, True):
        found = difference([1.0] * 100, [1.0] * 100, alone(100), 0.95, graded=graded)
        assert found.lower == pytest.approx(-0.02634, abs=1e-5)
    # a hundred questions about ten images say no more than ten
    shared = difference([1.0] * 100, [1.0] * 100, [str(idx % 10) for idx in range(100)], 0.95)
    assert shared.lower == tango(0, 0, 10, z_of(0.95, 1)).low


def test_a_perfect_score_is_no_certainty():
    assert score_interval([1.0] * 50, alone(50), 0.95) == wilson(50, 50, TWO_SIDED)
    assert score_interval([1.0] * 50, ["one"] * 50, 0.95) == wilson(1, 1, TWO_SIDED)


@pytest.mark.parametrize(
    ("share", "margin", "expected"),
    [(0.01, 0.005, 2474), (0.02, 0.01, 1237), (0.04, 0.02, 619), (0.06, 0.03, 413), (0.1, 0.01, 6183)],
)
def test_questions_that_are_needed(share, margin, expected):
    assert questions_needed(share, margin, 0.95) == expected


def test_so_many_questions_suffice_in_four_of_five_cases():
    share, margin = 0.04, 0.02
    num = questions_needed(share, margin, 0.95)
    drawn = np.random.default_rng(5).multinomial(num, [share / 2, share / 2, 1 - share], size=5000)
    pairs, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    shown = [tango(*pair.tolist(), num, z_of(0.95, 1)).low > -margin for pair in pairs]
    assert (np.array(shown) * times).sum() / 5000 == pytest.approx(0.8, abs=0.04)
