"""The first attack sees only what crossed the wire, equals its slow twin, and is scored with an exact interval."""

from __future__ import annotations

import inspect

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from veiltune.attacks import inversion
from veiltune.attacks.inversion import invert_by_nearest_embedding, score_token_recovery
from veiltune.attacks.result import AttackResult
from veiltune.errors import InputError
from veiltune.privatize.noise import sample_d_chi_noise

VOCAB, DIM = 60, 12


@pytest.fixture
def vocabulary(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(VOCAB, DIM, generator=generator) * torch.rand(VOCAB, 1, generator=generator) * 3


@pytest.fixture
def secret(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, VOCAB, (500,), generator=generator)


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets wrong shapes reach our own refusal where pytest runs with --jaxtyping-packages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def noised(vocabulary: torch.Tensor, secret: torch.Tensor, eta: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return vocabulary[secret] + sample_d_chi_noise((len(secret), DIM), eta=eta, generator=generator)


def slow_nearest(vector: torch.Tensor, vocabulary: torch.Tensor, top_k: int) -> list[int]:
    distances = [sum((a - b) ** 2 for a, b in zip(vector.tolist(), row, strict=True)) for row in vocabulary.tolist()]
    return sorted(range(len(distances)), key=distances.__getitem__)[:top_k]


@pytest.mark.parametrize("top_k", [1, 5, VOCAB])
@pytest.mark.parametrize("block", [2**24, 7 * VOCAB, 1])
def test_equals_the_slow_twin(
    monkeypatch: pytest.MonkeyPatch, vocabulary: torch.Tensor, secret: torch.Tensor, top_k: int, block: int
) -> None:
    monkeypatch.setattr(inversion, "_BLOCK", block)
    seen = noised(vocabulary, secret[:40], eta=6.0)
    guesses = invert_by_nearest_embedding(seen, vocabulary, top_k=top_k)
    assert guesses.shape == (40, top_k)
    assert guesses.tolist() == [slow_nearest(vector, vocabulary, top_k) for vector in seen]
    largest_product = (seen @ vocabulary.T).argmax(-1)  # planted: the published mistake, largest inner product
    assert guesses[:, 0].tolist() != largest_product.tolist()


def test_controls(vocabulary: torch.Tensor, secret: torch.Tensor) -> None:
    clean = invert_by_nearest_embedding(vocabulary[secret], vocabulary)
    assert score_token_recovery(clean, secret).success_rate == 1.0
    shuffled = secret[torch.randperm(len(secret), generator=torch.Generator().manual_seed(2))]
    chance = float((torch.bincount(secret, minlength=VOCAB) / len(secret)).square().sum())
    low, high = score_token_recovery(clean, shuffled).interval(0.999)
    assert low < chance < high


def test_more_noise_and_fewer_guesses_help_the_customer(vocabulary: torch.Tensor, secret: torch.Tensor) -> None:
    def success(eta: float, top_k: int = 1) -> float:
        guesses = invert_by_nearest_embedding(noised(vocabulary, secret, eta), vocabulary, top_k=top_k)
        return score_token_recovery(guesses, secret).success_rate

    assert success(200.0) > 0.95 > success(5.0) + 0.1 > success(2.0) + 0.2
    assert success(2.0, top_k=10) > success(2.0) + 0.1


def test_success_is_what_the_geometry_predicts(generator: torch.Generator) -> None:
    """Two tokens at distance D: the guess is wrong when the noise reaches further than D / 2 towards the other."""
    vocabulary = torch.zeros(2, DIM)
    vocabulary[1, 0], eta = 1.2, 9.0
    secret = torch.arange(2).repeat(10_000)
    result = score_token_recovery(invert_by_nearest_embedding(noised(vocabulary, secret, eta), vocabulary), secret)
    reach = sample_d_chi_noise((200_000, DIM), eta=eta, generator=generator)[:, 0]
    low, high = result.interval(0.999)
    assert low < float((reach < 0.6).double().mean()) < high
    assert not low < float((1.5 * reach < 0.6).double().mean()) < high  # planted


def test_the_attack_is_not_given_the_truth() -> None:
    assert set(inspect.signature(invert_by_nearest_embedding).parameters) == {"representations", "vocabulary", "top_k"}


def test_narrow_dtypes_and_no_tokens(vocabulary: torch.Tensor, secret: torch.Tensor) -> None:
    guesses = invert_by_nearest_embedding(vocabulary[secret].bfloat16(), vocabulary)
    assert score_token_recovery(guesses, secret).success_rate > 0.95
    assert invert_by_nearest_embedding(vocabulary[:0], vocabulary, top_k=3).shape == (0, 3)


@pytest.mark.usefixtures("unchecked_shapes")
def test_unusable_arguments_are_refused(vocabulary: torch.Tensor) -> None:
    for top_k in (0, VOCAB + 1):
        with pytest.raises(InputError, match=rf"top_k must be in \[1, 60\] \(the vocabulary size\), got {top_k}"):
            invert_by_nearest_embedding(vocabulary, vocabulary, top_k=top_k)
    with pytest.raises(InputError, match=r"width"):
        invert_by_nearest_embedding(vocabulary[:, :5], vocabulary)
    with pytest.raises(InputError, match="guesses are for 60 tokens, the secret has 3"):
        score_token_recovery(torch.zeros(VOCAB, 1, dtype=torch.long), torch.arange(3))
    with pytest.raises(InputError, match="trials at least 1"):
        score_token_recovery(torch.zeros(0, 1, dtype=torch.long), torch.arange(0))


# --- the score --------------------------------------------------------------------------------------------------------


@given(trials=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.999]))
def test_interval_equals_scipys(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    result = AttackResult(name="a", successes=successes, trials=trials)
    exact = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert result.interval(confidence) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert result.empirical_privacy == pytest.approx(1 - successes / trials)


def test_interval_covers_every_true_rate() -> None:
    trials = 20
    intervals = [AttackResult(name="a", successes=k, trials=trials).interval() for k in range(trials + 1)]
    half = [1.96 * (k / trials * (1 - k / trials) / trials) ** 0.5 for k in range(trials + 1)]
    textbook = [(k / trials - h, k / trials + h) for k, h in enumerate(half)]  # planted: too narrow near 0 and 1

    def least_coverage(intervals: list[tuple[float, float]]) -> float:
        rates = [i / 200 for i in range(1, 200)]
        return min(
            sum(float(stats.binom.pmf(k, trials, p)) for k, (low, high) in enumerate(intervals) if low <= p <= high)
            for p in rates
        )

    assert least_coverage(intervals) >= 0.95
    assert least_coverage(textbook) < 0.5


@pytest.mark.parametrize(("successes", "trials"), [(4, 3), (-1, 3), (0, 0)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(InputError, match=r"successes must be in \[0, trials\]"):
        AttackResult(name="a", successes=successes, trials=trials)


def test_it_prints_its_interval() -> None:
    assert str(AttackResult(name="inversion", successes=5, trials=20)) == "inversion: 0.25 [0.09, 0.49] n=20"
