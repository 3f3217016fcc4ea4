"""The forms of surrogates: for each type, how an invented value is made and how it is written."""

from __future__ import annotations

import functools
import random
import re
import unicodedata
from typing import TYPE_CHECKING

from veiltune._validate import one_of
from veiltune.data.detect import TYPES
from veiltune.data.detect_patterns import iban_remainder, luhn_digit, zh_check
from veiltune.data.legible import legible
from veiltune.data.propagate import fold

if TYPE_CHECKING:
    from faker import Faker

WORD = re.compile(r"[^\W\d_]+")
HAN = re.compile(r"[\u3400-\u9fff]")
RESERVED = ("example.com", "example.net", "example.org")
_TITLE_WORDS = "mr mrs ms mx miss dr prof jr sr ii iii van von de der da di la le bin al"
TITLES = frozenset(_TITLE_WORDS.split())


def canonical(type: str, value: str) -> str:
    """The form in which two writings of a value are one: digits and letters of a number, else folded text.

    >>> canonical("phone", "+1 (212) 555-0123"), canonical("phone", "212.555.0123"), canonical("name", "Ann  STONE")
    ('2125550123', '2125550123', 'ann stone')

    Raises:
        InputError: If the type is unknown.
    """
    if one_of(TYPES, type=type) == "phone":
        return _national(value)
    if type in ("iban", "card", "us_ssn", "zh_id"):
        return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", legible(value)[0])).upper()
    return " ".join(fold(value)[0].split())


def _national(phone: str) -> str:
    phone = fold(phone)[0]
    digits = re.sub(r"[^0-9]", "", re.split("x|ext", phone)[0])
    if len(digits) == 11 and digits[0] == "1" and digits[1] in "23456789" and re.match(r"\+1|1[ .(-]", phone):
        return digits[1:]
    return re.sub(r"^(?:00)?86(?=1[0-9]{10}$)", "", digits)


def like(word: str, new: str) -> str:
    """A word in the capitals of another."""
    if word.islower():
        return new.lower()
    return new.upper() if len(word) > 1 and word.isupper() else new[:1].upper() + new[1:]


@functools.cache
def _faker(locale: str) -> Faker:
    from faker import Faker

    return Faker(locale)


def _seeded_faker(rng: random.Random, locale: str) -> Faker:
    fake = _faker(locale)
    fake.seed_instance(rng.getrandbits(64))
    return fake


def name_words(name: str) -> list[str]:
    """The words of a name that are no titles or particles."""
    return [word for word in WORD.findall(name) if word.lower() not in TITLES]


def name_word(rng: random.Random, *, last: bool, length: int) -> str:
    """A first or last name; of one letter, an initial."""
    if length == 1:
        return rng.choice("ABCDEFGHJKLMNPRSTW")
    fake = _seeded_faker(rng, "en_US")
    return str(fake.last_name() if last else fake.first_name())


def chinese_name(rng: random.Random, name: str) -> str:
    """A Chinese name of the same length."""
    fake = _seeded_faker(rng, "zh_CN")
    surname, given = str(fake.last_name())[:1], ""
    while len(given) < len(name) - 1:
        given += str(fake.first_name())
    return surname + given[: len(name) - 1]


_LETTERS, _DIGITS = "abcdefghijkmnpqrstuvwxyz", "0123456789"


def email_like(rng: random.Random, email: str) -> str:
    """An address with letters for letters and digits for digits."""
    return f"{random_like(rng, email.partition('@')[0])}@{rng.choice(RESERVED)}"


def random_like(rng: random.Random, text: str) -> str:
    """Letters for letters, digits for digits; at least 6, so that two do not meet."""
    made = "".join(rng.choice(_DIGITS) if c.isdigit() else rng.choice(_LETTERS) if c.isalpha() else c for c in text)
    return made + "".join(rng.choices(_LETTERS, k=max(0, 6 - len(made))))


def _filled(form: str, digits: str, *, at: str) -> str:
    """Puts characters in the places of a form, from its end; those that are left over stay away."""
    places = [m.start() for m in re.finditer(at, form)]
    written = list(form)
    for place, digit in zip(reversed(places), reversed(digits), strict=False):
        written[place] = digit
    return "".join(written)


