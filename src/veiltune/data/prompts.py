"""Prompts and the texts to generate for them: E2E-style files and tables, as plain lists.

A refusal names the row, never a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veiltune._validate import one_of
from veiltune.data.tables import CHECK_NAME, read_columns
from veiltune.errors import DataError, InputError

FORMATS = ("auto", "e2e", "csv", "tsv", "jsonl", "parquet")
_BAR = "||"


@dataclass(frozen=True, repr=False)
class Prompted:
    """Rows of prompts and targets; its repr shows the size only.

    >>> Prompted(["a private prompt"], ["a private text"])
    Prompted(1 rows)

    Attributes:
        prompts: One a row; all of them "" for plain language modelling.
        targets: One a row, never blank: what the model learns to write.
        persons: Whose row it is, one a row, where the unit of privacy is a person; None where it is an example.

    Raises:
        DataError: If the lists differ in length, a target is blank, or only some of the prompts are.
    """

    prompts: list[str]
    targets: list[str]
    persons: list[str] | None = None

    def __post_init__(self) -> None:
        sizes = {"prompts": len(self.prompts)} | ({"persons": len(self.persons)} if self.persons is not None else {})
        for name, size in sizes.items():
            if size != len(self.targets):
                raise DataError(f"{name} must be one a row, got {size} for {len(self.targets)} targets")
        _refuse_blank(self.targets, "target")
        if any(self.prompts):
            _refuse_blank(self.prompts, "prompt")

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"Prompted({len(self)} rows)"


def read_prompted(
    source: str | Path,
    *,
    prompt_column: str | None = "prompt",
    target_column: str = "target",
    person_column: str | None = None,
    format: str = "auto",
) -> Prompted:
    """Reads prompts and targets, and persons where asked for.

    Args:
        source: A UTF-8 file, or `hub:NAME:SPLIT` as in `tables.read_table`.
        prompt_column: Column of the prompts; None or "" for plain language modelling of the targets.
        target_column: Column of the texts to learn.
        person_column: Column that says whose row it is.
        format: "e2e": lines ``prompt||target`` without column names, where blanks around both go and a row's number is
            its line's; else a format of `read_table`. "auto" goes by the file's ending and never finds "e2e".

    Raises:
        DataError: If the source is missing, empty, broken or not UTF-8, a column is missing, or a cell is blank.
        InputError: If the format is unknown, or "e2e" is asked for a column it has not.
    """
    one_of(FORMATS, format=format)
    if format == "e2e":
        if person_column is not None or not prompt_column:
            raise InputError("format 'e2e' has a prompt and a target in each line and no persons; use a table instead")
        return _read_e2e(Path(source))
    asked = {"target_column": target_column, "prompt_column": prompt_column, "person_column": person_column}
    optional = ("prompt_column", "person_column")
    keys, names = zip(*((key, name) for key, name in asked.items() if name or key not in optional), strict=True)
    columns = dict(zip(names, read_columns(source, names, keys=keys, format=format), strict=True))
    targets = columns[target_column]
    prompts = columns[prompt_column] if prompt_column else [""] * len(targets)
    return Prompted(prompts, targets, columns[person_column] if person_column else None)


def references(prompted: Prompted) -> tuple[list[str], list[list[str]]]:
    """Groups the targets by prompt, as generated texts are scored against several references.

    >>> references(Prompted(["a", "b", "a"], ["1", "2", "3"]))
    (['a', 'b'], [['1', '3'], ['2']])

    Returns:
        The distinct prompts, in the order of their first rows, and for each its targets in row order.

    Raises:
        InputError: If there are no prompts to group by.
    """
    if not any(prompted.prompts):
        raise InputError("references need prompts and all are empty; name the prompt column, or measure perplexity")
    groups: dict[str, list[str]] = {}
    for prompt, target in zip(prompted.prompts, prompted.targets, strict=True):
        groups.setdefault(prompt, []).append(target)
    return list(groups), list(groups.values())


def _read_e2e(path: Path) -> Prompted:
    pairs = []
    for row, line in enumerate(_lines(path), start=1):
        parts = line.split(_BAR)
        if len(parts) != 2:
            raise DataError(f"{path}: row {row} must be prompt{_BAR}target, it has {len(parts) - 1} times {_BAR!r}")
        pairs.append((parts[0].strip(), parts[1].strip()))
    prompts, targets = map(list, zip(*pairs, strict=True))
    _refuse_blank(prompts, "prompt")
    return Prompted(prompts, targets)


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, at least one; blank lines at its end are not rows."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {CHECK_NAME}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
    if not text.strip():
        raise DataError(f"{path} is empty; name a file with rows")
    return text.rstrip().split("\n")


def _refuse_blank(texts: Sequence[str], what: str) -> None:
    for row, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(f"the {what} of row {row} is blank; fill it or remove the row")
