"""A run folder: everything that one run writes, and file writing that survives a crash or a full disk.

runs/tune/config.toml      the configuration as resolved; a folder belongs to exactly one
          metrics.jsonl    one JSON object a line, appended
          *.json           written whole or not at all
          private/         mode 0700: what may show text or secrets (ledger, outbox, checkpoints)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import sqlite3
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from veiltune.errors import InputError, RunInUseError, StorageError, VeiltuneError

_TEMPORARY = ".tmp-"


def toml_differences(before: bytes, now: str) -> list[str]:
    """One line per key in which two TOML documents differ."""
    try:
        mine = _flat(tomllib.loads(before.decode()))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        return ["config.toml is no longer TOML"]
    theirs = _flat(tomllib.loads(now))
    keys = dict.fromkeys([*mine, *theirs])
    return [
        f"{key}: {mine.get(key, 'not set')!r} in the run, {theirs.get(key, 'not set')!r} now"
        for key in keys
        if mine.get(key) != theirs.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the body (disk full, no permission) or SQLite's into a one-line StorageError."""
    try:
        yield
    except VeiltuneError:
        raise
    except (OSError, sqlite3.OperationalError) as error:
        raise StorageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def atomic_write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces a file by new content: afterwards, crash or not, the old content is there or the new, never a part.

    Args:
        path: The file; its folder must exist.
        data: The whole new content.
        mode: Permissions from the first byte on (0o600 for secrets); the umask still applies.

    Raises:
        StorageError: If the disk is full or cannot be written; the old file is intact, no temporary file stays.
    """
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    with storage_errors(path):
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the body ends; if the body fails, nothing of it stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def private_folder(path: Path) -> Path:
    """Makes a folder that only its owner may enter (0700), or closes an existing one to the rest; returns it."""
    with storage_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    return path


class RunFolder:
    """Reads and writes the files of one run.

    `RunFolder(path)` touches nothing; `RunFolder.create` starts a run or takes one up again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, *, config: str) -> RunFolder:
        """Makes the folder and writes config.toml, or takes up the folder of an earlier start of the same run.

        Args:
            path: The run folder.
            config: The resolved configuration as TOML, see `config.dump_toml`.

        Raises:
            InputError: If the folder holds something else, or a run with another configuration.
            StorageError: If it cannot be written.
        """
        run, is_begun = cls(path), cls.is_begun(path, config=config)
        if not is_begun:
            with storage_errors(run.path):
                run.path.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(run.config_path, config.encode())
        run._drop_torn_line()
        return run

    @classmethod
    def is_begun(cls, path: str | Path, *, config: str) -> bool:
        """Whether the folder holds this very run; False if it is empty or not there. Writes nothing.

        Raises:
            InputError: If it is a file, or holds something else or a run with another configuration.
            StorageError: If it cannot be read.
        """
        run = cls(path)
        with storage_errors(run.path):
            if run.path.exists() and not run.path.is_dir():
                raise InputError(f"{run.path} is a file; name a folder as `run`")
            entries = run.path.iterdir() if run.path.exists() else ()
            present = {entry.name for entry in entries if not entry.name.startswith(_TEMPORARY)}
        if not present:
            return False
        if run.config_path.name not in present:
            raise InputError(f"{run.path} is not empty and holds no run; name another folder as `run`")
        if run.config_path.read_bytes() != config.encode():
            changes = "; ".join(toml_differences(run.config_path.read_bytes(), config)) or "another spelling"
            raise InputError(
                f"{run.path} holds a run with another configuration ({changes}); restore it, or name another folder as"
                " `run`"
            )
        return True

    @contextlib.contextmanager
    def held(self) -> Iterator[RunFolder]:
        """This folder, while no other process holds it; where the system has no such locks, unchecked.

        Raises:
            RunInUseError: If one does.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield self
            return
        with storage_errors(self.path):
            lock = (self.private / "lock").open("ab")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunInUseError(
                    f"another process is at work in {self.path}; wait for it, or name another folder as `run`"
                ) from None
            yield self

    @property
    def kind(self) -> str:
        """The command that the folder is of, by its config.toml: "tune", "train", or "" where there is none."""
        try:
            tree = tomllib.loads(self.config_path.read_bytes().decode())
        except (OSError, ValueError):
            return ""
        return "tune" if "vendor" in tree else "train"

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def private(self) -> Path:
        """The subfolder, mode 0700, for what may show text or secrets; made on first use."""
        return private_folder(self.path / "private")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl.

        Raises:
            StorageError: If it cannot be written.
        """
        with storage_errors(self.metrics_path), self.metrics_path.open("ab") as file:
            file.write((_to_json(metrics) + "\n").encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl, oldest first; a line that a crash cut short is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file whole or not at all. Infinity and NaN become the words "inf", "-inf" and "nan".

        Raises:
            StorageError: If it cannot be written; an earlier version is intact.
        """
        atomic_write_bytes(self.path / name, (_to_json(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Reads a JSON file back.

        Raises:
            InputError: If it is missing or is not JSON.
        """
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            raise InputError(f"{self.path} has no {name}; is it the folder of a finished run?") from None
        except ValueError:
            raise InputError(f"{self.path / name} is not JSON; it was changed after the run wrote it") from None

    def _drop_torn_line(self) -> None:
        """Cuts off what a crash left of a half-written last line, so that the next one starts at its beginning."""
        if not self.metrics_path.exists():
            return
        with storage_errors(self.metrics_path), self.metrics_path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _to_json(content: Any, *, indent: int | None = None) -> str:
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(content: Any) -> Any:
    """JSON has no infinity: replaces non-finite floats, at any depth, by words that float() reads back."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable. Folders cannot be opened on every system; there the rename is atomic only."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
