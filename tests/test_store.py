"""Blobs: whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from veiltune.errors import StorageError
from veiltune.vendor.store import BlobStore


def test_a_blob_comes_back_bit_for_bit(tmp_path: Path) -> None:
    blobs = BlobStore(str(tmp_path))
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor([1, 2])}
    blobs.put("jobs/x/one.safetensors", tensors)
    back = blobs.get("jobs/x/one.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_full_disk_leaves_the_old_blob_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = BlobStore(str(tmp_path))
    blobs.put("one", {"a": torch.ones(1)})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("veiltune.vendor.store._flush_to_device", full)
    with pytest.raises(StorageError, match="No space left on device"):
        blobs.put("one", {"a": torch.zeros(1)})
    assert blobs.get("one")["a"].item() == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_missing_or_damaged_blob_is_one_clear_error(tmp_path: Path) -> None:
    blobs = BlobStore(str(tmp_path))
    (tmp_path / "bad").write_bytes(b"not safetensors")
    for name in ("absent", "bad"):
        with pytest.raises(StorageError, match=f"cannot read back blob {name}"):
            blobs.get(name)


def test_other_file_systems_work_too() -> None:
    blobs = BlobStore("memory://veiltune-test")
    blobs.put("a/b", {"x": torch.ones(2)})
    assert blobs.get("a/b")["x"].tolist() == [1.0, 1.0]
    blobs.delete("a")
    with pytest.raises(StorageError):
        blobs.get("a/b")
