"""The ledger: how often each example was released, by a keyed hash, in SQL that survives a crash."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from veiltune._validate import positive_int
from veiltune.errors import InputError


@dataclass(frozen=True)
class LedgerTotals:
    """What was released in a run.

    Attributes:
        examples: Different texts.
        releases: Over all texts; equal to `examples` if each was released once.
        max_releases_per_example: What a bound on one text must be composed over.
        tokens: Over all releases.
    """

    examples: int
    releases: int
    max_releases_per_example: int
    tokens: int


def release_key(secret: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a text's release: HMAC-SHA256 of its token ids.

    Guarantee:
        Without the secret it tells nothing about the text but whether two are equal. With the secret, texts can be
        guessed and checked: keep the secret where the text is kept.

    Args:
        secret: At least 16 bytes.
        token_ids: Each in [0, 2^32).

    Raises:
        InputError: If the secret is too short.
    """
    if len(secret) < 16:
        raise InputError(f"secret must have at least 16 bytes, got {len(secret)}")
    encoded = b"".join(int(token).to_bytes(4, "little") for token in token_ids)
    return hmac.new(secret, b"release" + encoded, hashlib.sha256).digest()


class ReleaseLedger:
    """Counts releases. An entry is a (key, release number) pair, so counting a retry again changes nothing.

    >>> ledger = ReleaseLedger(sqlite3.connect(":memory:"))
    >>> ledger.record(b"key", num_tokens=9, release=0), ledger.record(b"key", num_tokens=9, release=0)
    (True, False)
    >>> ledger.totals()
    LedgerTotals(examples=1, releases=1, max_releases_per_example=1, tokens=9)

    Guarantee:
        What `record` returned from is on disk: a process killed at any moment leaves either the whole call counted or
        nothing of it. Recorded before sending, the count is never below what left. It holds no text and no token ids;
        the number of tokens of each text it does hold.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._sql = connection
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS releases (key BLOB NOT NULL, release INTEGER NOT NULL,"
                " num_tokens INTEGER NOT NULL, PRIMARY KEY (key, release)) WITHOUT ROWID"
            )

    def close(self) -> None:
        """Ends the connection, so that all is in the one database file."""
        self._sql.close()

    def record(self, key: bytes, *, num_tokens: int, release: int) -> bool:
        """Counts one release; returns whether it is new. Call it before the first byte leaves."""
        return self.record_many([key], num_tokens=[num_tokens], release=release) == 1

    def record_many(self, keys: Sequence[bytes], *, num_tokens: Sequence[int], release: int) -> int:
        """Counts several in one transaction; returns how many are new."""
        if release < 0:
            raise InputError(f"release must be a number from 0, got {release}")
        rows = [(key, release, positive_int(num_tokens=n)) for key, n in zip(keys, num_tokens, strict=True)]
        before = self._sql.total_changes
        with self._sql:
            self._sql.executemany("INSERT INTO releases VALUES (?, ?, ?) ON CONFLICT (key, release) DO NOTHING", rows)
        return self._sql.total_changes - before

    def num_releases(self, key: bytes) -> int:
        """How often one text was released."""
        return int(self._sql.execute("SELECT COUNT(*) FROM releases WHERE key = ?", (key,)).fetchone()[0])

    def totals(self) -> LedgerTotals:
        """Sums over the run."""
        query = (
            "SELECT COUNT(*), COALESCE(MAX(n), 0), COALESCE(SUM(n), 0), COALESCE(SUM(t), 0)"
            " FROM (SELECT COUNT(*) n, SUM(num_tokens) t FROM releases GROUP BY key)"
        )
        examples, largest, releases, tokens = self._sql.execute(query).fetchone()
        return LedgerTotals(examples, releases, largest, tokens)
