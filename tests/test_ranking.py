"""The area under the ROC curve equals counting pairs, and its interval covers the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn import metrics

from veiltune.attacks.ranking import MIN_PER_CLASS, roc_auc, roc_curve
from veiltune.errors import InputError


def slow_auc(scores: list[float], positives: list[bool]) -> float:
    own = [s for s, p in zip(scores, positives, strict=True) if p]
    other = [s for s, p in zip(scores, positives, strict=True) if not p]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in other]
    return sum(wins) / len(wins)


@given(data=st.data(), own=st.integers(10, 25), other=st.integers(10, 25))
@settings(max_examples=40, deadline=None)
def test_auc_equals_counting_pairs(data: st.DataObject, own: int, other: int) -> None:
    scores = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=own + other, max_size=own + other))
    positives = [True] * own + [False] * other
    auc, low, high = roc_auc(scores, positives)
    assert auc == pytest.approx(slow_auc(scores, positives), abs=1e-12)
    assert 0.0 <= low <= auc <= high <= 1.0
    flipped = roc_auc([-s for s in scores], positives)
    assert flipped == pytest.approx((1 - auc, 1 - high, 1 - low), abs=1e-9)


def slow_variance(scores: np.ndarray, positives: np.ndarray) -> float:
    """DeLong's by its definition."""
    own, other = scores[positives], scores[~positives]
    wins = (own[:, None] > other).astype(float) + (own[:, None] == other) / 2
    return float(wins.mean(1).var(ddof=1) / len(own) + wins.mean(0).var(ddof=1) / len(other))


def test_interval_is_delongs() -> None:
    rng = np.random.default_rng(0)
    positives = np.arange(200) < 80
    scores = np.round(rng.normal(size=200) + 0.8 * positives, 1)  # with ties
    auc, low, high = roc_auc(scores, positives)
    half = 1.959964 * slow_variance(scores, positives) ** 0.5 / (auc * (1 - auc))
    logit = np.log(auc / (1 - auc))
    assert (low, high) == pytest.approx(tuple(1 / (1 + np.exp(-logit + half * s)) for s in (1, -1)), abs=1e-6)


@pytest.mark.parametrize(("shift", "group_size"), [(0.0, 1), (1.0, 1), (2.3, 1), (3.2, 1), (0.5, 6)])
def test_interval_covers_the_true_auc(shift: float, group_size: int) -> None:
    """Normal scores with a known AUC; where examples come in groups an interval that ignores them is too narrow."""
    rng = np.random.default_rng(1)
    truth = float(norm.cdf(shift / 2**0.5))
    groups = np.repeat(np.arange(80), group_size).tolist()
    positives = np.repeat(np.arange(80) < 40, group_size)

    def covered(with_groups: bool) -> float:
        hits = 0
        for _ in range(400):
            share = 0.0 if group_size == 1 else 0.7
            common = np.repeat(rng.normal(size=80), group_size) * share**0.5
            scores = common + rng.normal(size=len(positives)) * (1 - share) ** 0.5 + shift * positives
            _, low, high = roc_auc(scores, positives, groups=groups if with_groups else None)
            hits += low <= truth <= high
        return hits / 400

    assert 0.92 <= covered(True) <= (0.985 if shift < 3 else 1.0)
    if group_size > 1:
        assert covered(False) < 0.85  # planted: one author's texts taken as independent


def test_a_perfect_ranking_is_not_certain() -> None:
    scores, positives = torch.arange(60.0), torch.arange(60) >= 45
    assert roc_auc(scores, positives) == (1.0, pytest.approx(0.025 ** (1 / 15)), 1.0)
    assert roc_auc(-scores, positives) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 15)))
    nearly = scores.clone()
    nearly[45] = 43.5  # one pair of 675 the other way round
    assert 0.6 < roc_auc(nearly, positives)[1] < roc_auc(scores, positives)[1]
    auc, low, high = roc_auc(torch.zeros(60), positives)  # nothing is ranked
    assert auc == 0.5 and low <= 0.5 <= high


def test_curve_has_the_same_area_and_few_points() -> None:
    rng = np.random.default_rng(2)
    positives = rng.random(3000) < 0.3
    scores = np.round(rng.normal(size=3000) + positives, 2)
    full = roc_curve(scores, positives, points=10_000)
    false, true, _ = metrics.roc_curve(positives, scores, drop_intermediate=False)
    assert np.allclose(np.array(full), np.stack([false, true], axis=1))
    few = roc_curve(scores, positives)
    assert len(few) <= 101 and few[0] == (0.0, 0.0) and few[-1] == (1.0, 1.0)
    area = float(np.trapezoid([y for _, y in few], [x for x, _ in few]))
    assert area == pytest.approx(roc_auc(scores, positives)[0], abs=2e-3)
    assert list(few) == sorted(few)


def test_too_few_or_unusable_are_refused() -> None:
    scores = np.arange(40.0)
    with pytest.raises(InputError, match=rf"at least {MIN_PER_CLASS} positive examples .* got 9"):
        roc_auc(scores, scores < 9)
    with pytest.raises(InputError, match=r"negative examples .* got 0"):
        roc_auc(scores, scores > -1)
    with pytest.raises(InputError, match=r"positive examples .* got 2"):
        roc_auc(scores, scores < 20, groups=[i // 10 for i in range(40)])
    with pytest.raises(InputError, match=r"one length, got \(40,\) and \(3,\)"):
        roc_auc(scores, [True, False, True])
    with pytest.raises(InputError, match="groups must have one entry"):
        roc_auc(scores, scores < 20, groups=["a"])
    with pytest.raises(InputError, match="got nan"):
        roc_auc(np.full(40, np.nan), scores < 20)
    with pytest.raises(InputError, match="one positive and one negative"):
        roc_curve(scores, scores < 100)
    with pytest.raises(InputError, match="points must be at least 2"):
        roc_curve(scores, scores < 20, points=1)
