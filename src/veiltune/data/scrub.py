"""Takes personal data out of tables of texts: finds it, looks for what was found everywhere, and replaces it.

    OUT/train.jsonl    the same records in the same order, other columns byte for byte
    OUT/scrub.json     counts by type, settings, sampled contexts in which what was found is masked, and every word
                       that is not all small letters, so that of a missed value only what is written small is there
    OUT/private/       while it runs: what is needed to go on, mode 0700; gone at the end

A record of a .txt file, or of a .tsv file with one column, of which nothing is left is an empty line, which readers may
skip; these kinds of file have no other way to write it.

Two passes over the files, in chunks: the first finds values, the second replaces them, also where only the look for
known values finds them. With surrogates there is one more in between, which draws those anew that occur in the corpus.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veiltune import __version__
from veiltune._validate import one_of, positive_int
from veiltune.data.detect import TYPES, Detector, DetectorOptions
from veiltune.data.optional import need
from veiltune.data.propagate import fold
from veiltune.data.pseudonyms import KEY_BYTES, Key, Pseudonyms, Value
from veiltune.data.replacing import MODES
from veiltune.data.scrubbing import (
    Values,
    find_in_chunk,
    meet_in_chunk,
    prepare_finding,
    prepare_meeting,
    prepare_replacing,
    replace_in_chunk,
)
from veiltune.data.streaming import CHUNK_BYTES, Chunk, Source, chunks, open_source
from veiltune.data.surrogates import canonical
from veiltune.data.tables import read_columns, read_optional_column
from veiltune.data.workers import ChunkedFile, WorkFolder, check_sources, in_order, processes_for
from veiltune.errors import DataError, InputError

REPORT = "scrub.json"
_KNOWN_TYPES = {"home": "address", "work": "address"}
_ROUNDS = 8
_LEAST_KEY = 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ScrubOptions:
    """How texts are scrubbed.

    Attributes:
        text_column: Column of the texts.
        person_column: Column that tells persons apart, "" for none: then a value has one surrogate whoever's it is.
        mode: "pseudonym" (a surrogate of the same form, the same for the same value), "mask" ([EMAIL]) or "remove".
        detection: What to look for.
        known: Table with the columns type, value and, if there is one, person: values to look for besides.
        key_file: At least 16 secret bytes, for the same surrogates in several runs; None for a key of this run alone.
        propagate: Whether what was found is looked for everywhere. If not, what becomes of a record hangs on the
            options, the key, the record and its person alone, as differential privacy per person needs it.
        contexts: Sampled contexts a type in the report.
        max_values: Most distinct values; they are what grows in memory, by some 4 KB each over all
            processes: with 200 000 it stays below a gigabyte.
        processes: 0 for one a core.
        chunk_bytes: About how much is worked on at a time.
    """

    text_column: str = "text"
    person_column: str = ""
    mode: str = "pseudonym"
    detection: DetectorOptions = field(default_factory=DetectorOptions)
    known: Path | None = None
    key_file: Path | None = None
    propagate: bool = True
    contexts: int = 3
    max_values: int = 200_000
    processes: int = 0
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True, kw_only=True)
class ScrubSummary:
    """What was done.

    Attributes:
        records: Number of records.
        touched: Number of those in which something was replaced.
        replaced: Replaced places by type.
        propagated: Those of them that only the look for known values found.
        values: Distinct values by type.
        other_columns: Columns that were copied as they are, personal data included.
        report: Path of scrub.json.
    """

    records: int
    touched: int
    replaced: dict[str, int]
    propagated: dict[str, int]
    values: dict[str, int]
    other_columns: tuple[str, ...]
    report: Path


def scrub(
    files: Sequence[str | Path],
    output: str | Path,
    options: ScrubOptions | None = None,
    *,
    progress: Progress | None = None,
) -> ScrubSummary:
    """Scrubs files into a new folder; the same call over the same folder goes on where a killed one stopped.

    Guarantee:
        Every place that the detector finds is replaced, and every other occurrence, in any of the files, of a value
        that it found once (after normalisation, at word boundaries, unless the value is shorter than 4 letters or 3
        Chinese characters). No surrogate is a value that was found, or occurs in the files as it stands. Without
        `propagate` the first holds for each record by itself, and a surrogate may occur in the files. Not covered:
        what the detector never finds; what a person can be told by without being named; a value that is written
        differently than by case, width or one kind of white space (numbers: than by their separators); a name of one
        word where it is written small, as a word.

    Args:
        files: .jsonl, .csv, .tsv or .txt, UTF-8; never changed.
        output: A new or empty folder, or that of the interrupted run.
        options: See `ScrubOptions`.
        progress: Called with a phase, the bytes done and all bytes.

    Raises:
        DataError: If a file is missing, empty, broken, not UTF-8 or lacks a column; names file and line.
        InputError: If an option is out of range, an optional package is missing, the output folder holds another run,
            there are more values than `max_values` (the same call with more goes on), or no harmless surrogate is left.
        StorageError: If the disk is full. What was done is kept for the next call.

    Source: consistent pseudonyms and dictionary propagation are old practice; the method is described in method.md.
    """
    options = options or ScrubOptions()
    output = Path(output)
    sources = [open_source(path, text=options.text_column, person=options.person_column) for path in files]
    check_sources(sources, output)
    _check(options)
    known = _read_known(options.known) if options.known else []
    file_key = _read_key(options.key_file) if options.key_file else None
    folder = WorkFolder(output, _identity(options, file_key, known), sources=sources, report=REPORT)
    run = _Run(folder, sources, options, file_key or _kept_key(folder), progress or (lambda *_: None))
    with folder.discarded_if_broken():
        return run.go(known)


def _check(options: ScrubOptions) -> None:
    one_of(MODES, mode=options.mode)
    positive_int(max_values=options.max_values)
    positive_int(chunk_bytes=options.chunk_bytes)
    if options.contexts < 0 or options.processes < 0:
        raise InputError("contexts and processes must be 0 or more")
    Detector(options.detection)
    if options.propagate:
        need("ahocorasick", "values that are looked for everywhere")


def _identity(options: ScrubOptions, key: bytes | None, known: list[Value]) -> dict[str, Any]:
    settings = asdict(replace(options, known=None, key_file=None, processes=0, max_values=0))
    listed = repr([(value.type, value.text, value.owner) for value in known])
    secret = hashlib.sha256(listed.encode(errors="surrogatepass") + (key or b""))
    return {"command": "scrub", "version": __version__, "settings": settings, "known": secret.hexdigest()}


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; make a key with: head -c {KEY_BYTES} /dev/urandom > FILE"
        ) from error
    if len(key) < _LEAST_KEY:
        raise InputError(f"{path} must have at least {_LEAST_KEY} secret bytes, it has {len(key)}")
    return key


def _kept_key(folder: WorkFolder) -> bytes:
    kept = folder.kept("key.json")
    key = bytes.fromhex(kept) if kept else os.urandom(KEY_BYTES)
    if not kept:
        folder.keep("key.json", key.hex())
    return key


def _read_known(path: Path) -> list[Value]:
    types, texts = read_columns(path, ["type", "value"])
    owners = read_optional_column(path, "person") or [""] * len(texts)
    values = []
    for row, (type, text, owner) in enumerate(zip(types, texts, owners, strict=True), start=1):
        type = _KNOWN_TYPES.get(type, type)
        if type not in TYPES or not canonical(type, text):
            raise DataError(f"{path}: row {row} must have a value and a type of {', '.join(TYPES)}")
        values.append(Value(type, text.strip(), owner))
    return values


class _Run:
    """One run: its passes, in order."""

    def __init__(
        self, folder: WorkFolder, sources: list[Source], options: ScrubOptions, key: bytes, progress: Progress
    ) -> None:
        self._folder, self._sources, self._options, self._key = folder, sources, options, key
        self._say = progress
        self._cut: list[tuple[int, int, Chunk]] | None = None
        self._total = sum(source.size for source in sources)

    def go(self, known: list[Value]) -> ScrubSummary:
        self._find()
        values = self._values(known)
        looked_for = values if self._options.propagate else known
        table, redrawn = self._table(looked_for)
        always = frozenset((value.type, canonical(value.type, value.text)) for value in known)
        outputs = self._replace(looked_for, table, always)
        return self._finish(values, outputs, redrawn)

    def _chunks(self) -> list[tuple[int, int, Chunk]]:
        """Number of the source, number in it, chunk."""
        if self._cut is None:
            self._cut = [
                (number, index, chunk)
                for number, source in enumerate(self._sources)
                for index, chunk in enumerate(chunks(source, self._options.chunk_bytes))
            ]
        return self._cut

    def _processes(self, todo: Iterable[Chunk]) -> int:
        return processes_for(self._options.processes, sum(chunk.end - chunk.start for chunk in todo))

    def _find(self) -> None:
        """The first pass; a chunk's places and values are kept, so that none is done twice."""
        todo = [job for job in self._chunks() if not (self._folder.private / _found_name(*job[:2])).exists()]
        work = in_order(
            find_in_chunk,
            (chunk for _, _, chunk in todo),
            processes=self._processes(chunk for _, _, chunk in todo),
            prepare=prepare_finding,
            arguments=(self._options.detection,),
        )
        done = self._total - sum(chunk.end - chunk.start for _, _, chunk in todo)
        for (number, index, chunk), found in zip(todo, work, strict=True):
            self._folder.keep(_found_name(number, index), found)
            done += chunk.end - chunk.start
            self._say("find", done, self._total)

    def _values(self, known: list[Value]) -> list[Value]:
        values = Values(self._options.max_values)
        for value in known:
            values.add(value.type, value.text, value.owner)
        for number, index, _ in self._chunks():
            for type, text, owner in self._folder.kept(_found_name(number, index))["values"]:
                values.add(type, text, owner)
        return values.values()

    def _table(self, values: list[Value]) -> tuple[dict[Key, str], int]:
        """Surrogates of which none occurs in the files, and how many were drawn anew for that."""
        if self._options.mode != "pseudonym":
            return {}, 0
        pseudonyms = Pseudonyms(self._key)
        avoid = set(self._folder.kept("avoid.json") or [])
        settled = self._folder.kept("avoid.json") is not None
        table = pseudonyms.table(values, avoid=avoid)
        fresh = table
        for _ in range(0 if settled else _ROUNDS):
            meeting = self._occurring(sorted(set(fresh.values())))
            if not meeting:
                break
            avoid |= meeting
            before, table = table, pseudonyms.table(values, avoid=avoid)
            fresh = {key: surrogate for key, surrogate in table.items() if before[key] != surrogate}
        else:
            if not settled:
                raise InputError("too many surrogates occur in the files; mask the values instead of replacing them")
        self._folder.keep("avoid.json", sorted(avoid))
        return table, len(avoid)

    def _occurring(self, surrogates: list[str]) -> set[str]:
        """Folded surrogates that the files contain."""
        if not surrogates or not self._options.propagate:
            return set()
        work = in_order(
            meet_in_chunk,
            (chunk for _, _, chunk in self._chunks()),
            processes=self._processes(chunk for _, _, chunk in self._chunks()),
            prepare=prepare_meeting,
            arguments=(surrogates,),
        )
        meeting: set[str] = set()
        done = 0
        for size, numbers in work:
            done += size
            meeting |= {fold(surrogates[number])[0] for number in numbers}
            self._say("check", done, self._total)
        return meeting

    def _replace(self, values: list[Value], table: dict[Key, str], always: frozenset[Key]) -> list[ChunkedFile]:
        """The second pass."""
        outputs = []
        for source in self._sources:
            with source.path.open("rb") as file:
                outputs.append(ChunkedFile(self._folder, source.path.name, file.read(source.start)))
        ready = [len(output.entries) for output in outputs]
        todo = [(n, i, chunk) for n, i, chunk in self._chunks() if i >= ready[n]]
        jobs = ((chunk, str(self._folder.private / _found_name(n, i)), self._options.contexts) for n, i, chunk in todo)
        alone = None if self._options.propagate else self._key
        work = in_order(
            replace_in_chunk,
            jobs,
            processes=self._processes(chunk for _, _, chunk in todo),
            prepare=prepare_replacing,
            arguments=(values, table, always, self._options.mode, alone),
        )
        done = self._total - sum(chunk.end - chunk.start for _, _, chunk in todo)
        for (number, _, chunk), (data, entry) in zip(todo, work, strict=True):
            outputs[number].append(data, entry)
            done += chunk.end - chunk.start
            self._say("replace", done, self._total)
        return outputs

    def _finish(self, values: list[Value], outputs: list[ChunkedFile], redrawn: int) -> ScrubSummary:
        entries = [entry for output in outputs for entry in output.entries]
        found, spread = (sum((Counter(e[name]) for e in entries), Counter()) for name in ("found", "propagated"))
        distinct = Counter(value.type for value in values)
        summary = ScrubSummary(
            records=sum(entry["records"] for entry in entries),
            touched=sum(entry["touched"] for entry in entries),
            replaced=dict(found + spread),
            propagated=dict(spread),
            values=dict(distinct),
            other_columns=tuple(sorted({name for entry in entries for name in entry["other_columns"]})),
            report=self._folder.output / REPORT,
        )
        left_out = ("known", "key_file", "processes", "max_values")
        settings = {name: value for name, value in asdict(self._options).items() if name not in left_out}
        report = {
            "format": 1,
            "settings": settings | {"known": self._options.known is not None},
            "key": "of a file" if self._options.key_file else "of this run, forgotten",
            "versions": _versions(),
            "files": [
                {"name": s.path.name, "bytes": s.size, "records": sum(e["records"] for e in o.entries)}
                | {"touched": sum(e["touched"] for e in o.entries)}
                for s, o in zip(self._sources, outputs, strict=True)
            ],
            "records": summary.records,
            "touched": summary.touched,
            "replaced_in_all": sum(summary.replaced.values()),
            "types": {
                type: {"values": distinct[type], "found": found[type], "propagated": spread[type]}
                for type in TYPES
                if distinct[type]
            },
            "other_columns_as_they_were": list(summary.other_columns),
            "surrogates_drawn_anew": redrawn,
            "contexts": _sampled(entries, self._options.contexts),
        }
        self._folder.finish([source.path.name for source in self._sources], report)
        return summary


def _found_name(number: int, index: int) -> str:
    return f"found-{number:04d}-{index:06d}.json"


def _versions() -> dict[str, str]:
    return {"veiltune": __version__} | {name: version(name) for name in ("faker", "phonenumbers", "pyahocorasick")}


def _sampled(entries: Iterable[dict[str, Any]], count: int) -> dict[str, list[str]]:
    ranked: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        for type, rank, shown in entry["contexts"]:
            ranked.setdefault(type, []).append((rank, shown))
    return {type: [shown for _, shown in sorted(found)[:count]] for type, found in sorted(ranked.items())}
