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
from veiltune.attacks.inversion import (
    invert_by_map,
    invert_by_nearest_embedding,
    rank_candidates,
    score_token_recovery,
    token_hits,
    unigram_log_prior,
)
from veiltune.attacks.result import AttackResult
from veiltune.attacks.sequences import batches_by_length, bootstrap_by_text, pad_texts, rouge_l, rows_of
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


# --- with a prior -----------------------------------------------------------------------------------------------------


def slow_scores(
    vector: torch.Tensor, vocabulary: torch.Tensor, log_prior: torch.Tensor, **strength: float
) -> list[float]:
    scores = []
    for row, prior in zip(vocabulary.tolist(), log_prior.tolist(), strict=True):
        square = sum((a - b) ** 2 for a, b in zip(vector.tolist(), row, strict=True))
        eta, sigma = strength.get("eta"), strength.get("sigma")
        scores.append(prior - (eta * square**0.5 if eta is not None else square / (2 * (sigma or 1.0) ** 2)))
    return scores


@pytest.mark.parametrize("strength", [{"eta": 3.0}, {"sigma": 0.7}])
@pytest.mark.parametrize("block", [2**24, 7 * VOCAB])
def test_map_equals_the_slow_twin(
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: torch.Tensor,
    secret: torch.Tensor,
    strength: dict[str, float],
    block: int,
) -> None:
    monkeypatch.setattr(inversion, "_BLOCK", block)
    seen, log_prior = noised(vocabulary, secret[:30], eta=3.0), unigram_log_prior(secret**2 // VOCAB, VOCAB)
    guesses = invert_by_map(seen, vocabulary, log_prior=log_prior, top_k=4, **strength)
    slow = torch.tensor([slow_scores(vector, vocabulary, log_prior, **strength) for vector in seen])
    ids, scores = rank_candidates(seen, vocabulary, log_prior=log_prior, top_k=4, **strength)
    assert torch.equal(guesses, slow.topk(4).indices)
    assert torch.equal(ids, guesses)
    torch.testing.assert_close(scores, slow.topk(4).values, rtol=1e-4, atol=1e-4)
    flat = torch.tensor([slow_scores(vector, vocabulary, 0 * log_prior, **strength) for vector in seen])
    torch.testing.assert_close(
        rank_candidates(seen, vocabulary, top_k=4, **strength)[1], flat.topk(4).values, rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(guesses, flat.topk(4).indices)  # planted: without the prior


@pytest.mark.parametrize("strength", [{"eta": 3.0}, {"sigma": 0.7}])
def test_tokens_with_noise_of_their_own_scale_equal_the_slow_twin(
    vocabulary: torch.Tensor, secret: torch.Tensor, strength: dict[str, float]
) -> None:
    seen, log_prior = noised(vocabulary, secret[:30], eta=3.0), unigram_log_prior(secret**2 // VOCAB, VOCAB)
    multipliers = torch.linspace(0.5, 2.0, VOCAB)
    _, scores = rank_candidates(
        seen, vocabulary, log_prior=log_prior, top_k=VOCAB, multipliers=multipliers, **strength
    )  # fmt: skip
    slow = [
        [
            slow_scores(vector, row, prior + DIM * factor.log(), **{name: scaled(name, s, float(factor))})[0]
            for row, prior, factor in zip(vocabulary.unsqueeze(1), log_prior.unsqueeze(1), multipliers, strict=True)
        ]
        for vector in seen
        for name, s in strength.items()
    ]
    torch.testing.assert_close(scores, torch.tensor(slow).sort(descending=True).values, rtol=1e-4, atol=1e-4)


def scaled(name: str, strength: float, factor: float) -> float:
    return strength * factor if name == "eta" else strength / factor


def test_the_prior_helps_where_tokens_are_uneven(vocabulary: torch.Tensor) -> None:
    rates = 1 / torch.arange(1.0, VOCAB + 1)
    public, secret = torch.multinomial(rates, 6000, True, generator=torch.Generator().manual_seed(3)).split(3000)
    seen = noised(vocabulary, secret, eta=2.0)
    nearest = score_token_recovery(invert_by_nearest_embedding(seen, vocabulary), secret).success_rate
    prior = unigram_log_prior(public, VOCAB)
    assert score_token_recovery(invert_by_map(seen, vocabulary, log_prior=prior, eta=2.0), secret).success_rate > (
        nearest + 0.05
    )
    wrong = prior.flip(0)  # planted
    assert (
        score_token_recovery(invert_by_map(seen, vocabulary, log_prior=wrong, eta=2.0), secret).success_rate < nearest
    )


def test_unigram_prior_is_a_distribution() -> None:
    prior = unigram_log_prior(torch.tensor([1, 1, 3]), 5, smoothing=0.5)
    assert prior.exp().tolist() == pytest.approx([0.5 / 5.5, 2.5 / 5.5, 0.5 / 5.5, 1.5 / 5.5, 0.5 / 5.5])


@pytest.mark.usefixtures("unchecked_shapes")
def test_unusable_priors_are_refused(vocabulary: torch.Tensor) -> None:
    prior = torch.zeros(VOCAB)
    for strength in ({}, {"eta": 1.0, "sigma": 1.0}):
        with pytest.raises(InputError, match="exactly one of eta"):
            invert_by_map(vocabulary, vocabulary, log_prior=prior, **strength)
    with pytest.raises(InputError, match="log_prior must have 60 entries"):
        invert_by_map(vocabulary, vocabulary, log_prior=prior[:3], eta=1.0)
    with pytest.raises(InputError, match="eta must be positive"):
        invert_by_map(vocabulary, vocabulary, log_prior=prior, eta=0.0)
    with pytest.raises(InputError, match=r"token_ids must be in \[0, 3\)"):
        unigram_log_prior(torch.tensor([3]), 3)


# --- whole texts ------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), room=st.integers(1, 30))
def test_batches_hold_every_text_once_and_give_the_rows_back(lengths: list[int], room: int) -> None:
    flat = torch.arange(sum(lengths))
    groups = batches_by_length(lengths, room)
    assert sorted(text for group in groups for text in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[text] for text in group]
        assert len(group) == 1 or max(sizes) * len(sizes) <= room
        rows = rows_of(lengths, group)
        batch, mask = pad_texts(flat[rows], sizes)
        assert mask.sum(1).tolist() == sizes
        assert batch[mask].tolist() == [i for text in group for i in flat.split(lengths)[text].tolist()]


def slow_common(a: list[int], b: list[int]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12), min_size=1, max_size=5))
def test_rouge_equals_the_slow_twin(texts: list[list[tuple[int, int]]]) -> None:
    lengths = [len(text) for text in texts]
    flat = torch.tensor([pair for text in texts for pair in text], dtype=torch.long).reshape(-1, 2)
    if not len(flat):
        with pytest.raises(InputError, match="size above 0"):
            rouge_l(flat[:, 0], flat[:, 1], lengths)
        return
    shares = [slow_common([a for a, _ in text], [b for _, b in text]) / len(text) for text in texts if text]
    assert rouge_l(flat[:, 0], flat[:, 1], lengths) == pytest.approx(sum(shares) / len(shares))


def test_bootstrap_covers_where_tokens_of_a_text_stand_and_fall_together() -> None:
    generator, lengths = torch.Generator().manual_seed(0), [10] * 60
    ours, naive, rounds = 0, 0, 200
    for number in range(rounds):
        texts = (torch.rand(60, generator=generator) < 0.4).repeat_interleave(10)
        low, high = bootstrap_by_text(texts, lengths, seed=number, resamples=400)
        ours += low <= 0.4 <= high
        low, high = AttackResult(name="a", successes=int(texts.sum()), trials=600).interval()
        naive += low <= 0.4 <= high  # planted: tokens taken as independent
    assert stats.binomtest(ours, rounds, 0.95).pvalue > 0.001
    assert naive / rounds < 0.7


def test_bootstrap_equals_the_slow_twin_in_the_mean_and_weighs_texts_by_length() -> None:
    hits, lengths = torch.tensor([True] * 8 + [False] * 2), [8, 0, 2]
    low, high = bootstrap_by_text(hits, lengths, seed=1)
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_by_text(hits, lengths, seed=1) == bootstrap_by_text(hits, lengths, seed=1)
    assert token_hits(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 5])).tolist() == [True, False]


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
