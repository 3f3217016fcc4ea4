"""Intervals equal their definitions, cover, and are never a point; comparisons hold their level."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from veiltune.attacks.intervals import effective_trials, share_by_group
from veiltune.audit.proportions import (
    auc_difference,
    clopper_pearson,
    excess,
    holm,
    mcnemar,
    median_interval,
    persons_needed,
    wilson,
)
from veiltune.errors import InputError

SIMULATIONS = 400
SLACK = 2.5 * math.sqrt(0.05 * 0.95 / SIMULATIONS)  # of a coverage of 95 %


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (1, 500), (250, 500)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_of_shares_are_scipys(successes: int, trials: int, confidence: float) -> None:
    result = stats.binomtest(successes, trials)
    for method, found in (
        ("wilson", wilson(successes, trials, confidence)),
        ("exact", clopper_pearson(successes, trials, confidence)),
    ):
        expected = result.proportion_ci(confidence, method=method)
        assert found == pytest.approx((successes / trials, expected.low, expected.high), abs=1e-12)


def test_wilson_solves_its_equation_for_fractions_too() -> None:
    """|share - p| = z sqrt(p (1 - p) / n) at both ends."""
    share, low, high = wilson(7.3, 40)
    assert share == pytest.approx(0.1825)
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 40), rel=1e-6)


def test_newcombe_by_hand() -> None:
    """Newcombe 1998, example (a): 56/70 against 48/80, method 10: .2000, .0524 to .3339."""
    found = excess([1.0] * 56 + [0.0] * 14, [1.0] * 48 + [0.0] * 32)
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    flipped = excess([1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14)
    assert flipped == pytest.approx((-0.2, -0.3339, -0.0524), abs=5e-5)


def test_nothing_found_is_not_zero() -> None:
    for persons in (1, 10, 380, 381, 1000):
        upper = excess([0.0] * persons, [0.0] * persons)[2]
        assert upper == pytest.approx(3.8414588 / (persons + 3.8414588))  # z^2 / (n + z^2)
        assert (upper <= 0.01) == (persons >= persons_needed(0.01) == 381)
    assert excess([0.5] * 20, [0.0] * 20)[0] == 0.5


def covered(draw: object, truth: float) -> float:
    return float(np.mean([low <= truth <= high for _, low, high in (draw() for _ in range(SIMULATIONS))]))  # type: ignore[operator]


@pytest.mark.parametrize(("own", "other", "persons"), [(0.3, 0.1, 300), (0.5, 0.5, 200)])
def test_excess_covers(own: float, other: float, persons: int) -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[float, float, float]:
        return excess((rng.random(persons) < own).astype(float), (rng.random(persons) < other).astype(float))

    def too_narrow() -> tuple[float, float, float]:
        value, low, high = draw()
        return value, value + (low - value) * 2 / 3, value + (high - value) * 2 / 3

    assert 0.95 - SLACK <= covered(draw, own - other) <= 0.95 + SLACK
    assert covered(too_narrow, own - other) < 0.93 - SLACK

    def shares() -> tuple[float, float, float]:
        return excess(rng.beta(own, 1 - own, size=persons), rng.beta(other, 1 - other, size=persons))

    assert covered(shares, own - other) >= 0.97  # shares in between vary less than a yes or no


@pytest.mark.parametrize("count", [6, 9, 20, 101])
def test_median_interval_is_the_narrowest_that_is_sure(count: int) -> None:
    values = np.arange(count, dtype=float)
    median, low, high = median_interval(np.random.default_rng(0).permutation(values))
    assert median == np.median(values) and high == count - 1 - low

    def coverage(rank: int) -> float:  # of the interval from the rank-th smallest to the rank-th largest
        return 1 - 2 * sum(math.comb(count, j) for j in range(rank)) / 2**count

    assert coverage(int(low) + 1) >= 0.95 > coverage(int(low) + 2)


def test_median_interval_covers_whatever_the_distribution() -> None:
    rng = np.random.default_rng(1)
    for draw, truth in [(rng.standard_cauchy, 0.0), (rng.standard_exponential, math.log(2))]:
        found = covered(lambda draw=draw: median_interval(draw(size=20)), truth)
        assert 0.9586 - SLACK <= found <= 0.9586 + SLACK  # 1 - 2 P[Bin(20, 1/2) <= 5]
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)
    assert median_interval([1.0, math.inf, 2.0, 3.0])[1:] == (1.0, math.inf)


def test_effective_trials_by_hand() -> None:
    """Twenty groups of five equal answers are twenty trials (times 19/20, as a variance divides by one less)."""
    answers = np.repeat(np.arange(20) % 2, 5)
    groups = np.repeat(np.arange(20), 5).tolist()
    assert effective_trials(answers, groups) == pytest.approx(19.0)
    assert effective_trials(answers) == 100
    assert effective_trials(np.zeros(100), groups) == 20
    rng = np.random.default_rng(2)
    assert effective_trials(rng.random(3000) < 0.3, (np.arange(3000) // 3).tolist()) > 2500


@pytest.mark.parametrize(("persons", "texts"), [(10, 15), (40, 15), (100, 6)])
def test_a_share_over_texts_of_persons_covers_the_true_one(persons: int, texts: int) -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(persons), texts).tolist()

    def hits() -> Any:
        return (rng.random((persons, texts)) < rng.beta(1.5, 1.5, size=(persons, 1))).ravel()

    assert covered(lambda: share_by_group(hits(), groups), 0.5) >= 0.95 - SLACK
    assert covered(lambda: clopper_pearson(int(hits().sum()), len(groups)), 0.5) < 0.95 - SLACK  # texts as trials
    assert share_by_group(np.ones(len(groups)), groups)[1] < clopper_pearson(len(groups), len(groups))[1]


def slow_mcnemar(first: list[bool], second: list[bool]) -> float:
    """Every way in which those who changed could have."""
    changed = [a for a, b in zip(first, second, strict=True) if a != b]
    n, seen = len(changed), abs(2 * sum(changed) - len(changed))
    ways = [abs(2 * sum(way) - n) >= seen for way in itertools.product([False, True], repeat=n)]
    return sum(ways) / len(ways)


def test_mcnemar_equals_counting_and_holds_its_level() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        first, second = (rng.random(10) < 0.5).tolist(), (rng.random(10) < 0.3).tolist()
        assert mcnemar(first, second).p_value == pytest.approx(slow_mcnemar(first, second))
    same = [mcnemar(rng.random(200) < 0.3, rng.random(200) < 0.3).p_value <= 0.05 for _ in range(400)]
    assert np.mean(same) <= 0.05 + SLACK
    assert mcnemar(rng.random(200) < 0.5, rng.random(200) < 0.2).p_value < 1e-4
    assert mcnemar([True], [True]).p_value == 1.0


def test_holm_by_hand() -> None:
    """.01 x 4 and .02 x 3; .03 x 2 would be below its forerunner's .06, .9 stays."""
    adjusted = holm({"d": 0.9, "a": 0.01, "c": 0.03, "b": 0.02})
    assert adjusted == pytest.approx({"d": 0.9, "a": 0.04, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def slow_auc(scores: np.ndarray, members: np.ndarray) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[members] for b in scores[~members]]
    return float(np.mean(pairs))


def test_auc_difference_equals_counting_and_covers() -> None:
    rng = np.random.default_rng(4)
    persons = np.repeat(np.arange(60), 2)
    members = persons < 30
    truth = float(stats.norm.cdf(1 / math.sqrt(2)) - stats.norm.cdf(0.5 / math.sqrt(2)))
    hits = narrow = 0
    for round_number in range(200):
        common = 0.8 * rng.normal(size=60)[persons]
        noise = 0.6 * rng.normal(size=(2, 120))
        first, second = common + noise[0] + members, common + noise[1] + 0.5 * members
        found = auc_difference(first, second, members, persons=persons.tolist(), resamples=200, seed=0)
        if round_number < 3:
            assert found[0] == pytest.approx(slow_auc(first, members) - slow_auc(second, members), abs=1e-12)
        hits += found[1] <= truth <= found[2]
        narrow += abs(found[0] - truth) <= (found[2] - found[1]) / 3
    assert 0.89 <= hits / 200 <= 0.99
    assert narrow / 200 < 0.89
    same = auc_difference(first, first, members, seed=0, resamples=50)
    assert same == (0.0, 0.0, 0.0)
    tied = np.round(first)
    expected = slow_auc(tied, members) - slow_auc(second, members)
    assert auc_difference(tied, second, members, seed=0, resamples=50)[0] == pytest.approx(expected, abs=1e-12)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"successes must be in \[0, trials\]"):
        wilson(3, 2)
    with pytest.raises(InputError, match="trials above 0"):
        clopper_pearson(0, 0)
    with pytest.raises(InputError, match="confidence must be between"):
        wilson(1, 2, confidence=1.0)
    with pytest.raises(InputError, match="in_shares must be in"):
        excess([1.5], [0.0])
    with pytest.raises(InputError, match="out_shares must be one share a person"):
        excess([0.5], [])
    with pytest.raises(InputError, match="upper must be between"):
        persons_needed(0.0)
    with pytest.raises(InputError, match="at least one number"):
        median_interval([])
    with pytest.raises(InputError, match="same persons"):
        mcnemar([True], [True, False])
    with pytest.raises(InputError, match="p_value must be in"):
        holm({"a": 1.5})
    with pytest.raises(InputError, match="at least 10 persons on each side"):
        auc_difference(np.arange(20.0), np.arange(20.0), np.arange(20) < 5, seed=0)
    with pytest.raises(InputError, match="same records"):
        auc_difference([1.0], [1.0, 2.0], [True], seed=0)
    with pytest.raises(InputError, match="with one group each"):
        effective_trials([True], ["a", "b"])
