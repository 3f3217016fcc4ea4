"""Every type is found in its forms, look-alikes are not, and fast searches agree with slow ones."""

# ruff: noqa: RUF001

from __future__ import annotations

import itertools
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from veiltune.data import detect_patterns as patterns
from veiltune.data.detect import TYPES, Detector, DetectorOptions, Found, without_overlaps
from veiltune.data.manifest import Manifest, read_manifest
from veiltune.data.synth import SynthOptions, synthesise
from veiltune.errors import InputError

MANIFEST_TYPES = {"name": "name", "email": "email", "phone": "phone", "home": "address", "work": "address"}


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(DetectorOptions(types=TYPES))


def found(detector: Detector, text: str) -> set[tuple[str, str]]:
    return {(one.type, text[one.start : one.end]) for one in detector.find(text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to <a.b+c@mail.example.co.uk>, please", {("email", "a.b+c@mail.example.co.uk")}),
        ("x@y.org,z_1@w.net", {("email", "x@y.org"), ("email", "z_1@w.net")}),
        ("a@b, @c.org, d@.org, e@f..org", set()),
        ("请写信到li.ming@example.org的邮件", {("email", "li.ming@example.org")}),
        ("call (632) 555-0146.", {("phone", "(632) 555-0146")}),
        ("632-555-0146, 632.555.0146 and +1 632 555 0146", {
            ("phone", "632-555-0146"), ("phone", "632.555.0146"), ("phone", "+1 632 555 0146")}),
        ("电话13812345678或138-1234-5678", {("phone", "13812345678"), ("phone", "138-1234-5678")}),
        ("+86 138 1234 5678; 010-62345678", {("phone", "+86 138 1234 5678"), ("phone", "010-62345678")}),
        ("+44 20 7946 0958 or 020 7946 0958", {("phone", "+44 20 7946 0958"), ("phone", "020 7946 0958")}),
        ("order 2018-01-14 03:07:43, 12/31/1999, 1.234.567,89", set()),
        ("file 4467 3395 of 10 000 000", set()),
        ("my phone is 467 3395", {("phone", "467 3395")}),
        ("IBAN gb82west12345698765432.", {("iban", "gb82west12345698765432")}),
        ("DE89 3704 0044 0532 0130 00 by noon", {("iban", "DE89 3704 0044 0532 0130 00")}),
        ("DE88 3704 0044 0532 0130 00, XX82WEST12345698765432, GB82WEST1234569876543", set()),
        ("4111111111111111 and 5500-0000-0000-0004 and 340000000000009", {
            ("card", "4111111111111111"), ("card", "5500-0000-0000-0004"), ("card", "340000000000009")}),
        ("4111111111111112 and 7992739871394111", set()),
        ("4111 1111 1111 1111 10 times; 6502234500762709 33 minutes; ES80 3877 8408 1301 6097 5361", {
            ("card", "4111 1111 1111 1111")}),
        ("SSN 078-05-1120; not 000-12-3456, 666-12-3456, 900-12-3456, 123-00-4567, 123-45-0000", {
            ("us_ssn", "078-05-1120")}),
        ("social security number 078051120, and an order that has the number 078051121", {("us_ssn", "078051120")}),
        ("身份证号11010519491231002X，编号110105194912310021", {("zh_id", "11010519491231002X")}),
        ("from 192.168.1.77 and fe80::1ff:fe23:4567:890a, not 1.2.3, 300.1.1.1, 10:15:00", {
            ("ip", "192.168.1.77"), ("ip", "fe80::1ff:fe23:4567:890a")}),
        ("see https://a.example/b?c=d, or (www.e.example).", {
            ("url", "https://a.example/b?c=d"), ("url", "www.e.example")}),
        ("it went to 12 Old Mill Road, Apt 4, Denham, CO 80202 in May", {
            ("address", "12 Old Mill Road, Apt 4, Denham, CO 80202")}),
        ("at Suite 725, 3865 Heron Square, Brackhaven; P.O. Box 17", {
            ("address", "Suite 725, 3865 Heron Square, Brackhaven"), ("address", "P.O. Box 17")}),
        ("on 4 October the 3 Mill workers met", set()),
        ("寄到安宁市幸福路12号3栋4层5室。住建国市解放大道8号启明大厦201室", {
            ("address", "安宁市幸福路12号3栋4层5室"), ("address", "建国市解放大道8号启明大厦201室")}),
        ("Dear Ann Stone,\nMr. O'Neil called.\nKind regards,\nMary-Jane Watson", {
            ("name", "Ann Stone"), ("name", "O'Neil"), ("name", "Mary-Jane Watson")}),
        ("Dear Customer Service, Good morning. Patient Records. Kind regards", set()),
        ("Stone, Ann wrote from ann.stone@x.org", {("name", "Stone, Ann"), ("email", "ann.stone@x.org")}),
        ("患者：李小明。客户王建国反映，张丽女士", {("name", "李小明"), ("name", "王建国"), ("name", "张丽")}),
    ],
)  # fmt: skip
def test_hand_written_examples(detector: Detector, text: str, expected: set[tuple[str, str]]) -> None:
    assert found(detector, text) == expected


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    options = SynthOptions(
        persons=60, population=20, validation=12, canaries=8, exposure_canaries=1, references=8,
        repetitions=(1, 2, 4), locales=("en_US", "zh_CN"),
    )  # fmt: skip
    return read_manifest(synthesise(tmp_path_factory.mktemp("corpus") / "both", options).manifest)


