"""What a corpus with known secrets contains: persons, records with the places of personal data, and canaries.

A manifest is a JSON Lines file: a header, then persons, records and canaries, one a line. It is the answer key of a
leakage audit and as secret as the persons in it would be. A refusal names the line, never a text or an id.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from veiltune._validate import one_of
from veiltune.errors import DataError
from veiltune.runs import storage_errors

FORMAT = 1
TYPES = ("name", "email", "phone", "home", "work")
SPLITS = ("in", "out", "pop", "val")
CUES = ("derivable", "cue_free")
FAMILIES = ("pii", "random", "token")
PURPOSES = ("epsilon", "exposure", "reference")
PARTIAL = ".partial"  # ending of a file while it is being written


@dataclass(frozen=True, repr=False)
class Span:
    """Where a value stands: the characters `text[start:end]` of a record.

    Attributes:
        type: One of `TYPES`.
        start: First character.
        end: One past the last.
    """

    type: str
    start: int
    end: int


@dataclass(frozen=True, repr=False)
class Person:
    """An invented person, the unit that is split.

    Attributes:
        id: Says nothing of the split.
        split: "in" (in the training text), "out" (the twin of one, never in it), "pop" or "val".
        pair: Shared by twins; "" for "pop" and "val".
        locale: Of the texts.
        cue: "derivable" if the e-mail address follows from the name, else "cue_free".
        repetitions: Number of documents that mention the person, all different.
        values: The string that stands in the texts, by type.
    """

    id: str
    split: str
    pair: str
    locale: str
    cue: str
    repetitions: int
    values: dict[str, str]


@dataclass(frozen=True, repr=False)
class Record:
    """A document; `person` is "" (and spans empty) for a carrier, which has no personal data."""

    id: str
    person: str
    split: str
    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, repr=False)
class Canary:
    """An inserted secret; its text is `prefix + secret`.

    Attributes:
        id: Says nothing of the purpose or of whether it is included.
        family: "pii" (a sentence of the corpus with invented personal data), "random" (a fixed prefix, random
            letters) or "token" (a fixed prefix, a token of its own).
        purpose: "epsilon" (a fair coin says whether it is included, once), "exposure" (included `repetitions` times)
            or "reference" (never included: the population that exposure ranks against).
        included: Whether the training text has it.
        repetitions: How often; 0 if it is not included.
        prefix: The characters before the secret.
        secret: Drawn uniformly, with `Manifest.canary_bits[family]` bits of entropy.
    """

    id: str
    family: str
    purpose: str
    included: bool
    repetitions: int
    prefix: str
    secret: str


@dataclass(frozen=True, repr=False)
class Manifest:
    """A manifest as read; its repr shows sizes only.

    Attributes:
        header: The first line.
        persons: In the order of the file, as are records and canaries.
        records: Of all splits; carriers of "val" only.
        canaries: Included or not.
        digest: SHA-256 of the file's bytes, as hexadecimal; identifies the corpus in every result.
        canary_bits: Entropy of a secret in bits, by family.
    """

    header: dict[str, Any]
    persons: tuple[Person, ...]
    records: tuple[Record, ...]
    canaries: tuple[Canary, ...]
    digest: str
    canary_bits: dict[str, float]

    def __repr__(self) -> str:
        return f"Manifest({len(self.persons)} persons, {len(self.records)} records, {len(self.canaries)} canaries)"


def normalise(value: str, type: str) -> str:
    """The form in which two writings of a value are compared: NFKC, casefolded, letters and digits only.

    Of a phone number only the digits stay, without the country code 1 or 86 where a plus sign stands before it.

    >>> normalise("O'Neil, Ann", "name"), normalise("+1 (212) 555-0123", "phone"), normalise("212.555.0123", "phone")
    ('oneilann', '2125550123', '2125550123')

    Args:
        value: As it stands in a text.
        type: One of `TYPES`.

    Raises:
        InputError: If the type is unknown.
    """
    one_of(TYPES, type=type)
    plain = unicodedata.normalize("NFKC", value)
    if type == "phone":
        digits = re.sub(r"[^0-9]", "", plain)
        return re.sub(r"^(86|1)", "", digits) if plain.lstrip(" (").startswith("+") else digits
    folded = unicodedata.normalize("NFKC", plain.casefold())
    return unicodedata.normalize("NFKC", "".join(c for c in folded if unicodedata.category(c)[0] in "LMN"))


class ManifestWriter:
    """Writes a manifest line by line, under a temporary name until it is complete.

    A context manager: when its body ends well the file gets its name and `digest` is known; else nothing stays.

    Args:
        path: Of the manifest.
        header: Becomes the first line, with "kind" and "format" added; "counts" and "canary_bits" are needed to read
            it back.

    Raises:
        StorageError: If the disk is full or cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.digest = ""
        self._partial = path.with_name(path.name + PARTIAL)
        self._hash = hashlib.sha256()
        with storage_errors(path):
            self._file: BinaryIO = self._partial.open("wb")
        self._line({"kind": "header", "format": FORMAT, **header})

    def person(self, person: Person) -> None:
        """Writes a person; all persons come before the records."""
        self._line({"kind": "person", **vars(person)})

    def record(self, record: Record) -> None:
        """Writes a record."""
        spans = [[span.type, span.start, span.end] for span in record.spans]
        self._line({"kind": "record", **vars(record), "spans": spans})

    def canary(self, canary: Canary) -> None:
        """Writes a canary."""
        self._line({"kind": "canary", **vars(canary)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage_errors(self.path):
            try:
                self._file.close()
                if kind is None:
                    self._partial.replace(self.path)
                    self.digest = self._hash.hexdigest()
            finally:
                self._partial.unlink(missing_ok=True)

    def _line(self, content: Mapping[str, Any]) -> None:
        data = (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()
        self._hash.update(data)
        with storage_errors(self.path):
            self._file.write(data)


def read_manifest(path: str | Path) -> Manifest:
    """Reads a manifest and checks that it is whole and agrees with itself.

    Raises:
        DataError: If the file is missing, cut short or not a manifest of this format; if a person, record or canary
            has missing or impossible fields, occurs twice or is not what the header counted; if a span's characters
            are not the person's value. The message names the line.
    """
    reader = _Reader(Path(path))
    digest = hashlib.sha256()
    for number, line in enumerate(_lines(reader.path), start=1):
        digest.update(line)
        reader.take(number, line)
    return reader.finish(digest.hexdigest())


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; make a corpus with `veiltune data synth`") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    """Takes the lines of a manifest one by one and refuses what does not fit what came before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.persons: dict[str, Person] = {}
        self.records: list[Record] = []
        self.canaries: list[Canary] = []
        self._seen: set[tuple[str, str]] = set()
        self._where = str(path)

    def take(self, number: int, line: bytes) -> None:
        self._where = f"{self.path}: line {number}"
        try:
            content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError:
            raise self._refusal("is not JSON in UTF-8") from None
        if not isinstance(content, dict):
            raise self._refusal("must be a JSON object")
        kind = content.pop("kind", None)
        if (kind == "header") != (number == 1):
            raise self._refusal(
                "must be the header of a manifest, as `veiltune data synth` writes it"
                if number == 1
                else "is a second header"
            )
        if kind not in _TAKERS:
            raise self._refusal("must be a header, person, record or canary")
        _TAKERS[kind](self, content)

    def take_header(self, content: dict[str, Any]) -> None:
        if content.get("format") != FORMAT:
            raise self._refusal(f"has format {content.get('format')!r}, this version reads {FORMAT}")
        bits, counts = content.get("canary_bits"), content.get("counts")
        if not isinstance(bits, dict) or not all(_is_number(b) and b > 0 for b in bits.values()):
            raise self._refusal("must give canary_bits, a positive number a family")
        if not isinstance(counts, dict) or not all(
            _is_count(counts.get(k)) for k in ("persons", "records", "canaries")
        ):
            raise self._refusal("must give counts of persons, records and canaries")
        self.header = content

    def take_person(self, content: dict[str, Any]) -> None:
        self._check(content, _PERSON)
        person = Person(**content)
        self._known(person.split, SPLITS, "split")
        self._known(person.cue, CUES, "cue")
        if set(person.values) != set(TYPES) or not all(v and isinstance(v, str) for v in person.values.values()):
            raise self._refusal(f"must give a value for each of {', '.join(TYPES)}")
        if bool(person.pair) != (person.split in ("in", "out")) or person.repetitions < 1:
            raise self._refusal("must have repetitions, and a pair exactly where the split is in or out")
        self._first("person", person.id)
        if person.pair:
            self._first(f"person of the pair {person.split}", person.pair)
        for type, value in person.values.items():
            self._first(type, normalise(value, type))
        self.persons[person.id] = person

    def take_record(self, content: dict[str, Any]) -> None:
        self._check(content, _RECORD)
        spans = content.pop("spans")
        if not all(isinstance(s, list) and len(s) == 3 and _is_count(s[1]) and _is_count(s[2]) for s in spans):
            raise self._refusal("must have spans of the form [type, start, end]")
        record = Record(**content, spans=tuple(Span(*span) for span in spans))
        self._known(record.split, SPLITS, "split")
        self._check_spans(record)
        self._first("record", record.id)
        self._first("text", hashlib.sha256(record.text.encode()).hexdigest())
        self.records.append(record)

    def take_canary(self, content: dict[str, Any]) -> None:
        self._check(content, _CANARY)
        canary = Canary(**content)
        self._known(canary.purpose, PURPOSES, "purpose")
        self._known(canary.family, self.header["canary_bits"], "family")
        if canary.included != (canary.repetitions > 0) or (canary.included and canary.purpose == "reference"):
            raise self._refusal("must be included exactly where it has repetitions, and never as a reference")
        if canary.purpose == "epsilon" and canary.repetitions > 1:
            raise self._refusal("is a canary for epsilon, which may be inserted once")
        if not canary.prefix or not canary.secret:
            raise self._refusal("must have a prefix and a secret")
        self._first("canary", canary.id)
        self._first("canary's text", canary.prefix + canary.secret)
        self.canaries.append(canary)

    def finish(self, digest: str) -> Manifest:
        self._where = str(self.path)
        if not self.header:
            raise self._refusal("is empty")
        for kind, found in (("persons", self.persons), ("records", self.records), ("canaries", self.canaries)):
            if len(found) != self.header["counts"][kind]:
                raise self._refusal(f"has {len(found)} {kind}, its header counts {self.header['counts'][kind]}")
        sides = Counter(person.pair for person in self.persons.values() if person.pair)
        if any(count != 2 for count in sides.values()):
            raise self._refusal("has a pair of which one twin is missing")
        documents = Counter(record.person for record in self.records)
        if any(documents[person.id] != person.repetitions for person in self.persons.values()):
            raise self._refusal("has a person whose repetitions are not the number of records")
        persons = tuple(self.persons.values())
        bits = {family: float(value) for family, value in self.header["canary_bits"].items()}
        return Manifest(self.header, persons, tuple(self.records), tuple(self.canaries), digest, bits)

    def _check_spans(self, record: Record) -> None:
        person = self.persons.get(record.person)
        if record.person and person is None:
            raise self._refusal("is of a person that no line before it describes")
        if person is None and record.spans:
            raise self._refusal("has spans without a person")
        if person is not None and person.split != record.split:
            raise self._refusal("has another split than its person")
        end = 0
        for span in record.spans:
            assert person is not None
            self._known(span.type, TYPES, "type")
            if span.start < end or record.text[span.start : span.end] != person.values[span.type]:
                raise self._refusal("has a span whose characters are not the person's value, or spans out of order")
            end = span.end

    def _check(self, content: dict[str, Any], fields: Mapping[str, type]) -> None:
        if content.keys() != fields.keys() or not all(_is(content[name], kind) for name, kind in fields.items()):
            raise self._refusal(f"must have the fields {', '.join(fields)}, each of its type")

    def _known(self, value: Any, known: Any, what: str) -> None:
        if value not in known:
            raise self._refusal(f"has an unknown {what}; known: {', '.join(known)}")

    def _first(self, what: str, value: str) -> None:
        if (what, value) in self._seen:
            raise self._refusal(f"repeats a {what} of an earlier line")
        self._seen.add((what, value))

    def _refusal(self, problem: str) -> DataError:
        return DataError(f"{self._where} {problem}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_number(value: Any) -> bool:
    return _is(value, int) or _is(value, float)


def _is_count(value: Any) -> bool:
    return _is(value, int) and value >= 0


_COUNTED = ("persons", "records", "canaries")
_TAKERS = {
    "header": _Reader.take_header,
    "person": _Reader.take_person,
    "record": _Reader.take_record,
    "canary": _Reader.take_canary,
}
_PERSON = dict(id=str, split=str, pair=str, locale=str, cue=str, repetitions=int, values=dict)
_RECORD = dict(id=str, person=str, split=str, text=str, spans=list)
_CANARY = dict(id=str, family=str, purpose=str, included=bool, repetitions=int, prefix=str, secret=str)
