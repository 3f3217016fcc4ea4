"""Texts as their reader sees them, against a slow twin that goes character by character; and what hides no more."""

# ruff: noqa: RUF001

from __future__ import annotations

import itertools
import random

import pytest

from veiltune.data.detect import Detector
from veiltune.data.legible import legible
from veiltune.data.propagate import Finder
from veiltune.data.pseudonyms import Pseudonyms, Value
from veiltune.data.replacing import Replacer
from veiltune.data.surrogates import canonical, written_like

HIDDEN, BLANKS = "\u00ad\u200b\u200d\u2060\ufeff", " \t\r\u00a0\u2009\u3000"
USUAL = {"１": "1", "Ａ": "A", "＠": "@", "．": ".", "\u2010": "-", "\u2011": "-", "\u2019": "'"}
ALPHABET = "ab1\n\u2019" + HIDDEN + BLANKS + "１Ａ＠．\u2010\u2011\u2013王，"


def slowly(text: str) -> tuple[str, list[int]]:
    made: list[tuple[str, int]] = []
    for spacing, group in itertools.groupby(enumerate(text), key=lambda one: one[1] in HIDDEN + BLANKS):
        run = list(group)
        if not spacing:
            for at, character in run:
                dash = character == "\u2013" and text[at - 1 : at].isdecimal() and text[at + 1 : at + 2].isdecimal()
                if dash and text[at - 1].isascii() and text[at + 1].isascii():
                    character = "-"
                made.append((USUAL.get(character, character), at))
            continue
        first, after = run[0][0], run[-1][0] + 1
        at_an_edge = text[first - 1 : first] == "\n" or text[after : after + 1] == "\n"
        if any(character in BLANKS for _, character in run) and not at_an_edge:
            made.append((" ", first))
    return "".join(character for character, _ in made), [*(at for _, at in made), len(text)]


def test_it_is_as_its_slow_twin() -> None:
    rng = random.Random(0)
    changed = 0
    for _ in range(5000):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(0, 12)))
        seen, places = legible(text)
        expected, where = slowly(text)
        assert seen == expected and (places or list(range(len(text) + 1))) == where
        assert legible(seen)[0] == seen or any(odd in text for odd in HIDDEN + "１\u2013")
        changed += seen != text
    assert changed > 1000


@pytest.mark.parametrize(
    ("type", "text", "value"),
    [
        ("email", "to ann\u200b.stone@example.org.", "ann.stone@example.org"),
        ("email", "to ａｎｎ@ｅｘａｍｐｌｅ．ｏｒｇ", "ann@example.org"),
        ("phone", "ring 212\u2013555\u20110123 now", "2125550123"),
        ("phone", "电话１３８１２３４５６７８。", "13812345678"),
        ("card", "card 4111 1111  11\u206011 1111 now", "4111111111111111"),
        ("iban", "to GB82-WEST-1234-5698-7654-32.", "GB82WEST12345698765432"),
        ("iban", "to GB82 WEST 1234 \n  5698 7654 32.", "GB82WEST12345698765432"),
        ("iban", "to GB82  WEST  1234  5698  7654  32", "GB82WEST12345698765432"),
        ("us_ssn", "SSN 078\u201105\u20111120", "078051120"),
        ("name", "Dear Ann \t Stone, hello", "ann stone"),
        ("name", "Dear Maria O\u2019Neill\u2011García, hello", "maria o'neill-garcía"),
        ("zh_id", "身份证 １１０１０５１９４９１２３１００２Ｘ", "11010519491231002X"),
        ("iban", "to DE89 ３７０４ 0044 0532 0130 00", "DE89370400440532013000"),
        ("card", "card ４１１１１１１１１１１１１１１１", "4111111111111111"),
        ("phone", "ring +14155552671 now", "4155552671"),
        ("address", "to 42 Baker Street, London NW1 6XE", "42 baker street, london nw1 6xe"),
    ],
)
def test_what_is_spelt_oddly_is_found_where_it_stands(type: str, text: str, value: str) -> None:
    (found,) = Detector().find(text)
    there = text[found.start : found.end]
    assert found.type == type and canonical(type, there) == value
    assert (
        text[: found.start].strip(" ") in ("to", "ring", "card", "SSN", "电话", "Dear", "身份证")
        and there == there.strip()
    )
    known = Value(type, legible(there)[0])  # as `scrub` keeps it
    new, _ = Replacer([known], Pseudonyms(bytes(32)).table([known])).replace(text, [(found.start, found.end, type)])
    assert canonical(type, new[found.start : len(new) - len(text[found.end :])]) != value
    assert new.startswith(text[: found.start]) and new.endswith(text[found.end :])


def test_a_known_value_is_replaced_in_any_digits() -> None:
    """Once a number in full-width digits was counted as replaced, and stood there still."""
    value = Value("phone", "13812345678")
    table = Pseudonyms(bytes(32)).table([value])
    new, places = Replacer([value], table).replace("１３８１２３４５６７８, 138 1234\u200b5678", [])
    assert [place.key for place in places] == [("phone", "13812345678")]  # spaces make it another text
    assert "１" not in new and new.startswith(table["phone", "13812345678"])
    assert written_like("iban", "٠١٢٣", "GB00") == "GB00"


def test_places_are_those_of_the_text() -> None:
    text = "x\u200b ANN\u00ad \t stone\u200b, y"
    assert [text[a:b] for a, b, _ in Finder({"Ann Stone": 0}).find(text)] == ["ANN\u00ad \t stone\u200b"]
