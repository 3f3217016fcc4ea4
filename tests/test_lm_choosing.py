"""An audit of some persons only."""

from __future__ import annotations

from pathlib import Path

import pytest

from veiltune.audit.lm.choosing import chosen_persons
from veiltune.audit.lm.subjects import Subjects
from veiltune.data.manifest import Manifest, read_manifest
from veiltune.data.synth import SynthOptions, synthesise
from veiltune.errors import DataError, InputError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("corpus")
    synthesise(folder, SynthOptions(persons=12, population=4, validation=2, canaries=0, exposure_canaries=0))
    return read_manifest(folder / "manifest.jsonl")


def test_persons_stay_or_leave_with_their_twins_and_records(manifest: Manifest, tmp_path: Path) -> None:
    inside = [person for person in manifest.persons if person.split == "in"]
    (tmp_path / "some.txt").write_text("\n".join(person.id for person in inside[:3]) + "\n")
    whole = Subjects.of(manifest, seed=0)
    found = {}
    for name in ("only", "leave_out"):
        chosen, words = chosen_persons(manifest, **{"only": None, "leave_out": None, name: tmp_path / "some.txt"})
        found[name] = Subjects.of(chosen, seed=0)
        assert f"{3 if name == 'only' else 9} of 12" in words
        assert chosen.digest != manifest.digest
        assert [p for p in chosen.persons if p.split in ("pop", "val")] == [
            p for p in manifest.persons if p.split in ("pop", "val")
        ]
    assert {p.id for p in found["only"].persons if p.split == "in"} == {p.id for p in inside[:3]}
    assert {p.pair for p in found["only"].persons} == {p.pair for p in inside[:3]}
    assert int((~found["only"].members).sum()) == 3
    assert len(found["only"].records) + len(found["leave_out"].records) == len(whole.records)
    assert not {p.id for p in found["only"].persons} & {p.id for p in found["leave_out"].persons}


def test_without_a_choice_nothing_changes(manifest: Manifest) -> None:
    assert chosen_persons(manifest, only=None, leave_out=None) == (manifest, "")


def test_bad_choices_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd.txt").write_text("nobody\n")
    with pytest.raises(DataError, match="names nobody"):
        chosen_persons(manifest, only=tmp_path / "empty.txt", leave_out=None)
    with pytest.raises(DataError, match="1 of the 1 persons"):
        chosen_persons(manifest, only=None, leave_out=tmp_path / "odd.txt")
    with pytest.raises(InputError, match="one of them"):
        chosen_persons(manifest, only=tmp_path / "odd.txt", leave_out=tmp_path / "odd.txt")
    with pytest.raises(InputError, match="text file"):
        chosen_persons(manifest, only=tmp_path / "missing.txt", leave_out=None)
