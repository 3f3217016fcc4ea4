"""Exposure is uniform where nothing leaks, capped where references end, and extrapolated as the fitted tail says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, norm, skewnorm

from veiltune.attacks.canary import _log_tail, exposure_bits, extrapolated_exposure_bits
from veiltune.errors import InputError


def slow_bits(score: float, references: list[float]) -> tuple[float, bool]:
    rank = 1 + sum(other >= score for other in references)
    return math.log2(len(references) + 1) - math.log2(rank), rank == 1


def test_bits_equal_counting() -> None:
    rng = np.random.default_rng(0)
    own, references = rng.integers(-5, 15, size=50).astype(float), rng.integers(-5, 10, size=200).astype(float)
    for found, score in zip(exposure_bits(own, references), own.tolist(), strict=True):
        bits, at_least = slow_bits(score, references.tolist())
        assert found.bits == pytest.approx(bits, abs=1e-12) and found.at_least == at_least


def test_bits_by_hand() -> None:
    """Seven references: above all is 3 bits at least, below the best is 2, below all 0."""
    found = exposure_bits([9.0, 6.5, 0.0, 7.0], np.arange(1.0, 8.0))
    assert [(one.bits, one.at_least) for one in found] == [(3.0, True), (2.0, False), (0.0, False), (2.0, False)]


def test_without_a_leak_few_bits_show() -> None:
    """P[bits >= b] <= 2^-b, and ranks are uniform; a leak of one deviation is seen."""
    rng = np.random.default_rng(1)
    bits = np.array([exposure_bits(rng.normal(size=1), rng.normal(size=63))[0].bits for _ in range(4000)])
    for b in range(1, 7):
        margin = 3 * math.sqrt(2.0**-b / 4000)
        assert abs(float((bits >= b).mean()) - 2.0**-b) <= margin
    leaking = exposure_bits(rng.normal(size=500) + 1.0, rng.normal(size=1000))
    assert np.median([one.bits for one in leaking]) > 2.0


@pytest.mark.parametrize("shape", [-4.0, -1.0, 0.0, 2.0])
def test_extrapolation_finds_the_tail_of_a_skew_normal(shape: float) -> None:
    references = skewnorm.rvs(shape, loc=-40, scale=6, size=20_000, random_state=2)
    at = np.array([skewnorm.isf(2.0**-b, shape, loc=-40, scale=6) for b in (1, 5, 12)])
    assert extrapolated_exposure_bits(at, references).tolist() == pytest.approx([1, 5, 12], rel=0.08)
    assert kstest(references, skewnorm(shape, loc=-40, scale=6).cdf).pvalue > 0.001  # the test's own references


def test_extrapolation_reaches_far_into_the_tail() -> None:
    """Symmetric references give a normal tail, whose bits are known far beyond where 1 - cdf is 0."""
    references = np.concatenate([norm.ppf((np.arange(500) + 0.5) / 500), -norm.ppf((np.arange(500) + 0.5) / 500)])
    deviation = references.std()
    for z in (1.0, 5.0, 8.0, 20.0, 60.0):
        expected = -float(norm.logsf(z)) / math.log(2)
        assert extrapolated_exposure_bits([z * deviation], references).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("skew", [1.5, 0.3])
def test_the_tails_two_formulae_meet(skew: float) -> None:
    """A bit on either side of where quadrature takes over, and monotone beyond."""
    rng = np.random.default_rng(3)
    references = rng.gamma(4 / skew**2, size=5000) * -1.0
    grid = np.linspace(references.mean(), references.mean() + 12 * references.std(), 400)
    bits = extrapolated_exposure_bits(grid, references)
    steps = np.diff(bits)
    assert (steps > 0).all() and (np.diff(steps) > -1e-6).all()  # log-concave: ever steeper
    area = quad(lambda x: 2.0 * norm.pdf(x) * norm.cdf(-3.0 * x), 2.0, 8.0, epsabs=0, epsrel=1e-12)[0]
    assert _log_tail(2.0, -3.0) == pytest.approx(math.log(area), rel=1e-9)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(InputError, match="got none"):
        exposure_bits([1.0], [])
    with pytest.raises(InputError, match="canary_scores must be one row of numbers"):
        exposure_bits([math.nan], [1.0])
    with pytest.raises(InputError, match="at least 50 references, got 49"):
        extrapolated_exposure_bits([1.0], np.arange(49.0))
    with pytest.raises(InputError, match="not all equal"):
        extrapolated_exposure_bits([1.0], np.zeros(60))
    with pytest.raises(InputError, match="finite scores"):
        extrapolated_exposure_bits([math.inf], np.arange(60.0))
