"""What was found once is nowhere left, everything else keeps its bytes, and a killed run goes on to the same result."""

# ruff: noqa: RUF001

from __future__ import annotations

import csv
import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from veiltune.cli import app
from veiltune.data import workers
from veiltune.data.detect import DetectorOptions
from veiltune.data.manifest import Manifest, normalise, read_manifest
from veiltune.data.pseudonyms import Pseudonyms, Value
from veiltune.data.replacing import Place, Replacer, apart, context
from veiltune.data.scrub import ScrubOptions, scrub
from veiltune.data.streaming import chunks, open_source
from veiltune.data.synth import SynthOptions, synthesise
from veiltune.errors import DataError, InputError, StorageError

SMALL = SynthOptions(
    persons=20, population=8, validation=8, canaries=8, exposure_canaries=1, references=4, repetitions=(1, 2, 4)
)
ANN = "Dear Ann Stone, we ring 212-555-2368 or write to ann.stone@old.org."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesise(tmp_path_factory.mktemp("corpus") / "small", SMALL).manifest.parent


@pytest.fixture(scope="module")
def manifest(corpus: Path) -> Manifest:
    return read_manifest(corpus / "manifest.jsonl")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    return tmp_path / "key"


def write(path: Path, lines: list[str], ending: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ending.join([*lines, ""]).encode())
    return path


def jsonl(path: Path, texts: list[str], persons: list[str] | None = None) -> Path:
    owners = persons or [""] * len(texts)
    return write(path, [json.dumps({"text": t, "person": p}) for t, p in zip(texts, owners, strict=True)])


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def survivors(manifest: Manifest, folder: Path, type: str) -> int:
    """Slow: how many of the persons' values stand anywhere in a folder's texts, by letters and digits alone."""
    paths = [path for path in folder.glob("*.jsonl") if path.name != "manifest.jsonl"]
    plain = "\n".join(normalise(text, type) for path in paths for text in texts_of(path))
    return sum(normalise(person.values[type], type) in plain for person in manifest.persons if person.split != "out")


def test_no_value_with_a_form_survives_and_a_shut_eye_is_noticed(
    corpus: Path, manifest: Manifest, tmp_path: Path
) -> None:
    files = [corpus / f"{name}.jsonl" for name in ("train", "population", "validation")]
    summary = scrub(files, tmp_path / "out", ScrubOptions(person_column="person"))
    for type in ("email", "phone", "home", "work"):
        assert survivors(manifest, corpus, type) > 20 and survivors(manifest, tmp_path / "out", type) == 0
    assert survivors(manifest, tmp_path / "out", "name") < 0.5 * survivors(manifest, corpus, "name")
    assert summary.records == sum(len(texts_of(path)) for path in files)
    blind = ScrubOptions(detection=DetectorOptions(types=("name",)))
    scrub(files, tmp_path / "blind", blind)
    assert survivors(manifest, tmp_path / "blind", "phone") == survivors(manifest, corpus, "phone")


