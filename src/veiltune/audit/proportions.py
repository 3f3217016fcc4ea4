"""Shares, their differences and medians with intervals, and paired comparisons of two models. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from veiltune._validate import in_range, positive_int
from veiltune.attacks.intervals import clopper_pearson as clopper_pearson
from veiltune.attacks.intervals import median_interval as median_interval
from veiltune.attacks.intervals import wilson as wilson
from veiltune.errors import InputError

Float64 = NDArray[np.float64]

RESAMPLES = 2000
_FEWEST_PERSONS = 10


def excess(in_shares: Any, out_shares: Any, confidence: float = 0.95) -> tuple[float, float, float]:
    """How much more is found of persons in the training text than of their like outside, which is chance.

    >>> [round(x, 4) for x in excess([0.0] * 500, [0.0] * 500)]
    [0.0, -0.0076, 0.0076]

    Guarantee:
        Near the stated coverage for yes or no (conservative at shares near 0 and 1), conservative for shares in
        between. Persons are the trials: what one person's records or values have in common is inside the share, and
        persons are taken as independent. Where nothing was found anywhere the upper limit is what so few persons can
        show, never 0.

    Args:
        in_shares: (P,) of each person inside: 1 if found, 0 if not, or the share of the person's values found.
        out_shares: (Q,) the same of persons outside.
        confidence: In (0, 1).

    Returns:
        (difference of means, low, high).

    Raises:
        InputError: If a side has no person or a share is outside [0, 1].

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    inside, outside = _shares(in_shares, "in_shares"), _shares(out_shares, "out_shares")
    own, own_low, own_high = wilson(float(inside.sum()), len(inside), confidence)
    other, other_low, other_high = wilson(float(outside.sum()), len(outside), confidence)
    difference = own - other
    low = difference - math.hypot(own - own_low, other_high - other)
    return difference, low, difference + math.hypot(own_high - own, other - other_low)


def persons_needed(upper: float = 0.01, confidence: float = 0.95) -> int:
    """The least number of persons on each side that can bring the upper limit of `excess` to this, if none is found.

    >>> persons_needed(0.01), persons_needed(0.005)
    (381, 765)

    Raises:
        InputError: If the limit is not between 0 and 1.
    """
    if not 0.0 < in_range(0.0, 1.0, upper=upper) < 1.0:
        raise InputError(f"upper must be between 0 and 1, got {upper}")
    low, high = 0, 1
    while wilson(0, high, confidence)[2] > upper:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wilson(0, middle, confidence)[2] <= upper else (middle, high)
    return high


@dataclass(frozen=True)
class McNemar:
    """What changed between two models, person by person.

    Attributes:
        p_value: Of the hypothesis that neither finds more, two-sided, exact.
        only_first: Found by the attack on the first model only.
        only_second: Found by the attack on the second only.
    """

    p_value: float
    only_first: int
    only_second: int


