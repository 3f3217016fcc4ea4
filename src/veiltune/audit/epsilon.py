"""A lower bound of epsilon from one training run with canaries. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, betaincinv, expit, gammaln, logit

from veiltune._validate import in_range
from veiltune.errors import InputError

Float64 = NDArray[np.float64]

GRID = (32, 16, 8, 4, 2)  # guesses in each tail: canaries over these; fixed before any score is seen
FEWEST_CANARIES = 32  # the smallest number of which each row of the grid has a guess in each tail
_SCAN = 33  # epsilons at which the p-value is looked at before the crossing is closed in on
_HALVINGS = 40


@dataclass(frozen=True, kw_only=True)
class AuditedEpsilon:
    """What guesses about coin flips certify.

    Attributes:
        epsilon: Lower bound; 0 where nothing is certified. Always "at least", never "equals".
        confidence: Of the bound.
        delta: For which it is stated.
        canaries: m.
        included: How many the coins put into the training text.
        tail: k of the grid's row that certified most: the k highest scores were guessed "in", the k lowest "out".
        guesses: 2 k.
        correct: Right ones among them.
        ceiling: What an attack without error would have certified on these coins.
    """

    epsilon: float
    confidence: float
    delta: float
    canaries: int
    included: int
    tail: int
    guesses: int
    correct: int
    ceiling: float


def audited_epsilon(scores: Any, included: Any, *, delta: float, confidence: float = 0.95, seed: int) -> AuditedEpsilon:
    """The largest epsilon that the guesses of one run refute, less none: epsilon is at least so much.

    >>> coins = np.random.default_rng(0).random(1000) < 0.5
    >>> found = audited_epsilon(coins.astype(float), coins, delta=1e-5, seed=0)  # every guess is right
    >>> round(found.epsilon, 2), found.guesses, found.correct
    (4.62, 500, 500)

    Guarantee:
        If the training is (epsilon, delta)-differentially private for adding or removing one unit (one canary with
        all its insertions), then the bound exceeds epsilon with probability at most 1 - confidence, whatever the
        scores are. It needs: each canary put in or left out by its own fair coin, before training; scores and seed
        that know nothing of the coins except through the model; one claim tested, once (a bound chosen among several
        runs or scores is none). Every training record that depends on a coin belongs to its canary. Rows of the grid
        are tested at a fifth of the error each (Bonferroni). A bound of 0 shows nothing, and no bound shows privacy:
        even a perfect attack certifies `ceiling` only.

    Args:
        scores: (m,) of the canaries, higher for "in".
        included: (m,) what the coins said.
        delta: In [0, 1).
        confidence: In (0, 1).
        seed: Of the order of ties.

    Raises:
        InputError: If lengths differ, a score is not finite, delta or confidence is out of range, there are fewer
            than 32 canaries, or all coins fell on one side.

    Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2.
    """
    values, truth = _checked(scores, included)
    if not 0.0 <= in_range(0.0, 1.0, delta=delta) < 1.0 or not 0.0 < in_range(0.0, 1.0, confidence=confidence) < 1.0:
        raise InputError(f"delta must be in [0, 1) and confidence between 0 and 1, got {delta} and {confidence}")
    alpha = (1.0 - confidence) / len(GRID)
    order = np.lexsort((np.random.default_rng(seed).random(len(values)), values))
    ordered = truth[order]
    m, inside = len(ordered), int(truth.sum())
    rows = [
        (k, int(ordered[m - k :].sum()) + int((~ordered[:k]).sum()), min(k, inside) + min(k, m - inside))
        for k in (m // part for part in GRID)
    ]
    bounds = [epsilon_of(m, 2 * k, correct, delta=delta, alpha=alpha) for k, correct, _ in rows]
    best = int(np.argmax(bounds))
    return AuditedEpsilon(
        epsilon=bounds[best],
        confidence=confidence,
        delta=delta,
        canaries=m,
        included=inside,
        tail=rows[best][0],
        guesses=2 * rows[best][0],
        correct=rows[best][1],
        ceiling=max(epsilon_of(m, 2 * k, most, delta=delta, alpha=alpha) for k, _, most in rows),
    )


def one_run_p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, if training is (epsilon, delta)-differentially private.

    >>> round(one_run_p_value(1000, 500, 500, epsilon=4.6, delta=1e-5), 4)
    0.0093

    P[Bin(r, q) >= v] + 2 m delta max over i in 1 .. v of P[v > Bin(r, q) >= v - i] / i, with q = e^eps / (1 + e^eps).

    Args:
        canaries: m.
        guesses: r, at most m, chosen without looking at the coins.
        correct: v.
        epsilon: At least 0.
        delta: In [0, 1).

    Returns:
        At most 1.

    Raises:
        InputError: If the counts contradict one another.

    Source: arXiv:2305.08846, theorem 5.2.
    """
    if not (0 <= correct <= guesses <= canaries and epsilon >= 0 and 0 <= delta < 1):
        raise InputError(
            f"counts must be correct <= guesses <= canaries, epsilon at least 0 and delta in [0, 1), got"
            f" {correct}, {guesses}, {canaries}, {epsilon} and {delta}"
        )
    return _p_value(canaries, guesses, correct, epsilon, delta, _log_binomials(guesses, correct))


