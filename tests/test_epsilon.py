"""The one-run bound equals its definition, is valid, and is as strong as the published table."""

from __future__ import annotations

import math
from fractions import Fraction
from time import process_time

import numpy as np
import pytest
from scipy.stats import binom

from veiltune.audit.epsilon import GRID, audited_epsilon, epsilon_of, one_run_p_value
from veiltune.errors import InputError

DELTA = 1e-5


def naive_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Term by term, in rational numbers."""
    q = Fraction(math.exp(epsilon) / (1 + math.exp(epsilon)))
    mass = [Fraction(math.comb(r, j)) * q**j * (1 - q) ** (r - j) for j in range(r + 1)]
    beta = sum(mass[v:], Fraction(0))
    spread = max((sum(mass[v - i : v], Fraction(0)) / i for i in range(1, v + 1)), default=Fraction(1))
    return min(1.0, float(beta + 2 * m * Fraction(delta) * spread))


@pytest.mark.parametrize(("m", "r"), [(12, 6), (12, 12), (60, 30), (100, 50)])
@pytest.mark.parametrize("delta", [0.0, 1e-9, 1e-5, 1e-2])
def test_p_value_equals_the_naive_sum(m: int, r: int, delta: float) -> None:
    for v in {1, r // 2, r - 1, r}:
        for epsilon in (0.0, 0.3, 2.0, 7.0):
            expected = naive_p_value(m, r, v, epsilon, delta)
            assert one_run_p_value(m, r, v, epsilon=epsilon, delta=delta) == pytest.approx(expected, rel=1e-9)


def test_p_value_by_hand() -> None:
    """Two guesses, both right, epsilon 0: 1/4 + 2 m delta max(P[Bin = 1] / 1, P[Bin <= 1] / 2) = 1/4 + 20 * .01 / 2."""
    assert one_run_p_value(10, 2, 2, epsilon=0.0, delta=0.01) == pytest.approx(0.25 + 20 * 0.01 * 0.5)
    assert one_run_p_value(10, 2, 0, epsilon=0.0, delta=0.01) == 1.0


@pytest.mark.parametrize(("r", "v"), [(200_000, 200_000), (200_000, 140_000), (10**5, 51_000)])
def test_large_counts_and_a_tiny_delta(r: int, v: int) -> None:
    for delta in (1e-300, 1e-12):
        found = epsilon_of(r, r, v, delta=delta, alpha=0.01)
        assert 0 < found < math.inf
        assert one_run_p_value(r, r, v, epsilon=found, delta=delta) == pytest.approx(0.01, rel=1e-6)
        assert float(binom.sf(v - 1, r, 1 / (1 + math.exp(-found)))) <= 0.01 * (1 + 1e-9)


def test_bound_is_where_the_p_value_crosses() -> None:
    for v in (40, 55, 62):
        bound = epsilon_of(1000, 62, v, delta=DELTA, alpha=0.01)
        every = [one_run_p_value(1000, 62, v, epsilon=e, delta=DELTA) <= 0.01 for e in np.linspace(0, 6, 601)]
        last = every.index(False) - 1 if not every[-1] else 600
        assert bound == pytest.approx(max(last, 0) * 0.01, abs=0.01)
        assert not any(every[last + 1 :])


def slow_bound(scores: np.ndarray, included: np.ndarray, delta: float) -> float:
    """Sort, guess, count; then step through epsilon."""
    order, m, best = np.argsort(scores), len(scores), 0.0
    for part in GRID:
        k = m // part
        right = sum(bool(included[i]) for i in order[m - k :]) + sum(not included[i] for i in order[:k])
        epsilon = 0.0
        while one_run_p_value(m, 2 * k, right, epsilon=epsilon, delta=delta) <= 0.05 / 5:
            best, epsilon = max(best, epsilon), epsilon + 0.01
    return best


def test_bound_equals_the_slow_one() -> None:
    rng = np.random.default_rng(3)
    for m, mu in [(32, 3.0), (100, 1.0), (333, 2.0)]:
        included = rng.random(m) < 0.5
        scores = rng.normal(size=m) + mu * included
        found = audited_epsilon(scores, included, delta=DELTA, seed=0)
        assert slow_bound(scores, included, DELTA) == pytest.approx(found.epsilon, abs=0.0101)
        assert found.epsilon <= found.ceiling and found.guesses == 2 * found.tail
        assert found.included == included.sum() and found.canaries == m


def test_ties_say_nothing() -> None:
    """Equal scores in the coins' own order must not become a perfect attack."""
    included = np.arange(1000) < 503
    found = [audited_epsilon(np.zeros(1000), included, delta=DELTA, seed=seed).epsilon for seed in range(20)]
    assert sum(bound > 0 for bound in found) <= 4
    first = audited_epsilon(np.zeros(1000), included, delta=DELTA, seed=1)
    assert first == audited_epsilon(np.zeros(1000), included, delta=DELTA, seed=1)


