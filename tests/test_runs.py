from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from veiltune.errors import InputError, StorageError
from veiltune.runs import RunFolder, atomic_write_bytes, private_folder

CONFIG = 'dtype = "bf16"\n'
WRITER = """
import sys
from pathlib import Path
from veiltune.runs import atomic_write_bytes
for index in range(10**6):
    atomic_write_bytes(Path(sys.argv[1]), bytes([65 + index % 26]) * 200_000)
    if index == 3:
        print("going", flush=True)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fail_with(code: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_create_writes_the_config(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run", config=CONFIG)
    assert run.config_path.read_text() == CONFIG


def test_the_same_run_is_taken_up_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", config=CONFIG).log({"step": 1})
    run = RunFolder.create(tmp_path / "run", config=CONFIG)
    run.log({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_another_config_is_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", config=CONFIG)
    with pytest.raises(
        InputError, match=r"another configuration \(dtype: .* in the run, 'int8' now.*\); restore it, or"
    ):
        RunFolder.create(tmp_path / "run", config='dtype = "int8"\n')
    assert RunFolder(tmp_path / "run").config_path.read_text() == CONFIG


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path, config=CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_crash_before_the_config_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123456789abcdef").touch()
    assert RunFolder.create(tmp_path, config=CONFIG).config_path.exists()


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config=CONFIG)
    run.log({"step": 1})
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run = RunFolder.create(tmp_path / "run", config=CONFIG)
    run.log({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_metrics_of_a_new_run(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path / "run", config=CONFIG).metrics() == []


def test_json_round_trip(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config=CONFIG)
    run.write_json("privacy.json", {"eta": float("inf"), "nested": [float("nan"), (1, 2.5)], "word": "é"})
    assert run.read_json("privacy.json") == {"eta": "inf", "nested": ["nan", [1, 2.5]], "word": "é"}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((run.path / "privacy.json").read_text(), parse_constant=refuse)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config=CONFIG)
    with pytest.raises(InputError, match=r"has no attacks.json; is it the folder of a finished run"):
        run.read_json("attacks.json")
    (run.path / "attacks.json").write_text("{")
    with pytest.raises(InputError, match=r"attacks.json is not JSON"):
        run.read_json("attacks.json")


def test_private_is_closed_to_others(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config=CONFIG)
    assert mode(run.private) == 0o700
    run.private.chmod(0o755)
    assert mode(private_folder(run.path / "private")) == 0o700


def test_atomic_write_replaces_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    for content in (b"old", b"new"):
        atomic_write_bytes(path, content, mode=0o600)
    assert (path.read_bytes(), mode(path), len(list(tmp_path.iterdir()))) == (b"new", 0o600, 1)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "privacy.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail_with(errno.ENOSPC))
    with pytest.raises(StorageError) as caught:
        atomic_write_bytes(path, b"new")
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (b"old", 1)


def test_a_real_full_device() -> None:
    with pytest.raises(StorageError, match=r"cannot write /dev/full/metrics.jsonl: Not a directory"):
        RunFolder("/dev/full").log({"step": 1})


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match=r"run is a file; name a folder as `run`"):
        RunFolder.create(tmp_path / "run", config=CONFIG)
    with pytest.raises(StorageError, match=r"cannot .*Not a directory"):
        RunFolder.create(tmp_path / "run" / "below", config=CONFIG)


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    content = path.read_bytes()
    assert len(content) == 200_000 and len(set(content)) == 1
