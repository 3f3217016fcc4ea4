"""Takes duplicates and near-duplicates out of tables of texts, and more records of a person than wanted.

    OUT/train.jsonl    the records that stay, in their order, byte for byte
    OUT/dedupe.json    counts and settings

One pass hashes and sketches every record; then it is decided which stay; the second pass copies them. In memory are
some 40 bytes a record and what near-duplicates take; sketches wait on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veiltune import __version__
from veiltune._validate import in_range, positive_int
from veiltune.data.optional import need
from veiltune.data.scrub import Progress
from veiltune.data.shingles import PERMUTATIONS, UInt32, UInt64, band_keys, exact_hash, plain, rows_for, signature
from veiltune.data.streaming import CHUNK_BYTES, Chunk, Source, chunks, open_source, rows
from veiltune.data.workers import ChunkedFile, WorkFolder, check_sources, in_order, processes_for
from veiltune.errors import InputError
from veiltune.runs import storage_errors

REPORT = "dedupe.json"
Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DedupeOptions:
    """What counts as a duplicate.

    Attributes:
        text_column: Column of the texts.
        person_column: Column that tells persons apart; "" for none.
        threshold: Jaccard index of five-word shingles from which on two texts are near-duplicates; 1 for exact ones
            only.
        max_records: Records that stay of a person: the first so many that are no duplicates; 0 for all. Records whose
            person is blank or null are of nobody known, and all stay.
        processes: 0 for one a core.
        chunk_bytes: About how much is worked on at a time.
    """

    text_column: str = "text"
    person_column: str = ""
    threshold: float = 0.8
    max_records: int = 0
    processes: int = 0
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True, kw_only=True)
class DedupeSummary:
    """What was done, in records.

    Attributes:
        records: All.
        kept: Those that stay.
        exact: Dropped because the same words came before, whatever case and punctuation.
        near: Dropped because nearly the same words came before.
        capped: Dropped because enough records of the person came before.
        report: Path of dedupe.json.
    """

    records: int
    kept: int
    exact: int
    near: int
    capped: int
    report: Path


def dedupe(
    files: Sequence[str | Path],
    output: str | Path,
    options: DedupeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> DedupeSummary:
    """Copies files to a new folder without duplicates, also across files: the first occurrence stays.

    The same call over the same folder goes on where a killed one stopped.

    Guarantee:
        Records with the same words in the same order are all found. Of two records whose Jaccard index of shingles is
        J, the estimate from 128 permutations has the standard deviation sqrt(J (1 - J) / 128): with the threshold .8,
        a pair of J = .9 is found with more than 99.9 %, of J = .85 with 93 %, of J = .8 with a half, and one of J = .7
        is taken for a duplicate with less than 1 %. Not covered: paraphrases, and texts inside longer ones.

    Args:
        files: .jsonl, .csv, .tsv or .txt, UTF-8; never changed.
        output: A new or empty folder, or that of the interrupted run.
        options: See `DedupeOptions`.
        progress: Called with a phase, the bytes done and all bytes.

    Raises:
        DataError: If a file is missing, empty, broken, not UTF-8 or lacks a column; names file and line.
        InputError: If an option is out of range, datasketch is missing or the output folder holds another run.
        StorageError: If the disk is full. What was done is kept for the next call.

    Source: Lee et al., arXiv 2107.06499 (why); Kandpal et al., arXiv 2202.06539 (how much repetition costs).
    """
    options, output = options or DedupeOptions(), Path(output)
    sources = [open_source(path, text=options.text_column, person=options.person_column) for path in files]
    check_sources(sources, output)
    _check(options)
    settings = asdict(replace(options, processes=0))
    identity = {"command": "dedupe", "version": __version__, "settings": settings}
    folder = WorkFolder(output, identity, sources=sources, report=REPORT)
    with folder.discarded_if_broken():
        return _Run(folder, sources, options, progress or (lambda *_: None)).go(settings)


def _check(options: DedupeOptions) -> None:
    in_range(0.3, 1.0, threshold=options.threshold)
    positive_int(chunk_bytes=options.chunk_bytes)
    if options.max_records < 0 or options.processes < 0:
        raise InputError("max_records and processes must be 0 or more")
    if options.max_records and not options.person_column:
        raise InputError("max_records counts records of a person; name the person column")
    if options.threshold < 1:
        need("datasketch", "near-duplicates")


class _Run:
    def __init__(self, folder: WorkFolder, sources: list[Source], options: DedupeOptions, progress: Progress) -> None:
        self._folder, self._sources, self._options, self._say = folder, sources, options, progress
        self._total = sum(source.size for source in sources)

    @cached_property
    def _chunks(self) -> list[tuple[int, int, Chunk]]:
        """Number of the source, number in it, chunk."""
        return [
            (number, index, chunk)
            for number, source in enumerate(self._sources)
            for index, chunk in enumerate(chunks(source, self._options.chunk_bytes))
        ]

    def go(self, settings: dict[str, Any]) -> DedupeSummary:
        self._sketch()
        sketches = Sketches([self._path(n, i) for n, i, _ in self._chunks])
        first = first_occurrences(sketches.exact)
        near = near_duplicates(sketches, first, self._options.threshold)
        kept = first & ~near
        within = first_of_each(sketches.persons, kept, self._options.max_records) if self._options.max_records else kept
        outputs = self._copy(within, sketches.sizes)
        summary = DedupeSummary(
            records=len(first),
            kept=int(within.sum()),
            exact=int((~first).sum()),
            near=int(near.sum()),
            capped=int((kept & ~within).sum()),
            report=self._folder.output / REPORT,
        )
        report = {
            "format": 1,
            "settings": settings,
            "versions": {"veiltune": __version__}
            | ({"datasketch": version("datasketch")} if self._options.threshold < 1 else {}),
            "files": [
                {"name": source.path.name, "records": sum(e["records"] for e in output.entries)}
                | {"kept": sum(e["kept"] for e in output.entries)}
                for source, output in zip(self._sources, outputs, strict=True)
            ],
            **{name: value for name, value in asdict(summary).items() if name != "report"},
        }
        self._folder.finish([source.path.name for source in self._sources], report)
        return summary

    def _path(self, number: int, index: int) -> Path:
        return self._folder.private / f"sketch-{number:04d}-{index:06d}"

    def _sketch(self) -> None:
        todo = [job for job in self._chunks if not Path(f"{self._path(*job[:2])}.exact.npy").exists()]
        rows_a_band = rows_for(self._options.threshold) if self._options.threshold < 1 else 0
        work = in_order(
            _sketch_chunk,
            ((chunk, str(self._path(n, i)), rows_a_band) for n, i, chunk in todo),
            processes=processes_for(self._options.processes, sum(c.end - c.start for _, _, c in todo)),
            prepare=_nothing,
            arguments=(),
        )
        done = self._total - sum(chunk.end - chunk.start for _, _, chunk in todo)
        for size in work:
            done += size
            self._say("sketch", done, self._total)

    def _copy(self, kept: Bools, sizes: list[int]) -> list[ChunkedFile]:
        outputs = []
        for source in self._sources:
            with source.path.open("rb") as file:
                outputs.append(ChunkedFile(self._folder, source.path.name, file.read(source.start)))
        start = done = 0
        ready = [len(output.entries) for output in outputs]
        for (number, index, chunk), size in zip(self._chunks, sizes, strict=True):
            if index >= ready[number]:
                data = b"".join(_kept_rows(chunk, kept[start : start + size]))
                entry = {"records": size, "kept": int(kept[start : start + size].sum())}
                outputs[number].append(data, entry)
            start, done = start + size, done + chunk.end - chunk.start
            self._say("copy", done, self._total)
        return outputs


def _nothing() -> None:
    return


def _sketch_chunk(job: tuple[Chunk, str, int]) -> int:
    """Writes hashes, persons, signatures and bands of a chunk's records; the hashes last, which says it is done."""
    chunk, path, rows_a_band = job
    exact, persons, sketches, bands = [], [], [], []
    for row in rows(chunk):
        if row.blank:
            continue
        words = plain(row.text)
        exact.append(exact_hash(words))
        persons.append(_person_hash(row.person))
        if rows_a_band:
            sketches.append(signature(words))
            bands.append(band_keys(sketches[-1], rows_a_band))
    with storage_errors(Path(path)):
        if sketches:
            np.save(f"{path}.signatures.npy", np.stack(sketches))
            np.save(f"{path}.bands.npy", np.ascontiguousarray(np.stack(bands).T))
        np.save(f"{path}.persons.npy", np.frombuffer(b"".join(persons), dtype=np.uint64))
        unfinished = Path(f"{path}.partial.npy")
        np.save(unfinished, np.frombuffer(b"".join(exact), dtype=np.uint64).reshape(-1, 2))
        unfinished.replace(f"{path}.exact.npy")
    return chunk.end - chunk.start


