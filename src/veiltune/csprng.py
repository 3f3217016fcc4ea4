"""Random bytes and uniform draws of a keystream; loads no framework."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from veiltune.errors import InputError

KEY_BYTES = 32
_STEP = 2.0**-53
_STREAM_BYTES = 2**37  # half of what a 32-bit block counter can number


class SecureGenerator:
    """A ChaCha20 keystream under a 32-byte key.

    >>> generator = SecureGenerator(bytes(32))
    >>> generator
    SecureGenerator(key=<secret>)
    >>> bool((generator.derive("noise", 7).uniform((3,)) == generator.derive("noise", 7).uniform((3,))).all())
    True

    Guarantee:
        Without the key, draws cannot be told from random by any feasible computation, nor predicted from other draws,
        by anyone. It covers draws, not the process: who reads this machine's memory reads the key. With a key that was
        drawn by a test's seed it protects nothing.

    Args:
        key: 32 secret bytes; drawn from the operating system if None.

    Raises:
        InputError: If the key has another length.

    Source: ChaCha20, RFC 8439; derivation: HMAC-SHA256, RFC 2104.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = os.urandom(KEY_BYTES) if key is None else bytes(key)
        if len(self._key) != KEY_BYTES:
            raise InputError(f"key must have {KEY_BYTES} bytes, got {len(self._key)}")
        self._next_stream, self._left = 0, 0

    def uniform(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """float64 in (0, 1], multiples of 2^-53."""
        count = math.prod(shape)
        if not count:
            return np.zeros(shape)
        words = np.frombuffer(self._keystream(8 * count), dtype=np.uint64)
        values = (words >> np.uint64(11)).astype(np.float64)
        values += 1.0
        values *= _STEP
        return values.reshape(shape)

    def integer(self) -> int:
        """From 0 to 2^63 - 1, for a framework's own generator."""
        return int.from_bytes(self._keystream(8), "little") >> 1

    def derive(self, *labels: bytes | str | int) -> SecureGenerator:
        """An independent generator for a purpose: the same labels give the same one, whatever was drawn before."""
        encoded = b"".join(_encode(label) for label in labels)
        return SecureGenerator(hmac.new(self._key, encoded, hashlib.sha256).digest())

    def _keystream(self, size: int) -> bytes:
        """The next bytes; a stream that would run out of block numbers is left for the next nonce."""
        if size > self._left:
            nonce = bytes(4) + self._next_stream.to_bytes(12, "little")  # counter, then nonce
            self._stream = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()
            self._next_stream, self._left = self._next_stream + 1, _STREAM_BYTES
        self._left -= size
        return self._stream.update(bytes(size))

    def __repr__(self) -> str:
        return "SecureGenerator(key=<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecureGenerator holds a secret and is not pickled")


def _encode(label: bytes | str | int) -> bytes:
    """An unambiguous encoding: type, length, content."""
    if isinstance(label, int):
        kind, content = b"i", str(label).encode()
    elif isinstance(label, str):
        kind, content = b"s", label.encode()
    else:
        kind, content = b"b", label
    return kind + len(content).to_bytes(8, "little") + content
