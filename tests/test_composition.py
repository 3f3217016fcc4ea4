"""Several d_chi releases: never less than the truth, never more than the metric bound, close to planning figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veiltune.errors import InputError
from veiltune.privatize.accounting import (
    d_chi_composed_epsilon,
    d_chi_epsilon,
    d_chi_mu,
    gaussian_delta,
    metric_bound,
)


def losses(*, eta: float, dim: int, distance: float, num_releases: int, count: int = 200_000) -> np.ndarray:
    """Sums of privacy losses, each eta (||z + D e|| - ||z||) of a vector drawn coordinate by coordinate."""
    rng, total = np.random.default_rng(0), np.zeros(count)
    for _ in range(num_releases):
        along = rng.normal(size=count)
        norm = np.sqrt(along**2 + rng.chisquare(dim - 1, count))
        radius = rng.gamma(dim, 1 / eta, count)
        total += eta * (np.sqrt(radius**2 + distance**2 + 2 * radius * distance * along / norm) - radius)
    return total


CASES = [
    {"eta": 5.0, "dim": 16, "distance": 0.5, "num_releases": 3},
    {"eta": 2.0, "dim": 3, "distance": 0.4, "num_releases": 8},
    {"eta": 50.0, "dim": 384, "distance": 0.3, "num_releases": 5},
    {"eta": 3.0, "dim": 4, "distance": 1.0, "num_releases": 1},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("delta", [0.1, 1e-3])
def test_it_is_the_truth_rounded_up_a_little(case: dict[str, float], delta: float) -> None:
    drawn = losses(**case)  # type: ignore[arg-type]
    epsilon = d_chi_composed_epsilon(delta, **case)  # type: ignore[arg-type]

    def measured(epsilon: float) -> tuple[float, float]:
        terms = np.maximum(0.0, -np.expm1(epsilon - drawn))
        return float(terms.mean()), 4 * float(terms.std()) / math.sqrt(len(drawn))

    value, error = measured(epsilon)
    assert value <= delta + error  # a bound
    spread = float(drawn.std())
    value, error = measured(epsilon - 0.1 * spread)
    assert value > delta + error  # and a tight one: a tenth of a standard deviation less is wrong
    assert epsilon <= metric_bound(case["eta"], case["num_releases"]) * case["distance"]  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_one_release_is_the_exact_one_up_to_a_cell(case: dict[str, float]) -> None:
    single = {name: case[name] for name in ("eta", "dim", "distance")}
    for delta in (0.05, 1e-5, 1e-9):
        exact = d_chi_epsilon(delta, **single)  # type: ignore[arg-type]
        rounded = d_chi_composed_epsilon(delta, **single, num_releases=1)  # type: ignore[arg-type]
        width = 2 * single["eta"] * single["distance"] / 4000
        assert exact - 2e-6 <= rounded <= exact + width + 1e-6


def test_it_is_near_the_planning_figure_in_high_dimension() -> None:
    epsilon = d_chi_composed_epsilon(1e-5, eta=50.0, dim=1024, distance=1.0, num_releases=10)
    assert epsilon == pytest.approx(32.6, abs=0.1)
    mu = d_chi_mu(eta=50.0, dim=1024, distance=1.0, num_releases=10)
    assert gaussian_delta(mu, epsilon) == pytest.approx(1e-5, rel=0.1)
    assert gaussian_delta(1.02 * mu, epsilon) > 1.3e-5  # planted


def test_more_releases_smaller_delta_and_larger_distance_cost_more() -> None:
    def epsilon(delta: float = 1e-5, distance: float = 0.5, num_releases: int = 4) -> float:
        return d_chi_composed_epsilon(delta, eta=6.0, dim=24, distance=distance, num_releases=num_releases)

    assert epsilon() < epsilon(num_releases=5) < epsilon(num_releases=40)
    assert epsilon() < epsilon(delta=1e-8)
    assert epsilon() < epsilon(distance=0.6)
    assert epsilon(num_releases=40) < 40 * epsilon(num_releases=1)


def test_it_never_passes_the_metric_bound() -> None:
    for eta, dim, distance in ((0.01, 3, 0.1), (40.0, 3, 4.0), (900.0, 16, 1.0)):
        for num_releases in (1, 7, 500):
            epsilon = d_chi_composed_epsilon(1e-12, eta=eta, dim=dim, distance=distance, num_releases=num_releases)
            assert 0 <= epsilon <= eta * num_releases * distance * (1 + 1e-12)


def test_unusable_arguments_are_refused() -> None:
    good = {"eta": 1.0, "dim": 8, "distance": 1.0, "num_releases": 2}
    for name, value in (("eta", 0.0), ("dim", 2), ("distance", -1.0), ("num_releases", 0)):
        with pytest.raises(InputError, match=name):
            d_chi_composed_epsilon(1e-5, **(good | {name: value}))  # type: ignore[arg-type]
    for delta in (0.0, 1e-14, 2.0):
        with pytest.raises(InputError, match="delta must be in"):
            d_chi_composed_epsilon(delta, **good)  # type: ignore[arg-type]