def epsilon_of(canaries: int, guesses: int, correct: int, *, delta: float, alpha: float) -> float:
    """The epsilon up to which every epsilon has a p-value of at most alpha; 0 where not even 0 has."""
    if correct == 0:
        return 0.0
    without_delta = float(logit(betaincinv(correct, guesses - correct + 1, alpha)))  # no epsilon beyond it is refuted
    if without_delta <= 0.0 or delta == 0.0:
        return max(0.0, without_delta)
    logs = _log_binomials(guesses, correct)

    def refuted(epsilon: float) -> bool:
        return _p_value(canaries, guesses, correct, epsilon, delta, logs) <= alpha

    low = 0.0
    if not refuted(low):
        return 0.0
    for high in np.linspace(0.0, without_delta, _SCAN)[1:].tolist():  # delta's part need not rise with epsilon
        if not refuted(high):
            break
        low = high
    else:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _p_value(m: int, r: int, v: int, epsilon: float, delta: float, log_binomials: Float64) -> float:
    if v == 0:
        return 1.0
    q = float(expit(epsilon))
    tail = float(bdtrc(v - 1, r, q))
    if delta == 0.0:
        return min(1.0, tail)
    below = np.arange(v)  # 0 .. v - 1 right guesses
    logs = log_binomials + below * math.log(q) + (r - below) * float(-np.logaddexp(0.0, epsilon))
    spread = np.cumsum(np.exp(logs)[::-1]) / np.arange(1, v + 1)
    return min(1.0, tail + 2.0 * m * delta * float(spread.max()))


def _log_binomials(r: int, v: int) -> Float64:
    """Logs of r over j for j = 0 .. v - 1."""
    below = np.arange(v)
    return np.asarray(gammaln(r + 1) - gammaln(below + 1) - gammaln(r - below + 1))


def _checked(scores: Any, included: Any) -> tuple[Float64, NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(included).astype(np.bool_)
    if values.ndim != 1 or values.shape != truth.shape:
        raise InputError(f"scores and included must be two rows of one length, got {values.shape} and {truth.shape}")
    if len(values) < FEWEST_CANARIES:
        raise InputError(
            f"a bound from one run needs at least {FEWEST_CANARIES} coin-flipped canaries, got {len(values)};"
            " 1000 are usual"
        )
    if not bool(np.isfinite(values).all()):
        raise InputError("every canary's score must be finite; the model or its API is broken")
    if truth.all() or not truth.any():
        raise InputError("the coins of all canaries fell on one side, which is no fair coin; check `included`")
    return values, truth
