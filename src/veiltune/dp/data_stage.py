"""The data stage of a training run: duplicates, a person's surplus records and personal data leave the rows.

    RUN/private/data/rows.jsonl      the rows as they were read (a prompt and a target are two lines)
                     scrubbed/       what `veiltune data scrub` makes of those that stay

Without privacy the rows are looked at together, as `veiltune data dedupe` and `scrub` do it. With privacy a row's fate
may depend on the records of its own person only, or the claim for one person would hang on what others wrote.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from veiltune.config.defences import Defences
from veiltune.data.dedupe import DedupeOptions, dedupe
from veiltune.data.detect import Detector
from veiltune.data.prompts import Prompted
from veiltune.data.propagate import Finder, long_enough
from veiltune.data.scrub import ScrubOptions, scrub
from veiltune.data.shingles import exact_hash, plain
from veiltune.dp.data import Labelled, TrainingTables
from veiltune.runs import atomic_write_bytes

Rows = Labelled | Prompted
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Thinned:
    """Rows after duplicates and surplus records left.

    Attributes:
        tables: With the rows that stay.
        notes: What was done, a line each.
    """

    tables: TrainingTables
    notes: list[str]


def thin_out(tables: TrainingTables, defences: Defences, *, private: bool) -> Thinned:
    """Drops duplicates and surplus records of the training rows; the first ones stay, in their order.

    Args:
        tables: As they were read.
        defences: What to do.
        private: Whether a row may be dropped for the sake of its own person's rows only.

    Raises:
        InputError: If near-duplicates are asked for and datasketch is missing.
    """
    if not (defences.dedupe or defences.max_records):
        return Thinned(tables, [])
    rows = tables.train
    kept = _own_first(rows, defences) if private else _firsts(rows, defences)
    note = f"data stage: {len(kept)} of {len(rows)} training rows stay without duplicates and surplus records"
    return Thinned(replace(tables, train=_chosen(rows, kept)), [note])


def scrubbed(rows: Rows, defences: Defences, folder: Path, *, private: bool) -> tuple[Rows, list[str]]:
    """Replaces personal data in training rows, and says what was done.

    Args:
        rows: Those that stay.
        defences: What to do.
        folder: For rows and what becomes of them, kept to go on from; as secret as the rows.
        private: Whether a value may be looked for in the records of others; see the module.

    Raises:
        InputError: If an optional package is missing.
        DataError: If the table of known values is broken.
        StorageError: If the folder cannot be written.
    """
    if defences.scrub == "off":
        return rows, []
    source, output = folder / "rows.jsonl", folder / "scrubbed"
    if not (output / "scrub.json").exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(source, rows)
        options = ScrubOptions(
            person_column="person",
            mode=defences.scrub,
            known=Path(defences.known) if defences.known else None,
            propagate=not private,
            contexts=0,
        )
        scrub([source], output, options)
    counts = json.loads((output / "scrub.json").read_bytes())["types"]
    places = sum(count["found"] + count["propagated"] for count in counts.values())
    note = f"data stage: {places} places of personal data replaced ({defences.scrub})"
    return _with_texts(rows, _read(output / "rows.jsonl")), [note]


def personal_spans(texts: Sequence[str], *, private: bool) -> list[Spans]:
    """Where personal data, or what stands in its place, is in each text.

    Args:
        texts: One a row.
        private: Then what is found in one text is not looked for in the others.

    Raises:
        InputError: If an optional package is missing.
    """
    detector = Detector()
    found = [[(one.start, one.end) for one in detector.find(text)] for text in texts]
    if private:
        return found
    values = {text[a:b] for text, spans in zip(texts, found, strict=True) for a, b in spans}
    finder = Finder({value: 0 for value in values if long_enough(value)})
    return [spans + [(a, b) for a, b, _ in finder.find(text)] for text, spans in zip(texts, found, strict=True)]


def _own_first(rows: Rows, defences: Defences) -> list[int]:
    """With privacy: a function of each person's rows alone."""
    seen: set[tuple[str, bytes]] = set()
    of_person: Counter[str] = Counter()
    kept = []
    for index, text in enumerate(_whole(rows)):
        person = rows.persons[index] if rows.persons else str(index)
        key = (person, exact_hash(plain(text)))
        if (defences.dedupe and key in seen) or (defences.max_records and of_person[person] >= defences.max_records):
            continue
        seen.add(key)
        of_person[person] += 1
        kept.append(index)
    return kept


def _firsts(rows: Rows, defences: Defences) -> list[int]:
    if not defences.dedupe:
        return _own_first(rows, defences)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        lines = ({"text": text, "person": _person(rows, index)} for index, text in enumerate(_whole(rows)))
        _write_lines(source, ({"row": index, **line} for index, line in enumerate(lines)))
        options = DedupeOptions(
            threshold=defences.dedupe,
            person_column="person" if rows.persons else "",
            max_records=defences.max_records,
        )
        dedupe([source], Path(folder) / "out", options)
        return [line["row"] for line in _lines(Path(folder) / "out" / "rows.jsonl")]


def _whole(rows: Rows) -> list[str]:
    if isinstance(rows, Labelled):
        return rows.texts
    return [
        f"{prompt}\n{target}" if prompt else target for prompt, target in zip(rows.prompts, rows.targets, strict=True)
    ]


def _person(rows: Rows, index: int) -> str:
    return rows.persons[index] if rows.persons else ""


def _chosen(rows: Rows, kept: Sequence[int]) -> Rows:
    def of(column: list[str]) -> list[str]:
        return [column[index] for index in kept]

    persons = of(rows.persons) if rows.persons else None
    if isinstance(rows, Labelled):
        return Labelled(of(rows.texts), of(rows.labels), persons)
    return Prompted(of(rows.prompts), of(rows.targets), persons)


def _columns(rows: Rows) -> tuple[list[str], ...]:
    """The columns with text, the ones to be replaced."""
    if isinstance(rows, Labelled):
        return (rows.texts,)
    return (rows.prompts, rows.targets) if any(rows.prompts) else (rows.targets,)


def _write(path: Path, rows: Rows) -> None:
    """Rows that are there already stay untouched, since an interrupted scrub goes on only if its input is no newer."""
    lines = (
        {"text": text, "person": _person(rows, index)}
        for index, texts in enumerate(zip(*_columns(rows), strict=True))
        for text in texts
    )
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if not path.exists() or path.read_bytes() != data:
        atomic_write_bytes(path, data, mode=0o600)


def _with_texts(rows: Rows, texts: list[str]) -> Rows:
    columns = [texts[place :: len(_columns(rows))] for place in range(len(_columns(rows)))]
    if isinstance(rows, Labelled):
        return replace(rows, texts=columns[0])
    prompts = columns[0] if len(columns) > 1 else rows.prompts
    return Prompted(prompts, columns[-1], rows.persons)


def _write_lines(path: Path, lines: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _read(path: Path) -> list[str]:
    return [str(line["text"]) for line in _lines(path)]
