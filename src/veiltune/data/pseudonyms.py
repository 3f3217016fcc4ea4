"""Surrogates: invented values that stand where personal data stood, the same for the same value, under a key.

    name       another name of as many words, drawn word by word, so "Ann Stone" and "Ms. Stone" of a person agree
    email      at example.com, .net or .org; made of the surrogate name where the original was made of the name
    phone      the same form; 555-0100 to 555-0199 for ten American digits, behind 129 for eleven Chinese ones
    iban       the same country and length, with a good check
    card       the same length, beginning with 9, which no issuer has, with a good check digit
    us_ssn     beginning with 666, which is never given out
    zh_id      of a region 99, which there is none, with a good check character
    ip, url    of the addresses and names that are kept for documentation
    address    the same form, other words and numbers

Numbers are drawn as digits and written in the form of each occurrence, see `written_like`.
"""

from __future__ import annotations

import hashlib
import hmac
import random
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from veiltune.data.propagate import fold
from veiltune.data.surrogates import (
    HAN,
    MAKERS,
    RESERVED,
    TITLES,
    WORD,
    canonical,
    chinese_name,
    email_like,
    like,
    name_word,
    name_words,
    other_digits,
    random_like,
)
from veiltune.errors import InputError

KEY_BYTES = 32
_ATTEMPTS = 200
_WORDS = re.compile(r"[A-Za-z]+(?:[._-][A-Za-z]+)+")
_SHAPELESS_AFTER = 50  # attempts after which a name or address without words gets random letters
_SHARED_AFTER = 100  # attempts after which two values may share a surrogate: some forms have few harmless values

Key = tuple[str, str]  # type, canonical value


@dataclass(frozen=True, repr=False, slots=True)
class Value:
    """A value of the corpus; its repr shows its type only.

    Attributes:
        type: One of `TYPES`.
        text: As it was found first.
        owner: The person in whose records alone it was found; "" if they are several or unknown.
    """

    type: str
    text: str
    owner: str = ""

    def __repr__(self) -> str:
        return f"Value({self.type})"


