"""One attack, tried: what it found or why there is nothing to report, never a silent zero."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from veiltune.audit.record import Attack
from veiltune.errors import VeiltuneError

log = logging.getLogger(__name__)


class NotApplicableError(VeiltuneError):
    """An attack that this run gives nothing to attack, with the reason."""


def attempt(name: str, title: str, sees: str, work: Callable[[], dict[str, Any]]) -> Attack:
    """Runs an attack and makes its entry from the fields that `work` returns.

    An attack that does not apply or crashes has an entry that says so. KeyboardInterrupt passes.
    """
    entry = Attack(name=name, title=title, sees=sees, status="done")
    started = time.monotonic()
    try:
        found = work()
    except NotApplicableError as error:
        return entry.model_copy(update={"status": "not_applicable", "reason": str(error)})
    except Exception as error:
        return entry.model_copy(update={"status": "failed", "reason": failure(error)})
    return entry.model_copy(update={"seconds": round(time.monotonic() - started, 2)} | found)


def failure(error: Exception) -> str:
    """Why an attack failed, without a word of any text: our own errors in full, others by their kind."""
    log.debug("an attack failed", exc_info=error)
    return str(error) if isinstance(error, VeiltuneError) else f"{type(error).__name__}; this is a defect"
