"""Information and success caps: against closed forms, published figures, and attacks that try to pass them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from veiltune.errors import InputError
from veiltune.privatize.information import d_chi_information, gaussian_information, success_cap


@pytest.mark.parametrize(
    ("prior", "nats", "cap"),
    [
        *[(0.5, 1 / 128, 0.562), (0.5, 1 / 32, 0.624), (0.5, 1 / 8, 0.745), (0.5, 0.5, 0.952)],
        *[(0.05, 0.021, 0.10), (0.05, 0.140, 0.20), (0.05, 0.324, 0.30), (0.05, 0.830, 0.50)],
        *[(0.01, 0.144, 0.10), (0.01, 0.429, 0.20), (0.01, 0.778, 0.30), (0.01, 1.614, 0.50)],
    ],
)
def test_caps_are_the_known_ones(prior: float, nats: float, cap: float) -> None:
    assert success_cap(prior, nats) == pytest.approx(cap, abs=1.1e-3)
    assert success_cap(prior, nats * 1.1) > cap + 2e-3  # planted


@given(prior=st.floats(1e-4, 0.999), nats=st.floats(0, 12))
def test_cap_solves_its_equation(prior: float, nats: float) -> None:
    cap = success_cap(prior, nats)
    assert prior <= cap <= 1.0
    reached = float(stats.entropy([cap, 1 - cap], [prior, 1 - prior]))
    assert reached >= nats - 1e-9 or cap == 1.0
    below = cap - 1e-6
    if below > prior:
        assert float(stats.entropy([below, 1 - below], [prior, 1 - prior])) <= nats


def test_cap_at_the_ends() -> None:
    assert success_cap(0.3, 0.0) == pytest.approx(0.3, abs=1e-8)
    assert success_cap(0.3, math.log(1 / 0.3)) == 1.0  # the secret's whole entropy, if it were uniform
    assert success_cap(0.3, math.inf) == 1.0
    assert success_cap(1.0, 0.0) == 1.0


def entropy_of_mixture(noise: np.ndarray, centres: np.ndarray, log_density: object) -> float:
    """I(X; X + Z) for X uniform on the centres, as the mean of log p(y | x) - log p(y) over draws."""
    rng = np.random.default_rng(1)
    chosen = rng.integers(len(centres), size=len(noise))
    values = centres[chosen] + noise
    logs = np.stack([log_density(values - centre) for centre in centres])  # type: ignore[operator]
    own = logs[chosen, np.arange(len(noise))]
    return float((own - np.logaddexp.reduce(logs, axis=0) + math.log(len(centres))).mean())


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("law", ["gaussian", "d_chi"])
def test_bound_holds_for_real_secrets(law: str, scale: float) -> None:
    """Eight equally likely vectors: measured information stays below the bound, by little where the signal is weak."""
    rng = np.random.default_rng(0)
    dim, eta, count = 6, 3.0, 40_000
    centres = rng.normal(size=(8, dim)) * scale
    covariance = np.cov(centres.T, bias=True)
    variances = np.linalg.eigvalsh(covariance).clip(0)
    normal = rng.normal(size=(count, dim))
    sigma = math.sqrt(dim + 1) / eta
    if law == "gaussian":
        measured = entropy_of_mixture(normal * sigma, centres, lambda z: -(z**2).sum(1) / (2 * sigma**2))
        bound = gaussian_information(variances, sigma)
    else:
        noise = normal / np.linalg.norm(normal, axis=1, keepdims=True) * rng.gamma(dim, 1 / eta, (count, 1))
        measured = entropy_of_mixture(noise, centres, lambda z: -eta * np.linalg.norm(z, axis=1))
        bound = d_chi_information(variances, eta)
    assert measured <= bound + 0.01
    if law == "gaussian" and scale == 0.2:
        assert measured >= 0.7 * bound  # not vacuous
    # the diagonal of any orthonormal basis is a bound too, and no better one
    own_basis = np.diag(covariance)
    assert (gaussian_information(own_basis, sigma) if law == "gaussian" else d_chi_information(own_basis, eta)) >= bound
    if law == "gaussian" and scale == 1.0:
        assert measured > gaussian_information(variances, 3 * sigma)  # planted: the noise is less than claimed


@pytest.mark.parametrize("dim", [1, 3, 64, 384])
def test_gap_of_d_chi_is_its_missing_entropy(dim: int) -> None:
    """Gaussian entropy of equal power less that of the noise, the latter from draws: E[-log p(z)]."""
    eta, rng = 7.0, np.random.default_rng(2)
    radii = rng.gamma(dim, 1 / eta, 200_000)
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    surprise = -(stats.gamma(dim, scale=1 / eta).logpdf(radii) - (dim - 1) * np.log(radii) - log_area)
    gaussian = dim / 2 * math.log(2 * math.pi * math.e * (dim + 1) / eta**2)
    gap = d_chi_information(np.zeros(dim), eta)
    error = 4 * float(surprise.std()) / math.sqrt(len(radii))
    assert gap == pytest.approx(gaussian - float(surprise.mean()), abs=error)
    assert gap != pytest.approx(gaussian - float(surprise.mean()) + 6 * error, abs=error)  # planted
    assert 0 < gap < 0.5


def test_an_attack_stays_below_the_cap() -> None:
    """Two values, the best possible test: success is Phi(D / 2 sigma)."""
    for distance in (0.1, 0.5, 1.0, 3.0):
        cap = success_cap(0.5, gaussian_information([(distance / 2) ** 2], 1.0))
        best = float(stats.norm.cdf(distance / 2))
        assert best <= cap
        assert best > success_cap(0.5, gaussian_information([(distance / 2) ** 2], 10.0))  # planted


def test_unusable_arguments_are_refused() -> None:
    for variances in ([-1.0], [math.nan], [], [[1.0]]):
        with pytest.raises(InputError, match="variances must be a list of finite numbers"):
            gaussian_information(variances, 1.0)
        with pytest.raises(InputError, match="variances must be a list of finite numbers"):
            d_chi_information(variances, 1.0)
    with pytest.raises(InputError, match="sigma must be positive"):
        gaussian_information([1.0], 0.0)
    with pytest.raises(InputError, match="eta must be positive"):
        d_chi_information([1.0], -1.0)
    for prior, nats in ((0.0, 1.0), (1.1, 1.0), (0.5, -0.1), (0.5, math.nan)):
        with pytest.raises(InputError, match="must be in"):
            success_cap(prior, nats)
