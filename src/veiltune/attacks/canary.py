"""Exposure of inserted secrets: how far they stand out among secrets that were never inserted. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp
from scipy.stats import skewnorm

from veiltune.errors import InputError

Float64 = NDArray[np.float64]

FEWEST_FOR_A_FIT = 50
_MOST_SKEW = 0.99  # a skew-normal distribution has at most .9953
_TAIL = 1e-6  # beyond, the closed form cancels
_STEPS = 2001


@dataclass(frozen=True)
class Exposure:
    """One secret's.

    Attributes:
        bits: log2 of references + 1, less log2 of the rank.
        at_least: Whether it beats every reference, so that it is exposed by at least so many bits.
    """

    bits: float
    at_least: bool


def exposure_bits(canary_scores: Any, reference_scores: Any) -> tuple[Exposure, ...]:
    """The bits by which asking the model shortens the search for each secret: log2(R + 1) - log2(rank).

    >>> exposure_bits([9.0, 2.0, 0.0], [1.0, 2.0, 3.0])
    (Exposure(bits=2.0, at_least=True), Exposure(bits=0.415..., at_least=False), Exposure(bits=0.0, at_least=False))

    Guarantee:
        For a secret the model never saw, drawn as the references were, the rank is uniform on 1 .. R + 1 (later, with
        ties): P[bits >= b] <= 2^-b, whatever the distribution of scores. No more than log2(R + 1) bits can show.

    Args:
        canary_scores: (N,) of inserted secrets, such as log-probabilities; higher for likelier.
        reference_scores: (R,) of secrets from the same population that were not inserted.

    Raises:
        InputError: If there is no reference or a score is nan.

    Source: Carlini et al. 2018, arXiv:1802.08232; ties count as ranked before.
    """
    own, others = _scores(canary_scores, "canary_scores"), np.sort(_scores(reference_scores, "reference_scores"))
    if not len(others):
        raise InputError("exposure needs secrets that were not inserted to compare with, got none")
    ranks = 1 + len(others) - np.searchsorted(others, own, side="left")
    return tuple(Exposure(math.log2((len(others) + 1) / int(rank)), bool(rank == 1)) for rank in ranks)


def extrapolated_exposure_bits(canary_scores: Any, reference_scores: Any) -> Float64:
    """Exposure beyond what references can show: -log2 of a fitted skew-normal distribution's upper tail.

    Guarantee:
        None: a model of the tail, not a measurement. Use it to compare, beside `exposure_bits`.

    Args:
        canary_scores: (N,) of inserted secrets; higher for likelier.
        reference_scores: (R,) of secrets that were not inserted, at least 50, not all equal; the distribution with
            their mean, variance and skewness (up to .99) is taken.

    Returns:
        (N,) bits.

    Raises:
        InputError: If there are too few references, they are all equal, or a score is not finite.

    Source: Carlini et al. 2018, arXiv:1802.08232, section 4.3 (there fitted by likelihood); Azzalini 1985.
    """
    own, others = _scores(canary_scores, "canary_scores"), _scores(reference_scores, "reference_scores")
    if len(others) < FEWEST_FOR_A_FIT:
        raise InputError(f"a fitted tail needs at least {FEWEST_FOR_A_FIT} references, got {len(others)}")
    if not (bool(np.isfinite(own).all()) and bool(np.isfinite(others).all()) and others.std() > 0):
        raise InputError("a fitted tail needs finite scores, and references that are not all equal")
    shape, location, scale = _fitted(others)
    return np.array([-_log_tail((x - location) / scale, shape) / math.log(2) for x in own])


def _scores(values: Any, name: str) -> Float64:
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or bool(np.isnan(row).any()):
        raise InputError(f"{name} must be one row of numbers, got shape {row.shape} or nan")
    return row


def _fitted(values: Float64) -> tuple[float, float, float]:
    """Shape, location and scale of the skew-normal distribution with the values' first three moments."""
    mean, deviation = float(values.mean()), float(values.std())
    skew = float(np.clip((((values - mean) / deviation) ** 3).mean(), -_MOST_SKEW, _MOST_SKEW))
    power = abs(skew) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    scale = deviation / math.sqrt(1 - 2 * delta * delta / math.pi)
    return delta / math.sqrt(1 - delta * delta), mean - scale * delta * math.sqrt(2 / math.pi), scale


def _log_tail(x: float, shape: float) -> float:
    """Log P[X > x], nats; by quadrature of the density where the closed form loses its digits."""
    closed = float(skewnorm.sf(x, shape))
    if closed > _TAIL:
        return math.log(closed)
    steepness = x - shape * math.exp(_log_density(shape * x) - float(log_ndtr(shape * x)))
    at = x + np.linspace(0.0, 40.0 / steepness, _STEPS)  # the density is log-concave: it falls ever faster
    heights = math.log(2) + _log_density(at) + log_ndtr(shape * at)
    weights = np.where(np.arange(_STEPS) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    return float(logsumexp(heights, b=weights * (at[1] - at[0]) / 3))


def _log_density(x: Any) -> Any:
    return -0.5 * x * x - 0.5 * math.log(2 * math.pi)
