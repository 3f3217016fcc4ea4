"""API keys: made once, shown once, kept as hashes."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from veiltune.errors import InputError
from veiltune.runs import atomic_write_bytes, storage_errors

log = logging.getLogger(__name__)

_PREFIX = "vt-"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_LONGEST = 256


def new_key(path: Path, name: str) -> str:
    """Makes a key, appends its hash to a file that only its owner may read, and returns it; it is kept nowhere.

    Calls at the same time, by threads or processes, wait for each other at PATH.lock, which stays; where the system has
    no such locks (Windows), make one key at a time.

    Args:
        path: JSON Lines, one key a line; made if it does not exist.
        name: Whose key it is: lower-case letters, digits and hyphens.

    Raises:
        InputError: If the name is unusable or taken, or the file is not one of keys.
        StorageError: If it cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"the name of a key must be 1 to 63 lower-case letters, digits or hyphens, got {name!r}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        known = _lines(path) if path.exists() else {}
        if name in known:
            raise InputError(f"{path} already has a key of {name}; choose another name, or take its line out first")
        key = _PREFIX + secrets.token_urlsafe(32)
        lines = [json.dumps({"name": one, "sha256": digest}) for one, digest in {**known, name: _digest(key)}.items()]
        atomic_write_bytes(path, ("\n".join(lines) + "\n").encode(), mode=0o600)
    return key


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with storage_errors(path):
        lock = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        with storage_errors(path):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class Keys:
    """The keys that a server takes; the file is read again when it has changed, so that a key can be revoked.

    Guarantee:
        The file holds SHA-256 of keys with 256 random bits, so who reads it learns no key. Comparison takes the same
        time whichever key it is. A key whose line was taken out is refused from the next request on, and all are while
        the file is missing or broken. It does not cover a key that its owner loses, nor a connection in clear.

    Args:
        path: As `new_key` wrote it.

    Raises:
        InputError: If the file is missing, has no key, may be read by others, or is not one of keys.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, _state(path)
        self._digests = _lines(path)
        if not self._digests:
            raise InputError(f"{path} has no key; make one with `veiltune guard key --name NAME`")

    @property
    def names(self) -> tuple[str, ...]:
        """Whose keys there are."""
        return tuple(self._digests)

    def owner(self, authorization: str) -> str | None:
        """Whose key an Authorization header holds (``Bearer KEY``); None if nobody's."""
        self._reread()
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or len(key) > _LONGEST:
            return None
        given, found = _digest(key.strip()), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found

    def _reread(self) -> None:
        state = _state(self._path)
        if state == self._state:
            return
        self._state, self._digests = state, {}
        try:
            self._digests = _lines(self._path)
            log.info("keys were read again: %d", len(self._digests))
        except InputError as error:
            log.error("no key is taken until the file of keys is mended: %s", error)


def _state(path: Path) -> tuple[int, int, int] | None:
    """Differs when the file has."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _lines(path: Path) -> Mapping[str, str]:
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise InputError(f"{path} may be read by others; chmod 600 it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; make a key with `veiltune guard key --name NAME`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a file of keys: {type(error).__name__}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            name, digest = entry["name"], entry["sha256"]
            if _NAME.fullmatch(name) and re.fullmatch(r"[0-9a-f]{64}", digest) and name not in found:
                found[name] = digest
                continue
        raise InputError(f"{path}: line {number} is no key, or repeats a name; each line has name and sha256")
    return found
