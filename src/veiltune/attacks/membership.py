"""Membership inference: was a record in the training text? One number a record, from next-token vectors alone.

Free of torch. Every score is higher for a member.

Threat model of all of them:
    Someone who may ask the finished model for next-token vectors (or, for n-gram coverage, only for text), holds the
    record in question and, where an attack takes `base`, the public model that was fine-tuned. No access to weights,
    gradients or the training text. One teacher-forced pass a record and model serves them all.
"""

from __future__ import annotations

import math
import zlib as _zlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veiltune._validate import in_range, positive, positive_int
from veiltune.errors import InputError

Float64 = NDArray[np.float64]

LOWEST_SHARE = 0.2  # Min-K%: the share of a record's tokens that counts
ABOVE_ALL = 1e9  # EZ: where a record with fewer than two error positions starts

_LEAST_DEVIATION = 1e-4  # float32 vectors know a standard deviation of log-probabilities no better
_LEAST_LOSS = 1e-6  # nats; so that a ratio of losses of 0 is 1


@dataclass(frozen=True, repr=False)
class TokenTrace:
    """What one teacher-forced pass tells of one record.

    Attributes:
        log_probs: (n,) log p(x_t | x_<t) of each scored token, nats.
        means: (n,) sum over the vocabulary of p log p (minus the entropy), nats; all nan where only the k most likely
            tokens are known.
        deviations: (n,) standard deviation of log p under p, nats; nan likewise.
        hits: (n,) whether the token was the most likely one.
    """

    log_probs: NDArray[Any]
    means: NDArray[Any]
    deviations: NDArray[Any]
    hits: NDArray[np.bool_]

    def __post_init__(self) -> None:
        shapes = {part.shape for part in (self.log_probs, self.means, self.deviations, self.hits)}
        if len(shapes) > 1 or self.log_probs.ndim != 1 or not len(self.log_probs):
            raise InputError(f"a trace needs four arrays of one length of at least 1, got shapes {sorted(shapes)}")

    def __len__(self) -> int:
        return len(self.log_probs)


Traces = Sequence[TokenTrace]


def loss(target: Traces) -> Float64:
    """Mean log-probability of a record's tokens: what the model was trained to raise.

    Args:
        target: Under the model in question.

    Returns:
        (N,) nats a token.

    Raises:
        InputError: If a log-probability is not finite.

    Source: Yeom et al. 2018, arXiv:1709.01604.
    """
    return np.array([part.mean() for part in _log_probs(target, "target")])


def reference(target: Traces, base: Traces, *, per_token: bool = False) -> Float64:
    """How much likelier the record is than under the public model: what fine-tuning added.

    Args:
        target: Under the model in question.
        base: The same records under the public model.
        per_token: Whether to divide by the number of tokens.

    Returns:
        (N,) sum of l_t - r_t in nats (or their mean).

    Raises:
        InputError: If the two are not of the same records, or a log-probability is not finite.

    Source: Carlini et al. 2020, arXiv:2012.07805; Watson et al. 2021, arXiv:2111.08440.
    """
    gains = _gains(target, base)
    return np.array([part.mean() if per_token else part.sum() for part in gains])


def zlib(target: Traces, compressed_bytes: Sequence[int]) -> Float64:
    """Log-probability by compressed length: a text that is likely for want of content is no evidence.

    Args:
        target: Under the model in question.
        compressed_bytes: Of each record's text, from `zlib_bytes`.

    Returns:
        (N,) nats a byte.

    Raises:
        InputError: If the counts differ, a length is not positive, or a log-probability is not finite.

    Source: Carlini et al. 2020, arXiv:2012.07805.
    """
    sizes = np.asarray(compressed_bytes, dtype=np.float64)
    if sizes.shape != (len(target),) or bool((sizes <= 0).any()):
        raise InputError(f"zlib needs one positive length for each of {len(target)} records, got shape {sizes.shape}")
    return np.array([part.sum() for part in _log_probs(target, "target")]) / sizes


def zlib_bytes(texts: Iterable[str]) -> list[int]:
    """Bytes of each text in UTF-8, compressed.

    >>> zlib_bytes(["aaaaaaaaaaaaaaaaaaaa", "sphinx of black quartz"])
    [11, 30]
    """
    return [len(_zlib.compress(text.encode())) for text in texts]


def lowercase(target: Traces, lowered: Traces) -> Float64:
    """Loss of the record in lower case over its own loss: who learnt it by heart is thrown by a change of case.

    Args:
        target: Under the model in question.
        lowered: The same records in lower case under the same model; their tokens may be more or fewer.

    Returns:
        (N,) ratio of mean losses, above 1 where the record as it stands is likelier.

    Raises:
        InputError: If the counts differ or a log-probability is not finite.

    Source: Carlini et al. 2020, arXiv:2012.07805.
    """
    _same_count(target, lowered, "lower case")
    own, low = -loss(target), -loss(lowered)
    return np.asarray((low + _LEAST_LOSS) / (own + _LEAST_LOSS))


