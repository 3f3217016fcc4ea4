"""What releases add up to, for one token's vector and two values of it at one L2 distance.

Three readings, from the coarsest to the finest: the metric bound (any number of releases, any distance), the exact
(epsilon, delta) of one d_chi release, and Gaussian DP (exact for Gaussian noise; for d_chi a planning approximation).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc
from scipy.stats import gamma, norm

from veiltune._validate import in_range, positive, positive_int
from veiltune.errors import InputError

Float64 = NDArray[np.float64]
_LOST_MASS = 1e-20  # of the radius, at each end of the integral
_NODES = 300  # of the quadrature, in each piece
_LARGE_EPSILON = 600.0  # e^epsilon leaves float64 soon after


def metric_bound(eta: float, num_releases: int) -> float:
    """The composed d_chi parameter of several fresh releases of one vector: num_releases * eta, per unit of distance.

    >>> metric_bound(50.0, 3)
    150.0

    Guarantee:
        Basic composition: n independent releases of a vector multiply n likelihood ratios of at most exp(eta * D) each.
        It holds at every distance D. A replay of the same bytes is not a release.
    """
    return positive(eta=eta) * positive_int(num_releases=num_releases)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) of mu-Gaussian-DP.

    >>> round(gaussian_delta(1.0, 1.0), 4)
    0.1269

    Args:
        mu: Distance over sigma, times sqrt(n) for n releases; > 0.
        epsilon: At least 0.

    Source: Dong et al. 2019, arXiv:1905.02383, Corollary 2.13.
    """
    positive(mu=mu), _finite_epsilon(epsilon)
    log_upper = norm.logcdf(-epsilon / mu + mu / 2)
    log_lower = min(epsilon + norm.logcdf(-epsilon / mu - mu / 2), log_upper)
    return float(-math.exp(log_upper) * math.expm1(log_lower - log_upper))


def d_chi_mu(*, eta: float, dim: int, distance: float, num_releases: int = 1) -> float:
    """The Gaussian-DP parameter that d_chi releases come close to in high dimension: for planning, not a bound.

    >>> d_chi_mu(eta=50.0, dim=400, distance=1.0, num_releases=4)
    5.0

    Guarantee:
        None: the privacy loss is only nearly normal, and the true delta can be the larger one. State `metric_bound`
        or, for one release, `d_chi_delta`.

    Source: central limit of the privacy loss eta (||n + D|| - ||n||), whose mean is near mu^2 / 2 and variance near
        mu^2 for mu = eta D / sqrt(dim); composition: Dong et al. 2019, arXiv:1905.02383.
    """
    ratio = positive(eta=eta) * positive(distance=distance) / math.sqrt(positive_int(dim=dim))
    return ratio * math.sqrt(positive_int(num_releases=num_releases))


def d_chi_delta(epsilon: float, *, eta: float, dim: int, distance: float) -> float:
    """The exact delta(epsilon) of one d_chi release, for two inputs at one L2 distance.

    With u = eta * radius ~ Gamma(dim, 1) and a = eta * distance, the privacy loss is
    sqrt(u^2 + a^2 + 2 u a cos) - u, and (1 + cos) / 2 of a uniform direction is Beta((dim-1)/2, (dim-1)/2). So
    delta = P[loss > epsilon] - e^epsilon P[loss < -epsilon], each an integral of a Beta share over u.

    >>> round(d_chi_delta(7.47, eta=50.0, dim=1024, distance=1.0) * 1e6, 2)  # the metric bound alone says epsilon = 50
    7.25
    >>> d_chi_delta(50.0, eta=50.0, dim=1024, distance=1.0)
    0.0

    Guarantee:
        One release of two inputs at this distance, or any smaller one, is (epsilon, delta)-indistinguishable to anyone
        who sees it. The quadrature agrees with 40-digit arithmetic to 1e-8 of delta. It does not cover several
        releases or several tokens.

    Args:
        epsilon: At least 0. At eta * distance and beyond, delta is 0; between 600 and there the (larger)
            P[loss > epsilon] is returned.
        eta: As in `sample_d_chi_noise`.
        dim: Of the vectors, at least 3.
        distance: L2 distance of the two inputs, > 0.

    Raises:
        InputError: If an argument is out of range.

    Source: the hockey-stick divergence, Balle et al. 2018, arXiv:1807.01647; the mechanism: arXiv:1910.08902.
    """
    span = positive(eta=eta) * positive(distance=distance)
    if positive_int(dim=dim) < 3:
        raise InputError(f"dim must be at least 3, got {dim}; the quadrature is made for vectors, state metric_bound")
    if _finite_epsilon(epsilon) >= span:
        return 0.0
    shape, gap, total = (dim - 1) / 2, span - epsilon, span + epsilon

    u, weights = _radius_quadrature(dim, (gap / 2, total / 2))  # where a share of directions becomes 1 or 0
    above = betainc(shape, shape, np.minimum(gap * (2 * u + total) / (4 * u * span), 1.0))
    below = betainc(shape, shape, np.maximum(gap * (2 * u - total) / (4 * u * span), 0.0))
    upper, lower = float(weights @ above), float(weights @ below)
    if epsilon > _LARGE_EPSILON:
        return upper
    return min(1.0, max(0.0, upper - math.exp(epsilon) * lower))


def d_chi_epsilon(delta: float, *, eta: float, dim: int, distance: float) -> float:
    """The least epsilon at which `d_chi_delta` is at most delta, rounded up by at most 1e-6.

    >>> round(d_chi_epsilon(1e-5, eta=50.0, dim=1024, distance=1.0), 2)
    7.36

    Args:
        delta: In (0, 1).
        eta: See `d_chi_delta`.
        dim: See `d_chi_delta`.
        distance: See `d_chi_delta`.
    """
    in_range(1e-15, 1.0, delta=delta)

    def excess(epsilon: float) -> float:
        return d_chi_delta(epsilon, eta=eta, dim=dim, distance=distance) - delta

    if excess(0.0) <= 0:
        return 0.0
    return min(eta * distance, float(brentq(excess, 0.0, eta * distance, xtol=1e-7)) + 1e-6)


def _radius_quadrature(dim: int, kinks: tuple[float, float]) -> tuple[Float64, Float64]:
    """Points and weights of a Gamma(dim, 1) expectation, Gauss-Legendre between the kinks."""
    low, high = float(gamma.ppf(_LOST_MASS, dim)), float(gamma.isf(_LOST_MASS, dim))
    edges = np.array([low, *sorted(u for u in kinks if low < u < high), high])
    nodes, node_weights = _legendre()
    half = np.diff(edges)[:, None] / 2
    u = (edges[:-1, None] + half * (nodes + 1)).ravel()
    return u, (half * node_weights).ravel() * np.exp((dim - 1) * np.log(u) - u - math.lgamma(dim))


@cache
def _legendre() -> tuple[Float64, Float64]:
    return np.polynomial.legendre.leggauss(_NODES)


def _finite_epsilon(epsilon: float) -> float:
    return in_range(0.0, 1e300, epsilon=epsilon)
