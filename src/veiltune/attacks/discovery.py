"""What a patient adversary finds: queries until a secret comes out, recall before errors, rank of the truth.

Free of torch. From exact log-probabilities, so nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veiltune._validate import positive_int
from veiltune.errors import InputError

Float64 = NDArray[np.float64]

BUDGETS = (1, 10, 100, 1_000, 10_000)  # queries
_LOG_HALF = float(np.log(0.5))
_SLACK = 1e-12  # a quotient that is whole but for rounding is whole


def queries_needed(log_probs: Any, p: float) -> Float64:
    """How often to sample until a secret has come out with probability p: ceil(log(1 - p) / log(1 - p_z)).

    >>> queries_needed(np.log([1.0, 0.5, 0.25, 0.01]), p=0.75).tolist()
    [1.0, 2.0, 5.0, 138.0]
    >>> queries_needed([-690.0, -np.inf], p=0.5).tolist()
    [3.19...e+299, inf]

    Threat model:
        Someone who samples n continuations of a prefix independently. With next-token vectors he knows p_z after one
        teacher-forced pass and need not sample at all: the figure then says what a limit on queries would be worth.

    Args:
        log_probs: (N,) log p_z in nats: the sum of the secret's log-probabilities under the sampling scheme (top-k,
            temperature) in question; -inf where it cannot come out.
        p: In (0, 1).

    Returns:
        (N,) numbers of queries, at least 1; inf where the secret never comes out or float64 ends.

    Raises:
        InputError: If p is not in (0, 1), or a log-probability is nan or above 0.

    Source: (n, p)-discoverable extraction, Hayes et al. 2024, arXiv:2410.19482.
    """
    values = np.asarray(log_probs, dtype=np.float64)
    if values.ndim != 1 or bool(np.isnan(values).any()) or bool((values > 0).any()):
        raise InputError(f"log_probs must be one row of numbers up to 0, got shape {values.shape}, nan or above 0")
    if not 0.0 < p < 1.0:
        raise InputError(f"p must be between 0 and 1, got {p}")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        log_miss = np.where(values > _LOG_HALF, np.log(-np.expm1(values)), np.log1p(-np.exp(values)))
        exact = np.log1p(-p) / log_miss
        rare = values < -700.0  # where exp leaves normal numbers; log(1 - x) is -x long before
        exact = np.where(rare, np.exp(np.log(-np.log1p(-p)) - values), exact)
    return np.asarray(np.maximum(1.0, np.ceil(exact * (1.0 - _SLACK))))


def discoverable_shares(log_probs: Any, p: float, budgets: Sequence[int] = BUDGETS) -> tuple[float, ...]:
    """Shares of secrets that come out with probability p within each number of queries.

    >>> discoverable_shares(np.log([0.9, 0.1, 0.001]), p=0.5, budgets=(1, 10, 1000))
    (0.333..., 0.666..., 1.0)

    Args:
        log_probs: As in `queries_needed`; at least one.
        p: In (0, 1).
        budgets: Numbers of queries.

    Raises:
        InputError: As `queries_needed`, or if there is no secret.
    """
    needed = queries_needed(log_probs, p)
    if not len(needed):
        raise InputError("a share of discoverable secrets needs at least one secret")
    return tuple(float((needed <= positive_int(budget=budget)).mean()) for budget in budgets)


@dataclass(frozen=True)
class RecallAtErrors:
    """What was found before the adversary had been wrong too often.

    Attributes:
        recall: Secrets found over targets.
        found: Secrets found.
        errors: Wrong guesses made: fewer than allowed where the guesses ran out.
        targets: Secrets there are.
        curve: (errors, recall) from (0, ...) on: the recall before one more error.
    """

    recall: float
    found: int
    errors: int
    targets: int
    curve: tuple[tuple[int, float], ...]


def recall_at_errors(correct: Any, confidence: Any, *, errors: int = 100, targets: int | None = None) -> RecallAtErrors:
    """Guesses in order of confidence until so many were wrong; of equal confidence the wrong ones come first.

    >>> found = recall_at_errors([True, False, True, True], [0.9, 0.8, 0.8, 0.1], errors=1)
    >>> found.recall, found.curve
    (0.75, ((0, 0.25), (1, 0.75)))

    Args:
        correct: (N,) whether each guess was right.
        confidence: (N,) the adversary's own, higher for surer.
        errors: Wrong guesses allowed.
        targets: Secrets there are; None: one a guess.

    Raises:
        InputError: If the lengths differ or are 0, a confidence is nan, or more is right than there are targets.

    Source: the training data extraction challenge, google-research/lm-extraction-benchmark (the measure).
    """
    right, sure = np.asarray(correct).astype(np.bool_), np.asarray(confidence, dtype=np.float64)
    if right.ndim != 1 or right.shape != sure.shape or not len(right) or bool(np.isnan(sure).any()):
        raise InputError(
            f"correct and confidence must be one number a guess, at least one, got {right.shape}, {sure.shape} or nan"
        )
    positive_int(errors=errors)
    count = positive_int(targets=len(right) if targets is None else targets)
    if int(right.sum()) > count:
        raise InputError(f"{int(right.sum())} right guesses are more than the {count} targets; guess each once")
    ordered = right[np.lexsort((right, -sure))]
    wrong = np.flatnonzero(~ordered)[: errors + 1]
    made = min(errors, len(wrong))
    found = [*(wrong - np.arange(len(wrong)))[: made + 1].tolist()]
    if len(found) <= made:  # the guesses ran out first
        found.append(int(right.sum()))
    curve = tuple((number, hits / count) for number, hits in enumerate(found))
    return RecallAtErrors(curve[-1][1], found[-1], made, count, curve)


def rank_of_truth(truth_scores: Any, candidate_scores: Sequence[Any]) -> NDArray[np.int64]:
    """Where the true value stands among candidates, 1 for first; ties count against the attacker.

    >>> rank_of_truth([3.0, 1.0], [[1.0, 2.0], [1.0, 5.0]]).tolist()
    [1, 3]

    Args:
        truth_scores: (N,) higher for likelier.
        candidate_scores: For each, scores of other values that it competes with; without the truth itself.

    Returns:
        (N,) ranks; among C others a blind guess is first with probability 1 / (C + 1).

    Raises:
        InputError: If the counts differ, someone has no candidate, or a score is nan.

    Source: the reconstruction and inference games of Lukas et al. 2023, arXiv:2302.00539.
    """
    truth = np.asarray(truth_scores, dtype=np.float64)
    others = [np.asarray(row, dtype=np.float64) for row in candidate_scores]
    if truth.ndim != 1 or len(truth) != len(others) or any(row.ndim != 1 or not len(row) for row in others):
        raise InputError(f"each of {len(truth)} true values needs at least one candidate, got {len(others)} rows")
    if bool(np.isnan(truth).any()) or any(bool(np.isnan(row).any()) for row in others):
        raise InputError("every score must be a number, got nan")
    return np.array([1 + int((row >= own).sum()) for own, row in zip(truth, others, strict=True)], dtype=np.int64)


def top_share(ranks: Any, k: int) -> float:
    """Share of true values among the k best.

    >>> top_share([1, 3, 12], 10)
    0.666...

    Raises:
        InputError: If there is no rank or k is not positive.
    """
    places = np.asarray(ranks)
    if places.ndim != 1 or not len(places):
        raise InputError("a share of ranks needs at least one rank")
    return float((places <= positive_int(k=k)).mean())
