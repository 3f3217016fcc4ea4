"""What releases add up to, for one token's vector and two values of it at one L2 distance.

Three readings, from the coarsest to the finest: the metric bound (any number of releases, any distance), the exact
(epsilon, delta) of one d_chi release or, rounded up on a grid, of several, and Gaussian DP (exact for Gaussian noise;
for d_chi a planning approximation).
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc
from scipy.stats import gamma, norm

from veiltune._validate import in_range, positive, positive_int
from veiltune.errors import InputError

Float64 = NDArray[np.float64]
_LOST_MASS = 1e-20  # of the radius, at each end of the integral
_NODES = 300  # of the quadrature, in each piece
_GRID_POINTS = 4000  # of the privacy loss of one release
_LOST_LOSS = 1e-18  # of the privacy loss, at each end of the grid
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
    span = _span(eta, dim, distance)
    if _finite_epsilon(epsilon) >= span:
        return 0.0
    upper, lower = _loss_tails(epsilon, span=span, dim=dim)
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


def d_chi_composed_epsilon(delta: float, *, eta: float, dim: int, distance: float, num_releases: int) -> float:
    """The epsilon at this delta of several fresh d_chi releases of one vector, by exact integration on a grid.

    The privacy loss of one release is cut into cells by its exact distribution (see `d_chi_delta`), each cell moved to
    its upper edge, and the result convolved with itself by dp_accounting.

    >>> round(d_chi_composed_epsilon(1e-5, eta=50.0, dim=1024, distance=1.0, num_releases=10), 1)  # metric bound: 500
    32.5

    Guarantee:
        n releases with independent noise of two vectors at this distance, or any smaller one, are
        (epsilon, delta)-indistinguishable to anyone who sees all of them, also where later ones are asked for in the
        light of earlier ones. Rounded up, by at most n cells of about 1/200 of the loss's standard deviation each;
        never more than `metric_bound` says. A replay of the same bytes is no release. It does not cover several
        tokens at once.

    Args:
        delta: In [1e-12, 1); below, the arithmetic of the convolution is not fine enough.
        eta: See `d_chi_delta`.
        dim: See `d_chi_delta`.
        distance: See `d_chi_delta`.
        num_releases: n, at least 1.

    Raises:
        InputError: If an argument is out of range.

    Source: privacy loss distributions, Sommer et al. 2019; Koskela et al. 2020, arXiv:1906.03049; dp_accounting.
    """
    in_range(1e-12, 1.0, delta=delta)
    bound = metric_bound(eta, num_releases) * distance
    cells, lost, width = _loss_cells(_span(eta, dim, distance), dim)
    one = PrivacyLossDistribution.create_from_rounded_probability(dict(cells), lost, width)
    several = one.self_compose(num_releases) if num_releases > 1 else one
    return min(bound, float(several.get_epsilon_for_delta(delta)))


def _span(eta: float, dim: int, distance: float) -> float:
    """The largest privacy loss of one release."""
    span = positive(eta=eta) * positive(distance=distance)
    if positive_int(dim=dim) < 3:
        raise InputError(f"dim must be at least 3, got {dim}; the quadrature is made for vectors, state metric_bound")
    return span


def _loss_tails(epsilon: float, *, span: float, dim: int) -> tuple[float, float]:
    """P[loss > epsilon] and P[loss < -epsilon] of one release, for 0 <= epsilon < span."""
    shape, gap, total = (dim - 1) / 2, span - epsilon, span + epsilon
    u, weights = _radius_quadrature(dim, (gap / 2, total / 2))  # where a share of directions becomes 1 or 0
    above = betainc(shape, shape, np.minimum(gap * (2 * u + total) / (4 * u * span), 1.0))
    below = betainc(shape, shape, np.maximum(gap * (2 * u - total) / (4 * u * span), 0.0))
    return float(weights @ above), float(weights @ below)


@lru_cache(maxsize=64)
def _loss_cells(span: float, dim: int) -> tuple[tuple[tuple[int, float], ...], float, float]:
    """The privacy loss of one release on a grid: (index, mass) at upper edges, the mass beyond, the width of a cell."""

    def above(loss: float) -> float:
        """P[loss of a release > loss]."""
        if abs(loss) >= span:
            return float(loss < 0)
        upper, lower = _loss_tails(abs(loss), span=span, dim=dim)
        return upper if loss >= 0 else 1.0 - lower

    def reach(side: int) -> float:
        """Where at most `_LOST_LOSS` is left further out."""
        low, high = 0.0, span
        while high - low > 1e-3 * span:
            middle = (low + high) / 2
            tail = _loss_tails(middle, span=span, dim=dim)[side]
            low, high = (middle, high) if tail > _LOST_LOSS else (low, middle)
        return high

    top, bottom = reach(0), -reach(1)
    width = (top - bottom) / _GRID_POINTS
    indices = range(math.floor(bottom / width), math.ceil(top / width) + 1)
    tails = np.minimum.accumulate([above(index * width) for index in indices])  # the quadrature errs by 1e-8 of it
    masses = np.append(1.0 - tails[0], -np.diff(tails))
    cells = tuple((index, float(mass)) for index, mass in zip(indices, masses, strict=True))
    return cells, float(tails[-1]), width


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
