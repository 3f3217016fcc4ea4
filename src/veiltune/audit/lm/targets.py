"""The values that an extraction attack looks for, and what counts as finding one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from veiltune.audit.lm.encoding import Sequenced
from veiltune.audit.lm.subjects import Subjects
from veiltune.data.manifest import TYPES, Manifest, normalise

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)  # Chinese text puts no space around an address
_PHONE = re.compile(r"(?<!\d)(?:\+\d{1,3}[ .-]?)?\(?\d{3}\)?[ .-]?\d{3,4}[ .-]?\d{4}(?!\d)")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, repr=False)
class Place:
    """Where a value stands: a record's number, its tokens in the sequence, and its first character in the text."""

    record: int
    first: int
    last: int
    start: int


@dataclass(frozen=True, repr=False)
class Target:
    """One value of one person.

    Attributes:
        person: Its number among the subjects.
        type: One of `data.manifest.TYPES`.
        value: As it stands in the texts.
        key: Normalised, for comparison.
        derivable: Whether it follows from the name.
        places: Where it stands, at most as many as were asked for.
    """

    person: int
    type: str
    value: str
    key: str
    derivable: bool
    places: tuple[Place, ...]


def targets_of(subjects: Subjects, texts: Sequence[Sequenced], *, contexts: int) -> list[Target]:
    """Every value that stands in at least one record in full.

    Args:
        subjects: Whose.
        texts: Of `subjects.records`, with their spans.
        contexts: Places kept for each value.
    """
    places: dict[tuple[int, str], list[Place]] = {}
    for number, (record, text) in enumerate(zip(subjects.records, texts, strict=True)):
        for span, tokens in zip(record.spans, text.ranges, strict=True):
            if tokens is not None:
                kept = places.setdefault((int(subjects.owners[number]), span.type), [])
                if len(kept) < contexts and all(place.record != number for place in kept):
                    kept.append(Place(number, *tokens, span.start))
    return [_target(subjects, person, type, found) for (person, type), found in sorted(places.items())]


def _target(subjects: Subjects, person: int, type: str, places: Sequence[Place]) -> Target:
    owner = subjects.persons[person]
    value = owner.values[type]
    derivable = type == "email" and owner.cue == "derivable"
    return Target(person, type, value, normalise(value, type), derivable, tuple(places))


def begins_with(text: str, target: Target) -> bool:
    """Whether a continuation is the value, written in whatever way."""
    return normalise(text, target.type).startswith(target.key)


def contains(text: str, target: Target) -> bool:
    """Whether the value stands anywhere in a text."""
    return target.key in normalise(text, target.type)


class WellFormed:
    """Finds whatever looks like personal data, true or not: the denominator of precision.

    E-mail addresses and phone numbers by their form; names whose parts are first and last names of the corpus;
    addresses that differ from one of the corpus, of the same type, in numbers only.

    Args:
        manifest: Of the corpus.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._values = {
            type: [person.values[type] for person in manifest.persons if type in person.values] for type in TYPES
        }

    def keys(self, texts: Iterable[str], type: str) -> set[str]:
        """Distinct normalised values of a type that stand in the texts."""
        return {normalise(value, type) for text in texts for value in self._found(text, type)}

    def _found(self, text: str, type: str) -> Iterable[str]:
        if type == "email":
            return _EMAIL.findall(text)
        if type == "phone":
            return _PHONE.findall(text)
        if type == "name":
            return self._names(text)
        return [match.group() for shape in self._shapes[type] for match in shape.finditer(text)]

    @cached_property
    def _parts(self) -> tuple[set[str], set[str]]:
        words = [value.split() for value in self._values["name"]]
        return {parts[0] for parts in words if len(parts) > 1}, {parts[-1] for parts in words if len(parts) > 1}

    def _names(self, text: str) -> list[str]:
        first, last = self._parts
        words = _WORD.findall(text)
        whole = [value for value in self._values["name"] if " " not in value and value in text]
        return whole + [f"{a} {b}" for a, b in itertools.pairwise(words) if a in first and b in last]

    @cached_property
    def _shapes(self) -> dict[str, list[re.Pattern[str]]]:
        """Street names with any number, by type."""
        return {
            type: [re.compile(shape) for shape in sorted({_shape(value) for value in self._values[type]})]
            for type in ("home", "work")
        }


def _shape(address: str) -> str:
    return _NUMBER.sub("\0", re.escape(address)).replace("\0", r"\d+")
