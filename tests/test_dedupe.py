"""Planted duplicates go, everything else stays byte for byte, and a slow exact comparison decides the same."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from veiltune.cli import app
from veiltune.data.dedupe import DedupeOptions, dedupe, first_occurrences, first_of_each
from veiltune.data.shingles import PERMUTATIONS, exact_hash, plain, rows_for, shingles, signature
from veiltune.errors import DataError, InputError

LETTERS = "abcdefghijklmnop"


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=4)) for _ in range(count)]


def jaccard(a: str, b: str) -> float:
    first, second = shingles(plain(a)), shingles(plain(b))
    return len(first & second) / len(first | second)


def changed(rng: random.Random, text: list[str], edits: int) -> list[str]:
    """Other words at so many places, far apart."""
    new = list(text)
    for place in range(edits):
        new[(place * 11 + 5) % len(text)] = "".join(rng.choices(LETTERS, k=5))
    return new


def write(path: Path, texts: list[str], persons: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, "text": text, "person": persons[i] if persons else "", "x": 1.50} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept(folder: Path, name: str = "x.jsonl") -> list[int]:
    return [json.loads(line)["id"] for line in (folder / name).read_text().splitlines()]


def slow(texts: list[str], threshold: float) -> list[int]:
    """Compares each text with every one that stays."""
    stay: list[int] = []
    for index, text in enumerate(texts):
        if all(plain(text) != plain(texts[i]) and jaccard(text, texts[i]) < threshold for i in stay):
            stay.append(index)
    return stay


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """Texts with duplicates far above the threshold and look-alikes far below it, shuffled."""
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        base = words(rng, 150)
        texts.append(" ".join(base))
        texts += [" ".join(changed(rng, base, 1))] * rng.randint(0, 2)  # J = .93
        texts += [" ".join(changed(rng, base, 12))] * rng.randint(0, 1)  # J = .42
        if rng.random() < 0.3:
            texts.append(", ".join(base).upper() + "!")
    rng.shuffle(texts)
    return texts


def test_what_stays_is_what_a_slow_comparison_leaves(
    planted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = slow(planted, 0.8)
    summary = dedupe([write(tmp_path / "x.jsonl", planted)], tmp_path / "out")
    assert kept(tmp_path / "out") == expected
    exact = len(planted) - len({tuple(plain(text)) for text in planted})
    assert (summary.records, summary.kept, summary.exact) == (len(planted), len(expected), exact)
    assert summary.near == len(planted) - exact - len(expected) > 15
    original = (tmp_path / "x.jsonl").read_text().splitlines(keepends=True)
    assert (tmp_path / "out" / "x.jsonl").read_text() == "".join(original[i] for i in expected)
    with monkeypatch.context() as without:  # exact duplicates need no datasketch
        without.setattr("veiltune.data.dedupe.version", lambda name: 1 / 0)
        dedupe([tmp_path / "x.jsonl"], tmp_path / "exact", DedupeOptions(threshold=1.0))
    assert len(kept(tmp_path / "exact")) == len(planted) - exact


def test_near_duplicates_above_the_threshold_are_found_as_often_as_stated(tmp_path: Path) -> None:
    rng = random.Random(5)
    found = {}
    for edits, low, high in ((1, 0.9, 0.95), (2, 0.84, 0.88), (4, 0.68, 0.76)):
        pairs = []
        for _ in range(60):
            base = words(rng, 130)
            pairs += [" ".join(base), " ".join(changed(rng, base, edits))]
        assert all(low < jaccard(a, b) < high for a, b in zip(pairs[::2], pairs[1::2], strict=True))
        found[edits] = dedupe([write(tmp_path / f"{edits}.jsonl", pairs)], tmp_path / f"out-{edits}").near
    assert found[1] == 60 and found[2] >= 48 and found[4] <= 6


def test_signatures_agree_as_often_as_the_jaccard_index_says() -> None:
    rng = random.Random(1)
    for edits in (1, 4, 10):
        shares, true = [], []
        for _ in range(60):
            base = words(rng, 130)
            other = changed(rng, base, edits)
            shares.append(np.mean(signature(base) == signature(other)))
            true.append(jaccard(" ".join(base), " ".join(other)))
        expected = float(np.mean(true))
        error = 5 * np.sqrt(expected * (1 - expected) / PERMUTATIONS / 60)
        assert abs(np.mean(shares) - expected) < error
        assert abs(np.mean(shares) - (expected - 0.1)) > error  # planted: a wrong index


def test_bands_find_a_pair_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        rows = rows_for(threshold)
        chances = [1 - (1 - threshold**r) ** (PERMUTATIONS // r) for r in (rows, rows + 1)]
        assert chances[0] >= 0.99 > chances[1]


def test_chinese_texts_are_compared_by_characters(tmp_path: Path) -> None:
    rng = random.Random(2)
    base = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(120))
    other = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(120))
    texts = [base, base[:60] + "甲" + base[61:], other, base + "。"]
    dedupe([write(tmp_path / "x.jsonl", texts)], tmp_path / "out")
    assert kept(tmp_path / "out") == slow(texts, 0.8) == [0, 2]


def test_short_and_empty_texts(tmp_path: Path) -> None:
    texts = ["yes", "Yes!", "no", "", " ", "yes no", "one two three four", "one two three five"]
    dedupe([write(tmp_path / "x.jsonl", texts)], tmp_path / "out")
    assert kept(tmp_path / "out") == [0, 2, 3, 5, 6, 7]


def test_the_first_so_many_of_a_person_stay(tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = [" ".join(words(rng, 20)) for _ in range(30)]
    texts[7] = texts[2]
    persons = [rng.choice("pqr") for _ in texts]
    source = write(tmp_path / "x.jsonl", texts, persons)
    summary = dedupe([source], tmp_path / "out", DedupeOptions(person_column="person", max_records=4))
    expected, count = [], dict.fromkeys("pqr", 0)
    for index, person in enumerate(persons):
        if index != 7 and count[person] < 4:
            expected.append(index)
            count[person] += 1
    assert kept(tmp_path / "out") == expected and summary.capped == 29 - len(expected)
    report = json.loads(summary.report.read_text())
    assert report["files"] == [{"name": "x.jsonl", "records": 30, "kept": len(expected)}]


@pytest.mark.parametrize("nobody", ["", "  ", None])
def test_records_of_nobody_known_are_not_those_of_one_person(nobody: str | None, tmp_path: Path) -> None:
    rng = random.Random(6)
    rows = [(nobody if i % 2 else "p", " ".join(words(rng, 20))) for i in range(20)]
    lines = [json.dumps({"id": i, "person": person, "text": text}) for i, (person, text) in enumerate(rows)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, ""]))
    table = [f"{i},{person or ''},{text}" for i, (person, text) in enumerate(rows)]
    (tmp_path / "x.csv").write_text("\n".join(["id,person,text", *table, ""]))
    options = DedupeOptions(person_column="person", max_records=3, processes=1)
    expected = [i for i in range(20) if i % 2 or i < 6]
    summary = dedupe([tmp_path / "x.jsonl"], tmp_path / "lines", options)
    assert kept(tmp_path / "lines") == expected and (summary.kept, summary.capped) == (13, 7)
    summary = dedupe([tmp_path / "x.csv"], tmp_path / "table", options)
    assert (summary.kept, summary.capped) == (13, 7)


def test_fast_and_slow_choices_agree() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        size = int(rng.integers(0, 40))
        persons = rng.integers(0, 5, size).astype(np.uint64)
        among = rng.random(size) < 0.7
        most = int(rng.integers(1, 5))
        taken: dict[int, int] = {}
        expected = []
        for person, chosen in zip(persons.tolist(), among, strict=True):
            taken[person] = taken.get(person, 0) + chosen
            expected.append(bool(chosen and (person == 0 or taken[person] <= most)))
        assert first_of_each(persons, among, most).tolist() == expected
        hashes = rng.integers(0, 3, (size, 2)).astype(np.uint64)
        seen = [tuple(row) for row in hashes.tolist()]
        assert first_occurrences(hashes).tolist() == [row not in seen[:i] for i, row in enumerate(seen)]


def test_duplicates_across_files_and_kinds_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"One two three.\r\n\r\nfour\n\nfour")
    (tmp_path / "b.csv").write_bytes(b'id,text\n1,"one, two\nthree"\n2,five\n3,Four!\n')
    dedupe([tmp_path / "a.txt", tmp_path / "b.csv"], tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"One two three.\r\n\r\nfour\n\n"
    assert (tmp_path / "out" / "b.csv").read_bytes() == b"id,text\n2,five\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_chunks_and_processes_change_nothing(planted: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", planted)
    for name, processes, chunk_bytes in (("a", 1, 10**6), ("b", 1, 3000), ("c", 2, 50_000)):
        dedupe([source], tmp_path / name, DedupeOptions(processes=processes, chunk_bytes=chunk_bytes))
    assert len({(tmp_path / name / "x.jsonl").read_bytes() for name in "abc"}) == 1


@pytest.mark.parametrize("phase", ["sketch", "copy"])
def test_a_killed_run_goes_on_to_the_same_bytes(phase: str, planted: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", planted)
    options = DedupeOptions(processes=1, chunk_bytes=20_000)
    dedupe([source], tmp_path / "whole", options)
    seen: list[str] = []

    def kill(name: str, *_: int) -> None:
        seen.append(name)
        if name == phase and seen.count(name) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dedupe([source], tmp_path / "out", options, progress=kill)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["private"]
    again: list[str] = []
    dedupe([source], tmp_path / "out", options, progress=lambda name, *_: again.append(name))
    assert again.count("sketch") == (0 if phase == "copy" else seen.count("sketch") and again.count("copy") - 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.1}, "threshold must be in [0.3, 1.0], got 0.1"),
        ({"max_records": 2}, "max_records counts records of a person; name the person column"),
        ({"max_records": -1}, "must be 0 or more"),
        ({"text_column": "body"}, "has no column 'body'; there are: 'id', 'text'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(InputError, match=re.escape(message)):
        dedupe([source], tmp_path / "out", replace(DedupeOptions(), **options))


def test_the_output_of_another_command_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "x.jsonl", ["a"])
    with pytest.raises(InputError, match="is the folder of an input file"):
        dedupe([source], tmp_path / "in")
    dedupe([source], tmp_path / "out")
    with pytest.raises(InputError, match="holds a finished run"):
        dedupe([source], tmp_path / "out")
    (tmp_path / "in" / "x.jsonl").write_text('{"text": "a"}\n{"text": Secret}\n')
    with pytest.raises(DataError, match=r"line 2 is not JSON$"):
        dedupe([source], tmp_path / "new")


def test_hashes_of_words() -> None:
    assert exact_hash("Hello,  WORLD") == exact_hash(["hello", "world"]) != exact_hash("hello")
    assert len(exact_hash("")) == 16


def test_texts_without_words_and_vowel_signs_are_told_apart(tmp_path: Path) -> None:
    texts = ["+++", "???", ":-) :-)", "+++", "ดี", "ดา", "ดี!", "हिन्दी", "हिनदी", "\u2764\ufe0f", "\U0001f600"]
    for threshold in (1.0, 0.8):
        output = tmp_path / f"{threshold}"
        dedupe([write(tmp_path / "x.jsonl", texts)], output, DedupeOptions(threshold=threshold))
        assert kept(output) == [0, 1, 2, 4, 5, 7, 8, 9, 10]


def test_the_command(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", ["a b", "A b.", "c"], ["p", "p", "p"])
    arguments = [
        "data",
        "dedupe",
        str(source),
        str(tmp_path / "out"),
        "--person-column",
        "person",
        "--max-records",
        "1",
    ]
    result = CliRunner().invoke(app, arguments)
    assert "1 of 3 records stay; dropped 1 exact and 0 near-duplicates, and 1 above" in result.output.replace("\n", " ")