def test_known_values_are_all_replaced(corpus: Path, manifest: Manifest, tmp_path: Path) -> None:
    table = [["type", "value", "person"]]
    table += [[type, value, person.id] for person in manifest.persons for type, value in person.values.items()]
    with (tmp_path / "known.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    options = ScrubOptions(person_column="person", known=tmp_path / "known.csv")
    scrub([corpus / "train.jsonl"], tmp_path / "out", options)
    assert survivors(manifest, tmp_path / "out", "name") == 0


def test_full_width_numbers_go_through_every_mode(tmp_path: Path, key: Path) -> None:
    """The default mode once ended in a KeyError that showed the number."""
    texts = [
        "身份证号：１１０１０５１９４９１２３１００２Ｘ",
        "ＤＥ８９３７０４００４４０５３２０１３０００",
        "Call +14155552671 or (415) 555-2671.",
    ]
    source = jsonl(tmp_path / "a" / "a.jsonl", texts)
    for number, options in enumerate(({}, {"propagate": False}, {"mode": "mask"}, {"mode": "remove"})):
        out = tmp_path / str(number)
        scrub([source], out, ScrubOptions(key_file=key, **options))  # type: ignore[arg-type]
        found = texts_of(out / "a.jsonl")
        assert all(new != old for new, old in zip(found, texts, strict=True))
        if not options:
            assert re.fullmatch(r"Call \+1(\d{3})(555)(01\d\d) or \(\1\) \2-\3\.", found[2])


def test_a_short_name_is_replaced_wherever_its_own_text_has_it(tmp_path: Path, key: Path) -> None:
    texts = [
        "Mr Lee wrote. Then Lee rang, at Leeds, to bleep.",
        "Lee is a town.",
        "患者：王明。王明今天来过。",
        "王明天",
    ]
    source = jsonl(tmp_path / "a" / "a.jsonl", texts)
    scrub([source], tmp_path / "out", ScrubOptions(key_file=key, mode="mask"))
    assert texts_of(tmp_path / "out" / "a.jsonl") == [
        "Mr [NAME] wrote. Then [NAME] rang, at Leeds, to bleep.", texts[1], "患者：[NAME]。[NAME]今天来过。", texts[3]
    ]  # fmt: skip
    scrub([source], tmp_path / "alone", ScrubOptions(key_file=key, mode="mask", propagate=False))
    assert texts_of(tmp_path / "alone" / "a.jsonl")[0] == "Mr [NAME] wrote. Then [NAME] rang, at Leeds, to bleep."


def test_without_propagation_a_record_is_searched_for_what_was_found_in_it(tmp_path: Path, key: Path) -> None:
    record = "My name is Octavia Brandt. Yours, as ever, OCTAVIA  BRANDT wrote it, not Octavia Brandtner."
    source = jsonl(tmp_path / "a" / "a.jsonl", [record, "As I said, Octavia Brandt lives there."])
    scrub([source], tmp_path / "alone", ScrubOptions(key_file=key, mode="mask", propagate=False))
    first, second = texts_of(tmp_path / "alone" / "a.jsonl")
    assert first == "My name is [NAME]. Yours, as ever, [NAME] wrote it, not Octavia Brandtner."
    assert second == "As I said, Octavia Brandt lives there."  # of another record: it may be another person's


def test_one_value_has_one_surrogate_in_every_file_and_writing(tmp_path: Path, key: Path) -> None:
    first = jsonl(tmp_path / "a" / "a.jsonl", [ANN, "ANN STONE rang from (212) 555-2368"])
    second = write(tmp_path / "b" / "b.txt", ["that was ann  stone, no: ann stone", "Ann Stoneham is another"])
    scrub([first, second], tmp_path / "out", ScrubOptions(key_file=key))
    dear, rang = texts_of(tmp_path / "out" / "a.jsonl")
    found = re.fullmatch(r"Dear (\w+ \w+), we ring (\d{3})-555-(01\d\d) or write to ([\w.]+)@example\.\w+\.", dear)
    assert found
    name, area, last, local = found.groups()
    assert local == name.lower().replace(" ", ".") and name != "Ann Stone"
    assert rang == f"{name.upper()} rang from ({area}) 555-{last}"
    assert (tmp_path / "out" / "b.txt").read_text() == (
        f"that was {name.lower()}, no: {name.lower()}\nAnn Stoneham is another\n"
    )


def test_without_propagation_a_record_hangs_on_itself_alone(tmp_path: Path, key: Path) -> None:
    options = ScrubOptions(key_file=key, propagate=False, person_column="person")
    here = [ANN, "the note of Ann Stone"]
    jsonl(tmp_path / "a" / "x.jsonl", here, ["p", "q"])
    jsonl(tmp_path / "b" / "x.jsonl", [*here, "Dear Bob Reed, call 212-555-2368"], ["p", "q", "r"])
    for name in ("a", "b"):
        scrub([tmp_path / name / "x.jsonl"], tmp_path / f"out-{name}", options)
    alone, together = (texts_of(tmp_path / f"out-{name}" / "x.jsonl") for name in "ab")
    assert alone == together[:2] and alone[1] == here[1] and alone[0] != here[0]
    scrub([tmp_path / "a" / "x.jsonl"], tmp_path / "out-c", replace(options, propagate=True))
    assert texts_of(tmp_path / "out-c" / "x.jsonl")[1] != here[1]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("mask", "Dear [NAME], we ring [PHONE] or write to [EMAIL]."), ("remove", "Dear , we ring  or write to .")],
)
def test_masks_and_removal(mode: str, expected: str, tmp_path: Path) -> None:
    scrub([jsonl(tmp_path / "x.jsonl", [ANN])], tmp_path / "out", ScrubOptions(mode=mode))
    assert texts_of(tmp_path / "out" / "x.jsonl") == [expected]


