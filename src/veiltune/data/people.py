"""Invented persons: harmless by construction, unique, and with known entropy.

E-mail addresses are at names that RFC 2606 reserves, American telephone numbers in the block that is kept for fiction
(area code, 555-0100 to 555-0199), Chinese ones behind 129, where no subscriber numbers begin; streets and towns are
invented. Nothing guards against a full name that a living person bears too: it stands beside nothing that is theirs.
"""

from __future__ import annotations

import functools
import math
import random
import re
import string
from collections.abc import Iterable, Mapping

from veiltune._validate import one_of
from veiltune.data import pools
from veiltune.data.carriers import TOPICS
from veiltune.data.expansion import seeded
from veiltune.data.fillers import CANARY_FRAMES, FILLERS, RANDOM_PREFIX
from veiltune.data.manifest import CUES, normalise
from veiltune.data.templates import TEMPLATES
from veiltune.errors import InputError

LOCALES = ("en_US", "zh_CN")
PHONE_STYLES = 4  # ways to write a number; twins share theirs
LOCAL_PART = string.ascii_lowercase + string.digits
LOCAL_LENGTH = 8
_ATTEMPTS = 1000
_KEY = 6  # characters by which values are found in a text
_SHORT_KEY = 3  # for Chinese names


def invent(rng: random.Random, *, locale: str, cue: str, style: int = 0) -> dict[str, str]:
    """One person's values, not yet checked against other persons.

    >>> person = invent(random.Random(0), locale="en_US", cue="derivable")
    >>> person["email"].split("@")[0] == person["name"].lower().replace(" ", ".")
    True

    Args:
        rng: Of all values.
        locale: One of `LOCALES`.
        cue: "derivable": the e-mail address begins with the name; "cue_free": with 8 random letters and digits.
        style: How the telephone number is written, below `PHONE_STYLES`.

    Returns:
        A string for each of `TYPES`.

    Raises:
        InputError: If locale or cue is unknown.
    """
    one_of(CUES, cue=cue)
    if one_of(LOCALES, locale=locale) == "zh_CN":
        name, local = _chinese_name(rng)
        home, work = _chinese_addresses(rng)
        phone = _chinese_phone(rng, style)
    else:
        first, last = (rng.choice(names) for names in english_names())
        name, local = f"{first} {last}", f"{first}.{last}".lower()
        home, work = _english_addresses(rng)
        phone = _english_phone(rng, style)
    if cue == "cue_free":
        local = "".join(rng.choices(LOCAL_PART, k=LOCAL_LENGTH))
    email = f"{local}@{rng.choice(pools.EMAIL_DOMAINS)}"
    return {"name": name, "email": email, "phone": phone, "home": home, "work": work}


def entropy_bits(locale: str) -> dict[str, float]:
    """Entropy of each value in bits, so the chance of a blind guess is 2 to the minus that.

    Given that values are unique, a guess right after others were seen is likelier by a factor below 1.2 for corpora
    of up to 10 000 persons. The e-mail address of a derivable person is counted with the name known.

    >>> bits = entropy_bits("en_US")
    >>> round(bits["email_cue_free"], 1), bits["email_derivable"], round(bits["phone"], 1)
    (43.4, 2.0, 16.1)
    """
    domain = math.log2(len(pools.EMAIL_DOMAINS))
    common = {"email_derivable": domain, "email_cue_free": domain + LOCAL_LENGTH * math.log2(len(LOCAL_PART))}
    if one_of(LOCALES, locale=locale) == "zh_CN":
        place = len(pools.CITIES_ZH) * len(pools.STREETS_ZH) * 900
        names = len(pools.SURNAMES_ZH) * len(pools.GIVEN_ZH) * (len(pools.GIVEN_ZH) - 1)
        home, work, phone = place * 30 * 30 * 9, place * len(pools.BUILDINGS_ZH) * 900, 10**8
    else:
        streets = len(pools.STREET_STEMS) * len(pools.STREET_ENDINGS) * 9000
        place = streets * len(pools.TOWN_STEMS) * len(pools.TOWN_ENDINGS)
        names = math.prod(map(len, english_names()))
        home = place * len(pools.HOME_STREETS)
        work = place * len(pools.WORK_STREETS) * len(pools.WORK_PLACES) * 900
        phone = len(_area_codes()) * 100
    numbers = {"name": names, "phone": phone, "home": home, "work": work}
    return common | {type: math.log2(number) for type, number in numbers.items()}