def min_k(target: Traces, *, share: float = LOWEST_SHARE) -> Float64:
    """Mean of the lowest log-probabilities: even the surprising words of a member were seen.

    Args:
        target: Under the model in question.
        share: Of the tokens that counts, rounded down, at least one.

    Returns:
        (N,) nats a token.

    Raises:
        InputError: If the share is out of (0, 1], or a log-probability is not finite.

    Source: Shi et al. 2023, arXiv:2310.16789.
    """
    return np.array([_lowest_mean(part, share) for part in _log_probs(target, "target")])


def min_k_plus_plus(target: Traces, *, share: float = LOWEST_SHARE) -> Float64:
    """Min-K% of log-probabilities standardised by what the vector leads to expect, (l - mean) / deviation.

    Deviations below 1e-4 nats, of vectors with all mass on one token, count as 1e-4.

    Args:
        target: Under the model in question, with means and deviations (full vectors).
        share: Of the tokens that counts, rounded down, at least one.

    Returns:
        (N,) standard deviations.

    Raises:
        InputError: If the share is out of (0, 1], or something is not finite.

    Source: Zhang et al. 2024, arXiv:2404.02936.
    """
    if not has_moments(target):
        raise InputError("min_k_plus_plus needs means and deviations, of full next-token vectors; got nan")
    parts = _log_probs(target, "target")
    standard = [
        (part - trace.means.astype(np.float64)) / np.maximum(trace.deviations.astype(np.float64), _LEAST_DEVIATION)
        for part, trace in zip(parts, target, strict=True)
    ]
    return np.array([_lowest_mean(part, share) for part in standard])


def rmia(
    target: Traces,
    base: Traces,
    population_target: Traces,
    population_base: Traces,
    *,
    offline_a: float = 0.3,
    gamma: float = 1.0,
) -> Float64:
    """Share of population records z that the record beats: Pr_z[ratio(x) / ratio(z) > gamma].

    ratio(x) = p(x) / (((1 + a) r(x) + 1 - a) / 2), with p and r the geometric means of a record's token probabilities
    under the model and under the reference, which keeps long records from underflow. With one reference the score
    never orders two records against their ratios, so `gamma` and the population only calibrate it: its resolution is
    1 / population.

    Args:
        target: Under the model in question.
        base: The same under a reference model that never saw them.
        population_target: Of records that are surely not members, under the model in question.
        population_base: The same under the reference.
        offline_a: a in [0, 1]: how a model that saw a record relates to one that did not; 1: not at all.
        gamma: By how much to beat, at least 1.

    Returns:
        (N,) shares.

    Raises:
        InputError: If records differ between models, the population is empty, or a parameter is out of range.

    Source: Zarifzadeh et al. 2023, arXiv:2312.03262, offline form.
    """
    in_range(0.0, 1.0, offline_a=offline_a)
    in_range(1.0, math.inf, gamma=gamma)
    if not len(population_target):
        raise InputError("rmia needs population records, surely not in the training text; got none")
    own = _log_ratio(target, base, offline_a)
    others = np.sort(_log_ratio(population_target, population_base, offline_a))
    return np.asarray(np.searchsorted(others, own - math.log(gamma), side="left") / len(others))


def ez(target: Traces, base: Traces, *, floor: float = 1e-3) -> Float64:
    """Where the model errs, rises over falls against the public model: log((P + floor) / (N + floor)).

    P and N are the sums of positive and of negative l_t - r_t over positions whose token is not the most likely one.
    A record with fewer than two such positions is known by heart: it ranks above all others, by its sum of l_t - r_t
    (the published code gives it 0, the lowest).

    Args:
        target: Under the model in question.
        base: The same records under the public model.
        floor: Nats, so that no fall is no division by zero.

    Returns:
        (N,) scores; from `ABOVE_ALL` on for records known by heart.

    Raises:
        InputError: If the two are not of the same records, or a log-probability is not finite.

    Source: EZ-MIA, arXiv:2601.12104; own implementation of the formula.
    """
    positive(floor=floor)
    scores = []
    for gain, trace in zip(_gains(target, base), target, strict=True):
        at_errors = gain[~trace.hits]
        if len(at_errors) < 2:
            scores.append(ABOVE_ALL + gain.sum())
        else:
            rises, falls = at_errors[at_errors > 0].sum(), -at_errors[at_errors < 0].sum()
            scores.append(math.log((rises + floor) / (falls + floor)))
    return np.array(scores, dtype=np.float64)


