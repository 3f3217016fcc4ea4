"""Writes a corpus with known secrets: persons in twins, texts without personal data, canaries, and the answer key.

    train.jsonl        documents of the "in" persons, carriers and included canaries, shuffled
    population.jsonl   documents of the "pop" persons and carriers: for reference models and token frequencies
    validation.jsonl   documents of the "val" persons and carriers: for perplexity
    manifest.jsonl     the answer key, see manifest.py; not for whoever trains
    tokens.txt         with token canaries: what to add to the tokenizer, included or not, a token a line

A line of the first three is {"text", "person"}; the person is the unit of privacy (a person, a carrier or a canary),
and its id says nothing of the split.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veiltune.data.canaries import secret_bits
from veiltune.data.corpus import PRESETS as PRESETS
from veiltune.data.corpus import TEXT_FILES, Corpus
from veiltune.data.corpus import SynthOptions as SynthOptions
from veiltune.data.manifest import PARTIAL, SPLITS, ManifestWriter
from veiltune.data.people import entropy_bits
from veiltune.errors import InputError
from veiltune.runs import storage_errors

MANIFEST_FILE = "manifest.jsonl"
TOKENS_FILE = "tokens.txt"


@dataclass(frozen=True, kw_only=True)
class SynthSummary:
    """What was written.

    Attributes:
        manifest: Path of the answer key.
        digest: SHA-256 of its bytes.
        persons: Number of persons, by split.
        documents: Number of lines, by file and kind (persons, canaries, carriers).
        words: The same, of words.
        carrier_share: Share of the words of train.jsonl in texts without personal data.
        canary_share: Share of the words of train.jsonl in canaries.
        canary_document_share: Share of the lines of train.jsonl that are canaries; above a tenth or so they change what
            the model learns.
    """

    manifest: Path
    digest: str
    persons: dict[str, int]
    documents: dict[str, dict[str, int]]
    words: dict[str, dict[str, int]]
    carrier_share: float
    canary_share: float
    canary_document_share: float


def synthesise(folder: str | Path, options: SynthOptions) -> SynthSummary:
    """Writes a corpus to a new or empty folder: train, population, validation and manifest (.jsonl).

    The same options give the same bytes with the same versions of Veiltune and Faker.

    Guarantee:
        Twins have the same documents but for the values, which are drawn alike, and a fair coin for each pair says who
        is in: without the model, nothing in the texts tells "in" from "out" better than by chance. No value of anybody,
        the persons of canaries included, occurs in a text about somebody else or in a carrier, also after normalisation
        (as one run of letters and digits, or of digits). Not covered: whoever knows the seed knows everything.

    Args:
        folder: Where to; made if it is missing.
        options: See `SynthOptions`; `PRESETS` has the ready-made ones.

    Raises:
        InputError: If the folder is not empty or is a file, or if more persons are asked for than there are values.
        StorageError: If the disk is full or cannot be written. Nothing stays of what was written.
    """
    folder = Path(folder)
    with storage_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} must be a new or empty folder; name another one, or remove it")
    corpus = Corpus(options)
    with storage_errors(folder), _all_or_nothing(folder):
        hashes = {
            f"{name}.jsonl": _write_lines(_path(folder, name, PARTIAL), corpus.lines(name)) for name in TEXT_FILES
        }
        tokens = sorted(canary.secret for canary in corpus.canaries if canary.family == "token")
        if tokens:
            (folder / TOKENS_FILE).write_text("\n".join(tokens) + "\n", encoding="utf-8")
        with ManifestWriter(folder / MANIFEST_FILE, _header(corpus) | {"sha256": hashes}) as writer:
            for person in corpus.persons:
                writer.person(person)
            for record in corpus.records():
                writer.record(record)
            for canary in corpus.canaries:
                writer.canary(canary)
            for name in TEXT_FILES:
                _path(folder, name, PARTIAL).replace(_path(folder, name))
    return _summary(corpus, writer)


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for name in TEXT_FILES:
            _path(folder, name, PARTIAL).unlink(missing_ok=True)
            _path(folder, name).unlink(missing_ok=True)
        (folder / TOKENS_FILE).unlink(missing_ok=True)
        if not existed:
            folder.rmdir()
        raise


def _path(folder: Path, name: str, ending: str = "") -> Path:
    return folder / f"{name}.jsonl{ending}"


def _write_lines(path: Path, lines: Iterator[tuple[str, str]]) -> str:
    """Returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for text, person in lines:
            line = (json.dumps({"text": text, "person": person}, ensure_ascii=False) + "\n").encode()
            digest.update(line)
            file.write(line)
    return digest.hexdigest()


def _header(corpus: Corpus) -> dict[str, Any]:
    options = corpus.options
    carriers = corpus.documents["validation"]["carriers"]
    return {
        "seed": options.seed,
        "options": asdict(options),
        "made_with": {"faker": version("faker")},
        "counts": {
            "persons": len(corpus.persons),
            "records": sum(person.repetitions for person in corpus.persons) + carriers,
            "canaries": len(corpus.canaries),
        },
        "documents": corpus.documents,
        "words": corpus.words,
        "entropy_bits": {locale: entropy_bits(locale) for locale in options.locales},
        "canary_bits": secret_bits(),
    }


def _summary(corpus: Corpus, writer: ManifestWriter) -> SynthSummary:
    splits = Counter(person.split for person in corpus.persons)
    words, documents = corpus.words["train"], corpus.documents["train"]
    return SynthSummary(
        manifest=writer.path,
        digest=writer.digest,
        persons={split: splits[split] for split in SPLITS},
        documents=corpus.documents,
        words=corpus.words,
        carrier_share=words["carriers"] / sum(words.values()),
        canary_share=words["canaries"] / sum(words.values()),
        canary_document_share=documents["canaries"] / sum(documents.values()),
    )
