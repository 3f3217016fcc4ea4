"""A manifest is read back as it was written, or refused in one line that names the place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veiltune.data.manifest import (
    TYPES,
    Canary,
    ManifestWriter,
    Person,
    Record,
    Span,
    normalise,
    read_manifest,
)
from veiltune.errors import DataError, InputError, StorageError

HEADER = {
    "seed": 0,
    "counts": {"persons": 2, "records": 3, "canaries": 2},
    "canary_bits": {"pii": 43.4, "random": 94.0},
}


def person(id: str, split: str, name: str, number: int, pair: str = "pair-0") -> Person:
    values = {"name": name, "email": f"{number}@example.com", "phone": f"212-555-010{number}"}
    addresses = {"home": f"{number} Ash Lane, Belby", "work": f"{number} Elm Plaza, Belby"}
    return Person(id, split, pair, "en_US", "cue_free", 1, values | addresses)


PERSONS = (person("person-1", "in", "Ann Stone", 1), person("person-2", "out", "Bob Reed", 2))
RECORDS = (
    Record("a", "person-1", "in", "Ann Stone: 1@example.com", (Span("name", 0, 9), Span("email", 11, 24))),
    Record("b", "person-2", "out", "Call Bob Reed", (Span("name", 5, 13),)),
    Record("c", "", "val", "云川市 has no 'secrets'\nat all.", ()),
)
CANARIES = (
    Canary("canary-1", "pii", "epsilon", True, 1, "Write to ", "x@example.com"),
    Canary("canary-2", "random", "reference", False, 0, "Code ", "abcd"),
)


def write(path: Path, header: dict[str, Any] = HEADER) -> ManifestWriter:
    with ManifestWriter(path, header) as writer:
        for one in PERSONS:
            writer.person(one)
        for record in RECORDS:
            writer.record(record)
        for canary in CANARIES:
            writer.canary(canary)
    return writer


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    writer = write(path)
    manifest = read_manifest(path)
    assert (manifest.persons, manifest.records, manifest.canaries) == (PERSONS, RECORDS, CANARIES)
    assert manifest.canary_bits == HEADER["canary_bits"] and manifest.header["seed"] == 0
    assert manifest.digest == writer.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert repr(manifest) == "Manifest(2 persons, 3 records, 2 canaries)"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("private", [PERSONS[0], RECORDS[0], CANARIES[0]])
def test_no_private_text_is_shown(private: object) -> None:
    assert not any(word in repr(private) for word in ("Ann", "example", "person-1", "canary-1"))


def test_nothing_stays_of_a_manifest_that_failed(tmp_path: Path) -> None:
    writer = ManifestWriter(tmp_path / "manifest.jsonl", HEADER)
    with pytest.raises(ZeroDivisionError), writer:
        writer.person(PERSONS[0])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [] and writer.digest == ""
    with pytest.raises(StorageError, match="cannot write"):
        ManifestWriter(tmp_path / "none" / "manifest.jsonl", HEADER)


Change = Callable[[list[dict[str, Any]]], object]
WRONG: list[tuple[Change, str]] = [
    (lambda lines: lines[0].update(format=2), r"line 1 has format 2, this version reads 1"),
    (lambda lines: lines[0].pop("canary_bits"), "line 1 must give canary_bits"),
    (lambda lines: lines[0].update(canary_bits={"pii": 0}), "line 1 must give canary_bits"),
    (lambda lines: lines[0].update(counts={"persons": 2}), "line 1 must give counts"),
    (lambda lines: lines.pop(0), "line 1 must be the header"),
    (lambda lines: lines.insert(3, lines[0]), "line 4 is a second header"),
    (lambda lines: lines.pop(), r"has 1 canaries, its header counts 2"),
    (lambda lines: lines[1].update(kind="animal"), "line 2 must be a header, person, record or canary"),
    (lambda lines: lines[1].pop("cue"), "line 2 must have the fields id, split"),
    (lambda lines: lines[1].update(extra=1), "line 2 must have the fields id, split"),
    (lambda lines: lines[1].update(repetitions=True), "line 2 must have the fields id, split"),
    (lambda lines: lines[1].update(repetitions=0), "line 2 must have repetitions, and a pair"),
    (lambda lines: lines[1].update(repetitions=2), "has a person whose repetitions are not the number of records"),
    (lambda lines: lines[1].update(split="train"), "line 2 has an unknown split; known: in, out, pop, val"),
    (lambda lines: lines[1].update(cue="free"), "line 2 has an unknown cue"),
    (lambda lines: lines[1].update(pair=""), "line 2 must have repetitions, and a pair exactly"),
    (lambda lines: lines[1].update(pair="pair-1"), "has a pair of which one twin is missing"),
    (
        lambda lines: (lines[2].update(split="in"), lines[4].update(split="in")),
        "line 3 repeats a person of the pair in",
    ),
    (lambda lines: lines[1]["values"].pop("home"), "line 2 must give a value for each of name, email"),
    (lambda lines: lines[1]["values"].update(home=""), "line 2 must give a value for each of name, email"),
    (lambda lines: lines[2]["values"].update(name="ann stone"), "line 3 repeats a name of an earlier line"),
    (lambda lines: lines[2].update(id="person-1"), "line 3 repeats a person of an earlier line"),
    (lambda lines: lines[3]["spans"][0].__setitem__(1, 1), "line 4 has a span whose characters are not the person's"),
    (lambda lines: lines[3]["spans"][0].__setitem__(0, "email"), "line 4 has a span whose characters are not"),
    (lambda lines: lines[3]["spans"][0].__setitem__(0, "fax"), "line 4 has an unknown type"),
    (lambda lines: lines[3]["spans"].reverse(), "line 4 has a span .* or spans out of order"),
    (lambda lines: lines[3].update(spans=[["name", 0]]), r"line 4 must have spans of the form \[type, start, end\]"),
    (lambda lines: lines[3].update(spans=[["name", -9, 9]]), "line 4 must have spans of the form"),
    (lambda lines: lines[3].update(person="person-9"), "line 4 is of a person that no line before it describes"),
    (lambda lines: lines[3].update(person=""), "line 4 has spans without a person"),
    (lambda lines: lines[3].update(split="out"), "line 4 has another split than its person"),
    (lambda lines: lines[4].update(id="a"), "line 5 repeats a record of an earlier line"),
    (lambda lines: lines.insert(5, {**lines[4], "id": "z"}), "line 6 repeats a text of an earlier line"),
    (lambda lines: lines[6].update(purpose="fun"), "line 7 has an unknown purpose"),
    (lambda lines: lines[6].update(family="fun"), "line 7 has an unknown family; known: pii, random"),
    (lambda lines: lines[6].update(included=False), "line 7 must be included exactly where it has repetitions"),
    (lambda lines: lines[7].update(included=True, repetitions=1), "line 8 must be included .* never as a reference"),
    (lambda lines: lines[6].update(repetitions=2), "line 7 is a canary for epsilon, which may be inserted once"),
    (lambda lines: lines[6].update(secret=""), "line 7 must have a prefix and a secret"),
    (lambda lines: lines[7].update(id="canary-1"), "line 8 repeats a canary of an earlier line"),
    (lambda lines: lines[7].update(prefix="Write to ", secret="x@example.com"), "line 8 repeats a canary's text"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = tmp_path / "manifest.jsonl"
    write(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=rf"manifest\.jsonl:? .*{message}") as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)
    assert not any(text in str(caught.value) for text in ("Ann", "example.com", "person-", "canary-"))


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    with pytest.raises(DataError, match=r"manifest.jsonl does not exist; make a corpus with `veiltune data synth`"):
        read_manifest(path)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_manifest(tmp_path)
    for content, message in (
        (b"", "manifest.jsonl is empty"),
        (b"[1]\n", "line 1 must be a JSON object"),
        (b"\xff\n", "line 1 is not JSON in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_manifest(path)
    write(path)
    path.write_bytes(path.read_bytes()[:-20])  # cut short in the middle of a line
    with pytest.raises(DataError, match="line 8 is not JSON in UTF-8"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("value", "type", "normal"),
    [
        ("Ann  Stone-Reed.", "name", "annstonereed"),
        ("ＡＮＮ Stone", "name", "annstone"),  # noqa: RUF001
        ("Straße", "home", "strasse"),
        ("云川市 松涧路148号", "home", "云川市松涧路148号"),
        ("J.Doe@Example.com", "email", "jdoeexamplecom"),
        ("+1 (212) 555-0123", "phone", "2125550123"),
        ("(212) 555.0123", "phone", "2125550123"),
        ("+86 129 1234 5678", "phone", "12912345678"),
        ("129-1234-5678", "phone", "12912345678"),
        ("1 212 555 0123", "phone", "12125550123"),  # without the plus sign the 1 stays
    ],
)
def test_normal_forms(value: str, type: str, normal: str) -> None:
    assert normalise(value, type) == normal


@given(value=st.text(max_size=30), type=st.sampled_from(TYPES))
def test_normal_forms_stay_as_they_are(value: str, type: str) -> None:
    once = normalise(value, type)
    assert normalise(once, type) == once
    assert normalise(f" {value.replace(' ', '  ')}!", type) in (once, normalise(value.strip(), type))


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(InputError, match="type 'mail' is unknown; did you mean 'email'"):
        normalise("a", "mail")
