"""Membership scores equal their formulae, by hand and against slow code; the operating point's interval covers."""

from __future__ import annotations

import math
import random
import zlib as plain_zlib

import numpy as np
import pytest
from scipy.stats import norm

from veiltune.attacks import membership
from veiltune.attacks.membership import ABOVE_ALL, TokenTrace, by_person, ngram_coverage, zlib_bytes
from veiltune.attacks.operating import non_members_needed, tpr_at_fpr
from veiltune.attacks.ranking import roc_auc
from veiltune.errors import InputError


def trace(log_probs: list[float], hits: list[bool] | None = None) -> TokenTrace:
    n = len(log_probs)
    return TokenTrace(
        log_probs=np.array(log_probs, dtype=np.float32),
        means=np.full(n, -2.0, dtype=np.float32),
        deviations=np.full(n, 0.5, dtype=np.float32),
        hits=np.array(hits if hits is not None else [False] * n),
    )


TARGET = [trace([-1.0, -2.0, -3.0], [True, False, False]), trace([-0.5, -0.25], [True, True])]
BASE = [trace([-2.0, -4.0, -2.0]), trace([-1.5, -0.25])]


def test_scores_by_hand() -> None:
    assert membership.loss(TARGET).tolist() == [-2.0, -0.375]
    assert membership.reference(TARGET, BASE).tolist() == [2.0, 1.0]
    assert membership.reference(TARGET, BASE, per_token=True).tolist() == pytest.approx([2 / 3, 0.5])
    assert membership.zlib(TARGET, [12, 3]).tolist() == [-0.5, -0.25]
    assert membership.lowercase(TARGET, [trace([-4.0]), trace([-0.375])]).tolist() == pytest.approx([2.0, 1.0])
    assert membership.min_k(TARGET).tolist() == [-3.0, -0.5]  # a fifth of 3 or 2 tokens rounds down to none: one counts
    assert membership.min_k(TARGET, share=0.7).tolist() == [-2.5, -0.5]
    assert membership.min_k_plus_plus(TARGET).tolist() == [-2.0, 3.0]  # (-3 + 2) / .5 and (-.5 + 2) / .5


def test_ez_by_hand() -> None:
    """Errors of the first record gain 2 and lose 1; the second has none, so it is above all by its gain."""
    first, second = membership.ez(TARGET, BASE, floor=0.5).tolist()
    assert first == pytest.approx(math.log(2.5 / 1.5))
    assert second == ABOVE_ALL + 1.0
    by_heart = membership.ez([trace([-1.0], [True]), trace([-1.0], [True])], [trace([-3.0]), trace([-2.0])])
    assert by_heart[0] > by_heart[1] > ABOVE_ALL - 1e6


def test_ez_ranks_what_is_known_by_heart_first() -> None:
    """Planted: the published rule gives 0 to records without errors, the lowest of all."""
    rng = np.random.default_rng(0)

    def record(member: bool) -> tuple[TokenTrace, TokenTrace]:
        base = -rng.exponential(3.0, size=20)
        gain = rng.normal(0.5, 1.0, size=20) if not member else -base - 0.01
        own = np.minimum(base + gain, -0.001)
        return trace(own.tolist(), (own > -0.5).tolist()), trace(base.tolist())

    truth = np.arange(200) < 100
    target, base = zip(*(record(member) for member in truth), strict=True)
    scores = membership.ez(target, base)
    assert roc_auc(scores, truth)[0] > 0.99
    assert roc_auc(np.where(scores >= ABOVE_ALL / 2, 0.0, np.exp(np.minimum(scores, 50))), truth)[0] < 0.05


def test_rmia_by_hand() -> None:
    """With a = 1 the reference alone is the mean over models: ratios e^(2/3) and e^.5 against e^.6 and e^0."""
    population = [trace([-1.0]), trace([-2.0])], [trace([-1.6]), trace([-2.0])]
    assert membership.rmia(TARGET, BASE, *population, offline_a=1.0).tolist() == [1.0, 0.5]
    assert membership.rmia(TARGET, BASE, *population, offline_a=1.0, gamma=math.e**0.3).tolist() == [0.5, 0.5]
    assert membership.rmia(TARGET, BASE, *population, offline_a=0.0).tolist() == [0.5, 1.0]  # p / ((r + 1) / 2)


