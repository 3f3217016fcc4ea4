"""The true positive rate where false positives are rare, with all that is uncertain about it. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from veiltune._validate import in_range
from veiltune.attacks.intervals import Float64, clopper_pearson, effective_trials, wilson
from veiltune.errors import InputError

FALSE_POSITIVES_NEEDED = 10  # below, it is hardly known how often the threshold errs
_LEAST_MEMBERS = 10


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """How many members are found when few non-members are taken for members.

    Attributes:
        fpr: The false positive rate that was asked for.
        tpr: Share of members above the threshold.
        low: Interval of the true positive rate at `fpr`, which includes that the threshold is an estimate.
        high: Its upper end.
        threshold_low: Clopper-Pearson interval of the true positive rate of this very threshold.
        threshold_high: Its upper end.
        false_positives: Non-members above the threshold.
        fpr_low: Interval of the threshold's true false positive rate.
        fpr_high: Its upper end.
        members: Their number.
        non_members: Their number.
    """

    fpr: float
    tpr: float
    low: float
    high: float
    threshold_low: float
    threshold_high: float
    false_positives: int
    fpr_low: float
    fpr_high: float
    members: int
    non_members: int


def non_members_needed(fpr: float) -> int:
    """Non-members without which `tpr_at_fpr` refuses.

    >>> [non_members_needed(fpr) for fpr in (0.1, 0.01, 0.001)]
    [100, 1000, 10000]
    """
    if not 0 < in_range(0.0, 1.0, fpr=fpr) < 1:
        raise InputError(f"fpr must be between 0 and 1, got {fpr}")
    return math.ceil(FALSE_POSITIVES_NEEDED / fpr - 1e-9)


def tpr_at_fpr(
    scores: Any,
    members: Any,
    *,
    fpr: float,
    seed: int,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> OperatingPoint:
    """Share of members above a threshold that lets the share `fpr` of non-members pass.

    >>> scores = [*range(100), *(85.5 + i for i in range(20))]
    >>> point = tpr_at_fpr(scores, [False] * 100 + [True] * 20, fpr=0.1, seed=0)
    >>> point.false_positives, point.tpr
    (10, 0.8)

    The threshold comes from non-members only; members are never looked at. Ties are broken at random, which is what
    an adversary who must answer would do.

    Guarantee:
        ``[low, high]`` covers the true positive rate at the rate that was asked for about as often as stated: it adds
        in squares the score interval of the share of hits and the shares of hits at the two ends of where the true
        threshold may lie among the non-members. ``[threshold_low, threshold_high]`` is exact for this threshold, but
        the threshold's own rate is only known to lie in ``[fpr_low, fpr_high]``: read as an interval at `fpr` it is
        far too narrow. Members and non-members are taken as samples of what an adversary meets; nothing is said of
        other records, or of an attack that was chosen on these scores.

    Args:
        scores: (N,) higher for a member.
        members: (N,) truth values.
        fpr: In (0, 1).
        seed: Of the order of ties.
        groups: Whose record each is: records of one person are not independent; numbers of trials are then effective
            ones. A group that has members and non-members is not expected.
        confidence: Of all intervals.

    Raises:
        InputError: If lengths differ, a score is nan, there are fewer than 10 members, or too few non-members for the
            rate; says how many are needed.

    Source: Carlini et al. 2021, arXiv:2112.03570 (the measure); Zou and Donner 2008 (adding intervals in squares);
        Korn and Graubard 1998 (effective trials).
    """
    values, truth = _checked(scores, members, groups, fpr)
    beaten = _non_members_above(values, truth, seed)
    count = int((~truth).sum())
    passes = math.floor(fpr * count + 1e-9)
    hits, wrong = beaten[truth] <= passes, beaten[~truth] < passes
    own, others = (
        effective_trials(part, None if groups is None else [g for g, kept in zip(groups, side, strict=True) if kept])
        for part, side in ((hits, truth), (wrong, ~truth))
    )
    tpr, low, high = wilson(float(hits.mean()) * own, own, confidence)
    ends = _shares_at_ends(beaten[truth], count, fpr, others, confidence)
    exact = clopper_pearson(tpr * own, own, confidence)
    rate = clopper_pearson(float(wrong.mean()) * others, others, confidence)
    return OperatingPoint(
        fpr=fpr,
        tpr=tpr,
        low=max(0.0, tpr - math.hypot(tpr - low, tpr - ends[0])),
        high=min(1.0, tpr + math.hypot(high - tpr, ends[1] - tpr)),
        threshold_low=exact[1],
        threshold_high=exact[2],
        false_positives=passes,
        fpr_low=rate[1],
        fpr_high=rate[2],
        members=int(truth.sum()),
        non_members=count,
    )


def _checked(
    scores: Any, members: Any, groups: Sequence[Hashable] | None, fpr: float
) -> tuple[Float64, NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(members).astype(np.bool_)
    if values.ndim != 1 or values.shape != truth.shape or (groups is not None and len(groups) != len(values)):
        raise InputError(f"scores, members and groups must be of one length, got {values.shape} and {truth.shape}")
    if bool(np.isnan(values).any()):
        raise InputError("every score must be a number, got nan")
    needed, count = non_members_needed(fpr), int((~truth).sum())
    if count < needed:
        raise InputError(
            f"a true positive rate at {fpr:g} false positives needs at least {needed} non-members, got {count}; ask for"
            " a higher rate or audit more records"
        )
    if int(truth.sum()) < _LEAST_MEMBERS:
        raise InputError(f"a true positive rate needs at least {_LEAST_MEMBERS} members, got {int(truth.sum())}")
    return values, truth


def _non_members_above(values: Float64, truth: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """(N,) how many non-members rank above each record, ties in random order."""
    order = np.lexsort((np.random.default_rng(seed).random(len(values)), values))[::-1]
    passed = ~truth[order]
    counts = np.empty(len(values), dtype=np.int64)
    counts[order] = np.cumsum(passed) - passed
    return counts


def _shares_at_ends(
    beaten: NDArray[np.int64], count: int, fpr: float, effective: float, confidence: float
) -> tuple[float, float]:
    """Shares of members above the strictest and the laxest place where the true threshold may lie."""
    reach = float(norm.isf((1.0 - confidence) / 2)) * math.sqrt(fpr * (1.0 - fpr) / effective)

    def share(place: float) -> float:
        place = min(max(place, 0.0), float(count))
        whole = math.floor(place)
        lower, upper = float((beaten <= whole).mean()), float((beaten <= whole + 1).mean())
        return lower + (place - whole) * (upper - lower)

    return share(count * (fpr - reach)), share(count * (fpr + reach))
