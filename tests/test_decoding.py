"""Decoding finds the best path of exact search; the trigram prior is a distribution and knows its text."""

from __future__ import annotations

import itertools

import jaxtyping
import pytest
import torch
from torch import Tensor

from tiny import VOCAB as TINY_VOCAB
from tiny import tiny_model
from veiltune.attacks.decoding import CausalPrior, NgramPrior, decode_with_prior
from veiltune.attacks.inversion import invert_by_map, rank_candidates, unigram_log_prior
from veiltune.errors import InputError
from veiltune.privatize.noise import sample_d_chi_noise

VOCAB, DIM, LENGTH = 30, 16, 12


def chain(texts: int, seed: int) -> tuple[Tensor, list[int]]:
    """Texts in which each token is the one before plus 1, 2 or 3 (mod V)."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (texts, LENGTH), generator=generator)
    steps[:, 0] = torch.randint(0, VOCAB, (texts,), generator=generator)
    return (steps.cumsum(1) % VOCAB).flatten(), [LENGTH] * texts


@pytest.fixture(scope="module")
def prior() -> NgramPrior:
    return NgramPrior(*chain(400, 1), vocab_size=VOCAB)


def slow_path(candidates: Tensor, scores: Tensor, prior: NgramPrior, weight: float) -> list[int]:
    best, found = -float("inf"), []
    for choice in itertools.product(range(candidates.shape[1]), repeat=len(candidates)):
        ids = [int(candidates[t, c]) for t, c in enumerate(choice)]
        total = sum(float(scores[t, c]) for t, c in enumerate(choice))
        for t, token in enumerate(ids):
            total += weight * float(prior.log_probs(torch.tensor([ids[:t]]).long(), torch.tensor([[token]])))
        if total > best:
            best, found = total, ids
    return found


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_equals_brute_force(prior: NgramPrior, generator: torch.Generator, weight: float) -> None:
    candidates = torch.stack([torch.randperm(VOCAB, generator=generator)[:3] for _ in range(8)])
    scores = 2 * torch.randn(8, 3, generator=generator)
    guesses = decode_with_prior(candidates, scores, [5, 3], prior, beam=81, weight=weight)[:, 0].tolist()
    slow = [
        *slow_path(candidates[:5], scores[:5], prior, weight),
        *slow_path(candidates[5:], scores[5:], prior, weight),
    ]
    assert guesses == slow
    greedy = candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist()
    assert (guesses == greedy) == (weight == 0.0)  # planted: a decoder that ignores the prior


def test_language_helps_under_noise(prior: NgramPrior, generator: torch.Generator) -> None:
    vocabulary, eta = torch.randn(VOCAB, DIM, generator=generator), 4.0
    (public, _), (secret, lengths) = chain(400, 1), chain(60, 2)
    values = vocabulary[secret] + sample_d_chi_noise((len(secret), DIM), eta=eta, generator=generator)
    alone = invert_by_map(values, vocabulary, log_prior=unigram_log_prior(public, VOCAB), eta=eta)
    candidates, scores = rank_candidates(values, vocabulary, eta=eta, top_k=10)

    def success(guesses: Tensor) -> float:
        return float((guesses[:, 0] == secret).float().mean())

    assert success(decode_with_prior(candidates, scores, lengths, prior)) > success(alone) + 0.1
    scrambled = NgramPrior(public[torch.randperm(len(public), generator=generator)], [len(public)], vocab_size=VOCAB)
    assert success(decode_with_prior(candidates, scores, lengths, scrambled)) < success(alone) + 0.05


@pytest.mark.parametrize("prefix", [[], [3], [3, 4], [0, 29, 5], [7, 7]])
def test_trigrams_are_a_distribution(prior: NgramPrior, prefix: list[int]) -> None:
    odds = prior.log_probs(torch.tensor([prefix]).long(), torch.arange(VOCAB).unsqueeze(0)).exp()
    assert float(odds.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(odds.min()) > 0


def test_trigrams_equal_the_slow_twin() -> None:
    texts, discount = [[0, 1, 2, 0, 1, 3], [0, 1, 2], [2, 2]], 0.75
    flat = torch.tensor([token for text in texts for token in text])
    prior = NgramPrior(flat, [len(text) for text in texts], vocab_size=5, discount=discount)
    grams = [tuple(([None, None, *text])[i : i + 3]) for text in texts for i in range(len(text))]
    pairs = {gram[1:]: {g for g in grams if g[1:] == gram[1:]} for gram in grams}

    def one(w: int) -> float:
        follows = {v: len([p for p in pairs if p[1] == v]) for v in range(5)}
        kept = {v: max(n - discount, 0) for v, n in follows.items()}
        total = sum(follows.values())
        return (kept[w] + (total - sum(kept.values())) / 5) / total

    def interpolate(counts: dict[int, int], w: int, lower: float) -> float:
        total = sum(counts.values())
        if not total:
            return lower
        rest = 1 - sum(max(n - discount, 0) for n in counts.values()) / total
        return max(counts.get(w, 0) - discount, 0) / total + rest * lower

    def two(v: int | None, w: int) -> float:
        return interpolate({p[1]: len(found) for p, found in pairs.items() if p[0] == v}, w, one(w))

    def three(u: int | None, v: int | None, w: int) -> float:
        counts: dict[int, int] = {}
        for gram in grams:
            if gram[:2] == (u, v):
                counts[gram[2]] = counts.get(gram[2], 0) + 1  # type: ignore[index, call-overload]
        return interpolate(counts, w, two(v, w))

    for prefix in ([], [0], [0, 1], [1, 2], [4, 4], [2, 4]):
        u, v = ([None, None, *prefix])[-2:]
        ours = prior.log_probs(torch.tensor([prefix]).long(), torch.arange(5).unsqueeze(0)).exp()[0]
        assert ours.tolist() == pytest.approx([three(u, v, w) for w in range(5)], rel=1e-5)


def test_causal_prior_is_the_model_itself() -> None:
    model = tiny_model("llama", "causal")
    prior = CausalPrior(model, start=1)
    ids = torch.tensor([[5, 9, 7], [4, 4, 8]])
    with torch.no_grad():
        logits = model(torch.nn.functional.pad(ids, (1, 0), value=1)).logits
    whole = logits.log_softmax(-1)[:, :-1].gather(2, ids.unsqueeze(-1)).squeeze(-1)
    steps = [prior.log_probs(ids[:, :t], ids[:, t : t + 1]) for t in range(3)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    candidates = torch.randint(0, TINY_VOCAB, (4, 3), generator=torch.Generator().manual_seed(0))
    assert decode_with_prior(candidates, torch.zeros(4, 3), [4], prior, beam=2).shape == (4, 1)


def test_unusable_arguments_are_refused(prior: NgramPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids, scores = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)
    with pytest.raises(InputError, match="one shape"):
        decode_with_prior(ids, scores[:2], [3], prior)
    with pytest.raises(InputError, match="sum to the number of rows, 3"):
        decode_with_prior(ids, scores, [4], prior)
    with pytest.raises(InputError, match="beam must be a whole number"):
        decode_with_prior(ids, scores, [3], prior, beam=0)
    with pytest.raises(InputError, match="weight must be in"):
        decode_with_prior(ids, scores, [3], prior, weight=-1.0)
    with pytest.raises(InputError, match=r"token_ids must be in \[0, 2\)"):
        NgramPrior(torch.tensor([0, 2]), [2], vocab_size=2)