def random_traces(rng: np.random.Generator, count: int) -> tuple[list[TokenTrace], list[TokenTrace]]:
    both: tuple[list[TokenTrace], list[TokenTrace]] = ([], [])
    for _ in range(count):
        n = int(rng.integers(1, 40))
        for side in both:
            side.append(
                TokenTrace(
                    log_probs=-rng.exponential(2.0, size=n).astype(np.float32),
                    means=-rng.exponential(2.0, size=n).astype(np.float32),
                    deviations=rng.uniform(0.1, 2.0, size=n).astype(np.float32),
                    hits=rng.random(n) < 0.5,
                )
            )
    return both


def slow_lowest(values: list[float], share: float = 0.2) -> float:
    count = max(1, int(len(values) * share + 1e-9))
    return sum(sorted(values)[:count]) / count


def slow_ratio(own: TokenTrace, base: TokenTrace, a: float) -> float:
    p, r = (math.prod(math.exp(x) ** (1 / len(t)) for x in t.log_probs.tolist()) for t in (own, base))
    return p / (((1 + a) * r + (1 - a)) / 2)


def slow_ez(own: TokenTrace, base: TokenTrace) -> float:
    gains = [a - b for a, b in zip(own.log_probs.tolist(), base.log_probs.tolist(), strict=True)]
    errors = [gain for gain, hit in zip(gains, own.hits, strict=True) if not hit]
    if len(errors) < 2:
        return 1e9 + sum(gains)
    return math.log((sum(max(g, 0) for g in errors) + 1e-3) / (sum(max(-g, 0) for g in errors) + 1e-3))


def test_scores_equal_slow_code() -> None:
    rng = np.random.default_rng(1)
    target, base = random_traces(rng, 60)
    others, other_base = random_traces(rng, 30)
    ratios = [slow_ratio(z, b, 0.3) for z, b in zip(others, other_base, strict=True)]
    expected = {
        "loss": [sum(t.log_probs.tolist()) / len(t) for t in target],
        "reference": [sum(t.log_probs.tolist()) - sum(b.log_probs.tolist()) for t, b in zip(target, base, strict=True)],
        "lowercase": [
            sum(b.log_probs.tolist()) / len(b) / (sum(t.log_probs.tolist()) / len(t))
            for t, b in zip(target, base, strict=True)
        ],
        "min_k": [slow_lowest(t.log_probs.tolist()) for t in target],
        "min_k_plus_plus": [
            slow_lowest([(x - m) / s for x, m, s in zip(t.log_probs.tolist(), t.means, t.deviations, strict=True)])
            for t in target
        ],
        "rmia": [
            sum(slow_ratio(t, b, 0.3) / ratio > 1.0 for ratio in ratios) / 30 for t, b in zip(target, base, strict=True)
        ],
        "ez": [slow_ez(t, b) for t, b in zip(target, base, strict=True)],
    }
    found = {
        "loss": membership.loss(target),
        "reference": membership.reference(target, base),
        "lowercase": membership.lowercase(target, base),
        "min_k": membership.min_k(target),
        "min_k_plus_plus": membership.min_k_plus_plus(target),
        "rmia": membership.rmia(target, base, others, other_base),
        "ez": membership.ez(target, base),
    }
    for name, scores in found.items():
        assert scores.dtype == np.float64 and scores.shape == (60,)
        assert scores.tolist() == pytest.approx(expected[name], abs=1e-5, rel=1e-5 if name == "lowercase" else 1e-12), (
            name
        )


def test_a_share_of_tokens_rounds_down_exactly() -> None:
    """Planted: int(100 * .29) is 28."""
    numbers = [-float(i) for i in range(1, 101)]
    assert membership.min_k([trace(numbers)], share=0.29).item() == pytest.approx(-sum(range(72, 101)) / 29)