def _person_hash(person: str) -> bytes:
    return hashlib.blake2b(person.encode(errors="surrogatepass"), digest_size=8).digest() if person else bytes(8)


def _kept_rows(chunk: Chunk, kept: Bools) -> Iterator[bytes]:
    """Blank lines are no records and stay."""
    decisions = iter(kept)
    for row in rows(chunk):
        if row.blank or next(decisions):
            yield row.raw.encode()


class Sketches:
    """Hashes of all records, and their signatures on the disk.

    Args:
        paths: Of the chunks, in order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        parts = [np.load(f"{path}.exact.npy") for path in paths]
        self.sizes = [len(part) for part in parts]
        self.exact: UInt64 = np.concatenate(parts)
        self.persons: UInt64 = np.concatenate([np.load(f"{path}.persons.npy") for path in paths])
        self._filled = [path for path, size in zip(paths, self.sizes, strict=True) if size]
        sizes = [size for size in self.sizes if size]
        self._starts = np.cumsum([0, *sizes])
        self._signatures: list[UInt32] = []

    def band(self, number: int) -> UInt64:
        """The hashes of one band of all records."""
        parts = [np.load(f"{path}.bands.npy", mmap_mode="r")[number] for path in self._filled]
        return np.concatenate(parts)

    @property
    def bands(self) -> int:
        """How many bands there are."""
        first = f"{self._filled[0]}.bands.npy" if self._filled else ""
        return len(np.load(first, mmap_mode="r")) if Path(first).is_file() else 0

    def signature(self, record: int) -> UInt32:
        """The signature of a record."""
        if not self._signatures:
            self._signatures = [np.load(f"{path}.signatures.npy", mmap_mode="r") for path in self._filled]
        part = int(np.searchsorted(self._starts, record, side="right")) - 1
        values: UInt32 = self._signatures[part][record - self._starts[part]]
        return values


def first_occurrences(hashes: UInt64) -> Bools:
    """Whether a record is the first with its hash.

    >>> first_occurrences(np.array([[1, 2], [1, 3], [1, 2]], dtype=np.uint64))
    array([ True,  True, False])

    Args:
        hashes: Shape (n, 2).
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of the same hashes the first comes first
    same = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    first = np.ones(len(hashes), dtype=bool)
    first[order[1:][same]] = False
    return first


