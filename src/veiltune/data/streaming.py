"""Tables of texts as files larger than memory: cut in chunks of whole records, one column changed, the rest untouched.

A chunk is a range of bytes. Records of JSON Lines and text files end with a line; those of CSV files may have line
breaks within double quotes. What is not the text keeps its bytes: other columns, blanks, quotes, line ends.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # there at run time
from pathlib import Path
from typing import BinaryIO

from veiltune.data.tables import CHECK_NAME
from veiltune.errors import DataError

ENDINGS = (".jsonl", ".csv", ".tsv", ".txt")
CHUNK_BYTES = 4 * 2**20
_LONGEST_RECORD = 64 * 2**20
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_FIELD = r'(?:"(?:[^"]|"")*+"|[^",\r\n][^,\r\n]*+|)'
_CSV_RECORD = re.compile(rf"{_FIELD}(?:,{_FIELD})*+\r?\n?")
_CSV_FIELD = re.compile(_FIELD)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file and its columns.

    Attributes:
        path: A file with one of `ENDINGS`.
        text: Column of the texts; of no meaning for .txt, where a line is a text.
        person: Column that tells persons apart, or "".
        header: The columns of a CSV or TSV file, in their order; empty for the other kinds.
        start: First byte after the header and the mark of UTF-8.
        size: Of the file, in bytes.
    """

    path: Path
    text: str
    person: str
    header: tuple[str, ...]
    start: int
    size: int

    @property
    def kind(self) -> str:
        """The file's ending."""
        return self.path.suffix.lower()


@dataclass(frozen=True)
class Chunk:
    """Whole records of a source.

    Attributes:
        source: The file.
        start: First byte.
        end: One past the last.
    """

    source: Source
    start: int
    end: int


@dataclass(frozen=True, repr=False)
class Row:
    """One record; its repr shows nothing.

    Attributes:
        raw: The record as it stands in the file, line end included.
        text: Its text, unescaped.
        person: What the person column says; "" if that is blank or null, or there is none.
        span: The characters of `raw` that are the text as written, quotes included.
        columns: Names of all columns; none for a .txt file.
    """

    raw: str
    text: str
    person: str
    span: tuple[int, int]
    columns: tuple[str, ...] = ()

    @property
    def blank(self) -> bool:
        """Whether this is an empty line and no record."""
        return not self.raw.strip()


def open_source(path: str | Path, *, text: str, person: str = "") -> Source:
    """Looks at a file: that it is there, has a known ending, content, and, where there is a header, the columns.

    Raises:
        DataError: If not. A missing column of a JSON Lines file is refused at the line that lacks it.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path} must end in {', '.join(ENDINGS)}; convert it, or rename it to what it is")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            mark = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            file.seek(mark)
            header = _read_header(file, path) if path.suffix.lower() in (".csv", ".tsv") else ()
            start = file.tell()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {CHECK_NAME}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if start >= size:
        raise DataError(f"{path} has no rows; name a table that has some")
    source = Source(path=path, text=text, person=person, header=header, start=start, size=size)
    if header:
        for column in filter(None, (text, person)):
            if header.count(column) != 1:
                raise _no_column(str(path), column, header)
    elif person and source.kind == ".txt":
        raise DataError(f"{path} has no columns, so leave the person column out")
    return source


def _no_column(where: str, column: str, names: Sequence[str]) -> DataError:
    problem = "has more than one column" if column in names else "has no column"
    return DataError(f"{where} {problem} {column!r}; there are: {', '.join(map(repr, names[:20]))}; name the right one")


def _read_header(file: BinaryIO, path: Path) -> tuple[str, ...]:
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    record = _next_csv(file, str(path)) if separator == "," else file.readline()
    try:
        line = record.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: line 1 is not UTF-8; convert the file, e.g. with iconv") from None
    if separator == "\t":
        return tuple(line.split("\t"))
    return tuple(_unquote(line[a:b]) for a, b in _csv_fields(line))


def chunks(source: Source, size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cuts a file in ranges of about so many bytes that end where a record ends.

    Raises:
        DataError: If a quote is never closed, or a record is larger than 64 MiB.
    """
    with source.path.open("rb") as file:
        start = source.start
        file.seek(start)
        while start < source.size:
            end = _csv_end(file, source, start, size) if source.kind == ".csv" else _line_end(file, source, start, size)
            yield Chunk(source, start, end)
            start = end


