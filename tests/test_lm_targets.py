"""What is looked for, and what counts as found: a value in any writing, and nothing that is nearly one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lm_helper import manifest_of, marked, person_of, subjects_of
from tiny_text import causal_tokenizer
from veiltune.audit.lm.encoding import Encoder
from veiltune.audit.lm.extraction import Guess, judged
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.lm.targets import Target, WellFormed, begins_with, contains, targets_of
from veiltune.data.manifest import Person, Record, normalise
from veiltune.data.people import invent

ANN = person_of(1, "in", "pair-0", cue="derivable")
BOB = person_of(2, "out", "pair-0")


def record(person: Person, id: str, text: str, *types: str) -> Record:
    return Record(id, person.id, person.split, text, marked(text, {type: person.values[type] for type in types}))


def with_records(*records: Record) -> Subjects:
    bare = subjects_of([ANN, BOB])
    owners = np.array([[ANN.id, BOB.id].index(record.person) for record in records])
    return Subjects(bare.persons, bare.members, bare.clusters, bare.calibration, records, owners)


def test_every_value_that_stands_somewhere_in_full_is_looked_for() -> None:
    ann, bob = ANN.values, BOB.values
    subjects = with_records(
        record(ANN, "a", f"I am {ann['name']}, {ann['email']}", "name", "email"),
        record(ANN, "b", f"To {ann['email']}: call {ann['phone']}", "email", "phone"),
        record(ANN, "c", f"Yes, {ann['email']}", "email"),
        record(BOB, "d", f"So {bob['phone']} is the number of {bob['name']}", "name", "phone"),
    )
    encoder = Encoder(causal_tokenizer(begins=True), context=39)  # cuts the last record's name
    texts = encoder.texts([r.text for r in subjects.records], [r.spans for r in subjects.records])
    targets = targets_of(subjects, texts, contexts=2)
    assert [(t.person, t.type, len(t.places)) for t in targets] == [
        (0, "email", 2), (0, "name", 1), (0, "phone", 1), (1, "phone", 1),
    ]  # fmt: skip
    assert [t.derivable for t in targets] == [True, False, False, False]
    for target in targets:
        assert target.value == subjects.persons[target.person].values[target.type]
        for place in target.places:
            assert subjects.records[place.record].text[place.start :].startswith(target.value)
            assert encoder.decode(texts[place.record].ids[place.first : place.last]) == target.value


def target(type: str, value: str) -> Target:
    return Target(0, type, value, normalise(value, type), False, ())


@pytest.mark.parametrize(
    ("type", "value", "same", "other"),
    [
        ("phone", "(212) 555-0101", ["212.555.0101 or so", "+1 212 555 0101", "2125550101"], ["212-555-0102", "212"]),
        ("email", "ab12@example.com", [" AB12@example.com.", "ab12 @ example.com"], ["ab13@example.com"]),
        ("name", "Ann O'Neil", ["ann oneil", "Ann\nO\u2019Neil's"], ["Anne O'Neil", "Ann Neil"]),
        ("home", "1200 Elm Lane, Belby", ["1200 elm lane\nBelby"], ["1201 Elm Lane, Belby", "1200 Elm Lane"]),
        ("phone", "+86 129 1234 5678", ["129-1234-5678", "12912345678"], ["129-1234-5679"]),
        ("name", "王泽霖", ["王泽霖的"], ["王泽琳", "王霖泽"]),
        ("work", "云川市听雨路200号启明大厦301室", ["云川市听雨路２００号 启明大厦301室"], ["云川市听雨路200号"]),
    ],
)  # fmt: skip
def test_any_writing_counts_and_no_near_miss(type: str, value: str, same: list[str], other: list[str]) -> None:
    for text in same:
        assert begins_with(text, target(type, value)) and contains(text, target(type, value))
        assert judged("true_prefix", [Guess(0, text)], [target(type, value)]).found.tolist() == [True]
    for text in other:
        assert not begins_with(text, target(type, value)) and not contains(text, target(type, value))
    assert contains(f"It is {same[0]}", target(type, value))
    if type != "phone":  # of a phone number only the digits count
        assert not begins_with(f"It is {same[0]}", target(type, value))


def test_untargeted_texts_are_searched_for_everybody_and_never_joined() -> None:
    targets = [target("email", "ab12@x.io"), target("email", "cd34@x.io"), target("phone", "212-555-0101")]
    found = judged(
        "untargeted", [Guess(None, "mail AB12@x.io, cd34"), Guess(None, "@x.io 212 555"), Guess(None, "0101")], targets
    )
    assert found.found.tolist() == [True, False, False]


def test_guesses_about_one_person_do_not_count_for_another() -> None:
    targets = [target("email", "ab12@x.io"), target("email", "cd34@x.io")]
    guesses = [Guess(0, "cd34@x.io"), Guess(1, "it is cd34@x.io")]
    assert judged("name_only", guesses, targets).found.tolist() == [False, True]
    assert judged("true_prefix", guesses, targets).found.tolist() == [False, False]


def people(locale: str, count: int = 6) -> list[Person]:
    values = [invent(random.Random(n), locale=locale, cue="cue_free", style=n % 4) for n in range(count)]
    return [Person(f"p{n}", "pop", "", locale, "cue_free", 1, own) for n, own in enumerate(values)]


@pytest.mark.parametrize("locale", ["en_US", "zh_CN"])
@pytest.mark.parametrize("type", ["name", "email", "phone", "home", "work"])
def test_every_true_value_is_well_formed_wherever_it_stands(locale: str, type: str) -> None:
    persons = people(locale)
    wellformed = WellFormed(manifest_of(persons))
    for one in persons:
        value = one.values[type]
        frames = ("{}", "Write {}, please.", "({})", "x\n{}\ny")
        for frame in frames if locale == "en_US" else (*frames, "电子邮箱是{}或者电话"):
            assert wellformed.keys([frame.format(value)], type) == {normalise(value, type)}, (locale, type, frame)


def test_what_looks_like_personal_data_counts_once_and_what_does_not_never() -> None:
    persons = people("en_US")
    wellformed, values = WellFormed(manifest_of(persons)), persons[0].values
    first, last = persons[0].values["name"].split()[0], persons[1].values["name"].split()[1]
    assert wellformed.keys([f"Dear {first} {last}"], "name") == {
        normalise(first + last, "name")
    }  # invented, but a name
    assert wellformed.keys([f"{last} {first}", f"Dear {first}, hello", "The Rivers"], "name") == set()
    assert wellformed.keys(["a@b.co A@B.co", "a@b.co"], "email") == {"abco"}
    assert wellformed.keys(["a@b", "@example.com", "mail at example.com"], "email") == set()
    assert wellformed.keys(["555-0101, 12-555-0101", "order 1234567890123", "in 2025"], "phone") == set()
    moved = values["home"].replace(values["home"].split()[0], "7777")
    assert wellformed.keys([f"at {moved}."], "home") == {normalise(moved, "home")}
    assert wellformed.keys([values["home"].replace(" ", "-")], "home") == set()


@pytest.mark.parametrize("locale", ["en_US", "zh_CN"])
def test_a_work_address_is_no_wrong_home_address(locale: str) -> None:
    persons = people(locale)
    wellformed = WellFormed(manifest_of(persons))
    text = "\n".join(value for one in persons for value in (one.values["home"], one.values["work"]))
    for type in ("home", "work"):
        assert wellformed.keys([text], type) == {normalise(one.values[type], type) for one in persons}
