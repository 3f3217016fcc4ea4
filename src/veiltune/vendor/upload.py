"""A job's one-shot upload: the representations of a frozen bottom, stored once and read every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veiltune.errors import ProtocolError
from veiltune.vendor.jobs import JobStore
from veiltune.vendor.store import BlobStore
from veiltune.wire.codec import check_padded


class Upload:
    """Rows of token vectors by position; kept in the wire's own dtype, mirrored on disk piece by piece."""

    def __init__(self, job_id: str, *, jobs: JobStore, blobs: BlobStore) -> None:
        self._job_id, self._jobs, self._blobs = job_id, jobs, blobs
        self._rows: list[tuple[Tensor, Tensor | None]] = []  # (T, H) values, (T,) scales of int8
        self._hashes: dict[int, bytes] = {}
        for chunk in jobs.uploads(job_id):
            self._take(blobs.get(self._name(chunk.first_row)))
            self._hashes[chunk.first_row] = chunk.payload_hash

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, first_row: int, values: Tensor, scales: Tensor | None, lengths: Sequence[int], payload_hash: bytes
    ) -> int:
        """Stores one piece, in order; the same piece again changes nothing. Returns the rows stored so far.

        Raises:
            ProtocolError: On a gap, or another piece where one is stored.
        """
        if first_row in self._hashes:
            if self._hashes[first_row] != payload_hash:
                raise ProtocolError(f"rows from {first_row} are stored already with other content")
            return len(self)
        if first_row != len(self):
            raise ProtocolError(f"the next row is {len(self)}, the piece starts at {first_row}")
        piece = {"values": values, "lengths": torch.tensor(list(lengths))}
        if scales is not None:
            piece["scales"] = scales
        self._blobs.put(self._name(first_row), piece)
        self._jobs.record_upload(self._job_id, first_row, len(lengths), payload_hash)
        self._hashes[first_row] = payload_hash
        self._take(piece)
        return len(self)

    def gather(self, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The (N, H) float32 vectors of some rows, one after the other, and their lengths.

        Raises:
            ProtocolError: If there is no such row, or more rows than a call may have.
        """
        if not rows:
            raise ProtocolError("a batch needs at least one row, got none")
        if max(rows) >= len(self):
            raise ProtocolError(f"rows must be below {len(self)}, got {max(rows)}")
        picked = [self._rows[row] for row in rows]
        lengths = [len(v) for v, _ in picked]
        check_padded(lengths)  # a row may be named more than once
        values = torch.cat([v.float() if s is None else v.float() * s.unsqueeze(-1) for v, s in picked])
        return values, lengths

    def _take(self, piece: dict[str, Tensor]) -> None:
        lengths = piece["lengths"].tolist()
        scales = piece["scales"].split(lengths) if "scales" in piece else [None] * len(lengths)
        self._rows.extend(zip(piece["values"].split(lengths), scales, strict=True))

    def _name(self, first_row: int) -> str:
        return f"jobs/{self._job_id}/upload/{first_row:08d}.safetensors"
