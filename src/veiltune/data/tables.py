"""Tables of texts: CSV, TSV, JSONL and Parquet files, and hub data sets, as plain lists.

Files are read in memory with the standard library and pyarrow: no copy of a text stays in a cache folder, and no type
is guessed (the label `01` is not 1, the text `NA` is not missing). A refusal names row and column, never a value.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from veiltune._validate import nearest, one_of
from veiltune.errors import DataError

Columns = dict[str, list[Any]]

#: What to do where a table is not found.
CHECK_NAME = "check its name, which starts at the folder you are in"

_LONGEST_FIELD = 16 * 2**20
_LONGEST_NAME = 32


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of a data set by column; its repr shows the size only.

    >>> Table(["a private text", "another"])
    Table(2 rows)

    Attributes:
        texts: One a row, never blank.
        labels: One a row, as they stand in the file; None if no label column was asked for.
        attributes: A sensitive attribute, one a row, for the audit; None if no such column was asked for.
    """

    texts: list[str]
    labels: list[str] | None = None
    attributes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Table({len(self)} rows)"


@dataclass(frozen=True)
class LabelSet:
    """The classes of a task, in the order of their numbers.

    >>> labels = LabelSet.fit(["spam", "ham", "spam"])
    >>> labels.names, labels.encode(["ham", "spam"])
    (('ham', 'spam'), [0, 1])
    """

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def fit(cls, labels: Sequence[str]) -> LabelSet:
        """The distinct labels, sorted."""
        return cls(tuple(sorted(set(labels))))

    def encode(self, labels: Sequence[str]) -> list[int]:
        """The class of each label.

        Raises:
            DataError: If a label is not among the classes; names its row, not the label.
        """
        classes = {name: index for index, name in enumerate(self.names)}
        for row, label in enumerate(labels, start=1):
            if label not in classes:
                raise DataError(f"the label of row {row} is none of the {len(self)} classes")
        return [classes[label] for label in labels]


def check_labels(table: Table, source: str) -> None:
    """Refuses a training table from whose labels nothing can be learnt.

    Args:
        table: With labels.
        source: What to call it.

    Raises:
        DataError: If there are no labels, all rows have the same, or each row has its own.
    """
    if table.labels is None:
        raise DataError(f"{source}: a training table needs labels; name the label column")
    labels, distinct = table.labels, len(set(table.labels))
    if distinct < 2:
        raise DataError(
            f"{source}: the labels must have at least two classes, and {len(labels)} row{'s' * (len(labels) > 1)} had "
            "one; is it the right column?"
        )
    if distinct == len(labels) > 2:
        raise DataError(f"{source}: each of the {len(labels)} rows has a label of its own; is it the right column?")


def read_table(
    source: str | Path,
    *,
    text_column: str,
    label_column: str | None = None,
    attribute_column: str | None = None,
    format: str = "auto",
) -> Table:
    """Reads texts, and labels and attributes where asked for.

    Args:
        source: A UTF-8 file, or `hub:NAME:SPLIT` for a data set of the Hugging Face hub (cached by its client).
        text_column: Column of the texts.
        label_column: Column of the labels; numbers and truth values become words, class names of the hub are used.
        attribute_column: Column of a sensitive attribute.
        format: csv (comma, double quotes), tsv (tab, no quoting), jsonl, parquet, or auto: by the file's ending.

    Raises:
        DataError: If the source is missing, empty, broken or not UTF-8, a column is missing, a text is blank, or a
            label or attribute is missing.
        InputError: If the format is unknown.
    """
    columns = _columns(source, format)

    def column(name: str | None, key: str = "") -> list[str] | None:
        return None if name is None else _words(_pick(columns, name, source, key), f"{source}, column {name!r}")

    texts = column(text_column, "text_column")
    assert texts is not None
    if not texts:
        raise DataError(f"{source} has no rows; name a table that has some")
    return Table(texts, column(label_column, "label_column"), column(attribute_column))


