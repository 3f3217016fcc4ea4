"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from veiltune.errors import InputError


def need(module: str, what: str, *, extra: str = "scrub") -> Any:
    """Imports an optional package.

    >>> need("no_such_package", "wonders")
    Traceback (most recent call last):
        ...
    veiltune.errors.InputError: wonders need no_such_package: pip install '.[scrub]' in veiltune's checkout

    Args:
        module: Its name.
        what: What needs it, in the plural.
        extra: The extra of Veiltune that has it.

    Raises:
        InputError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{what} need {module}: pip install '.[{extra}]' in veiltune's checkout") from None
