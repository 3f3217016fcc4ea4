from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veiltune.data import tables
from veiltune.data.tables import CHECK_NAME, LabelSet, Table, check_labels, read_table
from veiltune.errors import DataError, InputError

ROWS = [("good", "1", "f"), ("bad, very", "0", "m"), ('so "so"', "1", "f")]
SECRET = "zebra-4711"
CHOSEN = "; text_column says which one to read"
UNQUOTED = "the first line has 2 columns; put cells that hold a comma in double quotes"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "sex"), *ROWS])
    return path


def as_tsv(path: Path) -> Path:
    return write(path, "\n".join("\t".join(row) for row in [("text", "label", "sex"), *ROWS]) + "\n")


def as_jsonl(path: Path) -> Path:
    rows = [{"text": text, "label": int(label), "sex": sex} for text, label, sex in ROWS]
    return write(path, "\n".join(map(json.dumps, rows)))


def as_parquet(path: Path) -> Path:
    text, label, sex = zip(*ROWS, strict=True)
    table = pyarrow.table({"text": text, "label": [int(value) for value in label], "sex": sex})
    pyarrow.parquet.write_table(table, path)
    return path


def refusal(path: Path, **columns: str | None) -> str:
    """The message of the refusal: one line without any text of the table."""
    with pytest.raises(DataError) as caught:
        read_table(path, **({"text_column": "text", "label_column": "label"} | columns))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message
    return message.replace(str(path), path.name)


WRITERS: dict[str, Callable[[Path], Path]] = {"csv": as_csv, "tsv": as_tsv, "jsonl": as_jsonl, "parquet": as_parquet}


@pytest.mark.parametrize("ending", WRITERS)
def test_formats_agree(tmp_path: Path, ending: str) -> None:
    path = WRITERS[ending](tmp_path / f"table.{ending}")
    table = read_table(path, text_column="text", label_column="label", attribute_column="sex")
    assert (table.texts, table.labels, table.attributes) == tuple(map(list, zip(*ROWS, strict=True)))
    assert len(table) == 3


def test_columns_not_asked_for_are_none(tmp_path: Path) -> None:
    table = read_table(as_csv(tmp_path / "table.csv"), text_column="text")
    assert table.labels is None and table.attributes is None


def test_named_format(tmp_path: Path) -> None:
    path = as_tsv(tmp_path / "table.txt")
    assert len(read_table(path, text_column="text", format="tsv")) == 3
    assert refusal(path) == "table.txt has no ending that is known (csv, tsv, jsonl, parquet); name the format"


def test_nothing_is_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "\ufefftext,label\r\nNA,01\r\nnull,1.0\r\n")
    assert read_table(path, text_column="text", label_column="label") == Table(["NA", "null"], ["01", "1.0"])


def test_quoted_line_breaks_and_long_fields(tmp_path: Path) -> None:
    long = "word " * 50_000
    path = write(tmp_path / "t.csv", f'text\n"two\nlines"\n{long}\n')
    assert read_table(path, text_column="text").texts == ["two\nlines", long]


