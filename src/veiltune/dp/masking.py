"""Labels without loss: on the tokens of personal data, and on one in k tokens of every passage (goldfish).

Both are functions of a row alone, so they change nothing about a claim of privacy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from veiltune._validate import positive_int
from veiltune.errors import InputError

NO_LOSS = -100
_DIGEST = 8  # bytes


def goldfish(
    input_ids: Sequence[int], labels: Sequence[int], *, one_in: int, context: int = 13, key: bytes = b""
) -> list[int]:
    """Takes the loss from one in so many tokens; which ones, the tokens before them decide.

    A passage that occurs twice loses the same tokens both times, so that no copy teaches what another one withholds:
    reciting it, the model has to guess at each gap.

    >>> ids = [7, 8, 9] * 4
    >>> goldfish(ids, ids, one_in=1, context=3) == [7, 8, 9] + [-100] * 9
    True

    Guarantee:
        None. It makes long verbatim recitation unlikely; membership shows nearly as before, and a value of fewer
        tokens than `one_in` may keep all its loss.

    Args:
        input_ids: T token ids.
        labels: T, -100 where there is no loss anyway.
        one_in: k: the share 1 / k of the tokens loses its loss; 1: all of them but the first `context`.
        context: Tokens before one that decide. The first `context` tokens of a row have none and keep their loss.
        key: Decides too; the same key throughout a run.

    Returns:
        New labels.

    Raises:
        InputError: If a number is below 1.

    Source: Hans et al. 2024, arXiv:2406.10209, with a keyed cryptographic hash in place of its table.
    """
    positive_int(one_in=one_in)
    positive_int(context=context)
    raw = np.asarray(input_ids, dtype="<i4").tobytes()
    kept = list(labels)
    for place in range(context, len(kept)):
        before = raw[4 * (place - context) : 4 * place]
        number = int.from_bytes(hashlib.blake2b(before, key=key, digest_size=_DIGEST).digest(), "little")
        if number % one_in == 0:
            kept[place] = NO_LOSS
    return kept


def without_spans(
    labels: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """Takes the loss from every token that shares a character with a span.

    >>> without_spans([5, 6, 7], [(0, 3), (3, 8), (8, 9)], [(4, 8)])
    [5, -100, 7]

    Args:
        labels: T.
        offsets: T pairs of characters, first and one past the last; (0, 0) for a token without text.
        spans: Pairs of characters, likewise.

    Returns:
        New labels.

    Raises:
        InputError: If labels and offsets differ in length.
    """
    if len(labels) != len(offsets):
        raise InputError(f"offsets must be one a label, got {len(offsets)} for {len(labels)} labels")
    return [
        NO_LOSS if any(start < stop and end > begin for begin, stop in spans) and start < end else label
        for label, (start, end) in zip(labels, offsets, strict=True)
    ]
