"""What a rule of a report says: one thing that the figures mean, and how serious it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["unreliable", "leak", "caution", "held", "note"]
LEVELS: tuple[Level, ...] = ("unreliable", "leak", "caution", "held", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that the figures mean.

    Attributes:
        level: unreliable (trust no figure), leak, caution, held (an attack got nowhere), note.
        text: What it means.
        action: What to do about it; may be empty.
    """

    level: Level
    text: str
    action: str = ""
