"""What releases add up to: against slow twins, golden values, and the sampler itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from veiltune.errors import InputError
from veiltune.privatize.accounting import d_chi_delta, d_chi_epsilon, d_chi_mu, gaussian_delta, metric_bound
from veiltune.privatize.noise import sample_d_chi_noise

few = settings(max_examples=25, deadline=None)


def test_releases_add_up() -> None:
    assert metric_bound(2.5, 4) == 10.0
    for eta, releases in ((0.0, 1), (1.0, 0), (math.inf, 1)):
        with pytest.raises(InputError):
            metric_bound(eta, releases)


# --- d_chi ------------------------------------------------------------------------------------------------------------


def slow_delta(epsilon: float, eta: float, dim: int, distance: float, points: int = 3000) -> float:
    """E[(1 - e^(epsilon - loss))_+] as a plain sum over a grid of radii and angles."""
    low, high = stats.gamma(dim, scale=1 / eta).ppf([1e-13, 1 - 1e-13])
    radii = low + (np.arange(points) + 0.5) / points * (high - low)
    angles = (np.arange(points) + 0.5) / points * np.pi
    radius_weights = stats.gamma(dim, scale=1 / eta).pdf(radii)
    angle_weights = np.sin(angles) ** (dim - 2)
    total = 0.0
    for radius, weight in zip(radii, radius_weights / radius_weights.sum(), strict=True):
        moved = np.sqrt(radius**2 + distance**2 + 2 * radius * distance * np.cos(angles))
        loss = eta * (moved - radius)
        total += weight * float((angle_weights * np.maximum(0, 1 - np.exp(epsilon - loss))).sum())
    return total / float(angle_weights.sum())


@pytest.mark.parametrize(
    ("epsilon", "eta", "dim", "distance"),
    [
        (0.0, 5.0, 3, 0.4),
        (1.0, 2.0, 4, 1.5),
        (0.5, 4.0, 3, 0.25),
        (1.0, 5.0, 16, 1.0),
        (12.0, 25.0, 32, 1.0),
        (3.0, 50.0, 384, 0.5),
    ],
)
def test_delta_equals_the_slow_twin(epsilon: float, eta: float, dim: int, distance: float) -> None:
    slow = slow_delta(epsilon, eta, dim, distance)
    assert d_chi_delta(epsilon, eta=eta, dim=dim, distance=distance) == pytest.approx(slow, rel=2e-4)
    assert d_chi_delta(epsilon, eta=eta * 1.01, dim=dim, distance=distance) != pytest.approx(slow, rel=2e-4)  # planted


@pytest.mark.parametrize(
    ("epsilon", "eta", "dim", "distance", "golden"),  # 40 digits, tanh-sinh quadrature (mpmath)
    [
        (7.47, 50.0, 1024, 1.0, 7.2521876371e-06),
        (20.0, 50.0, 384, 1.0, 4.19349086288e-13),
        (40.0, 80.0, 384, 1.3, 2.36664266056e-08),
        (1.0, 2.0, 3, 1.5, 0.386867598048),
        (16.0, 15.5, 4, 1.04, 0.000315328765229),
    ],
)
def test_delta_equals_golden_values(epsilon: float, eta: float, dim: int, distance: float, golden: float) -> None:
    assert d_chi_delta(epsilon, eta=eta, dim=dim, distance=distance) == pytest.approx(golden, rel=1e-8)


def test_the_sampler_has_that_delta() -> None:
    """P[loss > e] - exp(e) P[loss < -e] counted over real draws; draws of another scale are rejected."""
    eta, dim, distance, epsilon, count = 6.0, 8, 0.7, 1.0, 200_000
    noise = sample_d_chi_noise((count, dim), eta=eta, generator=torch.Generator().manual_seed(0)).double()

    def deviation(noise: torch.Tensor) -> float:
        moved = noise.clone()
        moved[:, 0] += distance
        loss = eta * (moved.norm(dim=-1) - noise.norm(dim=-1))
        terms = (loss > epsilon).double() - math.exp(epsilon) * (loss < -epsilon).double()
        exact = d_chi_delta(epsilon, eta=eta, dim=dim, distance=distance)
        return abs(float(terms.mean()) - exact) / (float(terms.std()) / math.sqrt(count))

    assert deviation(noise) < 3.5
    for factor in (2 / 3, 0.95, 3 / 2):
        assert deviation(noise * factor) > 6


@few
@given(eta=st.floats(0.1, 30), dim=st.integers(3, 600), distance=st.floats(0.01, 3), share=st.floats(0, 0.99))
def test_delta_falls_with_epsilon_and_grows_with_distance(eta: float, dim: int, distance: float, share: float) -> None:
    epsilon = share * eta * distance
    delta = d_chi_delta(epsilon, eta=eta, dim=dim, distance=distance)
    assert 0 <= delta <= 1
    assert d_chi_delta(epsilon * 1.05 + 1e-3, eta=eta, dim=dim, distance=distance) <= delta * (1 + 1e-9) + 1e-300
    assert d_chi_delta(epsilon, eta=eta, dim=dim, distance=distance * 1.1) >= delta * (1 - 1e-9)


def test_delta_is_zero_from_the_metric_bound_on() -> None:
    assert d_chi_delta(3.0, eta=2.0, dim=5, distance=1.5) == 0.0
    assert d_chi_delta(2.9, eta=2.0, dim=5, distance=1.5) > 0.0


def test_very_large_epsilon_is_answered_from_above() -> None:
    near, beyond = (d_chi_delta(e, eta=1500.0, dim=300, distance=1.0) for e in (599.0, 601.0))
    assert 0.999 < beyond <= 1.0 and 0.999 < near <= 1.0


@few
@given(eta=st.floats(0.5, 60), dim=st.integers(3, 1000), log_delta=st.floats(-9, -0.5))
def test_epsilon_is_the_inverse_of_delta(eta: float, dim: int, log_delta: float) -> None:
    delta = 10**log_delta
    epsilon = d_chi_epsilon(delta, eta=eta, dim=dim, distance=1.0)
    assert epsilon <= eta
    assert d_chi_delta(epsilon, eta=eta, dim=dim, distance=1.0) <= delta
    if epsilon > 1e-3:
        assert d_chi_delta(epsilon - 1e-4, eta=eta, dim=dim, distance=1.0) >= delta * (1 - 1e-2)


def test_planning_comes_close_but_is_no_bound() -> None:
    def ratio(eta: float, dim: int, epsilon: float) -> float:
        exact = d_chi_delta(epsilon, eta=eta, dim=dim, distance=1.0)
        return gaussian_delta(d_chi_mu(eta=eta, dim=dim, distance=1.0), epsilon) / exact

    assert ratio(50.0, 1024, 3.0) == pytest.approx(1.0, abs=0.02)
    assert ratio(10.0, 16, 2.0) == pytest.approx(1.0, abs=0.2)
    assert ratio(1.2, 16, 0.03) < 0.99  # here it would state less than the truth
    assert d_chi_mu(eta=50.0, dim=100, distance=0.5, num_releases=9) == 7.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 2}, "dim must be at least 3"),
        ({"eta": 0.0}, "eta must be positive"),
        ({"distance": -1.0}, "distance must be positive"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, float], message: str) -> None:
    good = {"eta": 1.0, "dim": 4, "distance": 1.0}
    with pytest.raises(InputError, match=message):
        d_chi_delta(0.5, **(good | options))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="epsilon must be in"):
        d_chi_delta(-0.1, **good)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="delta must be in"):
        d_chi_epsilon(0.0, **good)  # type: ignore[arg-type]


# --- Gaussian ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "epsilon"), [(1.0, 0.0), (1.0, 1.0), (0.5, 2.0), (3.0, 8.0)])
def test_gaussian_delta_equals_the_hockey_stick_integral(mu: float, epsilon: float) -> None:
    x = np.linspace(-15, 18, 400_001)
    gain = np.maximum(0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x)).sum() * (x[1] - x[0])
    assert gaussian_delta(mu, epsilon) == pytest.approx(float(gain), rel=1e-4)
    assert gaussian_delta(mu * 1.01, epsilon) != pytest.approx(float(gain), rel=1e-3)  # planted


@given(mu=st.floats(1e-3, 1e3), epsilon=st.floats(0, 1e4))
@settings(deadline=None)
def test_gaussian_delta_is_a_probability_everywhere(mu: float, epsilon: float) -> None:
    delta = gaussian_delta(mu, epsilon)
    assert 0 <= delta <= 1
    assert gaussian_delta(mu, epsilon + 1) <= delta
    assert gaussian_delta(mu * 1.1, epsilon) >= delta
