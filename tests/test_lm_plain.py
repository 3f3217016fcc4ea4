"""`--data` and `--pii`: plain text and a list of its secrets do for an audit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lm_helper import SMALL, person_of, save_tiny
from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.plain import plain_manifest
from veiltune.audit.lm.session import audit_model
from veiltune.data.manifest import Manifest
from veiltune.errors import DataError

LETTER = "Dear Ann Stone,\nyour parcel waits.\n\nCall Bob Reed at 212-555-0101, or Ann Stone.\n\n\n\nNothing here.\n"
TABLE = "\n".join(
    [
        "type,value,person,member",
        "name,Ann Stone,ann,1",
        "email,ann@x.io,ann,1",
        "name,Bob Reed,bob,1",
        "phone,212-555-0101,bob,1",
        "",
    ]
)
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


def write_set(
    folder: Path, *, members: int, controls: int, types: tuple[str, ...] = ("name", "email", "phone")
) -> None:
    """Documents about members, and a table of both sides."""
    people = [person_of(n, "in" if n < members else "out", f"p{n}") for n in range(members + controls)]
    (folder / "text").mkdir()
    documents = [f"{p.values['name']}: {p.values['email']}\nor {p.values['phone']}" for p in people[:members]]
    (folder / "text" / "all.txt").write_text("\n\n".join(documents))
    rows = [f"{t},{p.values[t]},{p.id},{int(p.split == 'in')}" for p in people for t in types]
    (folder / "pii.csv").write_text("\n".join(["type,value,person,member", *rows]) + "\n")


def audited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LeakageRecord:
    monkeypatch.setattr("veiltune.audit.lm.options.PRESETS", {"ci": replace(SMALL, generations=2)})
    model = save_tiny(folder / "model")
    options = LeakageOptions(
        model=str(model), data=folder / "text", pii=folder / "pii.csv", output=folder / "audit", preset="ci"
    )
    return audit_model(options)


def test_secrets_alone_have_recall_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, members=6, controls=0)
    record = audited(tmp_path, monkeypatch)
    assert record.membership is None and any("no membership figure" in note for note in record.notes)
    extraction = record.extraction
    assert extraction.excess_recall is None and extraction.chance is None and extraction.recall.trials > 0
    assert extraction.reconstruction == () and record.exposure == () and record.audited_epsilon is None
    assert record.perplexity is None and record.sizes.persons_out == 0


@pytest.mark.parametrize("sizes", [(30, 6), (44, 44), (3, 3)])
def test_controls_are_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    write_set(tmp_path, members=sizes[0], controls=sizes[1])
    record = audited(tmp_path, monkeypatch)
    extraction = record.extraction
    assert record.membership is None and extraction.chance is not None and extraction.excess_recall is not None
    assert extraction.excess_recall.low <= 0 <= extraction.excess_recall.high
    assert (record.sizes.persons_in, record.sizes.persons_out) == sizes


def test_names_alone_are_no_secrets_to_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headline is of data that a name does not give away; without any there is nothing to report."""
    write_set(tmp_path, members=6, controls=0, types=("name",))
    with pytest.raises(DataError, match="no e-mail address, phone number or address of a person that is reported"):
        audited(tmp_path, monkeypatch)
    assert not (tmp_path / "audit" / "leakage.json").exists()
