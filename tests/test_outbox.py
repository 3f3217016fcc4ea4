"""The outbox: byte-identical repeats, nothing half-written, no text."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from veiltune.customer.outbox import Outbox, Released
from veiltune.customer.training import Trainer
from veiltune.errors import PrivacyError, StorageError

LENGTHS = [2, 3, 1]
KEYS = [b"a" * 32, b"b" * 32, b"c" * 32]


def released(seed: int = 0, *, scales: bool = False) -> Released:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 4, generator=generator).bfloat16()
    return Released(values, torch.rand(6, generator=generator) if scales else None, LENGTHS)


def open_outbox(folder: Path) -> Outbox:
    folder.mkdir(exist_ok=True)
    return Outbox(folder / "outbox", sqlite3.connect(folder / "ledger.sqlite"))


@pytest.mark.parametrize("scales", [False, True])
def test_releases_come_back_bit_for_bit_in_the_order_asked_for(tmp_path: Path, scales: bool) -> None:
    original = released(scales=scales)
    open_outbox(tmp_path).add(KEYS, original, part="train")
    back = open_outbox(tmp_path).get([KEYS[2], KEYS[0]])  # another process
    rows = [5, 0, 1]
    assert back.lengths == [1, 2]
    assert torch.equal(back.values, original.values[rows])
    assert (back.scales is None) == (original.scales is None)
    if original.scales is not None and back.scales is not None:
        assert torch.equal(back.scales, original.scales[rows])


def test_rows_of_the_upload_follow_the_shards(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    outbox.add(KEYS[:2], Released(torch.zeros(5, 4), None, [2, 3]), part="train")
    outbox.add([b"x" * 32], Released(torch.ones(1, 4), None, [1]), part="inference")
    outbox.add(KEYS[2:], Released(torch.ones(1, 4), None, [1]), part="train")
    assert outbox.keys("train") == KEYS
    assert [shard.lengths for shard in outbox.shards("train")] == [[2, 3], [1]]


def test_what_was_never_released_cannot_be_sent(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="never privatized"):
        open_outbox(tmp_path).get([KEYS[0]])


def test_a_release_is_never_replaced(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    outbox.add(KEYS, released(0), part="train")
    with pytest.raises(sqlite3.IntegrityError):
        outbox.add(KEYS[:1], Released(torch.ones(2, 4), None, [2]), part="train")
    assert torch.equal(outbox.get(KEYS).values, released(0).values)


def test_a_crash_between_shard_and_index_leaves_nothing_released(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    (tmp_path / "outbox" / "shard-000000.safetensors").write_bytes(b"left over")
    assert KEYS[0] not in outbox
    outbox.add(KEYS, released(), part="train")
    assert torch.equal(outbox.get(KEYS).values, released().values)


def test_a_full_disk_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = open_outbox(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        outbox.add(KEYS, released(), part="train")
    assert KEYS[0] not in outbox
    assert not list((tmp_path / "outbox").iterdir())


def test_steps_are_kept_until_they_cannot_be_asked_for(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    for step in (8, 9, 10):
        outbox.add_step(step, 0, released(step))
    outbox.forget_steps(before=9)
    assert outbox.step_release(8, 0) is None
    kept = outbox.step_release(10, 0)
    assert kept is not None
    assert torch.equal(kept.values, released(10).values)
    assert outbox.forgotten == 9


def test_a_vendor_that_goes_back_behind_what_is_kept_is_refused(tmp_path: Path) -> None:
    """It would get other values under the same noise, and their difference without."""
    trainer = Trainer.__new__(Trainer)
    outbox = open_outbox(tmp_path)
    trainer.releaser, trainer._local = SimpleNamespace(outbox=outbox), SimpleNamespace(restore=lambda _: None)  # type: ignore[assignment]
    trainer.resume_at(0)
    outbox.forget_steps(before=9)
    with pytest.raises(PrivacyError, match="the vendor is at step 0, before step 9"):
        trainer.resume_at(0)
