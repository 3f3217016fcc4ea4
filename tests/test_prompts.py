from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from veiltune.data import tables
from veiltune.data.prompts import FORMATS, Prompted, read_prompted, references
from veiltune.data.tables import read_columns, read_table
from veiltune.errors import DataError, InputError

SECRET = "zebra-4711"
ROWS = [("name : A | area : north", 'A is, "there" .', "p1"), ("name : B", "B !", "p2"), ("name : A", "zebra", "p1")]
NAMES = ("prompt", "target", "who")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([NAMES, *ROWS])
    return path


def as_tsv(path: Path) -> Path:
    return write(path, "\n".join("\t".join(row) for row in [NAMES, *ROWS]))


def as_jsonl(path: Path) -> Path:
    return write(path, "\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS))


def as_parquet(path: Path) -> Path:
    columns = dict(zip(NAMES, map(list, zip(*ROWS, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {"csv": as_csv, "tsv": as_tsv, "jsonl": as_jsonl, "parquet": as_parquet}


def refusal(source: Path, **options: Any) -> str:
    """The message of the refusal: one line without any text of the file."""
    with pytest.raises(InputError) as caught:
        read_prompted(source, **options)
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message
    return message.replace(str(source), source.name)


@pytest.mark.parametrize("ending", WRITERS)
def test_tables(tmp_path: Path, ending: str) -> None:
    prompted = read_prompted(WRITERS[ending](tmp_path / f"rows.{ending}"), person_column="who")
    assert (prompted.prompts, prompted.targets, prompted.persons) == tuple(map(list, zip(*ROWS, strict=True)))


def test_one_text_column_is_plain_language_modelling(tmp_path: Path) -> None:
    for column in ("", None):
        prompted = read_prompted(as_csv(tmp_path / "rows.csv"), prompt_column=column)
        assert prompted == Prompted(["", "", ""], [row[1] for row in ROWS], None)


def test_e2e(tmp_path: Path) -> None:
    lines = "\ufeffname : A||One . \r\nname : Bé | x : y|| Two \u2028 . \nname : A||Three .\n\n"
    prompted = read_prompted(write(tmp_path / "train.txt", lines), format="e2e")
    assert prompted == Prompted(["name : A", "name : Bé | x : y", "name : A"], ["One .", "Two \u2028 .", "Three ."])
    assert references(prompted) == (["name : A", "name : Bé | x : y"], [["One .", "Three ."], ["Two \u2028 ."]])


def test_the_house_e2e_file(shared_data: Path) -> None:
    prompted = read_prompted(shared_data / "e2e" / "test.txt", format="e2e")
    prompts, texts = references(prompted)
    assert len(prompted) == 4693 and len(prompts) == 630 and sum(map(len, texts)) == 4693


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"a||b\n{SECRET}\n", "train.txt: row 2 must be prompt||target, it has 0 times '||'"),
        (f"{SECRET}||b||c", "train.txt: row 1 must be prompt||target, it has 2 times '||'"),
        (f"a||b\n\n{SECRET}||b", "train.txt: row 2 must be prompt||target, it has 0 times '||'"),
        (f"{SECRET}|| ", "the target of row 1 is blank; fill it or remove the row"),
        (f"a||b\n ||{SECRET}", "the prompt of row 2 is blank; fill it or remove the row"),
        (f"||{SECRET}", "the prompt of row 1 is blank; fill it or remove the row"),
        (" \n", "train.txt is empty; name a file with rows"),
        (b"a||\xff", "train.txt is not UTF-8 (byte 3); convert it, e.g. with iconv"),
    ],
)
def test_broken_e2e_lines(tmp_path: Path, lines: str | bytes, message: str) -> None:
    assert refusal(write(tmp_path / "train.txt", lines), format="e2e") == message


def test_refusals(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", f"a||{SECRET}")
    assert "name the format" in refusal(path)  # a .txt is not guessed
    assert refusal(path, format="e2") == "format 'e2' is unknown; did you mean 'e2e'?"
    for option in ({"person_column": "who"}, {"prompt_column": None}):
        assert refusal(path, format="e2e", **option).startswith("format 'e2e' has a prompt and a target in each line")
    assert (
        refusal(tmp_path / "none.txt", format="e2e")
        == "none.txt does not exist; check its name, which starts at the folder you are in"
    )
    assert "cannot be read" in refusal(tmp_path, format="e2e")
    table = write(tmp_path / "rows.csv", f"prompt,target\n{SECRET},\n")
    assert refusal(table) == "rows.csv, column 'target': row 1 is empty; fill it or remove the row"
    table = write(tmp_path / "rows.csv", f"prompt,target\n{SECRET},x\n")
    assert "has no column 'promt'; did you mean 'prompt'?" in refusal(table, prompt_column="promt")
    assert refusal(table, prompt_column="promt").endswith("; prompt_column says which one to read")
    for prompt_column in ("prompt", ""):
        said = refusal(table, prompt_column=prompt_column, target_column="")
        assert "has no column ''" in said and said.endswith("; target_column says which one to read")


def test_prompted_checks_itself() -> None:
    with pytest.raises(DataError, match="prompts must be one a row, got 1 for 2 targets"):
        Prompted(["a"], ["b", "c"])
    with pytest.raises(DataError, match="persons must be one a row, got 0 for 1 targets"):
        Prompted(["a"], ["b"], [])
    with pytest.raises(DataError, match="the prompt of row 2 is blank"):
        Prompted(["a", ""], ["b", "c"])
    with pytest.raises(InputError, match="references need prompts"):
        references(Prompted([""], ["b"]))
    assert SECRET not in repr(Prompted([SECRET], [SECRET]))


def test_formats_are_those_of_tables() -> None:
    assert set(FORMATS) == {"auto", "e2e", *tables._READERS}


def test_read_columns_agrees_with_read_table(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "rows.csv")
    table = read_table(path, text_column="target", label_column="who")
    assert read_columns(path, ["who", "target"]) == [table.labels, table.texts]
    with pytest.raises(DataError, match="has no rows"):
        read_columns(write(tmp_path / "empty.csv", "who,target\n"), ["who"])
