"""Intervals of shares and medians from few observations. Free of torch.

Source: Wilson 1927; Clopper and Pearson 1934; Brown, Cai and DasGupta 2001 (which to use when).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom, norm, t

from veiltune._validate import in_range
from veiltune.errors import InputError

Float64 = NDArray[np.float64]

_FEW_GROUPS = 80


def wilson(successes: int | float, trials: int | float, confidence: float = 0.95) -> tuple[float, float, float]:
    """A share with its score interval, which never shrinks to a point: 0 of n is not "0 %".

    >>> [round(x, 4) for x in wilson(0, 500)]
    [0.0, 0.0, 0.0076]

    Guarantee:
        Near the stated coverage on average over true shares, for independent trials. Successes may be fractional:
        trials that each contribute a share in [0, 1]. A share's variance is at most that of a yes or no of the same
        mean, so the interval is then conservative.

    Args:
        successes: In [0, trials].
        trials: Above 0; fractional for an effective number.
        confidence: In (0, 1).

    Returns:
        (share, low, high).

    Raises:
        InputError: If a value is out of range.
    """
    share, z = _share(successes, trials), _z(confidence)
    spread = z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    reach = math.sqrt(spread * share * (1 - share) + spread * spread / 4) / (1 + spread)
    return share, max(0.0, centre - reach) if share > 0 else 0.0, min(1.0, centre + reach) if share < 1 else 1.0


def clopper_pearson(
    successes: int | float, trials: int | float, confidence: float = 0.95
) -> tuple[float, float, float]:
    """A share with its exact interval.

    >>> [round(x, 4) for x in clopper_pearson(10, 1000)]
    [0.01, 0.0048, 0.0183]

    Guarantee:
        Covers the true share with at least that probability for independent trials, whatever the share; so it is wider
        than need be.

    Args:
        successes: In [0, trials].
        trials: Above 0; fractional for an effective number.
        confidence: In (0, 1).

    Returns:
        (share, low, high).

    Raises:
        InputError: If a value is out of range.
    """
    share, tail = _share(successes, trials), _tail(confidence)
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.isf(tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return share, low, high


def median_interval(values: Any, confidence: float = 0.95) -> tuple[float, float, float]:
    """The median with an interval between two order statistics.

    >>> median_interval([7.0, 1.0, 3.0, 9.0, 5.0, 2.0, 8.0, 4.0, 6.0])
    (5.0, 2.0, 8.0)

    Guarantee:
        Covers the true median with at least that probability, whatever the distribution, for independent values. Where
        there are too few for that (below 6 at 95 %) it is their range, which covers with probability 1 - 2 / 2^n only.

    Args:
        values: (N,) numbers; infinite ones are fine.
        confidence: In (0, 1).

    Returns:
        (median, low, high).

    Raises:
        InputError: If there is no value or one is nan.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1 or not len(ordered) or bool(np.isnan(ordered).any()):
        raise InputError(f"a median needs one row of at least one number, got shape {ordered.shape} or nan")
    lower, upper = float(ordered[(len(ordered) - 1) // 2]), float(ordered[len(ordered) // 2])
    ranks = np.arange(1, len(ordered) // 2 + 1)
    sure = ranks[binom.cdf(ranks - 1, len(ordered), 0.5) <= _tail(confidence)]
    rank = int(sure[-1]) if len(sure) else 1
    return lower if lower == upper else (lower + upper) / 2, float(ordered[rank - 1]), float(ordered[-rank])


def effective_trials(hits: Any, groups: Sequence[Hashable] | None = None) -> float:
    """How many independent trials have the variance of these, of which those of one group may depend on each other.

    >>> effective_trials([1, 1, 0, 0], ["ann", "ann", "bob", "bob"]), effective_trials([1, 0, 1, 0])
    (1.0, 4.0)

    Args:
        hits: (N,) shares in [0, 1].
        groups: Of each trial; None if each is its own.

    Returns:
        At most N; the number of groups where all hits agree, which says nothing of their dependence.

    Raises:
        InputError: If there is no trial or the counts differ.

    Source: Korn and Graubard 1998, the variance of a ratio of group totals.
    """
    values = np.asarray(hits, dtype=np.float64)
    if values.ndim != 1 or not len(values) or (groups is not None and len(groups) != len(values)):
        raise InputError(f"hits must be one row of at least one, with one group each, got shape {values.shape}")
    if groups is None:
        return float(len(values))
    numbers: dict[Hashable, int] = {}
    members = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    share, count = float(values.mean()), len(numbers)
    sums = np.bincount(members, weights=values - share)
    variance = float(sums @ sums) * count / max(1, count - 1) / len(values) ** 2
    if variance <= 1e-15:
        return float(count)
    return min(float(len(values)), share * (1 - share) / variance)


def share_by_group(hits: Any, groups: Sequence[Hashable], confidence: float = 0.95) -> tuple[float, float, float]:
    """The share of hits with an interval that takes the trials of one group (person, text) as dependent.

    >>> [round(x, 2) for x in share_by_group([1, 1, 0, 0], ["ann", "ann", "bob", "bob"])]
    [0.5, 0.0, 1.0]

    Guarantee:
        The exact interval at the effective number of trials, which is lessened once more for being an estimate
        itself; with fewer than 80 groups at no more trials than groups, since an estimate from few can be far too
        large. Near the stated coverage for independent groups, above it for few of them.

    Args:
        hits: (N,) shares in [0, 1].
        groups: Of each trial.
        confidence: In (0, 1).

    Returns:
        (share, low, high).

    Raises:
        InputError: If there is no trial or the counts differ.

    Source: Korn and Graubard 1998.
    """
    trials, count = effective_trials(hits, groups), len(set(groups))
    tail = _tail(confidence)
    if count < len(groups):
        narrow, wide = (float(t.isf(tail, max(1, size - 1))) for size in (len(groups), count))
        trials *= (narrow / wide) ** 2
        if count < _FEW_GROUPS:
            trials = min(trials, count)
    share = float(np.mean(np.asarray(hits, dtype=np.float64)))
    return clopper_pearson(share * trials, trials, confidence)


def _share(successes: int | float, trials: int | float) -> float:
    if not (trials > 0 and 0 <= successes <= trials and math.isfinite(trials)):
        raise InputError(f"successes must be in [0, trials] and trials above 0, got {successes} of {trials}")
    return float(successes / trials)


def _tail(confidence: float) -> float:
    if not 0 < in_range(0.0, 1.0, confidence=confidence) < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}")
    return (1.0 - confidence) / 2


def _z(confidence: float) -> float:
    return float(norm.isf(_tail(confidence)))