def _phone(rng: random.Random, phone: str) -> str:
    national = _national(phone)
    if len(national) == 10 and re.fullmatch(r"[2-9][0-9]{2}[2-9][0-9]{6}", national):
        area = rng.choice([code for code in range(201, 990) if code // 10 % 10 != 9 and code % 100 != 11])
        return f"{area}55501{rng.randrange(100):02d}"
    if re.fullmatch(r"1[2-9][0-9]{9}", national):
        return f"129{rng.randrange(10**8):08d}"
    kept = min(3, len(national) // 3)
    return national[:kept] + "".join(rng.choices(_DIGITS, k=len(national) - kept))


_NUMBERS = {"phone": r"[0-9]"} | dict.fromkeys(("iban", "card", "us_ssn", "zh_id"), r"[0-9A-Za-z]")


def written_like(type: str, old: str, surrogate: str) -> str:
    """A surrogate in the writing of an occurrence: separators of a number, capitals of a name.

    >>> written_like("phone", "+1 (212) 555-0123", "3035550199"), written_like("name", "ANN STONE", "Jo Reed")
    ('+1 (303) 555-0199', 'JO REED')
    """
    old = unicodedata.normalize("NFKC", legible(old)[0])
    if type in _NUMBERS:
        extension = re.search(r"\s?(?:x|ext\.?)\s?[0-9]+$", old) if type == "phone" else None
        written = _filled(old[: extension.start()] if extension else old, surrogate, at=_NUMBERS[type])
        return surrogate if canonical(type, written) == canonical(type, old) else written  # digits of another script
    if type == "name" and old.isupper() and old.lower() != old:
        return surrogate.upper()
    if type == "name" and old.islower():
        return surrogate.lower()
    return surrogate


def _iban(rng: random.Random, iban: str) -> str:
    plain = canonical("iban", iban)
    if not plain.isascii() or len(plain) < 5:
        return random_like(rng, iban)
    body = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") if c.isalpha() else rng.choice(_DIGITS) for c in plain[4:])
    check = 98 - iban_remainder(plain[:2] + "00" + body)
    return f"{plain[:2]}{check:02d}{body}"


def _card(rng: random.Random, card: str) -> str:
    body = "9" + "".join(rng.choices(_DIGITS, k=len(canonical("card", card)) - 2))
    return body + luhn_digit(body)


def _us_ssn(rng: random.Random, _: str) -> str:
    return f"666{rng.randint(1, 99):02d}{rng.randint(1, 9999):04d}"


def _zh_id(rng: random.Random, _: str) -> str:
    body = (
        f"99{rng.randrange(10**4):04d}{rng.randint(1940, 2005)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
        f"{rng.randrange(1000):03d}"
    )
    return body + zh_check(body)


def _ip(rng: random.Random, ip: str) -> str:
    if ":" in ip:
        return "2001:db8:" + ":".join(f"{rng.randrange(2**16):x}" for _ in range(6))
    return f"{rng.choice(('192.0.2', '198.51.100', '203.0.113'))}.{rng.randint(1, 254)}"


def _url(rng: random.Random, _: str) -> str:
    return f"https://{rng.choice(RESERVED)}/{''.join(rng.choices(_LETTERS, k=8))}"


_KEPT_WORDS = (
    "street st avenue ave road rd lane ln drive dr court ct boulevard blvd square sq terrace ter crescent cres parkway"
    " pkwy plaza place pl way close highway hwy circle cir trail trl row mews alley loop pike grove gardens walk quay"
    " route freeway hollow bypass spur suite room office unit apt apartment flat floor ste box po psc apo ap ae fpo rue"
    " via calle avenida rua viale piazza ul the of and p o"
)
_KEPT = frozenset(_KEPT_WORDS.split())
_ZH_PART = re.compile(
    r"([\u3400-\u9fff]+?)(自治区|省|市|州|盟|县|区|镇|乡|旗|大街|大道|路|街|道|巷|弄|胡同|大厦|小区|花园|广场|公寓|中心|大楼)"
)


def _address(rng: random.Random, address: str) -> str:
    if HAN.search(address):
        return other_digits(rng, _ZH_PART.sub(lambda part: _chinese_place(rng, part[1]) + part[2], address))

    def word(found: re.Match[str]) -> str:
        old = found[0]
        if old.lower() in _KEPT or (len(old) == 1 and not old.isupper()):
            return old
        fake = _seeded_faker(rng, "en_US")
        if len(old) == 2 and old.isupper():
            return str(fake.state_abbr())
        return like(old, str(fake.last_name()))

    return other_digits(rng, WORD.sub(word, address))


def _chinese_place(rng: random.Random, old: str) -> str:
    fake = _seeded_faker(rng, "zh_CN")
    text = "".join(str(fake.first_name()) + str(fake.last_name()) for _ in range(len(old)))
    return text[: len(old)]


def other_digits(rng: random.Random, text: str) -> str:
    """The text with other numbers of as many digits."""

    def number(found: re.Match[str]) -> str:
        return rng.choice("123456789") + "".join(rng.choices(_DIGITS, k=len(found[0]) - 1))

    return re.sub(r"[0-9]+", number, text)


MAKERS = {
    "phone": _phone,
    "iban": _iban,
    "card": _card,
    "us_ssn": _us_ssn,
    "zh_id": _zh_id,
    "ip": _ip,
    "url": _url,
    "address": _address,
}
