"""Small validators whose message names the caller's parameter, the value that came and the remedy.

Each takes exactly one keyword argument, so that the message speaks in the caller's own spelling:

>>> positive(eta=2.0)
2.0
>>> positive(eta=0.0, hint="name the privatizer 'none' instead")
Traceback (most recent call last):
    ...
veiltune.errors.InputError: eta must be positive and finite, got 0.0; name the privatizer 'none' instead
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from veiltune.errors import InputError


def _only(values: dict[str, Any]) -> tuple[str, Any]:
    ((name, value),) = values.items()
    return name, value


def refusal(name: str, expected: str, value: object, hint: str = "") -> InputError:
    """Builds the one-line refusal: what was expected, what came, what to do."""
    return InputError(f"{name} must be {expected}, got {value!r}" + (f"; {hint}" if hint else ""))


def positive(*, hint: str = "", **values: float) -> float:
    """Returns the value if it is a finite number above zero."""
    name, value = _only(values)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise refusal(name, "positive and finite", value, hint)
    return value


def positive_int(*, hint: str = "", **values: int) -> int:
    """Returns the value if it is a whole number of at least one."""
    name, value = _only(values)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refusal(name, "a whole number of at least 1", value, hint)
    return value


def in_range(low: float, high: float, *, hint: str = "", **values: float) -> float:
    """Returns the value if low <= value <= high."""
    name, value = _only(values)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refusal(name, f"in [{low}, {high}]", value, hint)
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint "did you mean 'x'?" for a misspelt word, or the whole list where nothing is near.

    >>> nearest("d_chl", ["none", "d_chi", "gaussian"])
    "did you mean 'd_chi'?"
    >>> nearest("laplace", ["none", "d_chi"])
    'known: none, d_chi'
    """
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)


def one_of(known: Iterable[str], *, hint: str = "", **values: str) -> str:
    """Returns the value if it is one of the known names; a refusal suggests the nearest."""
    name, value = _only(values)
    names = list(known)
    if value not in names:
        raise InputError(f"{name} {value!r} is unknown; {hint or nearest(str(value), names)}")
    return str(value)