def near_duplicates(sketches: Sketches, among: Bools, threshold: float) -> Bools:
    """Whether an earlier record that stays is a near-duplicate, by the estimate of the signatures.

    Args:
        sketches: Of all records.
        among: Those that are compared at all.
        threshold: Least estimated Jaccard index.
    """
    near = np.zeros(len(among), dtype=bool)
    leaders: dict[int, list[int]] = {}
    for record, buckets in _shared_buckets(sketches, among):
        candidates = sorted({leader for bucket in buckets for leader in leaders.get(bucket, ())})
        if candidates and _most_alike(sketches, record, candidates) >= threshold:
            near[record] = True
            continue
        for bucket in buckets:
            leaders.setdefault(bucket, []).append(record)
    return near


def _most_alike(sketches: Sketches, record: int, candidates: Iterable[int]) -> float:
    own = sketches.signature(record)
    return max(np.count_nonzero(sketches.signature(other) == own) / PERMUTATIONS for other in candidates)


def _shared_buckets(sketches: Sketches, among: Bools) -> Iterator[tuple[int, list[int]]]:
    """Records in their order, each with the numbers of its bands' values that another record shares."""
    chosen = np.flatnonzero(among)
    records: list[Int64] = []
    buckets: list[Int64] = []
    start = 0
    for number in range(sketches.bands):
        _, places, counts = np.unique(sketches.band(number)[chosen], return_inverse=True, return_counts=True)
        shared = counts[places] > 1
        records.append(chosen[shared])
        buckets.append(places[shared] + start)
        start += len(counts)
    if not records:
        return
    all_records, all_buckets = np.concatenate(records), np.concatenate(buckets)
    order = np.argsort(all_records, kind="stable")
    ends = np.flatnonzero(np.diff(all_records[order])) + 1
    for part in np.split(order, ends):
        if len(part):
            yield int(all_records[part[0]]), all_buckets[part].tolist()


def first_of_each(persons: UInt64, among: Bools, most: int) -> Bools:
    """Of the chosen records, the first so many of each person, and all of 0, which is nobody known.

    >>> first_of_each(np.array([7, 7, 8, 7, 0, 0], dtype=np.uint64), np.array([True, False, True, True, True, True]), 1)
    array([ True, False,  True, False,  True,  True])
    """
    chosen = np.flatnonzero(among)
    order = chosen[np.argsort(persons[chosen], kind="stable")]
    starts = np.r_[True, persons[order[1:]] != persons[order[:-1]]] if len(order) else np.zeros(0, dtype=bool)
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    kept = np.zeros(len(among), dtype=bool)
    kept[order[(rank < most) | (persons[order] == 0)]] = True
    return kept
