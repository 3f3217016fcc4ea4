"""Surrogates are consistent, of the same form, harmless, and never a value of the corpus."""

# ruff: noqa: RUF001

from __future__ import annotations

import ipaddress
import itertools
import random
import re

import pytest

from veiltune.data.detect_patterns import iban_remainder, luhn_digit, zh_check
from veiltune.data.propagate import Finder, fold, long_enough
from veiltune.data.pseudonyms import Pseudonyms, Value
from veiltune.data.surrogates import canonical, written_like
from veiltune.errors import InputError

KEY = bytes(range(32))


def one(type: str, text: str, owner: str = "", key: bytes = KEY) -> str:
    """The surrogate of a single value, written as the value was."""
    table = Pseudonyms(key).table([Value(type, text, owner)])
    return written_like(type, text, table[type, canonical(type, text)])


VALUES = {
    "name": "Ann Stone",
    "email": "x62huqpu@old.net",
    "phone": "(212) 555-2368",
    "iban": "GB82 WEST 1234 5698 7654 32",
    "card": "4111 1111 1111 1111",
    "us_ssn": "078-05-1120",
    "zh_id": "11010519491231002X",
    "ip": "10.1.2.3",
    "url": "https://a.example/b",
    "address": "Suite 725, 3865 Heron Square, Brackhaven, CO 80202",
}


@pytest.mark.parametrize("type", VALUES)
def test_the_same_key_and_value_give_the_same_surrogate(type: str) -> None:
    surrogates = {one(type, VALUES[type], key=bytes([i] * 32)) for i in range(12)}
    assert one(type, VALUES[type]) == one(type, VALUES[type]) != VALUES[type]
    assert len(surrogates) > 6


def test_forms_are_kept_and_values_are_harmless() -> None:
    assert re.fullmatch(r"\(\d{3}\) 555-01\d\d", one("phone", "(212) 555-2368"))
    assert re.fullmatch(r"\+1 \d{3} 555 01\d\d", one("phone", "+1 212 555 2368"))
    assert re.fullmatch(r"129-\d{4}-\d{4}", one("phone", "138-1234-5678"))
    assert re.fullmatch(r"\+86 129 \d{4} \d{4}", one("phone", "+86 138 1234 5678"))
    iban = one("iban", VALUES["iban"])
    assert re.fullmatch(r"GB\d\d [A-Z]{4} \d{4} \d{4} \d{4} \d\d", iban) and iban_remainder(iban.replace(" ", "")) == 1
    card = one("card", VALUES["card"])
    digits = card.replace(" ", "")
    assert re.fullmatch(r"9\d{3} \d{4} \d{4} \d{4}", card) and luhn_digit(digits[:-1]) == digits[-1]
    assert re.fullmatch(r"666-\d\d-\d{4}", one("us_ssn", VALUES["us_ssn"]))
    zh_id = one("zh_id", VALUES["zh_id"])
    assert zh_id.startswith("99") and zh_check(zh_id[:17]) == zh_id[17]
    documentation = [ipaddress.ip_network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]
    assert any(ipaddress.ip_address(one("ip", "10.1.2.3")) in network for network in documentation)
    assert ipaddress.ip_address(one("ip", "fe80::1")) in ipaddress.ip_network("2001:db8::/32")
    assert re.fullmatch(r"[a-z]\d\d[a-z]{5}@example\.(com|net|org)", one("email", VALUES["email"]))
    assert re.fullmatch(
        r"Suite [1-9]\d\d, [1-9]\d{3} \w+ Square, \w+, [A-Z]{2} \d{5}", one("address", VALUES["address"])
    )
    assert re.fullmatch(r"..市..路\d\d号\d栋\d层\d室", one("address", "安宁市幸福路12号3栋4层5室"))
    assert len(one("name", "李小明")) == 3


def test_an_address_follows_the_name_of_its_owner() -> None:
    values = [
        Value("email", "ann.stone@old.org", "p1"),
        Value("email", "AStone@old.org", "p1"),
        Value("name", "Ann Stone", "p1"),
        Value("name", "Ms Stone", "p1"),
        Value("name", "Ann Stonefield", "p2"),
        Value("email", "ann.stonefield@old.org", "p2"),
    ]
    table = Pseudonyms(KEY).table(values)
    first, last = table["name", "ann stone"].split()
    assert table["name", "ms stone"] == f"Ms {last}"
    assert table["email", "ann.stone@old.org"].startswith(f"{first}.{last}@".lower())
    assert table["email", "astone@old.org"].partition("@")[0].lower() == (first[0] + last).lower()
    other = table["name", "ann stonefield"]
    assert other.split()[0] != first  # another person's Ann
    assert table["email", "ann.stonefield@old.org"].partition("@")[0] == other.lower().replace(" ", ".")