def rates(corpus: Manifest, detector: Detector) -> dict[str, tuple[float, float]]:
    """Recall and precision by type; exactly the same characters count."""
    right, there, claimed = defaultdict(int), defaultdict(int), defaultdict(int)
    for record in corpus.records:
        truth = {(MANIFEST_TYPES[span.type], span.start, span.end) for span in record.spans}
        got = {(one.type, one.start, one.end) for one in detector.find(record.text)}
        for counts, places in ((right, truth & got), (there, truth), (claimed, got)):
            for type, _, _ in places:
                counts[type] += 1
    return {type: (right[type] / there[type], right[type] / max(1, claimed[type])) for type in there}


def test_recall_and_precision_on_a_corpus_that_the_detector_does_not_know(corpus: Manifest) -> None:
    measured = rates(corpus, Detector())
    for type in ("email", "phone", "address"):
        assert min(measured[type]) >= 0.99, type
    assert measured["name"][0] > 0.4 and measured["name"][1] > 0.95
    blind = rates(corpus, Detector(DetectorOptions(types=("email",))))
    assert blind["email"] == measured["email"] and blind["phone"] == (0, 0)  # planted: it does not look


def slow_emails(text: str) -> set[str]:
    """Tries every start and every end around each @, and keeps the longest."""
    kept = set()
    for at in (m.start() for m in re.finditer("@", text)):
        lefts = [i for i in range(at) if re.fullmatch(r"[A-Za-z0-9_+%'.-]*[A-Za-z0-9_+%-]", text[i:at])]
        rights = [
            j
            for j in range(at + 1, len(text) + 1)
            if re.fullmatch(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_]|-(?=[A-Za-z0-9_-]))*\.)+[A-Za-z]{2,24}", text[at + 1 : j])
            and not re.match(r"[A-Za-z0-9_]|-[A-Za-z0-9]", text[j:])
        ]
        if lefts and rights and (local := text[min(lefts) : at].lstrip(".'-")):
            kept.add(local + text[at : max(rights)])
    return kept


def test_fast_and_slow_search_for_emails_agree() -> None:
    rng = random.Random(0)
    seen = 0
    for _ in range(3000):
        pieces = ["ab", "ab.", "b1.", "a", ".", "-", "_", " ", "'", "中"]
        before, after = ("".join(rng.choices(pieces, [6, 4, 2] + [1] * 7, k=rng.randint(1, 6))) for _ in range(2))
        if before.endswith("中"):
            continue  # belongs to an address only where no ASCII letter follows
        text = f"{before}@{after}"
        fast = {text[a:b] for a, b, _ in patterns.find_emails(text)}
        assert fast == slow_emails(text), text
        seen += bool(fast)
    assert seen > 50


def slow_luhn(digits: str) -> bool:
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if index % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def test_check_digits_agree_with_slow_ones_and_a_wrong_digit_is_refused() -> None:
    rng = random.Random(1)
    for _ in range(300):
        body = "4" + "".join(rng.choices("0123456789", k=14))
        good = body + patterns.luhn_digit(body)
        assert slow_luhn(good) and patterns.is_card(good)
        bad = good[:5] + str((int(good[5]) + 1) % 10) + good[6:]
        assert not patterns.is_card(bad) and not slow_luhn(bad)
        account = "DE00" + "".join(rng.choices("0123456789", k=18))
        remainder = 0
        for character in account[4:] + "131400":
            remainder = (remainder * 10 + int(character)) % 97
        assert patterns.iban_remainder(account) == remainder
        iban = f"DE{98 - remainder:02d}{account[4:]}"
        assert [iban[a:b] for a, b, _ in patterns.find_ibans(iban)] == [iban]
        assert not list(patterns.find_ibans(iban[:-1] + str((int(iban[-1]) + 1) % 10)))


