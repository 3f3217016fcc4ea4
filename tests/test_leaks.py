"""What the vendor gets to see: never text, token ids or label names; labels by their gradients, as the run says."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from parties import Vendor, open_job, running_vendor
from runs_helper import Stage, make_texts, tune_config, write_csv, write_tables
from veiltune.cli import app
from veiltune.customer.batching import encode_texts
from veiltune.customer.remote import VendorClient
from veiltune.customer.session import tune
from veiltune.data.tables import LabelSet, read_table
from veiltune.errors import ProtocolError
from veiltune.privatize.labels import keep_probability
from veiltune.privatize.release import release_key
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import decode_tensor

CANARY = "kqzj canary 4711"
LABELS = {"calm": "zebra-canary-calm", "loud": "zebra-canary-loud"}


def encodings(text: str, token_ids: list[int]) -> dict[str, bytes]:
    """The byte strings under which a text could be lying about."""
    return {
        "utf-8": text.encode(),
        "utf-16": text.encode("utf-16-le"),
        "int32": b"".join(token.to_bytes(4, "little") for token in token_ids),
        "int64": b"".join(token.to_bytes(8, "little") for token in token_ids),
        "varint": b"".join(varint(token) for token in token_ids),
    }


def varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


class Recorder:
    """A TCP proxy on loopback that keeps every byte of both directions."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")[::2]
        self._streams: list[bytearray] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"

    @property
    def recorded(self) -> list[bytes]:
        return [bytes(stream) for stream in self._streams]

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with self._server, contextlib.suppress(OSError):
            while True:
                customer, _ = self._server.accept()
                vendor = socket.create_connection((self._target[0], int(self._target[1])))
                for source, sink in ((customer, vendor), (vendor, customer)):
                    self._streams.append(bytearray())
                    pump = threading.Thread(target=self._pump, args=(source, sink, self._streams[-1]))
                    self._threads.append(pump)
                    pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with source, contextlib.suppress(OSError):
            while data := source.recv(2**16):
                record += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def stage(tmp_path: Path, tiny_folder: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path, tiny_folder)
    yield stage
    stage.clear()


@pytest.fixture
def recorder(stage: Stage) -> Iterator[Recorder]:
    recorder = Recorder(stage.address)
    yield recorder
    recorder.close()


def sql_values(database: Path) -> list[bytes]:
    """Every value of every row, as bytes."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        values = [value for name in names for row in connection.execute(f"SELECT * FROM {name}") for value in row]
    return [value if isinstance(value, bytes) else str(value).encode() for value in values]


def found(needles: dict[str, bytes], haystacks: dict[str, list[bytes]]) -> set[tuple[str, str]]:
    """(where, encoding) of every needle that is somewhere."""
    return {
        (where, encoding)
        for where, pieces in haystacks.items()
        for encoding, needle in needles.items()
        if any(needle in piece for piece in pieces)
    }


@pytest.mark.timeout(300)  # processes start slowly on a busy machine
def test_a_canary_never_reaches_the_vendor(
    tmp_path: Path, stage: Stage, recorder: Recorder, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The worst case: no noise, labels disclosed, no TLS; tune with either bottom, then predict."""
    needles: dict[str, bytes] = {}
    for name, text in {"text": CANARY, **LABELS}.items():
        inner = encode_texts(tokenizer, [text], max_length=64)[0][1:-1]  # without the special tokens around it
        needles |= {f"{name} as {encoding}": needle for encoding, needle in encodings(text, inner).items()}
    texts, labels = make_texts(24, seed=5)
    texts[0] = texts[23] = CANARY
    for name, part in (("train", slice(0, 16)), ("eval", slice(16, 24))):
        write_csv(tmp_path / f"{name}.csv", texts[part], [LABELS[label] for label in labels[part]])
    vendor = stage.vendor()
    quiet = {"train": {"epochs": 1, "batch_size": 4, "threads": 1}}
    config = tune_config(tmp_path, recorder.address, **quiet)
    unfrozen = tune_config(
        tmp_path, recorder.address, run=str(tmp_path / "unfrozen"), split={"bottom": "full", "cut_layer": 0}, **quiet
    )
    tune(unfrozen)
    assert stage.customer(config).ended() == 0
    predicted = CliRunner().invoke(app, ["predict", config.run, config.data.eval, "-o", str(tmp_path / "out.csv")])
    assert predicted.exit_code == 0
    own = (tmp_path / "out.csv").read_text()
    assert any(label in own for label in LABELS.values())  # the customer's own file does name them
    seen = {
        "wire": recorder.recorded,
        "outputs": [predicted.output.encode(), *(path.read_bytes() for path in tmp_path.glob("process-*"))],
        "state": [path.read_bytes() for path in stage.state.rglob("*") if path.is_file()],
        "rows": sql_values(stage.state / "jobs.sqlite"),
        "public files": [
            (Path(run.run) / name).read_bytes()
            for run in (config, unfrozen)
            for name in ("metrics.jsonl", "summary.json", "privacy.json")
        ],
    }
    assert sum(map(len, seen["wire"])) > 50_000 and len(seen["rows"]) > 100 and len(seen["outputs"]) == 5
    assert found(needles, seen) == set()
    client = VendorClient(recorder.address, credentials=None, plaintext=True)
    with contextlib.closing(client), pytest.raises(ProtocolError, match=CANARY):
        open_job(client, method=CANARY)  # the positive control: a frame in which a customer's words do travel
    planted = {"wire": recorder.recorded, "outputs": [vendor.stderr.read_bytes()]}
    assert found(needles, planted) == {("wire", "text as utf-8"), ("outputs", "text as utf-8")}


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    needles = encodings("ab", [300, 7])
    assert needles["varint"] == b"\xac\x02\x07"
    database = tmp_path / "rows.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE things (words TEXT, raw BLOB)")
        connection.execute("INSERT INTO things VALUES (?, ?)", ("x ab y", b"--\x2c\x01\0\0\x07\0\0\0"))
    assert found(needles, {"rows": sql_values(database)}) == {("rows", "utf-8"), ("rows", "int32")}
    for encoding, needle in needles.items():
        assert found(needles, {"wire": [b"..." + needle + b"..."]}) >= {("wire", encoding)}