def test_an_address_follows_a_name_that_was_found_nowhere_too() -> None:
    with_name = Pseudonyms(KEY).table([Value("name", "Ann Stone", "p"), Value("email", "ann.stone@old.org", "p")])
    without = Pseudonyms(KEY).table([Value("email", "ann.stone@old.org", "p")])
    key = ("email", "ann.stone@old.org")
    assert with_name[key].rpartition(".")[0].rpartition("@")[0].split(".")[0] == without[key].split(".")[0]


def test_no_surrogate_is_a_value_and_no_two_are_the_same() -> None:
    rng = random.Random(0)
    names = {f"{a} {b}" for a in ("James", "Mary", "John", "Linda") for b in ("Smith", "Brown", "Davis", "Miller")}
    values = [Value("name", name) for name in sorted(names)]
    values += [Value("phone", f"212-555-{n:04d}") for n in rng.sample(range(10000), 400)]
    table = Pseudonyms(KEY).table(values)
    assert len({(type, surrogate) for (type, _), surrogate in table.items()}) == len(values)
    assert not {surrogate for _, surrogate in table.items()} & {canonical(v.type, v.text) for v in values}
    chosen = table["name", "mary smith"]
    again = Pseudonyms(KEY).table(values, avoid=[fold(chosen)[0]])
    assert again["name", "mary smith"] != chosen
    planted = Pseudonyms(KEY).table([*values, Value("name", chosen)])
    assert planted["name", "mary smith"] != chosen  # now a value of the corpus


def test_values_share_surrogates_where_there_are_too_few_rather_than_fail() -> None:
    table = Pseudonyms(KEY).table([Value("ip", f"10.1.{a}.{b}") for a in range(4) for b in range(250)])
    assert 500 < len(set(table.values())) < 1000


@pytest.mark.parametrize("text", ["Dr", "123", "'", "Mr. de la"])
def test_a_name_without_a_name_gets_one_all_the_same(text: str) -> None:
    assert one("name", text).strip() not in ("", text)


def test_capitals_are_those_of_the_occurrence() -> None:
    surrogate = one("name", "Ann Stone")
    assert written_like("name", "ANN STONE", surrogate) == surrogate.upper()
    assert written_like("name", "ann stone", surrogate) == surrogate.lower()


def test_a_short_key_is_refused_and_a_key_is_not_shown() -> None:
    with pytest.raises(InputError, match="key must have at least 16 bytes, got 3"):
        Pseudonyms(b"abc")
    assert "00" not in repr(Pseudonyms(bytes(32))) and repr(Value("name", "Ann")) == "Value(name)"


def slow_find(values: dict[str, int], text: str) -> set[tuple[int, int, int]]:
    """Every value at every place, by comparing folded slices."""
    hits = []
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            for value, number in values.items():
                inside = any(
                    0 < at < len(text)
                    and text[at - 1].isalnum()
                    and text[at].isalnum()
                    and not re.match("[\u3400-\u9fff]", text[at - 1])
                    and not re.match("[\u3400-\u9fff]", text[at])
                    for at in (start, end)
                )
                if fold(text[start:end])[0] == fold(value)[0] and not inside:
                    hits.append((start, end, number))
    return set(hits)


def test_fast_and_slow_search_for_values_agree() -> None:
    rng = random.Random(3)
    values = {"ab": 0, "a b": 1, "中文": 2, "b1": 3}
    finder, seen = Finder(values), 0
    for _ in range(400):
        text = "".join(rng.choice("abAB1 \t中文ｂ.") for _ in range(rng.randint(2, 14)))
        fast, slow = finder.find(text), slow_find(values, text)
        assert set(fast) <= slow, text
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(fast)), text
        for hit in slow - set(fast):  # it is inside another one
            assert any(other[0] <= hit[0] and hit[1] <= other[1] for other in fast), text
        seen += len(fast)
    assert seen > 80
    assert not Finder({}).find("anything")


def test_texts_are_compared_after_normalisation_and_places_are_of_the_text() -> None:
    text = "Im Ｓtraßenbahn-Ort: JOSE\u0301 und jos\u00e9, ﬁnn"
    finder = Finder({"José": 0, "finn": 1, "strassenbahn": 2})
    assert [(text[a:b], n) for a, b, n in finder.find(text)] == [
        ("Ｓtraßenbahn", 2), ("JOSE\u0301", 0), ("jos\u00e9", 0), ("ﬁnn", 1)
    ]  # fmt: skip


def test_short_values_are_not_looked_for_everywhere() -> None:
    assert [long_enough(value) for value in ("Jo", "Anna", "a.b", "李明", "李小明")] == [
        False,
        True,
        False,
        False,
        True,
    ]