def _line_end(file: BinaryIO, source: Source, start: int, size: int) -> int:
    if start + size >= source.size:
        return source.size
    file.seek(start + size - 1)
    if not file.readline(_LONGEST_RECORD).endswith(b"\n") and file.tell() < source.size:
        raise DataError(f"{source.path} has a line of more than {_LONGEST_RECORD // 2**20} MiB; is it the right kind?")
    return min(file.tell(), source.size)


def _csv_end(file: BinaryIO, source: Source, start: int, size: int) -> int:
    end = start
    while end < min(start + size, source.size):
        end += len(_next_csv(file, str(source.path)))
    return end


def _next_csv(file: BinaryIO, where: str) -> bytes:
    """The next record: a line, or more where a quote is open at its end."""
    record = file.readline(_LONGEST_RECORD)
    if b'"' not in record or _is_record(record):
        return record
    parts, length = [record], len(record)
    while line := file.readline(_LONGEST_RECORD):
        parts.append(line)
        length += len(line)
        if length > _LONGEST_RECORD:
            break
        if b'"' in line and _is_record(b"".join(parts)):
            return b"".join(parts)
    most = _LONGEST_RECORD // 2**20
    raise DataError(f"{where} has a quote that is never closed, or a record of more than {most} MiB")


def _is_record(record: bytes) -> bool:
    return _CSV_RECORD.fullmatch(record.decode("latin-1")) is not None