def mcnemar(first: Any, second: Any) -> McNemar:
    """Whether the same persons are found more often in one model than in another, such as without and with a defence.

    >>> mcnemar([True] * 9 + [False], [False] * 9 + [True])
    McNemar(p_value=0.021..., only_first=9, only_second=1)

    Guarantee:
        The p-value is at most the stated level that often if the models do not differ, for independent persons. It is
        about these two models; other training seeds are other models.

    Args:
        first: (P,) whether each person was found in the first model.
        second: (P,) the same persons, second model.

    Raises:
        InputError: If the lengths differ or there is no person.

    Source: McNemar 1947; exact form by the sign test.
    """
    one, two = np.asarray(first).astype(np.bool_), np.asarray(second).astype(np.bool_)
    if one.ndim != 1 or one.shape != two.shape or not len(one):
        raise InputError(f"both models need the same persons, at least one, got {one.shape} and {two.shape}")
    here, there = int((one & ~two).sum()), int((two & ~one).sum())
    return McNemar(min(1.0, 2.0 * float(binom.cdf(min(here, there), here + there, 0.5))), here, there)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of a family of comparisons, adjusted so that all of them may be read together.

    >>> holm({"name": 0.04, "email": 0.01, "phone": 0.03})
    {'name': 0.06, 'email': 0.03, 'phone': 0.06}

    Guarantee:
        The chance that any true null hypothesis of the family has an adjusted value of at most a is at most a, however
        the tests depend on one another.

    Raises:
        InputError: If a value is not in [0, 1].

    Source: Holm 1979.
    """
    ordered = sorted(p_values.items(), key=lambda item: in_range(0.0, 1.0, p_value=float(item[1])))
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def auc_difference(
    first: Any,
    second: Any,
    members: Any,
    *,
    persons: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int,
) -> tuple[float, float, float]:
    """AUC on the first model less AUC on the second, over the same records; ties count one half.

    Guarantee:
        Percentile bootstrap over persons, members and non-members apart: near the stated coverage from some hundred
        persons a side on. It covers the draw of persons, not the training seed.

    Args:
        first: (N,) scores under the first model, higher for a member.
        second: (N,) of the same records under the second.
        members: (N,) truth values.
        persons: Whose record each is; None if each is its own.
        confidence: In (0, 1).
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        (difference, low, high).

    Raises:
        InputError: If lengths differ, a score is nan, or a side has fewer than 10 persons.

    Source: Efron 1979; pairs stay together.
    """
    one, two = (np.asarray(scores, dtype=np.float64) for scores in (first, second))
    truth = np.asarray(members).astype(np.bool_)
    names: Sequence[Hashable] = range(len(truth)) if persons is None else persons
    if one.ndim != 1 or not one.shape == two.shape == truth.shape or len(names) != len(truth):
        raise InputError(f"both models need scores of the same records, got {one.shape}, {two.shape}, {truth.shape}")
    if bool(np.isnan(one).any() or np.isnan(two).any()):
        raise InputError("every score must be a number, got nan")
    own, other = (_indices(names, side) for side in (truth, ~truth))
    if min(own.max(initial=-1), other.max(initial=-1)) + 1 < _FEWEST_PERSONS:
        raise InputError(f"a bootstrap needs at least {_FEWEST_PERSONS} persons on each side; audit more")
    margin = _wins(one, truth, own, other) - _wins(two, truth, own, other)
    sizes = np.bincount(own), np.bincount(other)
    generator = np.random.default_rng(seed)
    drawn = [
        generator.multinomial(len(size), np.full(len(size), 1 / len(size)), size=positive_int(resamples=resamples))
        for size in sizes
    ]
    totals = ((drawn[0] @ margin) * drawn[1]).sum(axis=1)
    differences = totals / ((drawn[0] @ sizes[0]) * (drawn[1] @ sizes[1]))
    tail = (1.0 - in_range(0.0, 1.0, confidence=confidence)) / 2
    low, high = np.quantile(differences, [tail, 1.0 - tail])
    return float(margin.sum() / (sizes[0].sum() * sizes[1].sum())), float(low), float(high)


def _indices(names: Sequence[Hashable], side: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers of the persons of one side's records, in order."""
    numbers: dict[Hashable, int] = {}
    kept = [name for name, taken in zip(names, side, strict=True) if taken]
    return np.array([numbers.setdefault(name, len(numbers)) for name in kept], dtype=np.int64)


def _wins(scores: Float64, truth: NDArray[np.bool_], own: NDArray[np.int64], other: NDArray[np.int64]) -> Float64:
    """(P, Q) pairs of records of two persons in which the member's scores higher."""
    table = np.zeros((int(own.max()) + 1, int(other.max()) + 1))
    against = scores[~truth]
    for value, person in zip(scores[truth], own, strict=True):
        won = (value > against) + 0.5 * (value == against)
        table[person] += np.bincount(other, weights=won, minlength=table.shape[1])
    return table


def _shares(values: Any, name: str) -> Float64:
    shares = np.asarray(values, dtype=np.float64)
    if shares.ndim != 1 or not len(shares):
        raise InputError(f"{name} must be one share a person, at least one, got shape {shares.shape}")
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise InputError(f"{name} must be in [0, 1]; 1 if all of a person was found")
    return shares