@pytest.mark.parametrize("m", [200, 1000])
def test_no_leak_is_not_reported(m: int) -> None:
    """And the threshold that is best after the fact, uncorrected, reports one in far more than one run of twenty."""
    rng = np.random.default_rng(4)
    bounds, tuned = [], []
    for _ in range(150):
        included, scores = rng.random(m) < 0.5, rng.normal(size=m)
        bounds.append(audited_epsilon(scores, included, delta=0.0, seed=0).epsilon > 0)
        ranked = included[np.argsort(-scores)]
        tuned.append(
            any(
                one_run_p_value(m, 2 * k, int(ranked[:k].sum() + (~ranked[-k:]).sum()), epsilon=0.0, delta=0.0) <= 0.05
                for k in range(5, m // 2, 5)
            )
        )
    assert np.mean(bounds) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 150)
    assert np.mean(tuned) > 0.15


def test_bound_is_below_the_truth_of_a_gaussian_mechanism_and_as_strong_as_published() -> None:
    """Mu 1 is epsilon 4.38 at delta 1e-5; the medians of 30 runs in the table are 1.53 and (mu 3) 4.27."""
    rng = np.random.default_rng(5)
    for mu, truth, published in [(1.0, 4.38, 1.53), (3.0, 16.7, 4.27)]:
        bounds = []
        for _ in range(60):
            included = rng.random(1000) < 0.5
            scores = rng.normal(size=1000) + mu * included
            bounds.append(audited_epsilon(scores, included, delta=DELTA, seed=0).epsilon)
        assert np.mean(np.array(bounds) <= truth) == 1.0
        assert np.median(bounds) == pytest.approx(published, rel=0.1)


def test_a_claim_that_is_too_low_is_caught() -> None:
    """Epsilon 1 is mu .268 at delta 1e-5; a broken run has a quarter of the noise, so four times that."""
    rng = np.random.default_rng(6)
    included = rng.random(1000) < 0.5
    sound, broken = (
        audited_epsilon(rng.normal(size=1000) + mu * included, included, delta=DELTA, seed=0) for mu in (0.268, 1.072)
    )
    assert sound.epsilon <= 1.0 < broken.epsilon


def test_it_is_quick() -> None:
    rng = np.random.default_rng(7)
    included = rng.random(1000) < 0.5
    scores = rng.normal(size=1000) + included

    def seconds() -> float:
        start = process_time()
        audited_epsilon(scores, included, delta=DELTA, seed=0)
        return process_time() - start

    assert min(seconds() for _ in range(5)) < 0.05


def test_unusable_input_is_refused() -> None:
    scores, included = np.arange(100.0), np.arange(100) % 2 == 0
    with pytest.raises(InputError, match="at least 32 coin-flipped canaries, got 31"):
        audited_epsilon(scores[:31], included[:31], delta=DELTA, seed=0)
    with pytest.raises(InputError, match="must be finite"):
        audited_epsilon(np.where(included, np.inf, scores), included, delta=DELTA, seed=0)
    with pytest.raises(InputError, match="one length"):
        audited_epsilon(scores, included[:50], delta=DELTA, seed=0)
    with pytest.raises(InputError, match="fell on one side"):
        audited_epsilon(scores, scores >= 0, delta=DELTA, seed=0)
    with pytest.raises(InputError, match="delta must be"):
        audited_epsilon(scores, included, delta=1.0, seed=0)
    with pytest.raises(InputError, match="correct <= guesses"):
        one_run_p_value(10, 5, 6, epsilon=1.0, delta=0.0)