@functools.cache
def english_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First and last names that are no words of the corpus ("Will Call", "Mark Price" would be)."""
    texts = (*TEMPLATES, *(s for topic in TOPICS for s in topic), *CANARY_FRAMES, RANDOM_PREFIX)
    words = set(re.findall(r"[a-z]+", " ".join([*texts, *(w for words in FILLERS.values() for w in words)]).lower()))

    def kept(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(n for n in names if n.isascii() and n.isalpha() and len(n) > 2 and n.lower() not in words)

    return kept(pools.FIRST_NAMES), kept(pools.LAST_NAMES)


class ValueIndex:
    """The values of all persons so far, to keep them apart and to find them where they do not belong."""

    def __init__(self) -> None:
        self._starts: dict[str, list[tuple[str, str]]] = {}
        self._short: dict[str, list[tuple[str, str]]] = {}
        self._contained = ""

    def add(self, owner: str, values: Mapping[str, str]) -> bool:
        """Takes a person in, unless a value equals, contains or is part of one of another person.

        >>> index = ValueIndex()
        >>> index.add("a", {"name": "Ann Stone"}), index.add("b", {"name": "Joann Stone"})
        (True, False)

        Returns:
            Whether the person was taken in.
        """
        plain = {type: normalise(value, type) for type, value in values.items()}
        if any(self.foreign(value) for value in values.values()):
            return False
        inner = [plain[type] for type in ("name", "email") if type in plain]  # others cannot be part of a longer value
        if any(value in self._contained for value in inner):
            return False
        self._contained += "\n".join([*inner, ""])
        for value in plain.values():
            index, size = (self._starts, _KEY) if len(value) >= _KEY else (self._short, _SHORT_KEY)
            index.setdefault(value[:size], []).append((value, owner))
        return True

    def foreign(self, text: str, owners: tuple[str, ...] = ()) -> bool:
        """Whether a text holds, after normalisation, a value of somebody who is not among its owners."""
        plain = re.sub("[^a-z0-9]", "", text.lower()) if text.isascii() else normalise(text, "name")
        return any(
            value in form and owner not in owners
            for form in (plain, re.sub("[^0-9]", "", plain))
            for index, size in ((self._starts, _KEY), (self._short, _SHORT_KEY))
            if index
            for key in index.keys() & {form[i : i + size] for i in range(len(form) - size + 1)}
            for value, owner in index[key]
        )


class People:
    """Draws persons who share no value, each from its own seed; the order of the draws matters.

    Args:
        seed: Of everything.
    """

    def __init__(self, seed: int) -> None:
        self.index = ValueIndex()
        self._seed = seed

    def draw(self, owner: str, *, locale: str, cue: str, style: int) -> dict[str, str]:
        """The values of a person who is not there yet; see `invent`.

        Raises:
            InputError: If no unused values are found: more persons were asked for than the word lists have room for.
        """
        for attempt in range(_ATTEMPTS):
            rng = seeded(self._seed, "person", owner, attempt)
            values = invent(rng, locale=locale, cue=cue, style=style)
            if self.index.add(owner, values):
                return values
        raise InputError(f"no unused name and number were found in {_ATTEMPTS} attempts; ask for fewer persons")


@functools.cache
def _area_codes() -> tuple[int, ...]:
    """200 to 989 without a middle 9 (kept free), an ending 11 (services) and 8XX with two equal digits (toll-free)."""
    codes = (code for code in range(200, 990) if code // 10 % 10 != 9 and code % 100 != 11)
    return tuple(code for code in codes if code // 100 != 8 or code % 100 % 11 != 0)


def _english_phone(rng: random.Random, style: int) -> str:
    area, last = rng.choice(_area_codes()), f"01{rng.randrange(100):02d}"
    return (f"({area}) 555-{last}", f"{area}-555-{last}", f"+1 {area} 555 {last}", f"{area}.555.{last}")[style]


def _chinese_phone(rng: random.Random, style: int) -> str:
    digits = f"{rng.randrange(10**8):08d}"
    a, b = digits[:4], digits[4:]
    return (f"129-{a}-{b}", f"129{a}{b}", f"+86 129 {a} {b}", f"129 {a} {b}")[style]


def _english_addresses(rng: random.Random) -> tuple[str, str]:
    def place(kinds: tuple[str, ...]) -> str:
        street = rng.choice(pools.STREET_STEMS) + rng.choice(pools.STREET_ENDINGS)
        town = rng.choice(pools.TOWN_STEMS) + rng.choice(pools.TOWN_ENDINGS)
        return f"{rng.randint(1000, 9999)} {street} {rng.choice(kinds)}, {town}"

    home, office = place(pools.HOME_STREETS), place(pools.WORK_STREETS)
    return home, f"{rng.choice(pools.WORK_PLACES)} {rng.randint(100, 999)}, {office}"


def _chinese_addresses(rng: random.Random) -> tuple[str, str]:
    def place() -> str:
        return f"{rng.choice(pools.CITIES_ZH)}市{rng.choice(pools.STREETS_ZH)}路{rng.randint(100, 999)}号"

    home = f"{place()}{rng.randint(1, 30)}栋{rng.randint(1, 30)}层{rng.randint(1, 9)}室"
    return home, f"{place()}{rng.choice(pools.BUILDINGS_ZH)}大厦{rng.randint(100, 999)}室"


def _chinese_name(rng: random.Random) -> tuple[str, str]:
    surname = rng.choice(pools.SURNAMES_ZH)
    given = rng.sample(pools.GIVEN_ZH, 2)
    return surname[0] + given[0][0] + given[1][0], f"{surname[1]}.{given[0][1]}{given[1][1]}"
