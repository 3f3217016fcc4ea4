"""Invented persons are harmless, apart from each other, and as hard to guess as is said."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import poisson

from veiltune.data import pools
from veiltune.data.carriers import TOPICS
from veiltune.data.manifest import TYPES, normalise
from veiltune.data.people import LOCALES, PHONE_STYLES, People, ValueIndex, english_names, entropy_bits, invent
from veiltune.data.templates import TEMPLATES
from veiltune.errors import InputError

PEOPLE = {
    (locale, cue): [
        invent(random.Random(seed), locale=locale, cue=cue, style=seed % PHONE_STYLES) for seed in range(400)
    ]
    for locale in LOCALES
    for cue in ("derivable", "cue_free")
}


def test_everything_is_reserved_or_invented() -> None:
    for (locale, _), people in PEOPLE.items():
        for person in people:
            assert tuple(person) == TYPES
            assert re.fullmatch(r"[a-z0-9.]+@(example\.(com|net|org)|mail\.test)", person["email"])
            number = normalise(person["phone"], "phone")
            assert re.fullmatch(r"[2-9][0-8]\d55501\d\d" if locale == "en_US" else r"129\d{8}", number)
            assert not re.match("[2-9]11|8(00|22|33|44|55|66|77|88)", number)


def test_the_address_follows_from_the_name_or_not_at_all() -> None:
    for person in PEOPLE["en_US", "derivable"]:
        assert person["email"].partition("@")[0] == person["name"].lower().replace(" ", ".")
    assert re.match(r"[a-z]+\.[a-z]+@", PEOPLE["zh_CN", "derivable"][0]["email"])
    for locale in LOCALES:
        for person, twin in zip(PEOPLE[locale, "cue_free"], PEOPLE[locale, "derivable"], strict=True):
            assert person["name"] == twin["name"] and person["phone"] == twin["phone"]
            assert re.fullmatch("[a-z0-9]{8}", person["email"].partition("@")[0])
            assert person["name"].split()[0].lower() not in person["email"]


def test_styles_write_the_same_number() -> None:
    for locale in LOCALES:
        written = [
            invent(random.Random(5), locale=locale, cue="cue_free", style=s)["phone"] for s in range(PHONE_STYLES)
        ]
        assert len(set(written)) == PHONE_STYLES and len({normalise(phone, "phone") for phone in written}) == 1


def test_names_are_no_words_of_the_texts() -> None:
    words = set(re.findall("[a-z]+", " ".join([*TEMPLATES, *itertools.chain(*TOPICS)]).lower()))
    first, last = english_names()
    assert not words & {name.lower() for name in first + last} and "Grant" in pools.FIRST_NAMES
    assert len(first) > 500 and len(last) > 800
    joined = {a + b for a in first for b in last}
    assert len(joined) > 0.999 * len(first) * len(last)  # so the entropy of a name is that of its two parts


def test_streets_and_towns_can_be_told_apart() -> None:
    """So that no two ways lead to one address and the entropy is the sum of the parts'."""
    for stems, endings in ((pools.STREET_STEMS, pools.STREET_ENDINGS), (pools.TOWN_STEMS, pools.TOWN_ENDINGS)):
        assert len({a + b for a in stems for b in endings}) == len(stems) * len(endings)
    assert not set(pools.HOME_STREETS) & set(pools.WORK_STREETS)
    for locale_pool in (pools.CITIES_ZH, pools.STREETS_ZH, pools.GIVEN_ZH, pools.SURNAMES_ZH):
        assert len(set(locale_pool)) == len(locale_pool)


