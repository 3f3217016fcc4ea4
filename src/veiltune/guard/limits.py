"""How much a key may ask: so many questions a second, and so many in all."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from veiltune._validate import positive, positive_int
from veiltune.errors import InputError
from veiltune.runs import storage_errors

_TABLE = "CREATE TABLE IF NOT EXISTS spent (name TEXT PRIMARY KEY, queries INTEGER NOT NULL) WITHOUT ROWID"
_CHARGE = (
    "INSERT INTO spent (name, queries) SELECT :name, :cost WHERE :cost <= :budget"
    " ON CONFLICT (name) DO UPDATE SET queries = queries + :cost WHERE queries + :cost <= :budget"
)


class RateLimit:
    """A bucket of tokens for each name: it fills at a rate and holds a burst.

    >>> now = [0.0]
    >>> limit = RateLimit(rate=2.0, burst=3, clock=lambda: now[0])
    >>> [limit.wait("a") for _ in range(4)], limit.wait("b")
    ([0.0, 0.0, 0.0, 0.5], 0.0)
    >>> now[0] = 0.5
    >>> limit.wait("a"), limit.wait("a")
    (0.0, 0.5)

    Args:
        rate: Questions a second, positive.
        burst: Questions at once, at least 1.
        clock: Seconds, never going back.
    """

    def __init__(self, *, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = positive(rate=rate), positive_int(burst=burst), clock
        self._held: dict[str, tuple[float, float]] = {}

    def wait(self, name: str) -> float:
        """Takes one, and returns 0; or takes none and returns after how many seconds there will be one."""
        now = self._clock()
        held, since = self._held.get(name, (float(self._burst), now))
        held = min(self._burst, held + (now - since) * self._rate)
        taken = held >= 1.0
        self._held[name] = (held - taken, now)
        return 0.0 if taken else (1.0 - held) / self._rate


class Budget:
    """Counts queries of each name in a file and never lets one exceed the budget.

    Guarantee:
        A charge is on disk before `charge` returns True, so what was answered is counted even if the process is killed
        or the power fails right after; a charge without an answer can be lost by its owner, never gained. Exact for
        all threads and processes that share the file.

    Args:
        path: SQLite file; made with permissions for its owner only.
        budget: Queries for each name, in all.

    Raises:
        InputError: If the file is something else than such a ledger.
        StorageError: If the file cannot be written.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self._path, self.budget, self._lock = path, positive_int(budget=budget), threading.Lock()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = FULL")
                self._database.execute(_TABLE)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                raise InputError(f"{path} is no ledger of budgets; name another file, or remove it") from None

    def charge(self, name: str, cost: int) -> bool:
        """Takes `cost` queries off the budget of a name, or nothing and returns False if it has fewer left.

        Raises:
            StorageError: If the disk is full; then nothing was charged.
        """
        values = {"name": name, "cost": positive_int(cost=cost), "budget": self.budget}
        with self._lock, storage_errors(self._path):
            return self._database.execute(_CHARGE, values).rowcount == 1

    def spent(self, name: str) -> int:
        """Queries charged so far."""
        with self._lock, storage_errors(self._path):
            row = self._database.execute("SELECT queries FROM spent WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()