def read_columns(
    source: str | Path, names: Sequence[str], *, keys: Sequence[str] = (), format: str = "auto"
) -> list[list[str]]:
    """Reads columns by name, one list a name; everything else is as in `read_table`.

    Args:
        source: As there.
        names: Of the columns.
        keys: Which setting each name comes from, for whoever has to mend it; empty if from none.
        format: As there.
    """
    columns = _columns(source, format)
    picked = [_pick(columns, name, source, key) for name, key in zip_longest(names, keys, fillvalue="")]
    words = [_words(values, f"{source}, column {name!r}") for name, values in zip(names, picked, strict=True)]
    if not all(words):
        raise DataError(f"{source} has no rows; name a table that has some")
    return words


def read_optional_column(source: str | Path, name: str, *, format: str = "auto") -> list[str] | None:
    """Reads one column, None if the table has none of that name; everything else is as in `read_table`."""
    columns = _columns(source, format)
    return _words(columns[name], f"{source}, column {name!r}") if name in columns else None


def _columns(source: str | Path, format: str) -> Columns:
    if str(source).startswith("hub:"):
        return _read_hub(str(source))
    path = Path(source)
    return _READERS[_format_of(path, format)](path)


def _format_of(path: Path, format: str) -> str:
    if format != "auto":
        return one_of(_READERS, format=format)
    ending = path.suffix.lower().lstrip(".")
    if ending not in _READERS:
        raise DataError(f"{path} has no ending that is known ({', '.join(_READERS)}); name the format")
    return ending


def _pick(columns: Columns, name: str, source: str | Path, key: str = "") -> list[Any]:
    if name in columns:
        return columns[name]
    if any(len(known) > _LONGEST_NAME for known in columns):  # a text, not a name: never show it
        raise DataError(f"{source} has no column {name!r}; its first line does not look like column names")
    hint = nearest(name, columns)
    listed = "" if hint.startswith("known") else f"; known: {', '.join(columns)}"
    remedy = f"; {key} says which one to read" if key else ""
    raise DataError(f"{source} has no column {name!r}; {hint}{listed}{remedy}")


def _words(values: Sequence[Any], where: str) -> list[str]:
    """Every value as a word: strings as they are, numbers and truth values spelt as in JSON."""
    words = []
    for row, value in enumerate(values, start=1):
        word = json.dumps(value) if isinstance(value, bool | int | float) else value
        if word is None or (isinstance(word, str) and not word.strip()):
            raise DataError(f"{where}: row {row} is empty; fill it or remove the row")
        if not isinstance(word, str):
            raise DataError(f"{where}: row {row} must be a string or a number, got a {type(value).__name__}")
        words.append(word)
    return words


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {CHECK_NAME}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
    if not text.strip():
        raise DataError(f"{path} is empty; name a table with rows")
    return text


def _read_csv(path: Path) -> Columns:
    return _read_delimited(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> Columns:
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, *, delimiter: str, quoting: Any) -> Columns:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header, *rows = [fields for fields in reader if fields]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    if len(set(header)) != len(header):
        raise DataError(f"{path} names a column twice in its first line")
    for row, fields in enumerate(rows, start=1):
        if len(fields) != len(header):
            remedy = "put cells that hold a comma in double quotes" if delimiter == "," else "no cell may hold a tab"
            raise DataError(
                f"{path}: row {row} has {len(fields)} fields, the first line has {len(header)} columns; {remedy}"
            )
    return {name: [fields[index] for fields in rows] for index, name in enumerate(header)}


def _read_jsonl(path: Path) -> Columns:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise DataError(f"{path}, line {number} is not JSON; a JSONL file has one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} must be a JSON object, got a {type(row).__name__}")
        rows.append(row)
    names = {name: None for row in rows for name in row}  # a dict keeps the order
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Columns:
    import pyarrow
    import pyarrow.parquet

    if not path.exists():
        raise DataError(f"{path} does not exist; {CHECK_NAME}")
    try:
        columns: Columns = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read ({type(error).__name__})") from None
    return columns


def _read_hub(source: str) -> Columns:
    import datasets

    _, name, split = [*source.split(":"), "", ""][:3]
    if not name or not split:
        raise DataError(f"a hub data set is named hub:NAME:SPLIT, got {source!r}")
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many types, whose messages may span lines
        raise DataError(
            f"{source} cannot be loaded ({type(error).__name__}); check its name and the network"
        ) from error
    columns: Columns = {column: list(dataset[column]) for column in dataset.column_names}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[column] = [feature.int2str(value) if value >= 0 else None for value in columns[column]]
    return columns


_READERS: dict[str, Callable[[Path], Columns]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