def test_a_certain_token_is_not_infinite() -> None:
    sure = TokenTrace(*(np.zeros(3, dtype=np.float32) for _ in range(3)), hits=np.ones(3, dtype=bool))
    assert membership.min_k_plus_plus([sure]).tolist() == [0.0]
    assert membership.lowercase([sure], [sure]).tolist() == [1.0]
    assert membership.lowercase([sure], [trace([-1.0])]).item() > 1e5


def test_ngram_coverage_equals_slow_code() -> None:
    rng = random.Random(2)
    records = [[rng.randrange(4) for _ in range(rng.randrange(1, 15))] for _ in range(40)]
    samples = [[rng.randrange(4) for _ in range(20)] for _ in range(2)]
    for n in (1, 2, 4):
        found = ngram_coverage(records, [samples] * 40, n=n)
        for record, score in zip(records, found, strict=True):
            size = min(n, len(record))
            grams = [record[i : i + size] for i in range(len(record) - size + 1)]
            hits = [any(s[i : i + size] == gram for s in samples for i in range(len(s))) for gram in grams]
            assert score == sum(hits) / len(grams)
    apart = ngram_coverage([[1, 2], [1, 2]], [[[1, 2]], [[2, 1]]], n=2)
    assert apart.tolist() == [1.0, 0.0]


def test_zlib_bytes_are_of_utf8() -> None:
    assert zlib_bytes(["张伟的电话"]) == [len(plain_zlib.compress("张伟的电话".encode()))]


def test_by_person_is_the_mean() -> None:
    rng = np.random.default_rng(3)
    persons = rng.integers(0, 10, size=100).tolist()
    scores = rng.normal(size=100)
    means, names = by_person(scores, persons)
    assert sorted(names) == sorted(set(persons))
    for name, mean in zip(names, means, strict=True):
        assert mean == pytest.approx(np.mean([s for s, p in zip(scores, persons, strict=True) if p == name]))


def test_unusable_traces_are_refused() -> None:
    nothing = np.full(2, np.nan, dtype=np.float32)
    top_k = TokenTrace(np.array([-1.0, -2.0], dtype=np.float32), nothing, nothing, np.array([True, False]))
    assert membership.loss([top_k]).tolist() == [-1.5]
    with pytest.raises(InputError, match="min_k_plus_plus needs means and deviations"):
        membership.min_k_plus_plus([top_k])
    with pytest.raises(InputError, match="1 of 2 target traces have a log-probability that is not finite"):
        membership.loss([trace([-1.0]), trace([-math.inf])])
    with pytest.raises(InputError, match="1 of 1 records differ in tokens"):
        membership.reference([trace([-1.0])], [trace([-1.0, -2.0])])
    with pytest.raises(InputError, match="same records, got 1 and 2"):
        membership.ez([trace([-1.0])], BASE)
    with pytest.raises(InputError, match="rmia needs population records"):
        membership.rmia(TARGET, BASE, [], [])
    with pytest.raises(InputError, match="offline_a must be in"):
        membership.rmia(TARGET, BASE, TARGET, BASE, offline_a=1.5)
    with pytest.raises(InputError, match="one positive length for each of 2"):
        membership.zlib(TARGET, [5])
    with pytest.raises(InputError, match="share must be"):
        membership.min_k(TARGET, share=0.0)
    with pytest.raises(InputError, match="four arrays of one length"):
        TokenTrace(nothing, nothing, nothing, np.array([True]))
    with pytest.raises(InputError, match="tokens and generations for each record"):
        ngram_coverage([[1]], [])
    with pytest.raises(InputError, match="one person a score"):
        by_person([1.0, 2.0], ["ann"])


