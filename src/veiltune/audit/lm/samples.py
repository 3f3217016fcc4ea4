"""A few of the things that came out, for the report's reader; kept in the private part of the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veiltune.audit.lm.extraction import Attempt
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.lm.targets import Target, begins_with, contains

PER_ATTACK = 6
_SHOWN = 160  # characters of a prompt's end


def sample_rows(attempts: Mapping[str, Attempt], targets: list[Target], subjects: Subjects) -> list[dict[str, Any]]:
    """For each targeted attack some guesses about members, those that succeeded first."""
    rows: list[dict[str, Any]] = []
    for name, attempt in attempts.items():
        if name == "untargeted":
            continue
        succeeds = begins_with if name == "true_prefix" else contains
        of_members = [
            (guess, targets[guess.target])
            for guess in attempt.guesses
            if guess.target is not None and subjects.members[targets[guess.target].person]
        ]
        of_members.sort(key=lambda pair: not succeeds(pair[0].text, pair[1]))  # stable: hits first
        one_each = {target.person: (guess, target) for guess, target in reversed(of_members)}
        of_members = [pair for pair in of_members if one_each[pair[1].person] == pair]
        rows += [
            {
                "attack": name,
                "type": target.type,
                "prompt": guess.prompt[-_SHOWN:],
                "written": guess.text,
                "true": target.value,
                "found": bool(succeeds(guess.text, target)),
            }
            for guess, target in of_members[:PER_ATTACK]
        ]
    return rows
