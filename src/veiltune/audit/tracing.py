"""What the attacks need of each token of a record, from one pass over a black box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from veiltune._validate import positive_int
from veiltune.attacks.membership import TokenTrace
from veiltune.audit.blackbox import BlackBox, Tokens, Vectors, spans, told

Float32 = NDArray[np.float32]
Booleans = NDArray[np.bool_]

TOP_K = 40  # Carlini et al. 2020 sample from so many
_IN_CACHE = 2**18  # values reduced at once: 1 MiB in float32 stays near the processor
_STRIDES = 64  # stretches of the vocabulary whose maxima find the most likely tokens


@dataclass(frozen=True, repr=False)
class Traced:
    """One record under one model: position t is about token t + 1, the first token is only read.

    Attributes:
        trace: What membership inference needs; finite also where a box does not tell a token (`blackbox.told`).
        top_k_log_probs: (n,) nats under sampling from the k most likely tokens; -inf where the token is not among
            them; all nan where the box tells fewer than k.
        exact: (n,) whether the box told the token's own log-probability, and it is not zero. Elsewhere the trace has an
            upper limit.
    """

    trace: TokenTrace
    top_k_log_probs: Float32
    exact: Booleans


def trace(
    box: BlackBox,
    sequences: Sequence[Tokens],
    *,
    top_k: int = TOP_K,
    progress: Callable[[int], None] | None = None,
) -> list[Traced]:
    """Reduces the vectors along each sequence to a few numbers a token, in one pass.

    Moments are of the probabilities as they came, divided by their sum (an API may round). Memory: one stretch of
    vectors, and 17 bytes a token.

    Args:
        box: The model.
        sequences: Lists of 2 to `box.context` + 1 token ids, start token included (`blackbox.record_ids`).
        top_k: Tokens that a sampler keeps.
        progress: Called with the number of sequences done.

    Returns:
        One a sequence, in order, of length T - 1. Without full vectors means and deviations are nan.

    Raises:
        InputError: If a sequence is too short or too long, or a vector is not a distribution.
    """
    positive_int(top_k=top_k)
    done: list[Traced] = []
    held: list[_Columns] = []
    for number, first, vectors in box.parts(sequences):
        tokens = np.asarray(sequences[number][first + 1 : first + 1 + len(vectors)], dtype=np.int64)
        for start, stop in spans(0, len(tokens), max(1, _IN_CACHE // box.vocabulary)):
            held.append(_reduce(box, vectors[start:stop], tokens[start:stop], top_k))
        if first + len(vectors) == len(sequences[number]) - 1:
            done.append(_joined(held))
            held = []
            if progress is not None:
                progress(len(done))
    return done


def kept_by_top_k(vectors: Vectors, k: int) -> NDArray[np.int64]:
    """The ids of the k most likely tokens of each vector, ascending; of equals at the border the lowest ids.

    >>> kept_by_top_k(np.log(np.array([[0.2, 0.4, 0.2, 0.2]], dtype=np.float32)), 2)
    array([[0, 1]])

    Args:
        vectors: (n, V); nan is taken as least likely.
        k: 1..V.

    Returns:
        (n, k) token ids.
    """
    values = np.where(np.isnan(vectors), -np.inf, vectors)
    border = _largest(values, k).min(axis=1, keepdims=True)
    kept = values >= border
    for row in np.flatnonzero(kept.sum(axis=1) > k):
        equal = np.flatnonzero(values[row] == border[row])
        kept[row, equal[k - int((values[row] > border[row]).sum()) :]] = False
    return np.nonzero(kept)[1].reshape(len(values), k)


# log_probs, means, deviations, hits, top_k_log_probs, exact
_Columns = tuple[NDArray[np.float64], Float32, Float32, Booleans, Float32, Booleans]


def _reduce(box: BlackBox, vectors: Vectors, tokens: NDArray[np.int64], top_k: int) -> _Columns:
    log_probs, exact = told(vectors, tokens)
    own = vectors[np.arange(len(tokens)), tokens]
    if box.full_vectors:
        means, deviations = _moments(vectors)
    else:
        vectors = np.where(np.isnan(vectors), -np.inf, vectors)
        means = deviations = np.full(len(tokens), np.nan, dtype=np.float32)
    hits = vectors.argmax(axis=1) == tokens
    k = min(top_k, box.vocabulary)
    if box.full_vectors or box.top_tokens >= k:
        top = _top_k_log_probs(vectors, tokens, np.where(np.isnan(own), -np.inf, own), k)
    else:
        top = np.full(len(tokens), np.nan, dtype=np.float32)
    return log_probs, means, deviations, hits, top, exact


def _moments(vectors: Vectors) -> tuple[Float32, Float32]:
    """Mean and standard deviation of log p under p."""
    probabilities = np.exp(vectors)
    weight = probabilities.sum(axis=1, dtype=np.float64)
    values = np.maximum(vectors, -1e4)  # 0 * -inf is no number; where p is 0 any finite value does
    means = np.vecdot(probabilities, values) / weight
    values -= means[:, None].astype(np.float32)
    np.multiply(values, values, out=values)
    variances = np.vecdot(probabilities, values) / weight
    return means.astype(np.float32), np.sqrt(variances).astype(np.float32)


def _top_k_log_probs(vectors: Vectors, tokens: NDArray[np.int64], own: Vectors, k: int) -> Float32:
    largest = _largest(vectors, k)
    border = largest.min(axis=1)
    top = largest.max(axis=1)
    total = top + np.log(np.exp(largest - top[:, None]).sum(axis=1))
    among = own >= border
    for row in np.flatnonzero(own == border):  # equals at the border: the lowest ids are kept
        before = int((vectors[row] > own[row]).sum()) + int((vectors[row, : tokens[row]] == own[row]).sum())
        among[row] = before < k
    return np.where(among & np.isfinite(own), own - total, -np.inf).astype(np.float32)


def _largest(values: Vectors, k: int) -> Vectors:
    """(n, k) the k largest of each row, in any order.

    They lie in the k columns with the largest maxima of a table that holds each row in `_STRIDES` lines (and in what is
    left over), so that only a few thousand values of a large vocabulary are sorted.
    """
    columns = values.shape[1] // _STRIDES
    if columns <= 2 * k:
        return _top_k(values, k)[0]
    table = values[:, : columns * _STRIDES].reshape(len(values), _STRIDES, columns)
    best = _top_k(table.max(axis=1), k)[1]
    candidates = np.take_along_axis(table, best[:, None, :], axis=2).reshape(len(values), -1)
    candidates = np.concatenate([candidates, values[:, columns * _STRIDES :]], axis=1)
    return _top_k(candidates, k)[0]


def _top_k(values: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
    """The k largest of each row and where they are, in any order.

    By torch: numpy's partition takes ten times as long where most entries are -inf, as in the vectors of a guard.
    """
    found = torch.tensor(values).topk(k, sorted=False)
    return found.values.numpy(), found.indices.numpy()


def _joined(held: list[_Columns]) -> Traced:
    columns = [np.concatenate(column) for column in zip(*held, strict=True)]
    log_probs, means, deviations, hits, top, exact = columns
    return Traced(TokenTrace(log_probs.astype(np.float32), means, deviations, hits), top, exact)