class TestLabels:
    """Which labels the output gradients show."""

    @pytest.fixture
    def vendor(self, tmp_path: Path, tiny_folder: Path) -> Iterator[Vendor]:
        with running_vendor(tmp_path / "vendor", tiny_folder) as running:
            yield running

    @pytest.fixture
    def attack(
        self, vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[dict[str, Any]], tuple[int, int]]:
        """`attack(privacy)` tunes and attacks; returns the number of labels that were guessed right, and of guesses."""
        write_tables(tmp_path, train=200, eval=4)
        frames: list[tuple[str, bytes]] = []
        honest = VendorClient.send

        def recording(client: VendorClient, method: str, request: Any) -> Any:
            frames.append((method, request.SerializeToString()))
            return honest(client, method, request)

        monkeypatch.setattr(VendorClient, "send", recording)

        def run(privacy: dict[str, Any]) -> tuple[int, int]:
            frames.clear()
            train = {"epochs": 2, "batch_size": 20, "learning_rate": 1e-3}
            config = tune_config(tmp_path, vendor.address, run=str(tmp_path / "run"), privacy=privacy, train=train)
            tune(config)
            truth = labels_by_row(config, vendor)
            guesses = guess_labels(frames)
            assert guesses.keys() == set(range(len(truth)))
            return sum(guesses[row] == label for row, label in enumerate(truth)), len(truth)

        return run

    def test_disclosed_labels_are_all_recovered(self, attack: Callable[[dict[str, Any]], tuple[int, int]]) -> None:
        assert attack({"labels": "disclosed"}) == (200, 200)

    def test_randomised_labels_are_recovered_as_often_as_they_were_kept(
        self, attack: Callable[[dict[str, Any]], tuple[int, int]]
    ) -> None:
        right, count = attack({"labels": "randomized_response", "label_epsilon": 1.0})
        low, high = binom.interval(0.999, count, keep_probability(2, 1.0))
        assert low <= right <= high
        assert high < count  # the disclosed labels of the test above would be noticed
        low_of_coin, high_of_coin = binom.interval(0.999, count, 0.5)
        assert not low_of_coin <= right <= high_of_coin  # and so would answers that say nothing


def guess_labels(frames: list[tuple[str, bytes]]) -> dict[int, int]:
    """The vendor's attack: the class with the least gradient, for each row of the upload, the same in every epoch."""
    rows: dict[tuple[int, int], list[int]] = {}
    guesses: dict[int, set[int]] = defaultdict(set)
    for method, data in frames:
        if method == "Forward":
            forward = pb.ForwardRequest.FromString(data)
            rows[forward.step, forward.micro_batch] = list(forward.rows.index)
        if method == "Backward":
            backward = pb.BackwardRequest.FromString(data)
            gradients = decode_tensor(backward.output_gradients, expected=(None, None))
            batch = rows[backward.step, backward.micro_batch]
            for row, guess in zip(batch, gradients.argmin(dim=-1).tolist(), strict=True):
                guesses[row].add(guess)
    assert all(len(each) == 1 for each in guesses.values())  # a second epoch shows nothing new
    return {row: each.pop() for row, each in guesses.items()}


def labels_by_row(config: Any, vendor: Vendor) -> list[int]:
    """The true label of each row of the upload, by the customer's own secret."""
    private = Path(config.run) / "private"
    table = read_table(config.data.train, text_column="text", label_column="label")
    assert table.labels is not None
    classes = LabelSet.fit(table.labels).encode(table.labels)
    token_ids = encode_texts(vendor.engine.base.tokenizer, table.texts, max_length=config.data.max_length)
    secret = (private / "secret").read_bytes()
    labels = {release_key(secret, ids): label for ids, label in zip(token_ids, classes, strict=True)}
    with contextlib.closing(sqlite3.connect(private / "ledger.sqlite")) as connection:
        keys = connection.execute("SELECT key FROM outbox WHERE part = 'train' ORDER BY shard, start").fetchall()
    return [labels[key] for (key,) in keys]
