"""Decoding with a language prior: candidates of any attack, re-read as the text they most probably form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from veiltune._validate import in_range, positive_int
from veiltune.attacks.sequences import check_lengths
from veiltune.errors import InputError


@runtime_checkable
class LanguagePrior(Protocol):
    """What text looks like, learned from public text."""

    def log_probs(self, prefixes: Int[Tensor, "B T"], continuations: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Log-probability of each continuation right after its prefix.

        Args:
            prefixes: Token ids from the text's first on; all of one length, which may be 0.
            continuations: K token ids for each prefix.
        """


def decode_with_prior(
    candidates: Int[Tensor, "N K"],
    scores: Float[Tensor, "N K"],
    lengths: Sequence[int],
    prior: LanguagePrior,
    *,
    beam: int = 8,
    weight: float = 1.0,
) -> Int[Tensor, "N 1"]:
    """Guesses each text as the path through its candidates with the best likelihood and language score.

    Beam search: positions from left to right, the `beam` best prefixes kept. Exact where the beam holds every prefix
    that the prior tells apart.

    Threat model:
        Honest-but-curious vendor with public text, on top of any attack that scores tokens: knows the mechanism for
        the likelihoods and how language goes on. Matters under noise, where several tokens fit each vector. Costs
        N * beam * K looks at the prior.

    Args:
        candidates: Token ids for each row of the texts, one after the other: the top K of a base attack.
        scores: Their log-likelihoods, without a prior of their own: `inversion.rank_candidates` with eta or sigma, or
            a trained inverter's log-scores less its `log_prior`.
        lengths: Rows of each text.
        prior: Scores continuations, such as `NgramPrior`.
        beam: Prefixes kept.
        weight: Of the prior's log-probabilities against the scores, >= 0.

    Raises:
        InputError: If sizes disagree or a number is out of range.

    Source: the noisy channel; for inversion of noised text Song and Raghunathan 2020, arXiv:2004.00053, and
        arXiv:2409.00960.
    """
    if candidates.shape != scores.shape:
        raise InputError(
            f"candidates and scores must have one shape, got {tuple(candidates.shape)} and {tuple(scores.shape)}"
        )
    check_lengths(lengths, len(candidates))
    positive_int(beam=beam)
    in_range(0.0, 1e6, weight=weight)
    sizes = list(lengths)
    parts = zip(candidates.split(sizes), scores.double().split(sizes), strict=True)
    guesses = [_best_path(ids, likelihood, prior, beam, weight) for ids, likelihood in parts]
    return torch.cat(guesses).unsqueeze(1) if guesses else candidates[:, :1]


def _best_path(candidates: Tensor, scores: Tensor, prior: LanguagePrior, beam: int, weight: float) -> Tensor:
    prefixes = candidates.new_zeros(1, 0)
    totals = scores.new_zeros(1)
    for ids, likelihood in zip(candidates, scores, strict=True):
        options = ids.expand(len(prefixes), -1)
        grown = totals.unsqueeze(1) + likelihood + weight * prior.log_probs(prefixes, options).to(scores)
        totals, flat = grown.flatten().topk(min(beam, grown.numel()))
        origin, choice = flat // len(ids), flat % len(ids)
        prefixes = torch.cat([prefixes[origin], ids[choice].unsqueeze(1)], dim=1)
    return prefixes[0]


