"""Tensors on disk: safetensors files through fsspec, whole or not at all.

A blob is written to a temporary name, flushed to the device and renamed, so a reader sees the old file or the new one
and never half of one. What exists is recorded elsewhere (SQL) only after this returns.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from typing import Any

import fsspec
from safetensors.torch import load, save
from torch import Tensor

from veiltune.errors import StorageError


class BlobStore:
    """Named dictionaries of tensors below one fsspec URL (a folder, s3://, memory://)."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def path(self, name: str) -> str:
        """Where a blob or folder lives, for what must be written as plain files."""
        return f"{self._root}/{name}"

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes or replaces a blob.

        Raises:
            StorageError: If the disk is full or not writable; an earlier blob of that name is intact.
        """
        data = save({key: value.contiguous() for key, value in tensors.items()})
        target = self.path(name)
        temporary = f"{target}.{secrets.token_hex(4)}.partial"
        try:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            with self._fs.open(temporary, "wb") as file:
                file.write(data)
                _flush_to_device(file)
            self._fs.mv(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError, FileNotFoundError):
                self._fs.rm(temporary)
            raise StorageError(f"cannot store a blob of {len(data)} bytes: {error.strerror or error}") from error

    def get(self, name: str) -> dict[str, Tensor]:
        """Reads a blob.

        Raises:
            StorageError: If it is missing or damaged.
        """
        try:
            with self._fs.open(self.path(name), "rb") as file:
                return load(file.read())
        except Exception as error:  # safetensors raises its own type for damage, fsspec several for absence
            raise StorageError(f"cannot read back blob {name}: {type(error).__name__}") from error

    def delete(self, name: str) -> None:
        """Removes a blob or a folder of blobs; absent is fine."""
        if self._fs.exists(self.path(name)):
            self._fs.rm(self.path(name), recursive=True)


def _flush_to_device(file: Any) -> None:
    file.flush()
    with contextlib.suppress(AttributeError, OSError):  # object stores have no descriptor: their close() commits
        os.fsync(file.fileno())