def ngram_coverage(
    records: Sequence[Sequence[int]], generations: Sequence[Sequence[Sequence[int]]], *, n: int = 3
) -> Float64:
    """Share of a record's n-grams that occur in text sampled from the model: needs no probabilities at all.

    >>> ngram_coverage([[1, 2, 3, 4]], [[[9, 1, 2, 3], [2, 3, 5]]], n=3).tolist()
    [0.5]

    Args:
        records: Tokens of each record; if the model was prompted with the start of a record, those after it.
        generations: For each record the samples it is compared with; one list may serve all: ``[samples] * N``.
        n: Tokens of an n-gram; a shorter record is one n-gram.

    Returns:
        (N,) shares of the n-grams, counted as often as they stand in the record.

    Raises:
        InputError: If the counts differ or a record is empty.

    Source: Hallinan et al. 2025, arXiv:2508.09603.
    """
    positive_int(n=n)
    if len(records) != len(generations) or any(not len(record) for record in records):
        raise InputError(
            f"ngram_coverage needs tokens and generations for each record, got {len(records)} and {len(generations)}"
        )
    pools: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    scores = []
    for record, samples in zip(records, generations, strict=True):
        size = min(n, len(record))
        key = (id(samples), size)
        if key not in pools:
            pools[key] = {gram for sample in samples for gram in _ngrams(sample, size)}
        grams = _ngrams(record, size)
        scores.append(sum(gram in pools[key] for gram in grams) / len(grams))
    return np.array(scores, dtype=np.float64)


def has_moments(traces: Traces) -> bool:
    """Whether means and deviations are known: not where an API gives the likeliest tokens only."""
    return all(bool(np.isfinite(t.means).all()) and bool(np.isfinite(t.deviations).all()) for t in traces)


def by_person(scores: Any, persons: Sequence[Hashable]) -> tuple[Float64, list[Hashable]]:
    """One score a person: the mean over the person's records.

    >>> by_person([1.0, 5.0, 3.0], ["ann", "bob", "ann"])
    (array([2., 5.]), ['ann', 'bob'])

    Args:
        scores: (N,) of records.
        persons: Whose record each is.

    Returns:
        (P,) means and the persons, in order of first appearance.

    Raises:
        InputError: If the counts differ or a score is not a number.
    """
    values, members = _numbers(scores), _numbered(persons)
    if len(values) != len(members):
        raise InputError(f"by_person needs one person a score, got {len(values)} scores and {len(members)} persons")
    sums, counts = np.bincount(members, weights=values), np.bincount(members)
    return sums / counts, list(dict.fromkeys(persons))


def _log_probs(traces: Traces, which: str) -> list[Float64]:
    parts = [trace.log_probs.astype(np.float64) for trace in traces]
    broken = sum(not bool(np.isfinite(part).all()) for part in parts)
    if broken:
        raise InputError(
            f"{broken} of {len(parts)} {which} traces have a log-probability that is not finite; the model is broken"
            " or its API returns the likeliest tokens only, without the token's own"
        )
    return parts


def _gains(target: Traces, base: Traces) -> list[Float64]:
    """l_t - r_t of each record."""
    _same_count(target, base, "reference")
    pairs = list(zip(_log_probs(target, "target"), _log_probs(base, "reference"), strict=True))
    differing = sum(len(own) != len(other) for own, other in pairs)
    if differing:
        raise InputError(
            f"{differing} of {len(pairs)} records differ in tokens between model and reference; both need one tokenizer"
        )
    return [own - other for own, other in pairs]


def _same_count(target: Traces, other: Traces, what: str) -> None:
    if len(target) != len(other):
        raise InputError(f"target and {what} must be of the same records, got {len(target)} and {len(other)}")


def _lowest_mean(values: Float64, share: float) -> float:
    in_range(0.0, 1.0, share=positive(share=share))
    count = max(1, math.floor(len(values) * share + 1e-9))  # 100 * .29 is 28.999999999999996
    return float(np.partition(values, count - 1)[:count].mean())


def _log_ratio(target: Traces, base: Traces, offline_a: float) -> Float64:
    """Log of p(x) over RMIA's estimate of its mean over models."""
    pairs = zip(_gains(target, base), _log_probs(target, "target"), strict=True)
    own, other = np.array([(part.mean(), (part - gain).mean()) for gain, part in pairs]).reshape(-1, 2).T
    if offline_a == 1.0:
        return np.asarray(own - other)
    return np.asarray(own - np.log(((1.0 + offline_a) * np.exp(other) + 1.0 - offline_a) / 2.0))


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _numbers(scores: Any) -> Float64:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or bool(np.isnan(values).any()):
        raise InputError(f"scores must be one row of numbers, got shape {values.shape} or nan")
    return values


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
