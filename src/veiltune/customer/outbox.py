"""What was sent, kept: every release is written here before its first byte leaves, and every repeat is read from here.

A shard is one safetensors file of several releases in the wire's own dtype, so a repeat has the same bytes. An index
in SQLite finds a release by its keyed hash; neither holds text or token ids.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from veiltune.errors import PrivacyError
from veiltune.runs import atomic_write_bytes

_FORGOTTEN = "forgotten"


@dataclass(frozen=True)
class Released:
    """Releases of some examples, one after the other: (N, H) values, (N,) scales of int8 or None, B lengths."""

    values: Tensor
    scales: Tensor | None
    lengths: list[int]


class Outbox:
    """The releases of one run, by key (frozen bottom, inference) or by step (trainable bottom), and first gradients."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self._folder, self._sql = folder, connection
        folder.mkdir(parents=True, exist_ok=True)
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS outbox (key BLOB PRIMARY KEY, part TEXT NOT NULL, shard INTEGER NOT NULL,"
                " start INTEGER NOT NULL, tokens INTEGER NOT NULL)"
            )
        self._cache: tuple[int, dict[str, Tensor]] | None = None

    def __contains__(self, key: bytes) -> bool:
        return self._sql.execute("SELECT 1 FROM outbox WHERE key = ?", (key,)).fetchone() is not None

    def add(self, keys: Sequence[bytes], released: Released, *, part: str) -> None:
        """Writes a shard, then its index entries; a crash between leaves a shard that the next `add` replaces."""
        shard = self._sql.execute("SELECT COALESCE(MAX(shard), -1) + 1 FROM outbox").fetchone()[0]
        _write(self._shard(shard), released)
        starts = torch.tensor([0, *released.lengths]).cumsum(0).tolist()
        rows = [(key, part, shard, start, n) for key, start, n in zip(keys, starts, released.lengths, strict=False)]
        with self._sql:
            self._sql.executemany("INSERT INTO outbox VALUES (?, ?, ?, ?, ?)", rows)

    def get(self, keys: Sequence[bytes]) -> Released:
        """The releases of some keys, in that order.

        Raises:
            PrivacyError: If one was never made: a fresh release must go through the mechanism, not through here.
        """
        pieces = [self._piece(key) for key in keys]
        values = torch.cat([values for values, _ in pieces])
        scales = torch.cat([s for _, s in pieces if s is not None]) if pieces[0][1] is not None else None
        return Released(values, scales, [len(values) for values, _ in pieces])

    def keys(self, part: str) -> list[bytes]:
        """The keys of a part in the order of their release: position = row of the upload."""
        query = "SELECT key FROM outbox WHERE part = ? ORDER BY shard, start"
        return [key for (key,) in self._sql.execute(query, (part,))]

    def shards(self, part: str) -> Iterator[Released]:
        """The shards of a part in order."""
        query = "SELECT DISTINCT shard FROM outbox WHERE part = ? ORDER BY shard"
        for (shard,) in self._sql.execute(query, (part,)).fetchall():
            yield _read(self._shard(shard))

    def step_release(self, step: int, micro_batch: int) -> Released | None:
        """What was released for a micro-batch of a trainable bottom, if it was."""
        path = self._step(step, micro_batch)
        return _read(path) if path.exists() else None

    def add_step(self, step: int, micro_batch: int, released: Released) -> None:
        """Keeps a micro-batch's release until no resumption can ask for it again."""
        _write(self._step(step, micro_batch), released)

    def steps(self) -> Iterator[tuple[int, int, Released]]:
        """Step, micro-batch and release of everything that is kept of a trainable bottom, in order."""
        for path in sorted(self._folder.glob("step-*.safetensors")):
            _, step, micro_batch = path.stem.split("-")
            yield int(step), int(micro_batch), _read(path)

    def add_gradients(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """Keeps the gradients that crossed the wire from `step` to the next checkpoint, for the audit."""
        tensors = {name: tensor.contiguous() for name, tensor in gradients.items()}
        atomic_write_bytes(self._folder / f"gradients-{step:08d}.safetensors", save(tensors))

    def gradients(self) -> list[dict[str, Tensor]]:
        """What `add_gradients` kept, in order."""
        return [load_file(path) for path in sorted(self._folder.glob("gradients-*.safetensors"))]

    def forget_steps(self, before: int) -> None:
        """Drops the releases of steps before a checkpoint that both parties hold; `forgotten` says so from then on."""
        atomic_write_bytes(self._folder / _FORGOTTEN, str(before).encode())
        for path in self._folder.glob("step-*.safetensors"):
            if int(path.name.split("-")[1]) < before:
                path.unlink()

    @property
    def forgotten(self) -> int:
        """The first step whose releases have not been dropped; 0 if none were."""
        path = self._folder / _FORGOTTEN
        return int(path.read_bytes()) if path.exists() else 0

    def _piece(self, key: bytes) -> tuple[Tensor, Tensor | None]:
        row = self._sql.execute("SELECT shard, start, tokens FROM outbox WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise PrivacyError("an example was asked for that was never privatized; this is a defect, nothing was sent")
        shard, start, tokens = row
        if self._cache is None or self._cache[0] != shard:
            self._cache = (shard, load_file(self._shard(shard)))
        tensors = self._cache[1]
        part = slice(start, start + tokens)
        return tensors["values"][part], tensors["scales"][part] if "scales" in tensors else None

    def _shard(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:06d}.safetensors"

    def _step(self, step: int, micro_batch: int) -> Path:
        return self._folder / f"step-{step:08d}-{micro_batch:04d}.safetensors"


def _write(path: Path, released: Released) -> None:
    tensors = {"values": released.values.contiguous(), "lengths": torch.tensor(released.lengths)}
    if released.scales is not None:
        tensors["scales"] = released.scales.contiguous()
    atomic_write_bytes(path, save(tensors))


def _read(path: Path) -> Released:
    tensors = load_file(path)
    return Released(tensors["values"], tensors.get("scales"), tensors["lengths"].tolist())
