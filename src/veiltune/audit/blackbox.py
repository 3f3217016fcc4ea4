"""The only way in which the leakage audit sees a model: next-token log-probabilities after a prefix.

A model is a `BlackBox`: one method is enough, `next_token_log_probs`. Everything else (whole records, decoding, many
endings of one prefix) is written with that method, and overridden where a model can do it faster. The same tests hold
all of them to the same numbers.

Three values have a meaning of their own in a vector:

=========  =====================================================================================================
value      means
=========  =====================================================================================================
-inf       the model (or a guard before it) gives the token probability zero
nan        the API does not tell; only where `full_vectors` is False, and never for the `top_tokens` most likely
otherwise  log-probability in nats, at most 0
=========  =====================================================================================================
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from veiltune._validate import positive_int
from veiltune.dp.encoding import prompt_ids
from veiltune.errors import InputError, VeiltuneError

Vectors = NDArray[np.float32]
Float64 = NDArray[np.float64]
Tokens = Sequence[int]

MASS_TOLERANCE = 0.01  # nats by which the probabilities of a vector may miss a sum of 1: rounding to 3 decimals passes
_ABOVE_ZERO = 1e-4  # a log-probability may be so far above 0 by rounding; it is taken as 0
_VALUES_AT_ONCE = 2**23  # log-probabilities held at once (32 MiB in float32)


class BlackBox(abc.ABC):
    """A language model that answers with next-token log-probabilities and nothing else.

    A box with one method, for a model that always gives the next token of a circle of five:

    >>> class Circle(BlackBox):
    ...     name, vocabulary, context, digest = "circle", 5, 100, "0" * 64
    ...     def next_token_log_probs(self, prefixes):
    ...         return np.log(np.full((len(prefixes), 5), 0.1) + 0.5 * np.eye(5)[[p[-1] - 4 for p in prefixes]])
    >>> box = Circle()
    >>> [vectors.shape for vectors in box.along([[0, 1, 2], [3, 4]])]
    [(2, 5), (1, 5)]
    >>> box.suffix_log_probs([0], [[1, 2], [2, 1]]).round(2).tolist()
    [-1.02, -4.61]

    Attributes:
        name: For people.
        vocabulary: V; token ids are 0..V-1.
        context: The longest prefix, in tokens.
        digest: Identifies the model, so that a resumed audit knows it again.
        full_vectors: Whether every entry of a vector is told. If not, entries that are not told are nan.
        top_tokens: Without full vectors: how many of the most likely tokens each vector is sure to hold.
        guarded_by: What stands before the model, in words, where it is known.
        texts_a_part: Texts that an audit asks for between two savings; few where asking is slow.
    """

    name: str
    vocabulary: int
    context: int
    digest: str
    full_vectors: bool = True
    top_tokens: int = 0
    guarded_by: str = ""
    texts_a_part: int = 10
    _refusal: type[VeiltuneError] = InputError  # what an unusable vector raises

    @abc.abstractmethod
    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        """The distribution of the token that follows each prefix.

        Args:
            prefixes: N lists of 1 to `context` token ids.

        Returns:
            (N, V) float32 log-probabilities in nats; -inf and nan as the module's docstring says.

        Raises:
            InputError: If a prefix is empty, too long or has an id outside the vocabulary.
        """

    def parts(self, sequences: Sequence[Tokens], *, start: int = 0) -> Iterator[tuple[int, int, Vectors]]:
        """The vectors at the positions of each sequence, in order, a bounded number at once.

        Args:
            sequences: Lists of 2 to `context` + 1 token ids.
            start: The first position wanted. Position t predicts token t + 1.

        Yields:
            (number of the sequence, first position, (n, V) vectors at the n positions from there on).

        Raises:
            InputError: If a sequence is too short or too long, or has an id outside the vocabulary.
        """
        for number, tokens in enumerate(self._accepted(sequences, least=start + 2, most=self.context + 1)):
            for first, stop in spans(start, len(tokens) - 1, self._rows_at_once):
                prefixes = [tokens[: position + 1] for position in range(first, stop)]
                yield number, first, self._ask(prefixes)

    def along(self, sequences: Sequence[Tokens]) -> Iterator[Vectors]:
        """The (T - 1, V) vectors of each sequence of T tokens, in order: position t predicts token t + 1.

        Holds one sequence's vectors at a time; `parts` holds less for long ones.

        Raises:
            InputError: As `parts`.
        """
        held: list[Vectors] = []
        for number, first, vectors in self.parts(sequences):
            held.append(vectors)
            if first + len(vectors) == len(sequences[number]) - 1:
                yield np.concatenate(held) if len(held) > 1 else held[0]
                held = []

    def suffix_log_probs(self, prefix: Tokens, suffixes: Sequence[Tokens]) -> Float64:
        """The log-probability of each suffix after one common prefix; for ranking a secret among candidates.

        Beginnings that suffixes share are asked for once.

        Args:
            prefix: At least one token id.
            suffixes: n lists of at least one token id.

        Returns:
            (n,) nats: the sum over the suffix's tokens. Tokens that a box does not tell, or gives probability zero,
            count as `told` says: then the sum is an upper limit.

        Raises:
            InputError: If the prefix or a suffix is empty, or both together exceed the context.
        """
        head, tails = self._suffixed(prefix, suffixes)
        wanted: dict[tuple[int, ...], dict[int, float]] = {}
        for tail in tails:
            for length, token in enumerate(tail):
                wanted.setdefault(tuple(tail[:length]), {})[token] = 0.0
        beginnings = list(wanted)
        for first, stop in spans(0, len(beginnings), self._rows_at_once):
            vectors = self._ask([[*head, *beginning] for beginning in beginnings[first:stop]])
            for row, beginning in enumerate(beginnings[first:stop]):
                tokens = np.fromiter(wanted[beginning], dtype=np.int64)
                values, _ = told(np.broadcast_to(vectors[row], (len(tokens), self.vocabulary)), tokens)
                wanted[beginning] = dict(zip(tokens.tolist(), values.tolist(), strict=True))
        return np.array([sum(wanted[tuple(tail[:i])][token] for i, token in enumerate(tail)) for tail in tails])

    def decoder(self, prefixes: Sequence[Tokens]) -> Decoder:
        """Begins step-by-step decoding of a batch of prefixes, each of 1 to `context` token ids.

        Raises:
            InputError: As `next_token_log_probs`.
        """
        return _AskingDecoder(self, self._accepted(prefixes, least=1, most=self.context))

    def close(self) -> None:  # noqa: B027
        """Gives back what the box holds (connections); nothing by default."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _rows_at_once(self) -> int:
        return max(1, _VALUES_AT_ONCE // self.vocabulary)

    def _ask(self, prefixes: Sequence[Tokens]) -> Vectors:
        return self._checked(self.next_token_log_probs(prefixes), len(prefixes))

    def _accepted(self, sequences: Sequence[Tokens], *, least: int, most: int) -> list[list[int]]:
        """The sequences as lists of plain integers, or the refusal."""
        accepted = []
        for number, tokens in enumerate(sequences, start=1):
            ids = np.asarray(tokens)
            if ids.ndim != 1 or not least <= len(ids) <= most:
                raise InputError(
                    f"sequence {number} must have {least} to {most} tokens for the model {self.name},"
                    f" got {ids.size}; begin a text with its start token and cut it to the model's context"
                )
            if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.vocabulary:
                raise InputError(
                    f"sequence {number} has token ids outside 0..{self.vocabulary - 1}: the tokenizer is not that of"
                    f" the model {self.name}; use the one that it was trained with"
                )
            accepted.append(ids.tolist())
        return accepted

    def _suffixed(self, prefix: Tokens, suffixes: Sequence[Tokens]) -> tuple[list[int], list[list[int]]]:
        (head,) = self._accepted([prefix], least=1, most=self.context)
        return head, self._accepted(suffixes, least=1, most=self.context + 1 - len(head))

    def _checked(self, vectors: Any, rows: int) -> Vectors:
        """The answer as (rows, V) float32 with nothing above 0, or the refusal."""
        try:
            values = np.asarray(vectors, dtype=np.float32)
        except (ValueError, TypeError):
            raise self._refusal(f"the model {self.name} must answer with vectors of one length") from None
        if values.shape != (rows, self.vocabulary):
            raise self._refusal(
                f"the model {self.name} must answer with {rows} vectors of {self.vocabulary} log-probabilities,"
                f" got {values.shape}; is its tokenizer another one?"
            )
        total = self._log_mass(values)
        if (total > MASS_TOLERANCE).any() or (self.full_vectors and (total < -MASS_TOLERANCE).any()):
            raise self._refusal(
                f"the probabilities of {self.name} must add up to 1, got {_worst(total):.4g};"
                " it must answer with natural log-probabilities of the whole vocabulary"
            )
        return np.minimum(values, 0.0) if (values > 0.0).any() else values

    def _log_mass(self, values: Vectors) -> Float64:
        """(N,) log of what the told probabilities add up to."""
        known = values if self.full_vectors else np.where(np.isnan(values), -np.inf, values)
        largest = known.max(axis=1)
        if np.isnan(largest).any():
            raise self._refusal(
                f"a log-probability of {self.name} is not a number; a model whose training diverged answers so"
            )
        if (largest > _ABOVE_ZERO).any():
            raise self._refusal(
                f"log-probabilities of {self.name} must be at most 0, got {largest.max():.4g};"
                " it must answer with log-probabilities, not probabilities or logits"
            )
        if np.isneginf(largest).any():
            raise self._refusal(f"{self.name} gives every token probability zero; a guard must renormalise its vectors")
        total: Float64 = largest + np.log(np.exp(known - largest[:, None]).sum(axis=1, dtype=np.float64))
        return total


class Decoder(abc.ABC):
    """A batch of texts that grow by one token a step.

    Attributes:
        log_probs: (N, V) distribution of each text's next token, as `BlackBox.next_token_log_probs` gives it.
    """

    log_probs: Vectors

    @abc.abstractmethod
    def append(self, tokens: Tokens) -> None:
        """Adds one token id to each of the N texts and moves `log_probs` on.

        Raises:
            InputError: If there is not one token a text, one is outside the vocabulary, or a text fills the context.
        """

    @abc.abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these texts only, in this order; a text named twice is doubled."""


class _AskingDecoder(Decoder):
    """Asks for the whole prefix at each step: what any box can do."""

    def __init__(self, box: BlackBox, prefixes: list[list[int]]) -> None:
        self._box, self._prefixes = box, prefixes
        self.log_probs = box._ask(prefixes)

    def append(self, tokens: Tokens) -> None:
        ids = one_each(tokens, self.log_probs)
        grown = [[*prefix, token] for prefix, token in zip(self._prefixes, ids, strict=True)]
        self._prefixes = self._box._accepted(grown, least=1, most=self._box.context)
        self.log_probs = self._box._ask(self._prefixes)

    def select(self, rows: Sequence[int]) -> None:
        self._prefixes = [list(self._prefixes[row]) for row in rows]
        self.log_probs = self.log_probs[np.asarray(rows, dtype=np.int64)]


def told(vectors: Vectors, tokens: Any) -> tuple[Float64, NDArray[np.bool_]]:
    """The log-probability of one token a vector, and whether it is exact.

    >>> values, exact = told(np.log(np.array([[0.6, 0.3, np.nan, np.nan]], dtype=np.float32)), [3])
    >>> np.exp(values).round(3).tolist(), exact.tolist()
    ([0.1], [False])

    Args:
        vectors: (n, V).
        tokens: n token ids.

    Returns:
        (n,) nats, all finite, and (n,) truth values. Where a box does not tell the token, or says zero, the least of
        two upper limits stands: the smallest log-probability above zero that it tells, and the logarithm of the mass
        that the told ones leave (at least 1e-7).
    """
    ids = np.asarray(tokens, dtype=np.int64)
    values = vectors[np.arange(len(ids)), ids].astype(np.float64)
    exact = np.isfinite(values)
    if not exact.all():
        rest = vectors[~exact].astype(np.float64)
        left = np.maximum(1.0 - np.nansum(np.exp(rest), axis=1), np.finfo(np.float32).eps)
        smallest = np.where(np.isfinite(rest), rest, np.inf).min(axis=1)
        values[~exact] = np.minimum(smallest, np.log(left))
    return values, exact


def start_ids(tokenizer: Any) -> list[int]:
    """The token before a text: what the tokenizer itself begins with, or else its end-of-text token.

    GPT-2 was trained on texts with an end-of-text token between them, so that one stands before each text but the
    first.

    Raises:
        InputError: If the tokenizer has neither.
    """
    own = prompt_ids(tokenizer, [""])[0]
    eos = getattr(tokenizer, "eos_token_id", None)
    if own:
        return own
    if eos is None:
        raise InputError("the tokenizer has neither a start nor an end-of-text token; use that of a causal model")
    return [int(eos)]


def record_ids(tokenizer: Any, texts: Sequence[str], *, end: bool = False) -> list[list[int]]:
    """Texts as the audit shows them to a model: the start token (`start_ids`), the text, and eos if `end`.

    The form of a training example without a prompt (`dp.encoding`), but for the start token where the tokenizer begins
    texts with nothing: with it, the first real token is scored too.

    Args:
        tokenizer: Of the model.
        texts: One a record.
        end: Whether the end-of-text token is scored as well; the tokenizer must have one.
    """
    start = start_ids(tokenizer)
    own = len(prompt_ids(tokenizer, [""])[0])
    eos = getattr(tokenizer, "eos_token_id", None)
    if end and eos is None:
        raise InputError("the tokenizer has no end-of-text token to score; leave `end` out")
    last = [int(eos)] if end and eos is not None else []
    # an empty separator has no tokens
    return [[*start, *ids[own:], *last] for ids in prompt_ids(tokenizer, texts, separator="")]


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive stretches of at most `size`.

    >>> list(spans(1, 6, 2))
    [(1, 3), (3, 5), (5, 6)]
    """
    for first in range(start, stop, positive_int(size=size)):
        yield first, min(first + size, stop)


def one_each(tokens: Tokens, vectors: Vectors) -> list[int]:
    """The tokens as integers, if there is one a vector and each is of the vocabulary."""
    ids = [int(token) for token in tokens]
    if len(ids) != len(vectors) or not all(0 <= token < vectors.shape[1] for token in ids):
        raise InputError(f"append takes {len(vectors)} token ids below {vectors.shape[1]}, one a text, got {len(ids)}")
    return ids


def _worst(total: Float64) -> float:
    return float(np.exp(total[np.abs(total).argmax()]))
