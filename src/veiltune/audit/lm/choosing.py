"""An audit of some persons of a manifest: those who were forgotten, or those who remain."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from veiltune.data.manifest import Manifest
from veiltune.errors import DataError, InputError


def chosen_persons(manifest: Manifest, *, only: Path | None, leave_out: Path | None) -> tuple[Manifest, str]:
    """Takes persons with their twins out of a manifest; the texts of others stay, and so do carriers and canaries.

    Args:
        manifest: As read.
        only: File with the id of a person on each line, who alone stay; None for all.
        leave_out: The same, of those who leave; not both.

    Returns:
        The manifest, with a digest of its own where anybody left, and a sentence for the record, "" if nobody did.

    Raises:
        InputError: If both are given or a file cannot be read.
        DataError: If a named person is not in the training text.
    """
    if only and leave_out:
        raise InputError("--only and --leave-out choose persons in two ways; give one of them")
    path = only or leave_out
    if path is None:
        return manifest, ""
    named = _read(path)
    inside = {person.id: person.pair or person.id for person in manifest.persons if person.split == "in"}
    if strangers := len(named - inside.keys()):
        raise DataError(f"{strangers} of the {len(named)} persons of {path} are not in the training text")
    pairs = {inside[name] for name in named}
    kept = tuple(
        person
        for person in manifest.persons
        if person.split not in ("in", "out") or ((person.pair or person.id) in pairs) == bool(only)
    )
    digest = hashlib.sha256(f"{manifest.digest}{bool(only)}{sorted(named)}".encode()).hexdigest()
    words = "only the persons that were named" if only else "all but the persons that were named"
    stay = sum(person.split == "in" for person in kept)
    return replace(manifest, persons=kept, digest=digest), f"{words}: {stay} of {len(inside)} in the training text"


def _read(path: Path) -> set[str]:
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path} must be a text file with the id of a person on each line") from None
    if not names:
        raise DataError(f"{path} names nobody; write the id of a person on each line")
    return names