def test_operating_point_by_hand() -> None:
    """100 non-members 0..99 and rate .1: the threshold is 89, above it 8 of 20 members; exact interval of 8/20."""
    members = [89.5 + 0.1 * i for i in range(8)] + [50.5 + i for i in range(12)]
    point = tpr_at_fpr([*range(100), *members], [False] * 100 + [True] * 20, fpr=0.1, seed=0)
    assert (point.tpr, point.false_positives, point.members, point.non_members) == (0.4, 10, 20, 100)
    assert (point.threshold_low, point.threshold_high) == pytest.approx((0.1912, 0.6395), abs=1e-4)
    assert (point.fpr_low, point.fpr_high) == pytest.approx((0.0490, 0.1762), abs=1e-4)
    assert 0.0 <= point.low < point.threshold_low + 0.05 and point.high > point.tpr


def test_ties_are_broken_at_random() -> None:
    """All scores equal: members pass as often as non-members, whatever order they came in."""
    rates = [tpr_at_fpr(np.zeros(600), np.arange(600) < 300, fpr=0.1, seed=seed).tpr for seed in range(40)]
    assert np.mean(rates) == pytest.approx(0.1, abs=0.02) and len(set(rates)) > 5


def sample(
    rng: np.random.Generator, persons: int, each: int, shift: float
) -> tuple[np.ndarray, np.ndarray, list[int] | None]:
    """Scores with unit variance, half of it common to a person's records."""
    sizes = rng.integers(1, 2 * each, size=2 * persons) if each > 1 else np.ones(2 * persons, dtype=int)
    owners = np.repeat(np.arange(2 * persons), sizes)
    members = owners < persons
    share = 0.5 if each > 1 else 0.0
    common, own = rng.normal(size=2 * persons)[owners], rng.normal(size=len(owners))
    return share**0.5 * common + (1 - share) ** 0.5 * own + shift * members, members, owners.tolist()


@pytest.mark.parametrize(("persons", "each", "fpr", "shift"), [(500, 1, 0.1, 0.5), (150, 6, 0.1, 1.0)])
def test_interval_covers_the_true_positive_rate(persons: int, each: int, fpr: float, shift: float) -> None:
    """Planted: an interval that takes the threshold as known, or records as independent, covers far less."""
    rng = np.random.default_rng(4)
    truth = float(norm.sf(norm.isf(fpr) - shift))
    covered = {"all": 0, "threshold known": 0, "no groups": 0}
    for _ in range(200):
        scores, members, owners = sample(rng, persons, each, shift)
        point = tpr_at_fpr(scores, members, fpr=fpr, seed=0, groups=owners)
        naive = tpr_at_fpr(scores, members, fpr=fpr, seed=0)
        covered["all"] += point.low <= truth <= point.high
        covered["threshold known"] += point.threshold_low <= truth <= point.threshold_high
        covered["no groups"] += naive.low <= truth <= naive.high
    assert 0.91 <= covered["all"] / 200 <= 0.99
    assert covered["threshold known"] / 200 < 0.88
    if each > 1:
        assert covered["no groups"] / 200 < 0.88


def test_too_few_for_a_rate_are_refused() -> None:
    assert non_members_needed(0.001) == 10_000
    scores = np.arange(1049.0)
    with pytest.raises(InputError, match="at least 1000 non-members, got 999"):
        tpr_at_fpr(scores, scores < 50, fpr=0.01, seed=0)
    assert tpr_at_fpr(scores, scores < 49, fpr=0.01, seed=0).tpr == 0.0
    with pytest.raises(InputError, match="at least 10 members, got 9"):
        tpr_at_fpr(scores, scores < 9, fpr=0.1, seed=0)
    with pytest.raises(InputError, match="one length"):
        tpr_at_fpr(scores, scores < 50, fpr=0.1, seed=0, groups=["a"])
    with pytest.raises(InputError, match="got nan"):
        tpr_at_fpr(np.full(1049, np.nan), scores < 50, fpr=0.1, seed=0)
    with pytest.raises(InputError, match="fpr must be"):
        tpr_at_fpr(scores, scores < 50, fpr=0.0, seed=0)
