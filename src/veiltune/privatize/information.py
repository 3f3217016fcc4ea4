"""How much a release can tell, in nats, and what share of secrets any attack can then recover. Free of torch.

Information about a secret bounds every attack at once, also those that nobody has thought of; but it is an average
over the assumed distribution of secrets, not a promise for each of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from veiltune._validate import in_range, positive
from veiltune.errors import InputError


def gaussian_information(variances: Any, sigma: float) -> float:
    """Most information, in nats, that a vector with independent Gaussian noise can carry about the clean vector.

    0.5 sum_j ln(1 + variance_j / sigma^2): the capacity of parallel Gaussian channels.

    >>> round(gaussian_information([3.0, 0.0], sigma=1.0), 4)  # 0.5 ln 4
    0.6931

    Guarantee:
        I(clean; clean + z) is at most this for z ~ N(0, sigma^2 I) and any distribution of clean vectors with these
        variances, along any orthonormal basis (least in the eigenbasis of their covariance). So is the information
        about anything that the clean vector is computed from. It is an average over that distribution: variances
        estimated on other text say nothing of this text, and it covers one vector and one release. For several add up.

    Args:
        variances: (H,) of the clean vectors, each at least 0.
        sigma: Standard deviation of the noise in each coordinate, > 0.

    Raises:
        InputError: If a variance is negative or not finite, or sigma is not positive.

    Source: Shannon 1948; as PAC privacy's bound in Xiao and Devadas 2022, arXiv:2210.03458, Theorem 3.
    """
    return float(0.5 * np.log1p(_checked(variances) / positive(sigma=sigma) ** 2).sum())


def d_chi_information(variances: Any, eta: float) -> float:
    """Most information, in nats, that a vector with d_chi noise can carry about the clean vector.

    The entropy of the sum is at most that of a Gaussian of its covariance; that of the noise is known exactly.

    >>> round(d_chi_information([0.2] * 384, eta=50.0), 1), round(gaussian_information([0.2] * 384, 385**0.5 / 50), 1)
    (160.0, 159.8)

    Guarantee:
        As `gaussian_information`, for z with density proportional to exp(-eta ||z||). A little above the Gaussian of
        equal power, since d_chi noise of that power has less entropy; that gap stays when variances are 0.

    Args:
        variances: (H,) of the clean vectors, each at least 0.
        eta: 1 / distance, > 0.

    Raises:
        InputError: If a variance is negative or not finite, or eta is not positive.

    Source: maximum entropy (Cover and Thomas 2006, theorem 8.6.5); noise: arXiv:1910.08902.
    """
    spread = _checked(variances)
    dim, power = len(spread), (len(spread) + 1) / positive(eta=eta) ** 2  # of the noise, in each coordinate
    sphere = math.log(2.0) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)  # surface of the unit sphere
    noise_entropy = sphere + math.lgamma(dim) - dim * math.log(eta) + dim
    gap = dim / 2 * math.log(2.0 * math.pi * math.e * power) - noise_entropy
    return float(0.5 * np.log1p(spread / power).sum()) + max(0.0, gap)


def success_cap(prior_success: float, nats: float) -> float:
    """The largest success rate of any attack after a release that carries at most so much information.

    >>> round(success_cap(0.5, 1 / 8), 3), round(success_cap(0.05, 0.14), 2)
    (0.745, 0.2)

    Guarantee:
        If the best guess without the release succeeds with probability prior_success, and the release carries at most
        `nats` of information about the secret, no attack succeeds with a larger probability p than this:
        KL(Bernoulli(p) || Bernoulli(prior_success)) <= nats. Over the distribution for which both numbers hold.

    Args:
        prior_success: Of the best guess without the release: for tokens the share of the most frequent one, for an
            attribute that of its largest class; never 1 / (number of values). In (0, 1].
        nats: Information about the secret, at least 0.

    Returns:
        A probability in [prior_success, 1], rounded up by at most 1e-9.

    Raises:
        InputError: If an argument is out of range.

    Source: Xiao and Devadas 2022, arXiv:2210.03458, Theorem 1 (data processing).
    """
    in_range(1e-12, 1.0, prior_success=prior_success), in_range(0.0, math.inf, nats=nats)
    if nats >= -math.log(prior_success):  # what certainty costs
        return 1.0

    def excess(success: float) -> float:
        rest = 0.0 if success == 1.0 else (1.0 - success) * math.log((1.0 - success) / (1.0 - prior_success))
        return success * math.log(success / prior_success) + rest - nats

    if excess(prior_success) >= 0.0:
        return prior_success
    return min(1.0, float(brentq(excess, prior_success, 1.0, xtol=1e-10)) + 1e-9)


def _checked(variances: Any) -> NDArray[np.float64]:
    values = np.asarray(variances, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not bool((np.isfinite(values) & (values >= 0)).all()):
        raise InputError(f"variances must be a list of finite numbers of at least 0, got shape {values.shape}")
    return values