def test_a_key_file_makes_runs_agree_and_without_one_they_differ(tmp_path: Path, key: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [ANN])
    made = {}
    for name, options in {
        "a": ScrubOptions(key_file=key), "b": ScrubOptions(key_file=key), "c": ScrubOptions(), "d": ScrubOptions()
    }.items():  # fmt: skip
        scrub([source], tmp_path / name, options)
        made[name] = texts_of(tmp_path / name / "x.jsonl")[0]
    assert made["a"] == made["b"] and len(set(made.values())) == 3


def test_a_surrogate_that_occurs_in_the_texts_is_drawn_anew(tmp_path: Path, key: Path) -> None:
    options = ScrubOptions(key_file=key)
    scrub([jsonl(tmp_path / "x.jsonl", [ANN])], tmp_path / "out", options)
    name = " ".join(texts_of(tmp_path / "out" / "x.jsonl")[0].split(",")[0].split()[1:])
    hidden = f"nobody would see that {name} is a name"
    scrub([jsonl(tmp_path / "y.jsonl", [ANN, hidden])], tmp_path / "again", options)
    dear, same = texts_of(tmp_path / "again" / "y.jsonl")
    assert same == hidden and name not in dear
    assert json.loads((tmp_path / "again" / "scrub.json").read_text())["surrogates_drawn_anew"] > 0


def test_the_report_counts_and_tells_no_value(tmp_path: Path) -> None:
    texts = [ANN, "a note for Ann Stone by MARY Untold 17", "nothing here"]
    summary = scrub([jsonl(tmp_path / "x.jsonl", texts)], tmp_path / "out")
    report = json.loads(summary.report.read_text())
    assert (report["records"], report["touched"], report["replaced_in_all"]) == (3, 2, 4)
    assert report["types"]["name"] == {"values": 1, "found": 2, "propagated": 0}
    assert set(report["contexts"]) == {"name", "phone", "email"}
    written = summary.report.read_text().lower()
    output = texts_of(tmp_path / "out" / "x.jsonl")[0]
    for word in ("ann", "stone", "2368", "untold", "mary", "17", output.split()[1].lower()):
        assert not re.search(rf"\b{word}\b", written), word
    assert "we ring [phone] or write to [email]" in written
    assert sorted(contents(tmp_path / "out")) == ["scrub.json", "x.jsonl"]
    scrub([tmp_path / "x.jsonl"], tmp_path / "bare", ScrubOptions(contexts=0))
    assert json.loads((tmp_path / "bare" / "scrub.json").read_text())["contexts"] == {}


def test_two_processes_give_the_same_bytes_as_one(corpus: Path, tmp_path: Path, key: Path) -> None:
    options = ScrubOptions(key_file=key, chunk_bytes=40_000, person_column="person")
    for processes in (1, 2):
        scrub([corpus / "train.jsonl"], tmp_path / str(processes), replace(options, processes=processes))
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and one["train.jsonl"] != (corpus / "train.jsonl").read_bytes()