@pytest.mark.parametrize(
    ("locale", "type", "draws"), [("en_US", "phone", 2000), ("en_US", "name", 6000), ("zh_CN", "name", 3500)]
)
def test_values_coincide_as_often_as_their_entropy_says(locale: str, type: str, draws: int) -> None:
    """Pairs of equal values among many draws are Poisson."""
    rng = random.Random(0)
    values = Counter(invent(rng, locale=locale, cue="cue_free")[type] for _ in range(draws))
    equal = sum(count * (count - 1) // 2 for count in values.values())

    def plausible(bits: float) -> bool:
        expected = draws * (draws - 1) / 2 / 2**bits
        return float(min(poisson.cdf(equal, expected), poisson.sf(equal - 1, expected))) > 0.001

    bits = entropy_bits(locale)[type]
    assert plausible(bits)
    assert not plausible(bits - 1.5) and not plausible(bits + 1.5)  # planted: another entropy


def test_stated_entropies() -> None:
    english, chinese = entropy_bits("en_US"), entropy_bits("zh_CN")
    assert english["email_cue_free"] == pytest.approx(8 * 5.169925 + 2, abs=1e-5)
    assert english["phone"] == pytest.approx(16.1, abs=0.05) and chinese["phone"] == pytest.approx(26.58, abs=0.01)
    assert english["home"] > 30 and chinese["home"] > 30 and english["name"] > 19 and chinese["name"] > 17


def slow_foreign(people: dict[str, dict[str, str]], text: str, owner: str) -> bool:
    normal = normalise(text, "name")
    digits = "".join(c for c in normal if c in "0123456789")
    return any(
        normalise(value, type) in form
        for id, values in people.items()
        if id != owner
        for type, value in values.items()
        for form in (normal, digits)
    )


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_index_finds_what_a_search_finds(data: st.DataObject) -> None:
    value = st.text("ab12 云-", min_size=3, max_size=9).filter(lambda v: len(normalise(v, "name")) >= 3)
    index, people = ValueIndex(), dict[str, dict[str, str]]()
    for owner in "xyz":
        values = {"name": data.draw(value), "email": data.draw(value)}
        plain = {normalise(v, t) for t, v in values.items()}
        others = {normalise(v, t) for vs in people.values() for t, v in vs.items()}
        free = not slow_foreign(people, values["name"], "") and not slow_foreign(people, values["email"], "")
        assert index.add(owner, values) == (free and not any(a in b for a in plain for b in others))
        if index.foreign(values["name"]) and not slow_foreign(people, values["name"], ""):
            people[owner] = values
    text = data.draw(st.text("ab12 云-", max_size=30))
    for owner in ("", "x"):
        assert index.foreign(text, (owner,)) == slow_foreign(people, text, owner)


def test_found_by_hand() -> None:
    index = ValueIndex()
    assert index.add("a", {"name": "Ann Stone", "phone": "+1 212 555 0123", "home": "1482 Ash Lane, Belby"})
    for other in ({"name": "ANN-STONE"}, {"name": "Joann Stoneham"}, {"name": "Nn Sto"}, {"phone": "(212) 555-0123"}):
        assert not index.add("b", other)
    assert index.add("b", {"name": "Bob Reed", "phone": "212-555-0124"})
    assert index.foreign("I saw annstone.") and not index.foreign("I saw annstone.", ("a",))
    assert index.foreign("Order 21, 25550124") and not index.foreign("2125550125 Stone Ann")
    assert index.add("c", {"name": "云帆舟"}) and index.foreign("我是云帆舟。") and not index.foreign("云帆")


def test_draws_depend_on_seed_and_owner_only() -> None:
    options = {"locale": "en_US", "cue": "cue_free", "style": 1}
    first, again, other = People(0), People(0), People(1)
    drawn = [first.draw(id, **options) for id in ("a", "b")]  # type: ignore[arg-type]
    assert [again.draw(id, **options) for id in ("b", "a")] == drawn[::-1]  # type: ignore[arg-type]
    assert other.draw("a", **options) != drawn[0]  # type: ignore[arg-type]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="locale 'en' is unknown"):
        invent(random.Random(0), locale="en", cue="derivable")
    with pytest.raises(InputError, match="cue 'free' is unknown"):
        invent(random.Random(0), locale="en_US", cue="free")
    monkeypatch.setattr(ValueIndex, "add", lambda *_: False)
    with pytest.raises(InputError, match="in 1000 attempts; ask for fewer persons"):
        People(0).draw("a", locale="en_US", cue="derivable", style=0)
