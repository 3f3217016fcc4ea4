"""The ledger counts each release once, whatever is retried or killed, and holds nothing of the text."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veiltune.errors import InputError
from veiltune.privatize.release import LedgerTotals, ReleaseLedger, release_key

SECRET = bytes(range(32))
calls = st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 3)), max_size=30)
WRITER = """
import itertools, sqlite3, sys
from veiltune.privatize.release import ReleaseLedger
ledger = ReleaseLedger(sqlite3.connect(sys.argv[1]))
for release in itertools.count():
    ledger.record_many([bytes([i]) for i in range(100)], num_tokens=[7] * 100, release=release)
    print(release, flush=True)
"""


@pytest.fixture
def ledger() -> ReleaseLedger:
    return ReleaseLedger(sqlite3.connect(":memory:"))


@given(calls=calls)
def test_totals_equal_the_slow_twin(calls: list[tuple[bytes, int]]) -> None:
    ledger, seen = ReleaseLedger(sqlite3.connect(":memory:")), set()
    for key, release in calls:
        assert ledger.record(key, num_tokens=len(key) + 4, release=release) is ((key, release) not in seen)
        seen.add((key, release))
    per_key = {key: sum(k == key for k, _ in seen) for key, _ in seen}
    assert ledger.totals() == LedgerTotals(len(per_key), len(seen), max(per_key.values(), default=0), 5 * len(seen))
    assert all(ledger.num_releases(key) == per_key.get(key, 0) for key in (b"a", b"b", b"c"))


def test_many_at_once_count_like_one_by_one(ledger: ReleaseLedger) -> None:
    assert ledger.record_many([b"a", b"b", b"a"], num_tokens=[3, 4, 3], release=0) == 2
    assert ledger.record_many([b"a", b"c"], num_tokens=[3, 5], release=0) == 1
    assert ledger.record_many([], num_tokens=[], release=0) == 0
    assert ledger.totals() == LedgerTotals(examples=3, releases=3, max_releases_per_example=1, tokens=12)


def test_a_refused_call_counts_nothing(ledger: ReleaseLedger) -> None:
    with pytest.raises(InputError, match="num_tokens must be a whole number of at least 1, got 0"):
        ledger.record_many([b"a", b"b"], num_tokens=[3, 0], release=0)
    with pytest.raises(InputError, match="release must be a number from 0, got -1"):
        ledger.record(b"a", num_tokens=3, release=-1)
    with pytest.raises(ValueError, match="zip"):
        ledger.record_many([b"a", b"b"], num_tokens=[3], release=0)
    assert ledger.totals() == LedgerTotals(0, 0, 0, 0)


def test_the_count_survives_reopening(tmp_path: Path) -> None:
    for expected in (True, False):
        connection = sqlite3.connect(tmp_path / "ledger.sqlite")
        assert ReleaseLedger(connection).record(b"a", num_tokens=3, release=0) is expected
        connection.close()


def test_a_killed_writer_leaves_whole_calls(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        confirmed = [int(writer.stdout.readline()) for _ in range(5)][-1]
        writer.send_signal(signal.SIGKILL)
        confirmed = max([confirmed, *map(int, writer.stdout.read().split())])
        writer.stdout.close()
        writer.wait()
        connection = sqlite3.connect(path)
        totals = ReleaseLedger(connection).totals()
        connection.close()
        assert totals.releases == 100 * totals.max_releases_per_example  # no call is half there
        assert totals.max_releases_per_example >= confirmed + 1  # what was confirmed is there


def test_keys_tell_equality_under_one_secret_and_nothing_else() -> None:
    texts = [[], [1], [1, 2], [12], [2, 1], [256], [1, 0], [0, 1], [65536], [30521] * 50]
    keys = [release_key(SECRET, ids) for ids in texts]
    assert len(set(keys)) == len(texts) and {len(key) for key in keys} == {32}
    assert keys == [release_key(SECRET, ids) for ids in texts]
    assert not set(keys) & {release_key(bytes(32), ids) for ids in texts}
    with pytest.raises(InputError, match="secret must have at least 16 bytes, got 3"):
        release_key(b"abc", [1])


def test_the_file_holds_no_token_ids(tmp_path: Path) -> None:
    ids = [0x5EC2E7A1, 0x7A3B9C5D, 0x1F2E3D4C]  # larger than a real vocabulary, so that no other bytes look like them
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    ReleaseLedger(connection).record(release_key(SECRET, ids), num_tokens=len(ids), release=0)
    connection.close()
    content = (tmp_path / "ledger.sqlite").read_bytes()
    forms = [form for token in ids for form in (token.to_bytes(4, "little"), token.to_bytes(4, "big"), b"%d" % token)]
    assert not any(form in content for form in forms)
    assert release_key(SECRET, ids) in content  # the search would have found it
    assert SECRET not in content