@pytest.mark.parametrize("where", ["find", "check", "replace", "torn"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    where: str, corpus: Path, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [corpus / "train.jsonl", corpus / "validation.jsonl"]
    options = ScrubOptions(key_file=key, chunk_bytes=20_000, processes=1, person_column="person")
    scrub(files, tmp_path / "whole", options)
    seen = []

    def kill(phase: str, done: int, total: int) -> None:
        seen.append(phase)
        if phase == ("replace" if where == "torn" else where) and seen.count(phase) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scrub(files, tmp_path / "out", options, progress=kill)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["private"]  # nothing half-written under its name
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o700
    if where == "torn":
        with (tmp_path / "out" / "private" / "train.jsonl").open("ab") as file:
            file.write(b"half a line")
    phases: list[str] = []
    scrub(files, tmp_path / "out", options, progress=lambda phase, *_: phases.append(phase))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    total = sum(len(list(chunks(open_source(f, text="text"), 20_000))) for f in files)
    assert phases.count("find") == (total - 3 if where == "find" else 0)
    assert phases.count("replace") == (total - 3 if where in ("replace", "torn") else total)


@pytest.mark.parametrize("written", [False, True])
def test_a_run_that_is_killed_at_its_very_end(written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "x.jsonl", [ANN])

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(workers.shutil, "rmtree", kill)
        if not written:
            patched.setattr(workers.WorkFolder, "finish", rename_only)
        with pytest.raises(KeyboardInterrupt):
            scrub([source], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["private", *["scrub.json"] * written, "x.jsonl"]
    if written:
        with pytest.raises(InputError, match="holds a finished run"):
            scrub([source], tmp_path / "out")
    else:
        scrub([source], tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["scrub.json", "x.jsonl"]
    assert "Ann" not in texts_of(tmp_path / "out" / "x.jsonl")[0]


def rename_only(folder: workers.WorkFolder, names: list[str], report: object) -> None:
    for name in names:
        (folder.private / name).replace(folder.output / name)
    raise KeyboardInterrupt


def test_a_run_without_key_file_keeps_its_key_until_the_end_only(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [ANN, "Ann Stone"])
    options = ScrubOptions(chunk_bytes=10, processes=1)

    def kill(phase: str, *_: int) -> None:
        if phase == "replace":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scrub([source], tmp_path / "out", options, progress=kill)
    kept = tmp_path / "out" / "private" / "key.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    scrub([source], tmp_path / "out", options)
    dear, name = texts_of(tmp_path / "out" / "x.jsonl")
    assert name in dear and name != "Ann Stone"  # both chunks under one key
    assert not (tmp_path / "out" / "private").exists()


def test_an_output_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in" / "x.jsonl", [ANN])
    scrub([source], tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="holds a finished run; name another folder"):
        scrub([source], tmp_path / "out")
    with pytest.raises(InputError, match="is the folder of an input file"):
        scrub([source], tmp_path / "in")
    with pytest.raises(InputError, match=r"x\.jsonl is a file; name a folder"):
        scrub([source], source)
    assert contents(tmp_path) == before

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scrub([source], tmp_path / "half", progress=kill)
    with pytest.raises(InputError, match="holds no interrupted run of this command over these files"):
        scrub([source], tmp_path / "half", ScrubOptions(mode="mask"))


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source = jsonl(tmp_path / "x.jsonl", [ANN])
    with monkeypatch.context() as patched:
        patched.setattr(workers.os, "fsync", full)
        with pytest.raises(StorageError, match=r"cannot write .*: No space left on device"):
            scrub([source], tmp_path / "out")
    assert not (tmp_path / "out" / "x.jsonl").exists()
    scrub([source], tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["scrub.json", "x.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "masc"}, "did you mean 'mask'"),
        ({"max_values": 0}, "max_values must be a whole number of at least 1"),
        ({"contexts": -1}, "contexts and processes must be 0 or more"),
        ({"key_file": Path("nowhere")}, "nowhere cannot be read"),
        ({"max_values": 2}, "more than 2 different values were found; raise --max-values"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        scrub([jsonl(tmp_path / "x.jsonl", [ANN])], tmp_path / "out", replace(ScrubOptions(), **options))


def test_a_run_with_too_many_values_goes_on_with_a_higher_limit(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [ANN])
    with pytest.raises(InputError, match="more than 2 different values"):
        scrub([source], tmp_path / "out", ScrubOptions(max_values=2))
    phases: list[str] = []
    scrub([source], tmp_path / "out", ScrubOptions(max_values=3), progress=lambda phase, *_: phases.append(phase))
    assert "find" not in phases and "Ann" not in texts_of(tmp_path / "out" / "x.jsonl")[0]


def test_a_short_key_and_a_broken_table_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [ANN])
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(InputError, match="must have at least 16 secret bytes, it has 5"):
        scrub([source], tmp_path / "out", ScrubOptions(key_file=tmp_path / "key"))
    (tmp_path / "known.csv").write_text("type,value\nname,Ann\nnmae,Secret\n")
    with pytest.raises(DataError, match="row 2 must have a value and a type of") as error:
        scrub([source], tmp_path / "out", ScrubOptions(known=tmp_path / "known.csv"))
    assert "Secret" not in str(error.value)
    with pytest.raises(InputError, match="two of the files have the same name"):
        scrub([source, jsonl(tmp_path / "b" / "x.jsonl", [ANN])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_short_and_common_names_eat_no_words() -> None:
    table = {("name", "mark"): "Hugo", ("name", "jo"): "Al"}
    replacer = Replacer([Value("name", "Mark"), Value("name", "Jo")], table)
    assert replacer.replace("Mark my mark, Jo: marks and Joe", [])[0] == "Hugo my mark, Jo: marks and Joe"
    known = Replacer([Value("name", "Jo")], table, always=frozenset({("name", "jo")}))
    assert known.replace("Jo and Joe, jo", [])[0] == "Al and Joe, jo"


def test_of_two_values_that_overlap_the_longer_is_replaced() -> None:
    table = {("name", "ann stone"): "Jo Reed", ("address", "4 ann stone road"): "9 Kim Road"}
    replacer = Replacer([Value("name", "Ann Stone"), Value("address", "4 Ann Stone Road")], table)
    assert replacer.replace("at 4 Ann Stone Road", [(5, 14, "name")])[0] == "at 9 Kim Road"


def test_of_two_values_that_partly_overlap_both_are_replaced() -> None:
    text, name = "Dear Ann Stone Street 12, Denham", (5, 14, "name")
    table = {("name", "ann stone"): "Jo Reed", ("address", "stone street 12, denham"): "9 Kim Road"}
    address = Value("address", "Stone Street 12, Denham")
    for mode, expected in (
        ("mask", "Dear [NAME] [ADDRESS]"), ("remove", "Dear  "), ("pseudonym", "Dear Jo Reed 9 Kim Road")
    ):  # fmt: skip
        new, places = Replacer([address], table, mode=mode).replace(text, [name])
        assert new == expected
        assert [(text[p.start : p.end], p.key[0], p.found) for p in places] == [
            ("Ann", "name", True), ("Stone Street 12, Denham", "address", False)
        ]  # fmt: skip
    known = Replacer([Value("name", "Ann Stone"), address], {}, mode="mask")
    assert known.replace(f"{text}; Ann Stone", [])[0] == "Dear [NAME] [ADDRESS]; [NAME]"
    del table[("name", "ann stone")]
    alone = Replacer([address], table, alone=Pseudonyms(b"k" * 32)).replace(text, [name])[0]
    assert re.fullmatch(r"Dear \w+ \w+ 9 Kim Road", alone) and "Ann" not in alone


def test_no_character_of_a_place_stays_whatever_overlaps() -> None:
    """Against a twin that looks at each character; places of which no two partly overlap are as they were."""
    rng, cut = random.Random(8), 0
    for _ in range(2000):
        text = "".join(rng.choices("ab ", k=24))
        spans = {tuple(sorted(rng.sample(range(25), 2))) for _ in range(rng.randint(1, 7))}
        places = [
            Place(a, b, ("name", text[a:b]), bool(rng.getrandbits(1)), text[a:b]) for a, b in sorted(spans) if
            text[a:b].strip() == text[a:b]
        ]  # fmt: skip
        kept = apart(text, places)
        assert kept == apart(text, places[::-1])
        assert all(a.start < a.end <= b.start for a, b in itertools.pairwise(kept))
        covered = {at for place in kept for at in range(place.start, place.end)}
        wanted = {at for place in places for at in range(place.start, place.end)}
        assert covered <= wanted and all(text[at] == " " for at in wanted - covered)
        outer = [p for p in places if not any(o.start <= p.start and p.end <= o.end and o is not p for o in places)]
        if all(a.end <= b.start for a, b in itertools.pairwise(outer)):
            assert kept == outer
        else:
            cut += 1
            assert max(places, key=lambda p: (p.end - p.start, p.found, -p.start)) in kept
            assert all(any(p.old == place.old and p.key == place.key for p in places) for place in kept)
    assert cut > 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u0418\u0432\u0430\u043d \u043f\u0438\u0448\u0435\u0442 X.", "_ \u043f\u0438\u0448\u0435\u0442 [NAME]."),
        ("他和李晓红，さくら、김민수 X", "_，_、_ [NAME]"),
        ("in \u0391\u03b8\u03ae\u03bd\u03b1, \u01c5ep A\u0301nn X", "in _, _ _ [NAME]"),
        ("l\u0663 \u0645\u062d\u0645\u062f a\u200bnn X", "_ _ _ [NAME]"),
        ("[SECRET_NAME] of [JOHN] to X, and O'Neil at foo_Bar", "[_] of [_] to [NAME], and _'_ at _"),
    ],
)  # fmt: skip
def test_contexts_show_small_letters_only(text: str, expected: str) -> None:
    """Of a missed value in whatever script, since the report may go to others."""
    at = text.index("X")
    assert context(text, [Place(at, at + 1, ("name", "x"), True, "X")], 0) == expected


def test_a_record_of_which_nothing_is_left_stays_a_record(tmp_path: Path) -> None:
    """An empty line would be none: readers skip it, and every record after it would have another number."""
    (tmp_path / "x.csv").write_bytes(b'text\r\nann.stone@old.org\r\n"a.b@old.org "\r\nhello\r\n')
    scrub([tmp_path / "x.csv"], tmp_path / "out", ScrubOptions(mode="remove"))
    assert (tmp_path / "out" / "x.csv").read_bytes() == b'text\r\n""\r\n" "\r\nhello\r\n'
    with (tmp_path / "out" / "x.csv").open(newline="") as file:
        assert [row["text"].strip() for row in csv.DictReader(file)] == ["", "", "hello"]
    (tmp_path / "y.csv").write_text("id,text\n1,ann.stone@old.org\n")
    scrub([tmp_path / "y.csv"], tmp_path / "two", ScrubOptions(mode="remove"))
    assert (tmp_path / "two" / "y.csv").read_text() == "id,text\n1,\n"


def test_columns_that_are_not_looked_at_are_named(tmp_path: Path) -> None:
    """They may hold the very values that were replaced beside them."""
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        json.dumps({"text": ANN, "name": "Ann Stone"}) + "\n" + json.dumps({"text": "x", "id": 3, "p": "q"}) + "\n"
    )
    table = tmp_path / "b.csv"
    table.write_text("mail,text,p\na@example.org,nothing,q\nb@example.org,nothing,r\n")
    (tmp_path / "c.txt").write_text("nothing\n")
    files = [str(lines), str(table), str(tmp_path / "c.txt")]
    result = CliRunner().invoke(app, ["data", "scrub", *files, str(tmp_path / "out")])
    assert "copied as they are: columns 'id', 'mail', 'name', 'p'" in result.output.replace("\n", " ")
    assert "names were found by the words around them only" in result.output.replace("\n", " ")
    report = json.loads((tmp_path / "out" / "scrub.json").read_text())
    assert report["other_columns_as_they_were"] == ["id", "mail", "name", "p"]


def test_the_command(tmp_path: Path, key: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", [ANN, "nothing"], ["p", "q"])
    options = ["--mode", "mask", "--types", "email, phone", "--person-column", "person", "--key-file", str(key)]
    result = CliRunner().invoke(app, ["data", "scrub", str(source), str(tmp_path / "out"), *options])
    assert "1 of 2 records changed; replaced 1 of type email, 1 of type phone" in result.output.replace("\n", " ")
    assert "names were found" not in result.output
    assert texts_of(tmp_path / "out" / "x.jsonl")[0] == "Dear Ann Stone, we ring [PHONE] or write to [EMAIL]."