def test_no_copy_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    for name in ("HOME", "HF_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for ending, write_as in WRITERS.items():
        read_table(write_as(tmp_path / f"table.{ending}"), text_column="text")
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv is empty; name a table with rows"),
        ("t.csv", " \n\n", "t.csv is empty; name a table with rows"),
        ("t.csv", "text,label\n", "t.csv has no rows; name a table that has some"),
        (
            "t.csv",
            "texts,label\na,b\n",
            f"t.csv has no column 'text'; did you mean 'texts'?; known: texts, label{CHOSEN}",
        ),
        ("t.csv", "a,b\n1,2\n", f"t.csv has no column 'text'; known: a, b{CHOSEN}"),
        ("t.csv", "text,text\na,b\n", "t.csv names a column twice in its first line"),
        ("t.csv", f"text,label\na,b\n{SECRET}\n", f"t.csv: row 2 has 1 fields, {UNQUOTED}"),
        ("t.csv", f"text,label\n{SECRET},b,c\n", f"t.csv: row 1 has 3 fields, {UNQUOTED}"),
        ("t.csv", f'text,label\n"{SECRET}" x,b\n', "t.csv, line 2: ',' expected after '\"'"),
        ("t.csv", f"text,label\n{SECRET},\n", "t.csv, column 'label': row 1 is empty; fill it or remove the row"),
        ("t.csv", "text,label\na,b\n ,b\n", "t.csv, column 'text': row 2 is empty; fill it or remove the row"),
        ("t.csv", b"text,label\ncaf\xe9,1\n", "t.csv is not UTF-8 (byte 14); convert it, e.g. with iconv"),
        (
            "t.tsv",
            f"a long sentence that nobody would call a name {SECRET}\t1\n",
            "t.tsv has no column 'text'; its first line does not look like column names",
        ),
        ("t.jsonl", "{}\n", f"t.jsonl has no column 'text'; known: {CHOSEN}"),
        (
            "t.jsonl",
            f'{{"text": "a", "label": 1}}\n{SECRET}',
            "t.jsonl, line 2 is not JSON; a JSONL file has one object a line",
        ),
        ("t.jsonl", f'["{SECRET}"]', "t.jsonl, line 1 must be a JSON object, got a list"),
        (
            "t.jsonl",
            f'{{"text": "{SECRET}", "label": [1]}}',
            "t.jsonl, column 'label': row 1 must be a string or a number, got a list",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}',
            "t.jsonl, column 'label': row 2 is empty; fill it or remove the row",
        ),
        ("t.parquet", SECRET, "t.parquet is not a Parquet file that can be read (ArrowInvalid)"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert refusal(write(tmp_path / name, content)) == message


@pytest.mark.parametrize("ending", WRITERS)
def test_missing_file(tmp_path: Path, ending: str) -> None:
    assert refusal(tmp_path / f"t.{ending}") == f"t.{ending} does not exist; {CHECK_NAME}"


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    assert refusal(tmp_path / "t.csv") == "t.csv cannot be read: Is a directory"


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format 'csvv' is unknown; did you mean 'csv'"):
        read_table(as_csv(tmp_path / "t.csv"), text_column="text", format="csvv")


def test_repr_shows_no_text() -> None:
    assert repr(Table([SECRET], [SECRET])) == "Table(1 rows)"


@pytest.mark.parametrize("source", ["hub:", "hub:sst2", "hub:sst2:"])
def test_hub_needs_name_and_split(source: str) -> None:
    with pytest.raises(DataError, match="hub:NAME:SPLIT, got"):
        read_table(source, text_column="text")


def test_hub_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    dataset = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("org/sst2", "train"): dataset}[name, split])
    table = read_table("hub:org/sst2:train", text_column="sentence", label_column="label")
    assert table == Table(["a", "b"], ["positive", "negative"])
    with pytest.raises(DataError, match="cannot be loaded \\(KeyError\\)"):
        read_table("hub:org/sst2:test", text_column="sentence")


def test_useful_labels() -> None:
    check_labels(Table(["x", "y"], ["a", "b"]), "t.csv")
    check_labels(Table(["x", "y", "z"], ["a", "b", "a"]), "t.csv")


def test_label_set() -> None:
    labels = LabelSet.fit(["spam", "ham", "spam"])
    assert (labels.names, len(labels), labels.encode(["ham", "spam"])) == (("ham", "spam"), 2, [0, 1])
    with pytest.raises(DataError, match="the label of row 2 is none of the 2 classes") as caught:
        labels.encode(["ham", SECRET])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "a training table needs labels; name the label column"),
        (["a", "a", "a"], "the labels must have at least two classes, and 3 rows had one; is it the right column?"),
        (["a", "b", "c"], "each of the 3 rows has a label of its own; is it the right column?"),
    ],
)
def test_useless_labels(labels: list[str] | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_labels(Table(["text"] * 3, labels), "t.csv")
    assert str(caught.value) == f"t.csv: {message}"


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1).filter(str.strip),
        min_size=1,
    )
)
def test_csv_gives_back_what_was_written(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "written.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text",), *((text,) for text in texts)])
    assert read_table(path, text_column="text").texts == texts


def test_sst2(shared_data: Path) -> None:
    path = shared_data / "sst2" / "glue_test.tsv"
    table = read_table(path, text_column="sentence", label_column="label")
    assert len(table) == 872 and table.labels is not None
    assert LabelSet.fit(table.labels).names == ("0", "1")


def test_readers_are_the_formats_of_the_config() -> None:
    from veiltune.config import DataSection

    assert str(DataSection.model_fields["format"].annotation).count("'") == 2 * len(["auto", *tables._READERS])
