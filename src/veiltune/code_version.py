"""Which code a run was made by: the package's version and a digest of what draws, differentiates and counts."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from veiltune import __version__

#: Below the package: what sampling, gradients, clipping and noise of a step are computed by.
_COUNTED = ("csprng.py", "randomness.py", "dp", "models")


@functools.cache
def code_version() -> str:
    """The version and a digest of that code, which says more than a version between releases does."""
    total, package = hashlib.sha256(), Path(__file__).parent
    for name in _COUNTED:
        for path in sorted([package / name, *(package / name).rglob("*.py")]):
            if path.is_file():
                total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{__version__} {total.hexdigest()[:16]}"
