"""Files keep every byte that is not text, broken ones are refused by line, and neither memory nor workers get loose."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from veiltune.data import workers
from veiltune.data.scrub import ScrubOptions, scrub
from veiltune.data.streaming import chunks, open_source, replaced, rows
from veiltune.errors import DataError, InputError, VeiltuneError

ANN = "Dear Ann Stone, we ring 212-555-2368 or write to ann.stone@old.org."


def write(path: Path, lines: list[str], ending: str = "\n") -> Path:
    path.write_bytes(ending.join([*lines, ""]).encode())
    return path


ODD_JSON = [
    '{"id": 1.0e5,"text":"plain" , "more": {"text": "Dear Ann Stone,"}, "z":"\\u00e9"}',
    '  {"text": "Dear Ann Stone, \\u00e9\\ud83d\\ude00 \\"x\\"", "id": 007e1}'.replace("007e1", "7e1"),
    '{"z": null, "text": "Dear Ann Stone, caf\u00e9\\n\\t"}\t',
    '{"text": "lone \\ud800 of Ann Stone"}',
    "",
]


def test_json_lines_keep_every_other_byte(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", ODD_JSON, "\r\n")
    scrub([source], tmp_path / "out", ScrubOptions(mode="mask"))
    lines = (tmp_path / "out" / "x.jsonl").read_bytes().decode().split("\r\n")
    masked = [line.replace("Ann Stone", "[NAME]") for line in ODD_JSON]
    masked[0] = ODD_JSON[0]  # the inner text is another column
    assert lines == [*masked, ""]


def test_fields_are_those_of_the_json_module(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = ["a", "\u00e9", "\u4e2d", '"', "\\\\", "\\n", "\\ud83d\\ude00", "{", "}", ",", ":", " ", "text"]

    def word() -> str:
        return "".join(rng.choices(pieces, k=rng.randint(0, 6))).encode().decode("unicode_escape", "replace")

    for number in range(200):
        row = {
            f"{word()}{i}": rng.choice([word(), 1.5, None, [word()], {"text": word()}])
            for i in range(rng.randint(0, 3))
        }
        items = [*row.items(), ("text", word())]
        rng.shuffle(items)
        ascii = any("\ud800" <= c <= "\udfff" for c in json.dumps(items, ensure_ascii=False))
        separators = (rng.choice([",", " , "]), rng.choice([":", " :  "]))
        line = json.dumps(dict(items), ensure_ascii=ascii or rng.random() < 0.5, separators=separators)
        row = json.loads(line)  # two halves of a character may have met
        (tmp_path / "x.jsonl").write_text(line)
        source = open_source(tmp_path / "x.jsonl", text="text")
        (found,) = rows(next(chunks(source)))
        new = replaced(source, found, found.text + "!")
        assert found.text == row["text"] and json.loads(new) == {**row, "text": found.text + "!"}
        start, end = found.span
        assert new.startswith(line[:start]) and new.endswith(line[end:]), number


ODD_CSV = (
    'id,"text",note\r\n1,"Dear Ann Stone, hello","a ""b"", c"\r\n2,"two\nlines of Ann Stone","x\ny"\n'
    '3,Ann Stone\'s 5" pipe,\n"4","","q"\n5,"he said ""Ann Stone""",last'
)


@pytest.mark.parametrize("chunk_bytes", [1, 40, 10**6])
def test_csv_keeps_every_other_byte_however_it_is_cut(chunk_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + ODD_CSV.encode())
    scrub([tmp_path / "x.csv"], tmp_path / "out", ScrubOptions(mode="mask", chunk_bytes=chunk_bytes, processes=1))
    assert (tmp_path / "out" / "x.csv").read_bytes() == b"\xef\xbb\xbf" + ODD_CSV.replace(
        "Ann Stone", "[NAME]"
    ).encode()


def test_records_are_those_of_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(ODD_CSV.encode())
    source = open_source(tmp_path / "x.csv", text="text", person="note")
    for size in (1, 7, 30, 1000):
        got = [(row.text, row.person) for chunk in chunks(source, size) for row in rows(chunk)]
        expected = [(row[1], row[2]) for row in csv.reader(io.StringIO(ODD_CSV, newline=""))][1:]
        assert got == expected
    row = next(rows(next(chunks(source))))
    assert replaced(source, row, 'a "b"') == '1,"a ""b""","a ""b"", c"\r\n'


