"""How well scores rank positives above negatives: the area under the ROC curve with its interval, and the curve.

Free of torch. Ties count one half, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, norm, rankdata

from veiltune._validate import in_range
from veiltune.errors import InputError

Float64 = NDArray[np.float64]
MIN_PER_CLASS = 10  # of positives and of negatives (or of their groups): below, the normal interval means nothing


def roc_auc(
    scores: Any, positives: Any, *, groups: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Area under the ROC curve: the chance that a positive scores above a negative; with its interval.

    >>> roc_auc([0.1] * 10 + [0.9] * 10, [False] * 10 + [True] * 10)  # ten of each: even a perfect ranking is unsure
    (1.0, 0.69..., 1.0)

    Guarantee:
        DeLong's variance on the logit scale, so the interval stays in [0, 1]; asymptotic. Where next to no pair is
        ranked the other way (a share below 1 / min(positives, negatives)) that variance says little, and the exact
        interval of so many disjoint pairs is stated instead, which is wider than needed. Examples are taken as
        independent unless `groups` says which are not.

    Args:
        scores: (N,) numbers, higher for a positive; an array, a list or a tensor on the CPU.
        positives: (N,) truth values.
        groups: Whose example each is (author, text): examples of one group may depend on each other.
        confidence: Of the interval.

    Returns:
        (auc, low, high).

    Raises:
        InputError: If lengths differ, a score is not a number, or a class has fewer than 10 examples or groups.

    Source: DeLong et al. 1988; fast by midranks: Sun and Xu 2014; groups: Obuchowski 1997; exact end: Clopper and
        Pearson 1934.
    """
    values, truth = _checked(scores, positives)
    members = _group_numbers(groups, len(values))
    fewest = min(_enough(members[truth], "positive"), _enough(members[~truth], "negative"))
    own, other = values[truth], values[~truth]
    m, n = len(own), len(other)
    midranks = rankdata(values)
    share_below = (midranks[truth] - rankdata(own)) / n  # of negatives, for each positive
    share_above = 1.0 - (midranks[~truth] - rankdata(other)) / m  # of positives, for each negative
    auc = float(share_below.mean())
    alpha = 1.0 - in_range(0.0, 1.0, confidence=confidence)
    variance = _grouped_variance(share_below - auc, share_above - auc, members[truth], members[~truth])
    if variance <= 0.0 or min(auc, 1.0 - auc) < 1.0 / fewest:
        right, wrong = auc * fewest, (1.0 - auc) * fewest
        low = float(beta.ppf(alpha / 2, right, wrong + 1)) if right else 0.0
        return auc, low, float(beta.isf(alpha / 2, right + 1, wrong)) if wrong else 1.0
    centre = math.log(auc / (1.0 - auc))
    reach = float(norm.isf(alpha / 2)) * math.sqrt(variance) / (auc * (1.0 - auc))
    return auc, _logistic(centre - reach), _logistic(centre + reach)


def roc_curve(scores: Any, positives: Any, points: int = 101) -> tuple[tuple[float, float], ...]:
    """The ROC curve as (false positive rate, true positive rate), from (0, 0) to (1, 1).

    >>> roc_curve([3.0, 2.0, 2.0, 1.0], [True, True, False, False])
    ((0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0))

    Args:
        scores: (N,) numbers, higher for a positive.
        positives: (N,) truth values.
        points: At most so many; thinned evenly along the curve. At least 2.

    Raises:
        InputError: If lengths differ, a score is not a number, a class is absent, or points is below 2.
    """
    values, truth = _checked(scores, positives)
    if points < 2:
        raise InputError(f"points must be at least 2, got {points}")
    if truth.all() or not truth.any():
        raise InputError("a ROC curve needs at least one positive and one negative")
    order = np.argsort(-values, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    true = np.append(0.0, np.cumsum(truth[order])[last_of_tie] / truth.sum())
    false = np.append(0.0, np.cumsum(~truth[order])[last_of_tie] / (~truth).sum())
    if len(true) > points:
        along = true + false  # rises with every point
        kept = np.unique(np.searchsorted(along, np.linspace(0.0, 2.0, points)).clip(0, len(along) - 1))
        true, false = true[kept], false[kept]
    return tuple((float(x), float(y)) for x, y in zip(false, true, strict=True))


def _checked(scores: Any, positives: Any) -> tuple[Float64, NDArray[np.bool_]]:
    values = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(positives).astype(np.bool_)
    if values.ndim != 1 or values.shape != truth.shape:
        raise InputError(f"scores and positives must be two lists of one length, got {values.shape} and {truth.shape}")
    if bool(np.isnan(values).any()):
        raise InputError("every score must be a number, got nan")
    return values, truth


def _group_numbers(groups: Sequence[Hashable] | None, count: int) -> NDArray[np.int64]:
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise InputError(f"groups must have one entry a score ({count}), got {len(groups)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def _enough(members: NDArray[np.int64], kind: str) -> int:
    distinct = len(np.unique(members))
    if distinct < MIN_PER_CLASS:
        raise InputError(
            f"an AUC with an interval needs at least {MIN_PER_CLASS} {kind} examples (of different groups),"
            f" got {distinct}"
        )
    return distinct


def _grouped_variance(
    own: Float64, other: Float64, own_groups: NDArray[np.int64], other_groups: NDArray[np.int64]
) -> float:
    """Obuchowski's variance of the AUC from centred components; DeLong's where every group has one example."""
    size = int(max(own_groups.max(), other_groups.max())) + 1
    sums = [np.bincount(g, weights=x, minlength=size) for g, x in ((own_groups, own), (other_groups, other))]
    counts = [len(np.unique(g)) for g in (own_groups, other_groups)]
    groups = len(np.union1d(own_groups, other_groups))
    first, second = (
        total @ total * count / (count - 1) / len(x) ** 2
        for total, count, x in zip(sums, counts, (own, other), strict=True)
    )
    shared = sums[0] @ sums[1] * groups / (groups - 1) / (len(own) * len(other))
    return float(first + second + 2.0 * shared)


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
