"""What `scrub` does with one chunk, in a process of its own: find, look for surrogates, replace.

Each `prepare_` function is called once in a process, before the function of the same name.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from pathlib import Path
from typing import Any

from veiltune.data.detect import Detector, DetectorOptions
from veiltune.data.legible import legible
from veiltune.data.propagate import Finder
from veiltune.data.pseudonyms import Key, Pseudonyms, Value
from veiltune.data.replacing import Place, Replacer, Spans, context
from veiltune.data.streaming import Chunk, replaced, rows
from veiltune.data.surrogates import canonical
from veiltune.errors import InputError


class Values:
    """Distinct values with the person in whose records alone they were found.

    Args:
        most: How many there may be.
    """

    def __init__(self, most: int) -> None:
        self._values: dict[Key, tuple[str, str | None]] = {}
        self._most = most

    def add(self, type: str, text: str, owner: str | None) -> None:
        """Takes a value up.

        Raises:
            InputError: If there are too many.
        """
        key = (type, canonical(type, text))
        present = self._values.get(key)
        if present is None:
            self._values[key] = (text, owner)
            if len(self._values) > self._most:
                raise InputError(
                    f"more than {self._most} different values were found; raise --max-values (4 KB of memory each)"
                )
        elif owner != present[1]:
            self._values[key] = (present[0], None)

    def triples(self) -> list[tuple[str, str, str | None]]:
        """Type, text and person, None for several, in the order of the first finding."""
        return [(type, text, owner) for (type, _), (text, owner) in self._values.items()]

    def values(self) -> list[Value]:
        """The same as values."""
        return [Value(type, text, owner or "") for type, text, owner in self.triples()]


_DETECTOR: dict[DetectorOptions, Detector] = {}


def prepare_finding(options: DetectorOptions) -> None:
    """Makes the detector."""
    _DETECTOR.clear()
    _DETECTOR[options] = Detector(options)


def find_in_chunk(chunk: Chunk) -> dict[str, Any]:
    """Places by record, and values with the one person in whose records they are; None for several."""
    (detector,) = _DETECTOR.values()
    places: list[tuple[int, Spans]] = []
    values = Values(2**31)
    for number, row in enumerate(rows(chunk)):
        found = detector.find(row.text)
        if found:
            places.append((number, [(f.start, f.end, f.type) for f in found]))
        for f in found:
            values.add(f.type, legible(row.text[f.start : f.end])[0], row.person)
    return {"places": places, "values": values.triples()}


_MEETING: list[Finder] = []


def prepare_meeting(surrogates: list[str]) -> None:
    """Makes the finder of surrogates."""
    _DETECTOR.clear()
    _MEETING[:] = [Finder((surrogate, number) for number, surrogate in enumerate(surrogates))]


def meet_in_chunk(chunk: Chunk) -> tuple[int, list[int]]:
    """Size of the chunk, and the numbers of the surrogates that occur in it."""
    (finder,) = _MEETING
    numbers = {number for row in rows(chunk) for _, _, number in finder.find(row.text)}
    return chunk.end - chunk.start, sorted(numbers)


_REPLACER: list[Replacer] = []


def prepare_replacing(
    values: list[Value], table: dict[Key, str], always: frozenset[Key], mode: str, key: bytes | None
) -> None:
    """Makes the replacer; with a key, each record is treated as if it were alone."""
    _MEETING.clear()
    alone = Pseudonyms(key) if key is not None else None
    _REPLACER[:] = [Replacer(values, table, always=always, mode=mode, alone=alone)]


def replace_in_chunk(job: tuple[Chunk, str, int]) -> tuple[bytes, dict[str, Any]]:
    """The chunk as it is written, and what the report counts."""
    chunk, found_path, contexts = job
    spans = _read_places(found_path)
    (replacer,) = _REPLACER
    parts: list[bytes] = []
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    ranked: dict[str, list[tuple[str, str]]] = {}
    records = touched = 0
    columns: set[str] = set()
    for number, row in enumerate(rows(chunk)):
        text, places = replacer.replace(row.text, spans.get(number, []), row.person)
        parts.append(replaced(chunk.source, row, text).encode())
        records += not row.blank
        columns.update(row.columns)
        touched += bool(places)
        for order, place in enumerate(places):
            counts[place.found][place.key[0]] += 1
            rank = hashlib.blake2b(f"{chunk.start} {number} {order}".encode(), digest_size=8).hexdigest()
            _sample(ranked.setdefault(place.key[0], []), contexts, rank, row.text, places, order)
    sampled = [(type, rank, shown) for type, found in ranked.items() for rank, shown in found]
    others = sorted(columns - {chunk.source.text})
    entry = {"records": records, "touched": touched, "contexts": sampled, "other_columns": others}
    return b"".join(parts), {**entry, "found": dict(counts[True]), "propagated": dict(counts[False])}


def _read_places(path: str) -> dict[int, Spans]:
    places = json.loads(Path(path).read_bytes())["places"]
    return {number: [(a, b, type) for a, b, type in spans] for number, spans in places}


def _sample(ranked: list[tuple[str, str]], most: int, rank: str, text: str, places: list[Place], order: int) -> None:
    """Keeps the lowest ranks, so that what is sampled does not hang on the order of the work."""
    if most and (len(ranked) < most or rank < ranked[-1][0]):
        ranked.append((rank, context(text, places, order)))
        ranked[:] = heapq.nsmallest(most, ranked)