class Pseudonyms:
    """Draws surrogates under a key; the same key, values and order give the same ones.

    >>> table = Pseudonyms(bytes(32)).table([Value("name", "Ann Stone"), Value("email", "ann.stone@old.org")])
    >>> name, email = table["name", "ann stone"], table["email", "ann.stone@old.org"]
    >>> email.partition("@")[0] == name.lower().replace(" ", ".")
    True

    Guarantee:
        A surrogate is no value of the table, of any type, nor one of those to avoid; and two values have two
        surrogates, unless their form has too few harmless ones (American telephone numbers beyond some 70 000, IP
        addresses beyond some 700). Without the key, a surrogate tells nothing of its value but its form: its length,
        its separators, the country or the first three digits of a number, what of a Chinese address stands before its
        numbers. Whoever has the key can test a guess. Not covered: a surrogate name
        may be that of a living person, and a telephone number of other forms than American and Chinese mobile may be
        in use.

    Args:
        key: At least 16 secret bytes.

    Raises:
        InputError: If the key is shorter.

    Source: HMAC-SHA256, RFC 2104; Faker's names.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise InputError(f"key must have at least 16 bytes, got {len(key)}")
        self._key = bytes(key)

    def __repr__(self) -> str:
        return "Pseudonyms(key=<secret>)"

    def table(self, values: Iterable[Value], *, avoid: Collection[str] = ()) -> dict[Key, str]:
        """A surrogate for each value, by type and canonical value.

        Args:
            values: Distinct after `canonical`.
            avoid: Folded texts (see `propagate.fold`) that no surrogate may be: values that occur in the corpus.
        """
        values = list(values)
        return _Table(self._key, values, avoid).fill()


def _generator(key: bytes, labels: Iterable[str]) -> random.Random:
    encoded = [label.encode(errors="surrogatepass") for label in labels]
    message = b"".join(len(label).to_bytes(8, "little") + label for label in encoded)
    return random.Random(hmac.new(key, message, hashlib.sha256).digest())


class _Table:
    """Surrogates of one corpus: names first, since e-mail addresses follow them."""

    def __init__(self, key: bytes, values: list[Value], avoid: Collection[str]) -> None:
        self._key = key
        self._values = {(value.type, canonical(value.type, value.text)): value for value in values}
        self._taken = set(avoid) | {fold(value.text)[0] for value in values} | {plain for _, plain in self._values}
        self._used: set[Key] = set()
        self._names: dict[tuple[str, str], list[tuple[str, str]]] = {}  # owner and a word: names, with surrogates
        self._last_words = {
            (value.owner, fold(words[-1])[0])
            for value in values
            if value.type == "name" and len(words := name_words(value.text)) > 1
        }
        self._table: dict[Key, str] = {}

    def fill(self) -> dict[Key, str]:
        for key in sorted(self._values, key=lambda key: key[0] != "name"):
            self._table[key] = surrogate = self._unused(key)
            if key[0] == "name":
                owner = self._values[key].owner
                words = WORD.findall(key[1])
                for word in (*words, words[0][:1] + words[-1] if words else ""):
                    self._names.setdefault((owner, word), []).append((key[1], surrogate))
        return self._table

    def _unused(self, key: Key) -> str:
        value = self._values[key]
        surrogate = ""
        for attempt in range(_ATTEMPTS):
            surrogate = self._surrogate(key, value, str(attempt) if attempt else "")
            plain, form = canonical(value.type, surrogate), fold(surrogate)[0]
            if plain in self._taken or form in self._taken:
                continue
            if (value.type, plain) in self._used and attempt < _SHARED_AFTER:
                continue
            self._used.add((value.type, plain))
            return surrogate
        raise InputError(
            f"no surrogate of type {value.type} was found in {_ATTEMPTS} attempts that is no value of the corpus;"
            " mask that type instead"
        )

    def _surrogate(self, key: Key, value: Value, attempt: str) -> str:
        type, plain = key
        rng = _generator(self._key, (type, value.owner, plain, attempt))
        if type in ("name", "address") and int(attempt or 0) >= _SHAPELESS_AFTER:
            return random_like(rng, value.text).title()
        if type == "name":
            return self._name(value, attempt)
        if type == "email":
            followed = "" if attempt else self._following(value)
            return followed or self._by_words(value, attempt) or email_like(rng, value.text)
        return MAKERS[type](rng, value.text)

    def _name(self, value: Value, attempt: str) -> str:
        """Word by word; a word of a person has one surrogate in all of the person's names."""
        if HAN.search(value.text):
            return chinese_name(_generator(self._key, ("name", value.owner, value.text, attempt)), value.text)

        def new(word: re.Match[str]) -> str:
            if word[0].lower() in TITLES:
                return word[0]
            last = (value.owner, fold(word[0])[0]) in self._last_words
            return self._word(word[0], value.owner, attempt, last=last)

        return WORD.sub(new, value.text)

    def _word(self, word: str, owner: str, attempt: str, *, last: bool) -> str:
        rng = _generator(self._key, ("word", owner, fold(word)[0], attempt))
        return like(word, name_word(rng, last=last, length=len(word)))

    def _by_words(self, value: Value, attempt: str) -> str:
        """Of first.last@, what the surrogate of that name would give, though the name was not found; "" of others."""
        local, _, domain = value.text.partition("@")
        if not _WORDS.fullmatch(local):
            return ""
        end = local.rindex(WORD.findall(local)[-1])
        made = WORD.sub(lambda word: self._word(word[0], value.owner, attempt, last=word.start() == end), local)
        return f"{made}@{_domain(self._key, domain)}"

    def _following(self, value: Value) -> str:
        """The address that follows from the surrogate name as the original followed from the name, or ""."""
        local, _, domain = value.text.partition("@")
        parts = WORD.findall(fold(local)[0])
        for part in parts:
            for owner in dict.fromkeys((value.owner, "")):
                for name, surrogate in self._names.get((owner, part), []):
                    made = _translate(local, name, surrogate)
                    if made:
                        rng = _generator(self._key, ("digits", value.owner, fold(local)[0]))
                        return f"{other_digits(rng, made)}@{_domain(self._key, domain)}"
        return ""


def _translate(local: str, name: str, surrogate: str) -> str:
    """Puts the words of the surrogate where the words of the name or their initials stand; "" if others are there."""
    old, new = WORD.findall(name), [fold(word)[0] for word in WORD.findall(surrogate)]
    if len(old) != len(new) or any(not word.isascii() for word in new):
        return ""
    words = dict(zip(old, new, strict=True))
    initials = {a[0]: b[0] for a, b in zip(old, new, strict=True)}
    result, end, whole = "", 0, False
    for part in WORD.finditer(local):
        plain = fold(part[0])[0]
        if plain in words:
            made, whole = words[plain], True
        elif plain in initials:
            made = initials[plain]
        elif plain == old[0][0] + old[-1]:
            made, whole = new[0][0] + new[-1], True
        else:
            return ""
        result += local[end : part.start()] + like(part[0], made)
        end = part.end()
    return result + local[end:] if whole else ""


def _domain(key: bytes, domain: str) -> str:
    return _generator(key, ("domain", fold(domain)[0])).choice(RESERVED)
