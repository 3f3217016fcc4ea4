"""An audit without a manifest: plain training text and a list of its secrets, from anyone who holds such a set.

The folder has text files (.txt: a document is what blank lines enclose; .jsonl: an object with "text" a line). The
table has the columns `type` and `value`; `person` tells whose (without it each value is a person's own), and `member`
(1 or 0) tells values that are in the training text from controls of the same kind that are not. Without controls
recall is not compared with chance, and there is no membership figure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from veiltune.data.manifest import TYPES, Manifest, Person, Record, Span, normalise
from veiltune.data.tables import read_columns, read_optional_column
from veiltune.errors import DataError

_MEMBER = {"1": True, "true": True, "yes": True, "in": True, "0": False, "false": False, "no": False, "out": False}


def plain_manifest(folder: Path, secrets: Path) -> Manifest:
    """Finds the secrets in the text and makes what `veiltune data synth` would have written about it.

    Raises:
        DataError: If the folder has no text, the table not the columns, or no secret stands in the text.
    """
    documents = list(_documents(folder))
    persons = _persons(secrets)
    digest = hashlib.sha256(json.dumps([documents, [vars(person) for person in persons]]).encode()).hexdigest()
    records = tuple(_records(documents, persons))
    owners = {record.person for record in records}
    if not any(person.id in owners and person.split == "in" for person in persons):
        raise DataError(f"none of the values of {secrets} stands in the text of {folder}; are they of the same set?")
    return Manifest(header={}, persons=tuple(persons), records=records, canaries=(), digest=digest, canary_bits={})


def _documents(folder: Path) -> Iterator[str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl")) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder} must be a folder with .txt or .jsonl files, found none")
    for path in files:
        if path.suffix == ".jsonl":
            yield from read_columns(path, ["text"], format="jsonl")[0]
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
        yield from (part.strip() for part in text.split("\n\n") if part.strip())


def _persons(secrets: Path) -> list[Person]:
    types, values = read_columns(secrets, ["type", "value"])
    owners = read_optional_column(secrets, "person") or [f"value-{row}" for row in range(len(types))]
    members = read_optional_column(secrets, "member") or ["1"] * len(types)
    found: dict[str, tuple[bool, dict[str, str]]] = {}
    for row, (type, value, owner, member) in enumerate(zip(types, values, owners, members, strict=True), start=1):
        if type not in TYPES:
            raise DataError(f"{secrets}: row {row} has an unknown type; known: {', '.join(TYPES)}")
        if member.strip().lower() not in _MEMBER:
            raise DataError(f"{secrets}: row {row} must have 1 or 0 as member")
        if not normalise(value, type):
            raise DataError(f"{secrets}: row {row} has a value without letters or digits")
        side = _MEMBER[member.strip().lower()]
        known = found.setdefault(owner, (side, {}))
        if known[0] != side or type in known[1]:
            raise DataError(f"{secrets}: row {row} repeats a type of its person, or contradicts its side")
        known[1][type] = value
    return [_person(owner, side, values) for owner, (side, values) in found.items()]


def _person(owner: str, inside: bool, values: dict[str, str]) -> Person:
    return Person(
        id=owner,
        split="in" if inside else "out",
        pair="",
        locale="en_US",
        cue="cue_free",
        repetitions=1,
        values=values,
    )


def _records(documents: list[str], persons: list[Person]) -> Iterator[Record]:
    """For each person the documents with one of its values; a control borrows the place of a member's value.

    A value that stands in none of the documents (a control) is looked for where members' values of its type stand: the
    same documents with that value in its place.
    """
    held: dict[str, list[tuple[str, Span]]] = {type: [] for type in TYPES}
    number = 0
    for person in (one for one in persons if one.split == "in"):
        for text in documents:
            spans = tuple(
                sorted(
                    (
                        Span(type, text.index(value), text.index(value) + len(value))
                        for type, value in person.values.items()
                        if value in text
                    ),
                    key=lambda span: span.start,
                )
            )
            if spans:
                for span in spans:
                    held[span.type].append((text, span))
                yield Record(f"document-{number}", person.id, "in", text, spans)
                number += 1
    for place, person in enumerate(one for one in persons if one.split == "out"):
        for type, value in person.values.items():
            if held[type]:
                text, span = held[type][place % len(held[type])]
                changed = text[: span.start] + value + text[span.end :]
                spans = (Span(type, span.start, span.start + len(value)),)
                yield Record(f"document-{number}", person.id, "out", changed, spans)
                number += 1