@dataclass(frozen=True)
class _Order:
    """Counts of one n-gram order: sorted keys, discounted shares and what is left for lower orders."""

    keys: NDArray[np.int64]  # n-grams
    shares: NDArray[np.float64]  # max(count - discount, 0) / count of the context
    contexts: NDArray[np.int64]  # sorted
    rests: NDArray[np.float64]  # probability left for the lower order

    def lookup(self, context: NDArray[np.int64], key: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Share of each n-gram and rest of its context; 0 and 1 where unseen."""
        return _find(self.keys, self.shares, key, 0.0), _find(self.contexts, self.rests, context, 1.0)


class NgramPrior:
    """Interpolated Kneser-Ney trigrams of public text.

    >>> prior = NgramPrior(torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 4]), [9], vocab_size=6)
    >>> odds = prior.log_probs(torch.tensor([[1, 2]]), torch.arange(6).unsqueeze(0)).exp()
    >>> int(odds.argmax()), round(float(odds.sum()), 6)
    (3, 1.0)

    Args:
        token_ids: Public texts, one after the other.
        lengths: Tokens of each.
        vocab_size: V, below 2 million.
        discount: Taken from each count, in (0, 1).

    Raises:
        InputError: If sizes disagree, an id is out of range or there is no token.

    Source: Kneser and Ney 1995; Chen and Goodman 1999, one discount an order.
    """

    def __init__(
        self, token_ids: Int[Tensor, " N"], lengths: Sequence[int], *, vocab_size: int, discount: float = 0.75
    ) -> None:
        check_lengths(lengths, len(token_ids))
        positive_int(vocab_size=vocab_size)
        if not len(token_ids) or not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size < 2**21 - 1:
            raise InputError(f"token_ids must be in [0, {vocab_size}) and at least one, vocab_size below 2 million")
        in_range(0.0, 1.0, discount=discount)
        self._base = vocab_size + 1  # id V stands before a text's first token
        first, second, third = _windows(token_ids.cpu().numpy(), lengths, vocab_size)
        trigrams, counts = np.unique((first * self._base + second) * self._base + third, return_counts=True)
        self._three = _order(trigrams, counts.astype(np.float64), self._base, discount)
        pairs, spread = np.unique(trigrams % self._base**2, return_counts=True)  # contexts each pair follows
        self._two = _order(pairs, spread.astype(np.float64), self._base, discount)
        follows = np.bincount(pairs % self._base, minlength=vocab_size)[:vocab_size].astype(np.float64)
        kept = np.maximum(follows - discount, 0.0)
        self._one = (kept + (follows.sum() - kept.sum()) / vocab_size) / follows.sum()

    def log_probs(self, prefixes: Int[Tensor, "B T"], continuations: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """See `LanguagePrior`; looks at the last two tokens."""
        start = np.full((len(prefixes), 2), self._base - 1, dtype=np.int64)
        last = np.concatenate([start, prefixes[:, -2:].cpu().numpy()], axis=1)[:, -2:]
        token = continuations.cpu().numpy()
        middle = last[:, 1:]
        outer = last[:, :1] * self._base + middle
        pair_share, pair_rest = self._two.lookup(middle, middle * self._base + token)
        share, rest = self._three.lookup(outer, outer * self._base + token)
        probability = share + rest * (pair_share + pair_rest * self._one[token])
        return torch.from_numpy(np.log(probability)).float().to(continuations.device)


class CausalPrior:
    """A causal language model that uses the same tokenizer.

    Args:
        model: Hugging Face causal LM in eval mode; left unchanged.
        start: Id put before every prefix, such as the model's beginning-of-text token.
    """

    def __init__(self, model: Any, *, start: int) -> None:
        self._model, self._start = model, start

    @torch.no_grad()
    def log_probs(self, prefixes: Int[Tensor, "B T"], continuations: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """See `LanguagePrior`; runs the model over the whole prefix."""
        ids = torch.nn.functional.pad(prefixes, (1, 0), value=self._start)
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float()
        result: Tensor = logits.log_softmax(dim=-1).gather(1, continuations)
        return result


def _windows(tokens: NDArray[np.int64], lengths: Sequence[int], start: int) -> tuple[NDArray[np.int64], ...]:
    """Each token with the two before it in its text; `start` stands in where there is none."""
    place = np.concatenate([np.arange(length) for length in lengths])
    before = np.where(place >= 1, np.roll(tokens, 1), start)
    further = np.where(place >= 2, np.roll(tokens, 2), start)
    return further.astype(np.int64), before.astype(np.int64), tokens.astype(np.int64)


def _order(keys: NDArray[np.int64], counts: NDArray[np.float64], base: int, discount: float) -> _Order:
    contexts, where = np.unique(keys // base, return_inverse=True)
    totals = np.bincount(where, weights=counts)
    kept = np.maximum(counts - discount, 0.0)
    rests = 1.0 - np.bincount(where, weights=kept) / totals
    return _Order(keys=keys, shares=kept / totals[where], contexts=contexts, rests=rests)


def _find(
    keys: NDArray[np.int64], values: NDArray[np.float64], wanted: NDArray[np.int64], missing: float
) -> NDArray[np.float64]:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], missing)
