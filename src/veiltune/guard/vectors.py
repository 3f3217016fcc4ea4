"""What is done to one vector of log-probabilities: parts of it sealed, temperature, top-k, rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veiltune._validate import in_range, positive, positive_int
from veiltune.errors import InputError
from veiltune.guard.vocabulary import Int64

Vector = NDArray[np.float32]

_LEAST_MASS = 1e-30  # that sealed tokens still share
_EXACT = 0.1  # a smaller remainder is added up anew


def unigram(texts: Iterable[Sequence[int]], size: int) -> NDArray[np.float64]:
    """(V,) shares of the tokens of public texts, each counted once more than it occurs.

    >>> unigram([[0, 0, 1]], 3).round(3).tolist()
    [0.5, 0.333, 0.167]

    Args:
        texts: Lists of token ids.
        size: V.

    Raises:
        InputError: If an id is not below V.
    """
    counts = np.ones(positive_int(size=size))
    for ids in texts:
        found = np.bincount(np.asarray(ids, dtype=np.int64), minlength=size)
        if len(found) > size:
            raise InputError(f"a token id of the public text is not below {size}; use the model's own tokenizer")
        counts += found
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


class Seal:
    """Replaces what a model says of some tokens by what a reference says.

    A sealed token gets the probability that the reference gives it; all other tokens are scaled alike, so that the
    vector still adds up to 1. No sealed token has probability zero, and what the model thought of the sealed tokens is
    gone: a token that is withheld looks like all its neighbours.

    >>> seal = Seal(np.array([0.1, 0.3, 0.4, 0.2]))
    >>> vector = np.log(np.array([0.5, 0.2, 0.1, 0.2], dtype=np.float32))
    >>> [f"{p:.3f}" for p in np.exp(seal.of(vector, np.array([0])))]
    ['0.100', '0.360', '0.180', '0.360']

    Guarantee:
        The told vector is a function of the sealed ids, the reference and the proportions of tokens that are not
        sealed; where all are, of the reference alone. That something was sealed can be seen by anyone who knows the
        reference.

    Args:
        reference: (V,) positive shares: a unigram distribution of public text, or a public model's vector.

    Raises:
        InputError: If a share is not positive.

    Attributes:
        whole: (V,) the vector in which all tokens are sealed.
    """

    def __init__(self, reference: Any) -> None:
        shares = np.asarray(reference, dtype=np.float64)
        if shares.ndim != 1 or not np.isfinite(shares).all() or not (shares > 0).all():
            raise InputError(f"the reference must be a row of positive shares, got shape {shares.shape}")
        self._shares = shares / shares.sum()
        self.whole: Vector = np.log(self._shares).astype(np.float32)
        self.whole.flags.writeable = False

    def of(self, log_probs: Vector, ids: Int64) -> Vector:
        """A copy with the tokens `ids` (all different) sealed; the same object if there are none."""
        if not len(ids):
            return log_probs
        rest, others = 1.0 - float(self._shares[ids].sum()), _mass_beside(log_probs, ids)
        if not rest > 0.0 < others:  # there is nothing beside the sealed tokens: then all are
            return self.whole
        vector: Vector = log_probs + np.float32(math.log(rest / others))
        vector[ids] = self.whole[ids]
        return vector

    def among(self, log_probs: Vector, ids: Int64) -> Vector:
        """As `of`, but the sealed tokens share what they had together; all others are unchanged."""
        mass = float(np.exp(log_probs[ids], dtype=np.float64).sum())
        vector = log_probs.copy()
        vector[ids] = self.whole[ids] + np.float32(math.log(max(mass, _LEAST_MASS) / self._shares[ids].sum()))
        return vector


@dataclass(frozen=True)
class Shape:
    """What is done to every vector: temperature, then top-k, then rounding of probabilities; 0 leaves a step out.

    None of these is a defence alone: attacks that see only which token is likeliest are about as good (Choquette-Choo
    et al. 2021, arXiv:2007.14321). They make the vector cheaper to send and a budget of queries worth more.

    >>> vector = np.log(np.array([0.6, 0.25, 0.15], dtype=np.float32))
    >>> [f"{p:.3f}" for p in np.exp(Shape(top_k=2, decimals=1).of(vector))]
    ['0.700', '0.300', '0.000']

    Raises:
        InputError: If a number is out of range.

    Attributes:
        temperature: Log-probabilities are divided by it.
        top_k: Tokens that keep a probability; of equal ones those with lower ids.
        decimals: Of the probabilities. What rounding takes or adds is shared out again.
    """

    temperature: float = 1.0
    top_k: int = 0
    decimals: int = 0

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        in_range(0, 2**31, top_k=self.top_k)
        in_range(0, 12, decimals=self.decimals)

    def of(self, log_probs: Vector) -> Vector:
        """The shaped vector, (V,); the same object if there is nothing to do."""
        vector = log_probs
        if self.temperature != 1.0:
            vector = tempered(vector, self.temperature)
        if 0 < self.top_k < len(vector):
            kept = np.full_like(vector, -np.inf)
            ids = best(vector, self.top_k)
            kept[ids] = vector[ids]
            vector = normalised(kept)
        if self.decimals:
            rounded = np.exp(vector, dtype=np.float64).round(self.decimals)
            if not rounded.any():
                rounded[int(vector.argmax())] = 1.0
            with np.errstate(divide="ignore"):
                vector = np.log(rounded / rounded.sum()).astype(np.float32)
        return vector


def best(log_probs: Vector, k: int) -> Int64:
    """Ids of the k largest entries, largest first; of equal ones the lower id.

    >>> best(np.array([0.1, 0.3, 0.3, 0.2, 0.1], dtype=np.float32), 4).tolist()
    [1, 2, 3, 0]
    """
    k = min(k, len(log_probs))
    if k == 0:
        return np.zeros(0, dtype=np.int64)
    if k < len(log_probs):
        least = np.partition(log_probs, len(log_probs) - k)[len(log_probs) - k]
        above, equal = np.flatnonzero(log_probs > least), np.flatnonzero(log_probs == least)
        ids = np.sort(np.concatenate([above, equal[: k - len(above)]]))
    else:
        ids = np.arange(k)
    return ids[np.argsort(-log_probs[ids], kind="stable")]


def without(log_probs: Vector, ids: Int64) -> Vector:
    """The vector after some tokens are ruled out.

    Raises:
        InputError: If nothing is left.
    """
    if not len(ids):
        return log_probs
    kept = _mass_beside(log_probs, ids)
    if not kept > 0.0:
        raise InputError("the guard leaves no token; fewer strings must be protected")
    left: Vector = log_probs - np.float32(math.log(kept))
    left[ids] = -np.inf
    return left


def _mass_beside(log_probs: Vector, ids: Int64) -> float:
    """What all tokens but some have together."""
    mass = 1.0 - float(np.exp(log_probs[ids]).sum(dtype=np.float64))
    if mass > _EXACT:
        return mass
    chances = np.exp(log_probs)  # a difference of nearly equal numbers says nothing
    chances[ids] = 0.0
    return float(chances.sum(dtype=np.float64))


def tempered(log_probs: Vector, temperature: float) -> Vector:
    """Log-probabilities divided by a temperature, however small, and normalised; what has probability zero keeps it.

    >>> np.exp(tempered(np.log(np.array([0.6, 0.4], dtype=np.float32)), 1e-300)).tolist()
    [1.0, 0.0]
    """
    below = log_probs.astype(np.float64) - log_probs.max()
    with np.errstate(over="ignore"):
        return normalised((below / temperature).astype(np.float32))


def normalised(log_probs: Vector) -> Vector:
    """Log-probabilities that add up to 1, float32."""
    largest = log_probs.max()
    total = np.log(np.exp(log_probs - largest).sum(dtype=np.float64))
    result: Vector = (log_probs - np.float32(largest + total)).astype(np.float32, copy=False)
    return result