def test_of_overlapping_finds_the_first_type_then_the_longer_stays() -> None:
    rng = random.Random(2)
    for _ in range(300):
        candidates = []
        for _ in range(rng.randint(1, 7)):
            start = rng.randint(0, 20)
            candidates.append(Found(start, start + rng.randint(1, 9), rng.choice(TYPES), rng.choice((0.5, 1.0))))
        kept = without_overlaps(candidates)
        assert kept == sorted(kept)
        assert all(a.end <= b.start for a, b in itertools.pairwise(kept))
        for one in candidates:
            better = [
                other
                for other in kept
                if other.start < one.end
                and one.start < other.end
                and (TYPES.index(other.type), other.start - other.end) <= (TYPES.index(one.type), one.start - one.end)
            ]
            assert better  # itself, or what it lost to


@pytest.mark.parametrize(
    "piece",
    [
        *("1", "1 ", "1-", "12 ", "+1 ", "(", "a.", "a@", "@", ":", "a:", "GB82 1234 ", "4111 1111 ", " ", "\n"),
        *("Ab ", "Ab-", "Ab'", "Dear ", "Ann Stone, ", "12 Ab ", "Ab: ", "\nAb Ab", "http://", "号中", "路1", "王"),
    ],
)
def test_no_text_takes_long(piece: str, detector: Detector) -> None:
    text = piece * (20_000 // len(piece))
    started = time.process_time()
    detector.find(text + "号 x@y.org")
    assert time.process_time() - started < 2  # far more where a pattern tries every way to cut a text


def test_a_find_does_not_show_where_or_what() -> None:
    assert repr(Found(3, 9, "name", 0.5)) == "Found(name)"


@pytest.mark.parametrize("kind", ["presidio", "both"])
def test_presidio_finds_the_same_forms(kind: str) -> None:
    pytest.importorskip("presidio_analyzer")
    detector = Detector(DetectorOptions(detector=kind))
    text = "Mail a.b@example.org, card 4111111111111111, IBAN GB82WEST12345698765432, ring +1 212 555 2368."
    assert {type for type, _ in found(detector, text)} >= {"email", "card", "iban", "phone"}
    assert ("email", "li@example.org") in found(detector, "写信到 li@example.org 。")
    crowded = found(detector, "写信到li@example.org的邮件")
    assert (("email", "li@example.org") in crowded) == (kind == "both")  # Presidio's takes the Chinese words along


def test_a_model_finds_persons_that_have_no_sign(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Zoe Quinn"}])
    pipeline.to_disk(tmp_path / "model")
    text = "the keys of Zoe Quinn lay there"
    assert found(Detector(), text) == set()
    assert found(Detector(DetectorOptions(ner=str(tmp_path / "model"))), text) == {("name", "Zoe Quinn")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": ("emial",)}, "type 'emial' is unknown; did you mean 'email'"),
        ({"types": ()}, "types must name at least one"),
        ({"detector": "presido"}, "did you mean 'presidio'"),
        ({"ner": "no_such_model"}, "no_such_model is no installed spaCy model"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        Detector(replace(DetectorOptions(), **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "options"),
    [("phonenumbers", {}), ("presidio_analyzer", {"detector": "presidio"}), ("spacy", {"ner": "model"})],
)
def test_a_missing_package_is_named(module: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"need {module}: pip install '.\[scrub\]'"):
        Detector(DetectorOptions(**options))  # type: ignore[arg-type]


def test_those_that_stay_are_as_by_looking_at_all_pairs() -> None:
    rng = random.Random(0)
    for _ in range(300):
        starts = [rng.randint(0, 40) for _ in range(rng.randint(0, 12))]
        candidates = [Found(a, a + rng.randint(1, 9), rng.choice(TYPES), rng.choice((0.5, 1.0))) for a in starts]
        kept: list[Found] = []
        for found in sorted(candidates, key=lambda f: (TYPES.index(f.type), f.start - f.end, -f.score, f.start)):
            if all(found.end <= other.start or other.end <= found.start for other in kept):
                kept.append(found)
        assert without_overlaps(candidates) == sorted(kept)
