"""Texts that a black box continues, drawn at random or greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veiltune._validate import positive, positive_int, refusal
from veiltune.audit.blackbox import BlackBox, Tokens, Vectors, spans
from veiltune.audit.tracing import TOP_K, kept_by_top_k
from veiltune.errors import InputError

Int64 = NDArray[np.int64]
Progress = Callable[[int], None]


@dataclass(frozen=True, repr=False)
class Continuation:
    """What a model added to a prefix.

    Attributes:
        tokens: Without the prefix and without the end-of-text token.
        log_prob: Sum of the tokens' log-probabilities in nats, that of the end-of-text token left out: the attacker's
            confidence. Of the whole distribution, whatever the sampler keeps.
    """

    tokens: list[int]
    log_prob: float


def sample(
    box: BlackBox,
    prefixes: Sequence[Tokens],
    *,
    new_tokens: int,
    eos: int | None,
    seed: int,
    top_k: int | None = TOP_K,
    temperature: float = 1.0,
    batch: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continues each prefix with tokens drawn from its k most likely ones, until `eos`.

    Prefix number i draws from its own generator, made of the seed and i: a text depends on the batch size only where
    rounding moves a draw across a border, about once in a million tokens.

    Args:
        box: The model.
        prefixes: Lists of at least one token id; the start token alone asks for a text out of nothing. The same one
            may stand many times.
        new_tokens: At most so many a text.
        eos: Ends a text and is left out of it; None for none.
        seed: Not negative.
        top_k: The sampler keeps so many tokens, at most all; None keeps all. Of equally likely tokens at the border
            those with the lowest ids stay.
        temperature: Log-probabilities are divided by it.
        batch: Texts at once.
        progress: Called with the number of texts done.

    Returns:
        The new tokens of each prefix, in order.

    Raises:
        InputError: If an argument is out of range, a prefix and its new tokens exceed the context, or the box does not
            tell so many tokens.

    Source: Fan et al. 2018, arXiv:1805.04833; as an attack Carlini et al. 2020, arXiv:2012.07805.
    """
    positive(temperature=temperature)
    k = min(box.vocabulary if top_k is None else positive_int(top_k=top_k), box.vocabulary)
    if not box.full_vectors and k > box.top_tokens:
        raise InputError(
            f"{box.name} tells the {box.top_tokens} most likely tokens only, top_k is {top_k}; set it to"
            f" {box.top_tokens} at most"
        )

    def draw(vectors: Vectors, uniforms: NDArray[np.float64]) -> Int64:
        return _draw(vectors, uniforms, k=k, temperature=temperature)

    found = _continue(box, prefixes, draw, new_tokens=new_tokens, eos=eos, seed=seed, batch=batch, progress=progress)
    return [text.tokens for text in found]


def greedy(
    box: BlackBox,
    prefixes: Sequence[Tokens],
    *,
    new_tokens: int,
    eos: int | None,
    batch: int = 64,
    progress: Progress | None = None,
) -> list[Continuation]:
    """Continues each prefix with the most likely token each time (of equals the lowest id), until `eos`.

    Args:
        box: The model; one that tells a single token is enough.
        prefixes: Lists of at least one token id.
        new_tokens: At most so many a text.
        eos: Ends a text and is left out of it; None for none.
        batch: Texts at once.
        progress: Called with the number of texts done.

    Returns:
        One a prefix, in order.

    Raises:
        InputError: If an argument is out of range, or a prefix and its new tokens exceed the context.
    """

    def best(vectors: Vectors, uniforms: NDArray[np.float64]) -> Int64:
        chosen: Int64 = np.nanargmax(vectors, axis=1)
        return chosen

    return _continue(box, prefixes, best, new_tokens=new_tokens, eos=eos, seed=0, batch=batch, progress=progress)


def _continue(
    box: BlackBox,
    prefixes: Sequence[Tokens],
    choose: Callable[[Vectors, NDArray[np.float64]], Int64],
    *,
    new_tokens: int,
    eos: int | None,
    seed: int,
    batch: int,
    progress: Progress | None,
) -> list[Continuation]:
    positive_int(new_tokens=new_tokens), positive_int(batch=batch)
    if seed < 0:
        raise refusal("seed", "a whole number of at least 0", seed)
    longest = max(map(len, prefixes), default=0)
    if longest + new_tokens > box.context + 1:
        raise InputError(
            f"a prefix of {longest} tokens and {new_tokens} new ones exceed the context of {box.context} of {box.name};"
            " shorten one of them"
        )
    order = sorted(range(len(prefixes)), key=lambda row: -len(prefixes[row]))  # neighbours need little padding
    texts = [Continuation([], 0.0)] * len(prefixes)
    for first, stop in spans(0, len(order), batch):
        rows = order[first:stop]
        draws = np.stack([np.random.default_rng([seed, row]).random(new_tokens) for row in rows])
        for row, text in zip(rows, _batch(box, [prefixes[row] for row in rows], choose, draws, eos), strict=True):
            texts[row] = text
        if progress is not None:
            progress(stop)
    return texts


def _batch(
    box: BlackBox,
    prefixes: Sequence[Tokens],
    choose: Callable[[Vectors, NDArray[np.float64]], Int64],
    draws: NDArray[np.float64],
    eos: int | None,
) -> list[Continuation]:
    decoder = box.decoder(prefixes)
    tokens: list[list[int]] = [[] for _ in prefixes]
    totals = np.zeros(len(prefixes))
    alive = np.arange(len(prefixes))
    for step in range(draws.shape[1]):
        chosen = choose(decoder.log_probs, draws[alive, step])
        going = np.flatnonzero(chosen != (-1 if eos is None else eos))
        totals[alive[going]] += decoder.log_probs[going, chosen[going]]
        for text, token in zip(alive[going].tolist(), chosen[going].tolist(), strict=True):
            tokens[text].append(token)
        if not len(going) or step + 1 == draws.shape[1]:
            break
        if len(going) < len(alive):
            decoder.select(going.tolist())
            alive = alive[going]
        decoder.append(chosen[going].tolist())
    return [Continuation(ids, float(total)) for ids, total in zip(tokens, totals, strict=True)]


def _draw(vectors: Vectors, uniforms: NDArray[np.float64], *, k: int, temperature: float) -> Int64:
    """One token a vector by the inverse of the distribution function over ascending ids."""
    if k == vectors.shape[1]:
        ids = np.broadcast_to(np.arange(k), vectors.shape)
        values = vectors.astype(np.float64)
    else:
        ids = kept_by_top_k(vectors, k)
        values = np.take_along_axis(vectors, ids, axis=1).astype(np.float64)
    weights = np.exp((values - values.max(axis=1, keepdims=True)) / temperature)
    sums = weights.cumsum(axis=1)
    places = (sums <= uniforms[:, None] * sums[:, -1:]).sum(axis=1)
    # rounding may put a draw at the very end, beyond the last token that has any probability
    last = k - 1 - (weights[:, ::-1] > 0).argmax(axis=1)
    chosen: Int64 = np.take_along_axis(ids, np.minimum(places, last)[:, None], axis=1)[:, 0]
    return chosen
