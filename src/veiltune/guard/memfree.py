"""No verbatim passages: a Bloom filter of the training text's n-grams of tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from veiltune._validate import in_range, positive_int
from veiltune.errors import InputError
from veiltune.guard.vocabulary import Int64

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)


class NgramFilter:
    """Remembers every run of n tokens of some texts and knows which tokens would repeat one.

    >>> ngrams = NgramFilter([[1, 2, 3, 4], [7, 8, 9]], n=3, key=b"k")
    >>> ngrams.repeats([5, 1, 2], [3, 4, 9]).tolist(), ngrams.repeats([2], [3]).tolist()
    ([True, False, False], [False])

    Guarantee:
        A token that would complete an n-gram of the texts is always found (a Bloom filter misses nothing); another is
        taken for one with about the probability `false_positive_rate`. It stops verbatim repetition only: a changed
        word, case or space within every n tokens passes, so it protects no secret on its own.

    Args:
        texts: Lists of token ids, without start and end tokens.
        n: Tokens of a run.
        false_positive_rate: Of one look-up; the filter takes 1.44 log2(1/rate) bits an n-gram.
        key: Of the hash, up to 64 bytes; a secret one keeps others from finding tokens that collide.

    Raises:
        InputError: If a number is out of range, or no text has n tokens.

    Attributes:
        count: N-grams put in, repeated ones counted once for each time.

    Source: MemFree decoding, Ippolito et al. 2022, arXiv:2210.17546; Kirsch and Mitzenmacher 2006 (two hashes).
    """

    def __init__(
        self, texts: Iterable[Sequence[int]], *, n: int = 10, false_positive_rate: float = 1e-4, key: bytes = b""
    ) -> None:
        self.n = positive_int(n=n)
        in_range(1e-12, 0.5, false_positive_rate=false_positive_rate)
        self._key = key
        hashes = [part for ids in texts if len(part := self._all(np.asarray(ids, dtype=np.int64)))]
        self.count = sum(map(len, hashes))
        if not self.count:
            raise InputError(f"no text has {n} tokens; give longer texts or a smaller n")
        self._size = max(64, math.ceil(-self.count * math.log(false_positive_rate) / math.log(2) ** 2))
        self._rounds = np.arange(max(1, round(self._size / self.count * math.log(2))), dtype=np.uint64)[:, None]
        self._bits = np.zeros(-(-self._size // 8), dtype=np.uint8)
        for part in hashes:
            places = self._places(part).ravel()
            np.bitwise_or.at(self._bits, places >> np.uint64(3), _bit(places))

    @property
    def nbytes(self) -> int:
        """Bytes of the filter."""
        return self._bits.nbytes

    def repeats(self, before: Sequence[int], candidates: Sequence[int] | Int64) -> NDArray[np.bool_]:
        """Which candidates would complete an n-gram.

        Args:
            before: The tokens so far; the last n - 1 count. With fewer nothing repeats.
            candidates: Token ids.
        """
        ids = np.asarray(candidates, dtype=np.int64)
        if len(before) < self.n - 1:
            return np.zeros(len(ids), dtype=np.bool_)
        places = self._places(_mixed(self._context(before[len(before) - self.n + 1 :]), ids))
        hit: NDArray[np.bool_] = (self._bits[places >> np.uint64(3)] & _bit(places) != 0).all(axis=0)
        return hit

    def _all(self, ids: Int64) -> NDArray[np.uint64]:
        contexts = [self._context(ids[at : at + self.n - 1].tolist()) for at in range(len(ids) - self.n + 1)]
        return _mixed(np.array(contexts, dtype=np.uint64), ids[self.n - 1 :]) if contexts else np.zeros(0, np.uint64)

    def _context(self, ids: Sequence[int]) -> np.uint64:
        data = np.asarray(ids, dtype="<i8").tobytes()
        return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "little"))

    def _places(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """(rounds, N) places in the filter."""
        return (hashes + self._rounds * (_scrambled(hashes) | np.uint64(1))) % np.uint64(self._size)


def _mixed(context: NDArray[np.uint64] | np.uint64, ids: Int64) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        return _scrambled(np.asarray(context ^ ((ids.astype(np.uint64) + np.uint64(1)) * _STEP)))


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a permutation of 64-bit numbers."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _MIX[0]
        values = (values ^ (values >> np.uint64(27))) * _MIX[1]
        return values ^ (values >> np.uint64(31))


def _bit(places: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return (np.uint64(1) << (places & np.uint64(7))).astype(np.uint8)