def rows(chunk: Chunk) -> Iterator[Row]:
    """The records of a chunk.

    Raises:
        DataError: If a line is not UTF-8, not a JSON object, lacks a column or has no text in it; names the line.
    """
    with chunk.source.path.open("rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.end - chunk.start)
    if len(data) != chunk.end - chunk.start:
        raise DataError(f"{chunk.source.path} has changed while it was read")
    at = 0
    for record in _records(chunk.source, data):
        try:
            yield _parse(chunk.source, record.decode())
        except (ValueError, KeyError) as error:
            raise _refusal(chunk, data[:at].count(b"\n"), error) from None
        at += len(record)


def _records(source: Source, data: bytes) -> Iterator[bytes]:
    if source.kind != ".csv":
        yield from data.splitlines(keepends=True) if b"\r" not in data else _lines(data)
        return
    file = io.BytesIO(data)
    while record := _next_csv(file, str(source.path)):
        yield record


def _lines(data: bytes) -> Iterator[bytes]:
    """At line feeds only; a carriage return may be a part of a text."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end


class _Missing(KeyError):
    def __init__(self, column: str, names: Sequence[str]) -> None:
        super().__init__(column)
        self.column, self.names = column, names


class _Broken(ValueError):
    """What is wrong with a record, in words without its content."""


def _parse(source: Source, raw: str) -> Row:
    body = raw.rstrip("\r\n")
    if source.kind == ".txt":
        return Row(raw, body, "", (0, len(body)))
    if not body.strip():
        return Row(raw, "", "", (0, 0))
    if source.kind == ".jsonl":
        return _parse_json(source, raw, body)
    spans = _csv_fields(body) if source.kind == ".csv" else _tsv_fields(body)
    if len(spans) != len(source.header):
        raise _Broken(f"has {len(spans)} fields, the header has {len(source.header)}")
    values = [body[a:b] for a, b in spans]
    if source.kind == ".csv":
        values = [_unquote(value) for value in values]
    place = source.header.index(source.text)
    person = values[source.header.index(source.person)] if source.person else ""
    return Row(raw, values[place], _known(person), spans[place], source.header)


def _parse_json(source: Source, raw: str, body: str) -> Row:
    fields = dict(_members(body))
    for column in filter(None, (source.text, source.person)):
        if column not in fields:
            raise _Missing(column, tuple(fields))
    text, span = fields[source.text]
    if not isinstance(text, str):
        raise _Broken(f"has no text in column {source.text!r}")
    person = fields[source.person][0] if source.person else None
    person = "" if person is None else person if isinstance(person, str) else json.dumps(person)
    return Row(raw, text, _known(person), span, tuple(fields))


def _known(person: str) -> str:
    return person if person.strip() else ""


def _members(body: str) -> Iterator[tuple[str, tuple[object, tuple[int, int]]]]:
    """The members of a JSON object with the characters of each value."""
    at = _after_space(body, 0)
    if body[at : at + 1] != "{":
        raise _Broken("is not a JSON object")
    at = _after_space(body, at + 1)
    seen: set[str] = set()
    while body[at : at + 1] == '"':
        name, at = scanstring(body, at + 1)
        at = _after_space(body, at)
        if body[at : at + 1] != ":" or name in seen:
            raise _Broken("names a column twice" if name in seen else "is not JSON")
        seen.add(name)
        start = _after_space(body, at + 1)
        value, end = _DECODER.raw_decode(body, start)
        yield name, (value, (start, end))
        at = _after_space(body, end)
        if body[at : at + 1] != ",":
            break
        at = _after_space(body, at + 1)
        if body[at : at + 1] != '"':
            raise _Broken("is not JSON")
    if body[at : at + 1] != "}" or _after_space(body, at + 1) != len(body):
        raise _Broken("is not JSON")


def _after_space(body: str, at: int) -> int:
    found = _SPACE.match(body, at)
    assert found
    return found.end()


def _csv_fields(body: str) -> list[tuple[int, int]]:
    spans, at = [], 0
    while True:
        found = _CSV_FIELD.match(body, at)
        if found is None or body[found.end() : found.end() + 1] not in ("", ","):
            raise _Broken("has a quote in the middle of a field")
        spans.append(found.span())
        if found.end() == len(body):
            return spans
        at = found.end() + 1


def _tsv_fields(body: str) -> list[tuple[int, int]]:
    spans, at = [], 0
    for part in body.split("\t"):
        spans.append((at, at + len(part)))
        at += len(part) + 1
    return spans


def _unquote(field: str) -> str:
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


def _refusal(chunk: Chunk, line: int, error: Exception) -> DataError:
    """Names the line of the file; counts those before the chunk only now."""
    source = chunk.source
    with source.path.open("rb") as file:
        left = chunk.start
        while left:
            part = file.read(min(left, 2**20))
            line += part.count(b"\n")
            left -= len(part)
    where = f"{source.path}: line {line + 1}"
    if isinstance(error, _Missing):
        return _no_column(where, error.column, error.names)
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{where} is not UTF-8; convert the file, e.g. with iconv")
    return DataError(f"{where} {error if isinstance(error, _Broken) else 'is not JSON'}")


def replaced(source: Source, row: Row, text: str) -> str:
    """The record with another text; the same characters if the text is the same.

    Raises:
        DataError: If the new text cannot be written in this kind of file.
    """
    if text == row.text:
        return row.raw
    start, end = row.span
    return row.raw[:start] + _written(source, row.raw[start:end], text) + row.raw[end:]


def _written(source: Source, old: str, text: str) -> str:
    if source.kind == ".jsonl":
        surrogates = any("\ud800" <= c <= "\udfff" for c in text)
        return json.dumps(text, ensure_ascii=surrogates or old.isascii())
    if source.kind == ".csv":
        vanishes = len(source.header) == 1 and not text.strip()  # readers skip an empty line
        needed = vanishes or old.startswith('"') or text.startswith('"') or any(c in text for c in ",\r\n")
        return '"' + text.replace('"', '""') + '"' if needed else text
    if "\n" in text or (source.kind == ".tsv" and "\t" in text):
        raise DataError(f"{source.path}: a replacement has a line break or a tab, which this kind of file cannot hold")
    return text
