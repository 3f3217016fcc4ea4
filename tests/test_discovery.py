"""Queries, recall before errors and ranks equal their definitions."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veiltune.attacks.discovery import discoverable_shares, queries_needed, rank_of_truth, recall_at_errors, top_share
from veiltune.errors import InputError


def exact_queries(log_prob: float, p: float) -> float:
    """In 400 decimal digits."""
    getcontext().prec = 400
    chance = Decimal(log_prob).exp()
    if chance >= 1:
        return 1.0
    quotient = (1 - Decimal(p)).ln() / (1 - chance).ln()
    return max(1.0, float(quotient.to_integral_value(ROUND_CEILING)))


@pytest.mark.parametrize("p", [1e-6, 0.5, 0.9, 0.999])
def test_queries_are_exact_from_certain_to_1e_300(p: float) -> None:
    log_probs = [0.0, -1e-300, -1e-17, -1e-9, -0.01, -0.6931, -0.6932, -1.0, -5.0, -30.0, -40.0, -100.0, -690.7]
    expected = [exact_queries(log_prob, p) for log_prob in log_probs]
    assert queries_needed(log_probs, p).tolist() == pytest.approx(expected, rel=1e-11)


def test_queries_at_the_ends() -> None:
    assert queries_needed([-math.inf, -2000.0], 0.5).tolist() == [math.inf, math.inf]
    assert queries_needed([-705.0], 0.5).item() == pytest.approx(math.log(2) * math.exp(705), rel=1e-9)
    assert np.all(np.diff(queries_needed(np.linspace(-709, 0, 5000), 0.9)) <= 0)


@given(chance=st.floats(1e-4, 0.9), p=st.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_so_many_queries_are_enough_and_one_fewer_is_not(chance: float, p: float) -> None:
    n = queries_needed([math.log(chance)], p).item()
    assert -math.expm1(n * math.log1p(-chance)) >= p * (1 - 1e-9)
    assert n == 1 or -math.expm1((n - 1) * math.log1p(-chance)) < p * (1 + 1e-9)


def test_shares_by_hand() -> None:
    """Half of the time within ceil(log .5 / log(1 - p_z)) queries: 1, 7, 69 and 69315."""
    log_probs = np.log([0.5, 0.1, 0.01, 1e-5])
    assert queries_needed(log_probs, 0.5).tolist() == [1.0, 7.0, 69.0, 69315.0]
    assert discoverable_shares(log_probs, 0.5) == (0.25, 0.5, 0.75, 0.75, 0.75)
    assert discoverable_shares(log_probs, 0.5, budgets=(7, 6, 10**6)) == (0.5, 0.25, 1.0)


def slow_recall(correct: list[bool], confidence: list[float], errors: int, targets: int) -> float:
    guesses = sorted(zip(confidence, correct, strict=True), key=lambda pair: (-pair[0], pair[1]))
    found = wrong = 0
    for _, right in guesses:
        wrong += not right
        if wrong > errors:
            break
        found += right
    return found / targets


@given(
    guesses=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40), errors=st.integers(1, 10)
)
@settings(max_examples=200, deadline=None)
def test_recall_equals_going_through_the_guesses(guesses: list[tuple[bool, int]], errors: int) -> None:
    correct, confidence = [g for g, _ in guesses], [float(c) for _, c in guesses]
    found = recall_at_errors(correct, confidence, errors=errors, targets=50)
    for allowed, recall in found.curve[1:]:
        assert recall == slow_recall(correct, confidence, allowed, 50)
    assert found.recall == slow_recall(correct, confidence, errors, 50) == found.found / 50
    assert found.errors == min(errors, correct.count(False)) == len(found.curve) - 1
    assert list(found.curve) == sorted(found.curve)


def test_ranks_count_ties_against_the_attacker() -> None:
    """Planted: a model that says nothing must not be first everywhere."""
    rng = np.random.default_rng(0)
    candidates = rng.normal(size=(2000, 9))
    ranks = rank_of_truth(rng.normal(size=2000), list(candidates))
    assert top_share(ranks, 1) == pytest.approx(0.1, abs=0.02) and top_share(ranks, 10) == 1.0
    assert rank_of_truth(np.zeros(5), [np.zeros(9)] * 5).tolist() == [10] * 5
    assert rank_of_truth([2.0], [[3.0, 2.0, 1.0]]).tolist() == [3]


def test_unusable_input_is_refused() -> None:
    for log_probs in ([0.1], [math.nan], [[-1.0]]):
        with pytest.raises(InputError, match="log_probs must be"):
            queries_needed(log_probs, 0.5)
    for p in (0.0, 1.0):
        with pytest.raises(InputError, match="p must be between"):
            queries_needed([-1.0], p)
    with pytest.raises(InputError, match="at least one secret"):
        discoverable_shares([], 0.5)
    with pytest.raises(InputError, match="2 right guesses are more than the 1 targets"):
        recall_at_errors([True, True], [1.0, 2.0], targets=1)
    with pytest.raises(InputError, match="correct and confidence"):
        recall_at_errors([True], [math.nan])
    with pytest.raises(InputError, match="needs at least one candidate"):
        rank_of_truth([1.0], [[]])
    with pytest.raises(InputError, match="got nan"):
        rank_of_truth([1.0], [[math.nan]])
    with pytest.raises(InputError, match="at least one rank"):
        top_share([], 1)
