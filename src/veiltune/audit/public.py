"""The public text that attackers train on: any table or plain text that the vendor could have too."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from veiltune.data.tables import read_table
from veiltune.errors import DataError

LEAST_TOKENS = 2_000


@dataclass(frozen=True)
class PublicText:
    """Public texts as token sequences.

    Attributes:
        source: In the user's words.
        digest: SHA-256 of the texts.
        token_ids: One sequence a text.
    """

    source: str
    digest: str
    token_ids: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return sum(map(len, self.token_ids))


def read_public(
    source: str,
    encode: Callable[[Sequence[str]], list[list[int]]],
    *,
    text_column: str,
    private: Sequence[str],
    max_tokens: int,
    seed: int,
) -> PublicText:
    """Reads and encodes public text.

    Args:
        source: A `.txt` file with a text a line, or a table as for `veiltune tune`.
        encode: Texts to token ids.
        text_column: Of a table.
        private: The texts of the run, none of which may be among the public ones: that would be cheating.
        max_tokens: Where to stop; texts are taken in random order.
        seed: Of that order.

    Raises:
        DataError: If it cannot be read, has too few tokens, or contains private texts.
    """
    texts = _read(source, text_column)
    secret = {_folded(text) for text in private}
    shared = sum(_folded(text) in secret for text in texts)
    if shared:
        raise DataError(
            f"{source} has {shared} texts that the run released; an attacker who trains on them proves nothing:"
            " remove them"
        )
    order = random.Random(seed).sample(texts, len(texts))
    chosen, total = [], 0
    for ids in encode(order):
        if total >= max_tokens:
            break
        chosen.append(ids)
        total += len(ids)
    if total < LEAST_TOKENS:
        raise DataError(f"{source} has {total} tokens; learned attackers need at least {LEAST_TOKENS:,} of public text")
    digest = hashlib.sha256("\0".join(order).encode()).hexdigest()
    return PublicText(Path(source).name, digest, chosen)


def _read(source: str, text_column: str) -> list[str]:
    if Path(source).is_dir():
        raise DataError(f"{source} is a folder; name a .txt file with a text a line, or a table")
    if not source.endswith(".txt"):
        return read_table(source, text_column=text_column).texts
    try:
        lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{source} has no text; give public text, a line each")
    return texts


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
