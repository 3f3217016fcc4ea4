"""When two texts are near-duplicates: the share of runs of five words that they have in common, and its estimate.

Source: Broder 1997 (shingles, minima of permutations); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
chapter 3 (bands); datasketch, whose permutations are used.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veiltune._validate import in_range
from veiltune.data.legible import legible
from veiltune.data.optional import need

UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]

SHINGLE = 5
PERMUTATIONS = 128
_LETTER = r"[^\W_\u3400-\u9fff]"
_WORDS = re.compile(rf"[\u3400-\u9fff]|{_LETTER}+")
_FOUND = 0.99


def plain(text: str) -> list[str]:
    r"""Words of a text casefolded and in NFKC, a Chinese character being a word; the rest does not count.

    A text without any letter or digit is what stands between its blanks.

    >>> plain("Hello,  WORLD!  你好"), plain("hello world") == plain("Hel\u200blo... World?")
    (['hello', 'world', '你', '好'], True)
    >>> plain("+++ :-)")
    ['+++', ':-)']
    """
    seen, _ = legible(text)
    if seen.isascii():
        seen = seen.lower()
        return _WORDS.findall(seen) or seen.split()
    seen = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold())
    return _marked_words().findall(seen) or seen.split()


@functools.cache
def _marked_words() -> re.Pattern[str]:
    """`_WORDS`, with the marks that belong to a letter: Thai and Indic vowels, accents without a composed form."""
    marks = "".join(map(re.escape, filter(_is_mark, map(chr, range(0x300, 0x20000)))))
    return re.compile(rf"[\u3400-\u9fff]|{_LETTER}++(?:(?![\0-\u02ff])[{marks}]++{_LETTER}*+)*+")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def exact_hash(text: str | list[str]) -> bytes:
    """16 bytes that are the same for the same words, of a text or as `plain` gives them."""
    words = plain(text) if isinstance(text, str) else text
    return hashlib.blake2b(" ".join(words).encode(errors="surrogatepass"), digest_size=16).digest()


def shingles(words: list[str]) -> set[str]:
    """All runs of five words; a shorter text is one run.

    >>> sorted(shingles("a b c d e f".split())), shingles(["a", "b"])
    (['a b c d e', 'b c d e f'], {'a b'})
    """
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def signature(words: list[str]) -> UInt32:
    """The minimum of each of 128 permutations of the shingles' hashes, shape (128,).

    Two texts agree in each place with the probability of their Jaccard index.

    Raises:
        InputError: If datasketch is not installed.
    """
    sketch = _empty_sketch().copy()
    sketch.update_batch([shingle.encode(errors="surrogatepass") for shingle in shingles(words)])
    values: UInt32 = sketch.hashvalues.astype(np.uint32)
    return values


@functools.cache
def _empty_sketch() -> Any:
    return need("datasketch", "near-duplicates").MinHash(
        num_perm=PERMUTATIONS, seed=1, hashfunc=_hash32, scheme="affine32"
    )


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def band_keys(values: UInt32, rows: int) -> UInt64:
    """A hash for each band of so many places of a signature, shape (128 // rows,); equal bands have equal hashes.

    >>> band_keys(np.arange(128, dtype=np.uint32), 6).shape
    (21,)
    """
    bands = np.ascontiguousarray(values[: PERMUTATIONS // rows * rows]).reshape(-1, rows)
    return np.array([_hash64(number, band.tobytes()) for number, band in enumerate(bands)], dtype=np.uint64)


def _hash64(number: int, band: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(band, digest_size=8, salt=number.to_bytes(2, "little")).digest(), "little")


def rows_for(threshold: float) -> int:
    """The longest bands of which a pair at the threshold still shares one with 99 %.

    Longer bands make fewer pairs that are compared in vain.

    >>> rows_for(0.8), rows_for(0.5)
    (6, 3)

    Raises:
        InputError: If the threshold is not in [0.3, 1].
    """
    in_range(0.3, 1.0, threshold=threshold)
    lengths = range(1, 17)
    return max(r for r in lengths if r == 1 or 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= _FOUND)
