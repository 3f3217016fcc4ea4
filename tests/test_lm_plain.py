"""`--data` and `--pii`: plain text and a list of its secrets do for an audit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veiltune.audit.lm.plain import plain_manifest
from veiltune.data.manifest import Manifest
from veiltune.errors import DataError

LETTER = "Dear Ann Stone,\nyour parcel waits.\n\nCall Bob Reed at 212-555-0101, or Ann Stone.\n\n\n\nNothing here.\n"
TABLE = "type,value,person,member\nname,Ann Stone,ann,1\nemail,ann@x.io,ann,1\nname,Bob Reed,bob,1\nphone,212-555-0101,bob,1\n"
CONTROLS = "phone,212-555-0199,eve,0\nname,Eve Marsh,eve,0\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text" / "deep").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text(LETTER)
    rows = [{"text": "Write to ann@x.io: Ann Stone"}, {"text": "No secret"}]
    (tmp_path / "text" / "deep" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text" / "notes.md").write_text("Ann Stone is not read here")
    return tmp_path


def made(folder: Path, table: str) -> Manifest:
    (folder / "pii.csv").write_text(table)
    return plain_manifest(folder / "text", folder / "pii.csv")


def found(manifest: Manifest, person: str) -> list[tuple[str, dict[str, str]]]:
    return [
        (record.text, {span.type: record.text[span.start : span.end] for span in record.spans})
        for record in manifest.records
        if record.person == person
    ]


def test_secrets_are_found_where_they_stand(folder: Path) -> None:
    manifest = made(folder, TABLE)
    assert [(person.id, person.split, person.values) for person in manifest.persons] == [
        ("ann", "in", {"name": "Ann Stone", "email": "ann@x.io"}),
        ("bob", "in", {"name": "Bob Reed", "phone": "212-555-0101"}),
    ]
    assert found(manifest, "ann") == [
        ("Dear Ann Stone,\nyour parcel waits.", {"name": "Ann Stone"}),
        ("Call Bob Reed at 212-555-0101, or Ann Stone.", {"name": "Ann Stone"}),
        ("Write to ann@x.io: Ann Stone", {"email": "ann@x.io", "name": "Ann Stone"}),
    ]
    assert found(manifest, "bob") == [
        ("Call Bob Reed at 212-555-0101, or Ann Stone.", {"name": "Bob Reed", "phone": "212-555-0101"})
    ]
    assert len({record.id for record in manifest.records}) == len(manifest.records)
    assert all(list(r.spans) == sorted(r.spans, key=lambda span: span.start) for r in manifest.records)


def test_a_control_is_looked_for_where_a_secret_of_its_kind_stands(folder: Path) -> None:
    manifest = made(folder, TABLE + CONTROLS)
    (eve,) = [person for person in manifest.persons if person.id == "eve"]
    assert eve.split == "out"
    (phone, name) = found(manifest, "eve")
    assert phone == ("Call Bob Reed at 212-555-0199, or Ann Stone.", {"phone": "212-555-0199"})
    assert name[1] == {"name": "Eve Marsh"} and "Eve Marsh" in name[0]
    assert all(record.split == "out" for record in manifest.records if record.person == "eve")


def test_without_persons_each_value_is_somebodys_own(folder: Path) -> None:
    manifest = made(folder, "type,value\nname,Ann Stone\nphone,212-555-0101\n")
    assert [(person.split, list(person.values)) for person in manifest.persons] == [("in", ["name"]), ("in", ["phone"])]
    assert len({person.id for person in manifest.persons}) == 2


def test_the_digest_is_of_text_and_table(folder: Path) -> None:
    one, same, other = (made(folder, table).digest for table in (TABLE, TABLE, TABLE + CONTROLS))
    assert one == same != other
    (folder / "text" / "a.txt").write_text(LETTER + "\n\nMore.")
    assert made(folder, TABLE).digest != one


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("kind,value\nname,Ann Stone\n", "no column 'type'"),
        ("type,value\n", "no rows"),
        ("type,value\npassport,12345\n", "row 1 has an unknown type; known: name, email"),
        ("type,value,member\nname,Ann Stone,maybe\n", "row 1 must have 1 or 0 as member"),
        ("type,value\nname,Ann Stone\nname,---\n", "row 2 has a value without letters or digits"),
        ("type,value\nphone,Ann Stone\n", "row 1 has a value without letters or digits"),
        ("type,value,person\nname,Ann Stone,a\nname,Bob Reed,a\n", "row 2 repeats a type of its person"),
        ("type,value,person,member\nname,Ann Stone,a,1\nphone,212-555-0101,a,0\n", "row 2 .* contradicts its side"),
        ("type,value\nname,Zed Quist\n", "none of the values of .* stands in the text"),
        ("type,value,member\nname,Ann Stone,0\n", "none of the values of .* stands in the text"),
    ],
)
def test_a_table_that_will_not_do(folder: Path, table: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as refusal:
        made(folder, table)
    assert not any(secret in str(refusal.value) for secret in ("Ann", "Bob", "Zed", "12345", "212"))


def test_a_folder_that_will_not_do(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "pii.csv").write_text(TABLE)
    for name in ("empty", "nowhere", "pii.csv"):
        with pytest.raises(DataError, match=r"must be a folder with \.txt or \.jsonl files"):
            plain_manifest(folder / name, folder / "pii.csv")
    (folder / "text" / "c.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8 \(byte 2\)"):
        made(folder, TABLE)
