"""A guard from files: protected strings, the training text for the n-gram filter, public text as reference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veiltune.config.guard import GuardConfig
from veiltune.data.manifest import read_manifest
from veiltune.data.streaming import chunks, open_source, rows
from veiltune.data.tables import read_columns
from veiltune.errors import InputError
from veiltune.guard.decoding import Guard
from veiltune.guard.folding import fold_all
from veiltune.guard.memfree import NgramFilter
from veiltune.guard.protected import ProtectedStrings
from veiltune.guard.vectors import Shape, unigram
from veiltune.guard.vocabulary import Vocabulary


def guard_of(config: GuardConfig, tokenizer: Any, *, size: int) -> Guard | None:
    """The guard that a `guard.toml` asks for; see `build_guard`.

    Raises:
        InputError: See `build_guard`.
    """
    protect, memfree, vector = config.protect, config.memfree, config.vector
    return build_guard(
        tokenizer,
        size=size,
        protect=protect.files,
        unknown=protect.unknown,
        shortest=protect.shortest,
        memfree=memfree.text,
        n=memfree.n,
        candidates=memfree.candidates,
        false_positive_rate=memfree.false_positive_rate,
        reference=vector.reference,
        shape=Shape(vector.temperature, vector.top_k, vector.decimals),
    )


def build_guard(
    tokenizer: Any,
    *,
    size: int,
    protect: Sequence[str | Path] = (),
    unknown: float = 0.5,
    shortest: int = 5,
    memfree: str | Path = "",
    n: int = 10,
    candidates: int = 50,
    false_positive_rate: float = 1e-4,
    reference: str | Path = "",
    shape: Shape | None = None,
) -> Guard | None:
    """Reads the files and compiles the guard; None if nothing is asked for.

    Args:
        tokenizer: The model's.
        size: V of the model.
        protect: Files as in `protected_values`.
        unknown: As in `ProtectedStrings`.
        shortest: As in `ProtectedStrings`.
        memfree: Training text as in `texts_of`; "": no n-gram filter.
        n: Tokens of a passage.
        candidates: As in `Guard`.
        false_positive_rate: As in `NgramFilter`.
        reference: Public text as in `texts_of`; "": all tokens alike.
        shape: Of every vector.

    Raises:
        InputError: If a file cannot be read or holds nothing, or a string is too short; no message shows a string.
    """
    values = [value for path in protect for value in _checked(Path(path), unknown, shortest)]
    if not values and not memfree and (shape is None or shape == Shape()):
        return None
    vocabulary = Vocabulary.of(tokenizer, size=size)
    ngrams = None
    if memfree:
        texts = (_ids(tokenizer, text) for text in texts_of(Path(memfree)))
        ngrams = NgramFilter(texts, n=n, false_positive_rate=false_positive_rate, key=os.urandom(32))
    shares = unigram((_ids(tokenizer, text) for text in texts_of(Path(reference))), size) if reference else None
    strings = ProtectedStrings(values, vocabulary, unknown=unknown, shortest=shortest) if values else None
    return Guard(
        vocabulary, protected=strings, ngrams=ngrams, candidates=candidates, reference=shares, shape=shape or Shape()
    )


def protected_values(path: Path) -> list[str]:
    """The strings of a file.

    Args:
        path: ``manifest.jsonl`` of `veiltune data synth`: the values of all persons and canaries that it names, in
            the training text or not, since a list of those who are in it tells whether somebody is (docs/threats.md);
            ``.csv``, ``.tsv`` or ``.parquet`` with a column `value`, as in `read_table`; anything else: one string a
            line, empty lines left out.

    Raises:
        InputError: If it cannot be read or has no string.
    """
    ending = path.suffix.lower()
    if ending == ".jsonl":
        manifest = read_manifest(path)
        values = [value for person in manifest.persons for value in person.values.values()]
        values += [canary.secret for canary in manifest.canaries]
    elif ending in (".csv", ".tsv", ".parquet"):
        (values,) = read_columns(path, ["value"])
    else:
        values = [line for line in _lines(path) if line.strip()]
    if not values:
        raise InputError(f"{path} has no string to protect")
    return values


def _checked(path: Path, unknown: float, shortest: int) -> list[str]:
    """The strings of a file; a refusal of one names the file."""
    values = protected_values(path)
    try:
        fold_all(values, unknown=unknown, shortest=shortest)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return values


def texts_of(path: Path) -> Iterator[str]:
    """The column `text` of a table (.csv, .tsv, .jsonl, .parquet), or the lines of any other file.

    All but Parquet are read piece by piece, so a file may be larger than the memory.

    Raises:
        InputError: If it cannot be read, is empty, or is a table with a broken row or without such a column.
    """
    ending = path.suffix.lower()
    if ending == ".parquet":
        yield from read_columns(path, ["text"])[0]
    elif ending in (".csv", ".tsv", ".jsonl"):
        for chunk in chunks(open_source(path, text="text")):
            yield from (row.text for row in rows(chunk) if not row.blank)
    else:
        yield from _lines(path)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _lines(path: Path) -> Iterator[str]:
    """At line ends only, not at the other characters that `splitlines` takes for one."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.removesuffix("\n") for line in file)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