def test_tabs_and_plain_lines(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('id\ttext\n1\tDear Ann Stone, "\n2\t\n')
    (tmp_path / "x.txt").write_text("Dear Ann Stone, hi\r\n\nlast of Ann Stone")
    scrub([tmp_path / "x.tsv", tmp_path / "x.txt"], tmp_path / "out", ScrubOptions(mode="mask"))
    assert (tmp_path / "out" / "x.tsv").read_text() == 'id\ttext\n1\tDear [NAME], "\n2\t\n'
    assert (tmp_path / "out" / "x.txt").read_bytes() == b"Dear [NAME], hi\r\n\nlast of [NAME]"


WRONG_NAME = b'{"text": "a"}\n{"txt": "a", "id": 1}\n'
BROKEN: dict[str, tuple[str, bytes, dict[str, str], str]] = {
    "missing": ("x.jsonl", b"", {"name": "y.jsonl"}, r"y\.jsonl does not exist"),
    "ending": ("x.json", b"{}", {}, r"must end in \.jsonl, \.csv, \.tsv, \.txt"),
    "empty": ("x.jsonl", b"", {}, "has no rows"),
    "header only": ("x.csv", b"id,text\n", {}, "has no rows"),
    "not json": ("x.jsonl", b'{"text": "a"}\n{"text": Secret}\n', {}, "line 2 is not JSON$"),
    "cut short": ("x.jsonl", b'{"text": "a"}\n{"text": "Secr', {}, "line 2 is not JSON$"),
    "more": ("x.jsonl", b'{"text": "a"} x\n', {}, "line 1 is not JSON$"),
    "list": ("x.jsonl", b"[1]\n", {}, "line 1 is not a JSON object"),
    "twice": ("x.jsonl", b'{"text": "a", "text": "b"}\n', {}, "line 1 names a column twice"),
    "number": ("x.jsonl", b'{"text": 7}\n', {}, "line 1 has no text in column 'text'"),
    "no column": ("x.jsonl", WRONG_NAME, {}, "line 2 has no column 'text'; there are: 'txt'"),
    "no csv column": ("x.csv", b"id,body\n1,a\n", {}, "has no column 'text'; there are: 'id', 'body'"),
    "no person": ("x.jsonl", b'{"text": "a"}\n', {"person": "who"}, "has no column 'who'; there are: 'text'"),
    "person of a line": ("x.txt", b"a\n", {"person": "who"}, "has no columns, so leave the person column out"),
    "latin-1": ("x.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', {}, "line 2 is not UTF-8; convert the file"),
    "latin-1 header": ("x.csv", b"t\xe9xt\na\n", {}, "line 1 is not UTF-8"),
    "fields": ("x.csv", b"id,text\n1,a,b\n", {}, "line 2 has 3 fields, the header has 2"),
    "open quote": ("x.csv", b'id,text\n1,"Secret\n', {}, "has a quote that is never closed"),
    "quote": ("x.csv", b'id,text\n1,"a"b\n', {}, "never closed|quote in the middle"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_line_without_their_text(case: str, tmp_path: Path) -> None:
    name, data, given, message = BROKEN[case]
    (tmp_path / name).write_bytes(data)
    source = tmp_path / given.get("name", name)
    with pytest.raises(DataError, match=message) as error:
        scrub([source], tmp_path / "out", ScrubOptions(person_column=given.get("person", "")))
    assert "\n" not in str(error.value) and "Secr" not in str(error.value)
    assert not (tmp_path / "out").exists()


_PEAK = """
import re, sys
from veiltune.data.scrub import ScrubOptions, scrub
if __name__ == "__main__":
    scrub([sys.argv[1]], sys.argv[2], ScrubOptions(processes=1, chunk_bytes=int(sys.argv[3]), mode="mask"))
    print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_hangs_on_the_chunk_and_not_on_the_file(tmp_path: Path) -> None:
    line = json.dumps({"text": ANN + " nothing to be found here" * 20, "id": 1})
    (tmp_path / "run.py").write_text(_PEAK)

    def peak(lines: int, chunk_bytes: int) -> float:
        source = write(tmp_path / f"{lines}.jsonl", [line] * lines)
        command = [str(tmp_path / "run.py"), str(source), str(tmp_path / f"{lines}-{chunk_bytes}"), str(chunk_bytes)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        return int(done.stdout) / 1024  # MiB

    small, large = peak(300, 100_000), peak(8000, 100_000)
    assert (tmp_path / "8000.jsonl").stat().st_size > 4e6
    assert large - small < 4
    assert peak(7999, 10**9) - small > 8  # planted: all in one chunk


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(VeiltuneError, match="a worker process was killed, perhaps for want of memory"):
        list(workers.in_order(_die, [1, 2], processes=2, prepare=_ready, arguments=()))
    with pytest.raises(InputError, match="processes must be a whole number"):
        list(workers.in_order(_die, [1], processes=0, prepare=_ready, arguments=()))


_PARENT = """
import os, sys, time
from veiltune.data import workers

def ready():
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()

def work(_):
    time.sleep(0.05)

if __name__ == "__main__":
    list(workers.in_order(work, range(10**6), processes=2, prepare=ready, arguments=()))
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    (tmp_path / "run.py").write_text(_PARENT)

    def until(true: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not true() and time.monotonic() < limit:
            time.sleep(0.05)
        assert true()

    def alive(pid: str) -> bool:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"

    with subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path / "pids")]) as parent:
        until(lambda: len(os.listdir(tmp_path / "pids")) == 2)
        pids = os.listdir(tmp_path / "pids")
        assert all(alive(pid) for pid in pids)
        parent.kill()
    until(lambda: not any(alive(pid) for pid in pids))


def _ready() -> None:
    return


def _die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
