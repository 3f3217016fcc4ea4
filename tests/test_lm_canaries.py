"""Canaries: scores of secrets alone, exposures by hand, and a bound whose guesses never see a coin."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from lm_helper import flipped, short_canaries, traced
from tiny_text import causal_tokenizer
from veiltune.audit.lm import canaries as module
from veiltune.audit.lm.canaries import canary_scores, canary_text, exposures, one_run_bound
from veiltune.audit.lm.encoding import Encoder, Sequenced
from veiltune.audit.lm.opening import Claim
from veiltune.data.manifest import Canary
from veiltune.errors import InputError


def sequenced(*canaries: Canary, context: int = 64) -> list[Sequenced]:
    found = [canary_text(canary) for canary in canaries]
    encoder = Encoder(causal_tokenizer(begins=True), context=context)
    return encoder.texts([text for text, _ in found], [spans for _, spans in found])


CANARY = Canary("canary-1", "random", "epsilon", True, 1, "Code ", "abcd")


def test_only_the_secret_is_scored() -> None:
    """<bos> C o d e _ a b c d <eos>: the five characters before and the end do not count."""
    (text,) = sequenced(CANARY)
    own = traced([-100.0] * 5 + [-1.0, -2.0, -3.0, -4.0] + [-100.0])
    base = traced([-100.0] * 5 + [-4.0, -4.0, -4.0, -4.0] + [-100.0])
    assert canary_scores([text], [own], None).tolist() == [-10.0]
    assert canary_scores([text], [own], [base]).tolist() == [6.0]


def test_a_canary_that_does_not_fit_is_refused() -> None:
    (text,) = sequenced(CANARY, context=8)
    with pytest.raises(InputError, match="does not fit into the model's context"):
        canary_scores([text], [traced([-1.0] * 7)], None)


def canary(family: str, purpose: str, times: int, number: int) -> Canary:
    return Canary(f"{family}-{purpose}-{number}", family, purpose, times > 0, times, "x", "y")


def test_exposures_by_hand() -> None:
    """31 references score 0 to 30: above all is 5 bits, above 15 of them (rank 16) one bit, below all 0."""
    own = [
        ("exposure", 1, -1.0),
        ("exposure", 1, 15.5),
        ("exposure", 1, 14.5),
        ("exposure", 4, 99.0),
        ("exposure", 4, 30.5),
    ]
    rows = [(p, t, s) for p, t, s in own] + [("reference", 0, float(n)) for n in range(31)]
    canaries = [canary("random", purpose, times, n) for n, (purpose, times, _) in enumerate(rows)]
    found = exposures(canaries, np.array([score for _, _, score in rows]))
    assert [(one.repetitions, one.canaries, one.median_bits, one.at_cap) for one in found] == [
        (1, 3, pytest.approx(math.log2(32 / 17)), 0),
        (4, 2, 5.0, 2),
    ]
    assert all(one.cap_bits == 5.0 and one.family == "random" for one in found)
    assert (found[0].low, found[0].high) == (0.0, 1.0)  # three values: their range


def test_families_are_ranked_among_themselves() -> None:
    canaries = [canary(family, "reference", 0, n) for family in ("pii", "random") for n in range(20)]
    canaries += [canary("pii", "exposure", 1, 0), canary("random", "exposure", 1, 0)]
    scores = np.array([*range(20), *range(100, 120), 50.0, 50.0])
    assert [(one.family, one.at_cap) for one in exposures(canaries, scores)] == [("pii", 1), ("random", 0)]


def test_too_few_references_are_no_population() -> None:
    canaries = [canary("pii", "reference", 0, n) for n in range(19)] + [canary("pii", "exposure", 1, 0)]
    assert exposures(canaries, np.arange(20.0)) == ()
    assert exposures([], np.empty(0)) == ()


def leaked(canaries: list[Canary], seed: int = 0) -> np.ndarray[Any, Any]:
    """Scores of a model that knows what it saw, the families on very different scales."""
    rng = np.random.default_rng(seed)
    own = np.array([10.0 * one.repetitions for one in canaries]) + rng.normal(size=len(canaries))
    return np.where([one.family == "random" for one in canaries], 1000 + 50 * own, own)


CANARIES = short_canaries(128, random.Random(4))


def test_a_leak_is_certified_and_set_against_the_claim() -> None:
    found = one_run_bound(CANARIES, leaked(CANARIES), claim=Claim(0.5, 1e-6, "person"), seed=0)
    assert found is not None and found.exceeds_claim and found.epsilon > 2 and found.epsilon == found.ceiling
    assert (found.canaries, found.delta, found.claimed_unit) == (128, 1e-6, "person")
    assert found.included == sum(one.included for one in CANARIES if one.purpose == "epsilon")
    fair = one_run_bound(CANARIES, leaked(CANARIES), claim=Claim(50.0, 1e-6, "person"), seed=0)
    assert fair is not None and not fair.exceeds_claim
    unclaimed = one_run_bound(CANARIES, leaked(CANARIES), claim=None, seed=0)
    assert unclaimed is not None and unclaimed.claimed_epsilon is None and not unclaimed.exceeds_claim
    assert unclaimed.delta == 1e-5


def test_no_coins_no_bound() -> None:
    assert one_run_bound([c for c in CANARIES if c.purpose != "epsilon"], np.empty(0), claim=None, seed=0) is None
    assert one_run_bound([], np.empty(0), claim=None, seed=0) is None


def test_a_model_that_saw_nothing_certifies_nothing() -> None:
    bounds = []
    for seed in range(40):
        found = one_run_bound(CANARIES, np.random.default_rng(seed).normal(size=len(CANARIES)), claim=None, seed=seed)
        assert found is not None
        bounds.append(found.epsilon)
    assert sum(bound > 0 for bound in bounds) <= 6  # 5 % of 40; seven would be p < .004


def test_guesses_do_not_depend_on_the_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is ordered stays the same when every coin is turned, and so every right guess becomes a wrong one."""
    seen: list[Any] = []
    honest = module.audited_epsilon

    def watching(scores: Any, included: Any, **options: Any) -> Any:
        seen.append((np.array(scores), np.array(included)))
        return honest(scores, included, **options)

    monkeypatch.setattr(module, "audited_epsilon", watching)
    for canaries in (CANARIES, flipped(CANARIES)):
        one_run_bound(canaries, leaked(CANARIES), claim=None, seed=0)
    (scores, coins), (same, turned) = seen
    assert np.array_equal(scores, same) and np.array_equal(coins, ~turned)


def test_families_are_put_on_one_scale_by_references_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "audited_epsilon", lambda scores, coins, **_: seen.append(np.array(scores)) or 1 / 0)
    scores = leaked(CANARIES)
    with pytest.raises(ZeroDivisionError):
        one_run_bound(CANARIES, scores, claim=None, seed=0)
    (given,) = seen
    expected = []
    for one, score in zip(CANARIES, scores, strict=True):
        if one.purpose == "epsilon":
            family = [
                s for c, s in zip(CANARIES, scores, strict=True) if (c.family, c.purpose) == (one.family, "reference")
            ]
            expected.append((score - np.mean(family)) / np.std(family))
    assert given == pytest.approx(np.array(expected))


def test_a_constant_model_and_too_few_canaries() -> None:
    """Ties are broken at random, and nothing is certified; below 32 coins there is no bound, and no crash."""
    flat = one_run_bound(CANARIES, np.zeros(len(CANARIES)), claim=None, seed=0)
    assert flat is not None and flat.epsilon == 0
    few = short_canaries(31, random.Random(1))
    assert one_run_bound(few, leaked(few), claim=None, seed=0) is None
