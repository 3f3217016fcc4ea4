"""What the releases of a run add up to, for one changed token at one L2 distance."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betainc
from scipy.stats import gamma, norm

from veiltune._validate import in_range, positive, positive_int


def metric_bound(eta: float, num_releases: int) -> float:
    """The composed d_chi parameter of several fresh releases of one vector: num_releases * eta, per unit of distance.

    >>> metric_bound(50.0, 3)
    150.0

    Guarantee:
        Basic composition: exact for independent noise, whatever the distance. A replay of the same bytes is not a
        release.
    """
    return positive(eta=eta) * positive_int(num_releases=num_releases)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) of mu-Gaussian-DP.

    >>> round(gaussian_delta(1.0, 1.0), 4)
    0.1269

    Source: Dong et al. 2019, arXiv:1905.02383, Corollary 2.13.
    """
    mu, epsilon = positive(mu=mu), in_range(0.0, math.inf, epsilon=epsilon)
    upper = norm.cdf(-epsilon / mu + mu / 2)
    lower = math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))
    return float(max(0.0, upper - lower))


def d_chi_delta(epsilon: float, *, eta: float, dim: int, distance: float, num_points: int = 4000) -> float:
    """The exact delta(epsilon) of one d_chi release, for two inputs at one L2 distance.

    The privacy loss at noise n is eta * (||n + D|| - ||n||). For a given radius r it exceeds t exactly when the cosine
    between n and D exceeds ((r + t/eta)^2 - r^2 - D^2) / (2 r D), and the cosine of a uniform direction follows a Beta
    law; so delta = integral over r of P[loss > epsilon] minus e^epsilon times the same under the other input. By
    symmetry the second term is the probability that the loss is below -epsilon.

    Guarantee:
        For this distance and one release: (epsilon, delta)-indistinguishability, up to the quadrature error of
        `num_points` radii (below 1e-9 where tested against Monte Carlo and against epsilon = 0, the total variation).

    Args:
        epsilon: At least 0. At eta * distance and beyond, delta is 0.
        eta: As in `sample_d_chi_noise`.
        dim: Of the vectors, at least 2.
        distance: L2 distance of the two inputs, > 0.
        num_points: Radii at which the inner probability is evaluated.

    Source: definition of the hockey-stick divergence; d_chi: arXiv:1910.08902.
    """
    positive(eta=eta), positive(distance=distance), positive_int(dim=dim)
    if in_range(0.0, math.inf, epsilon=epsilon) >= eta * distance:
        return 0.0
    levels = (np.arange(num_points) + 0.5) / num_points  # equal-mass quantiles of the radius
    radii = gamma.ppf(levels, dim, scale=1.0 / eta)
    above = _share_above(radii, epsilon / eta, distance, dim).mean()
    below = 1.0 - _share_above(radii, -epsilon / eta, distance, dim).mean()
    return float(max(0.0, above - math.exp(epsilon) * below))


def _share_above(radii: np.ndarray, gain: float, distance: float, dim: int) -> np.ndarray:
    """P over directions that ||n + D|| - ||n|| > gain, for each radius ||n||."""
    target = np.maximum(radii + gain, 0.0)
    cosine = np.clip((target**2 - radii**2 - distance**2) / (2.0 * radii * distance), -1.0, 1.0)
    share: np.ndarray = np.where(radii + gain < 0, 1.0, betainc((dim - 1) / 2, (dim - 1) / 2, (1.0 - cosine) / 2))
    return share
