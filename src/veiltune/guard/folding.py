"""Protected strings as the guard compares them: a fold that works character by character, and how much may show."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from veiltune._validate import in_range, positive_int
from veiltune.errors import InputError

SHORTEST = 5  # weight of the shortest string that may be protected
UNKNOWN = 0.5  # share of a string that must stay unknown
_LEAST_HEAD = 4  # weight that may always show, or the start of every word would be sealed
_WORDS = re.compile(r"[\W_]+")
_COUNTRY = re.compile(r"^(86|1)")
# Latin letters that Unicode gives no decomposition, as people without them on the keyboard write them.
_PLAIN = str.maketrans(
    dict(zip("øłđħŧıȷðƀɨʉǥ", "oldhtijdbiug", strict=True)) | {"æ": "ae", "œ": "oe", "þ": "th", "ŋ": "ng"}
)


class _Table(dict[int, str]):
    def __missing__(self, code: int) -> str:
        spread = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        kept = (c for c in spread.translate(_PLAIN) if unicodedata.category(c)[0] in "LN")
        self[code] = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in kept)
        return self[code]


_TABLE = _Table()


def fold(text: str) -> str:
    r"""Letters and digits only, without case, accents, strokes, widths and scripts of digits; one character at a time.

    Because no character looks at its neighbours, the fold of a text is that of its parts one after the other, so a
    guard can follow a text token by token. Whatever `data.manifest.normalise` takes for equal, this takes for equal.

    >>> fold("O'Neil, José"), fold("Łukasz Sørensen"), fold("+1 (212) \uff15\uff15\uff15-01\u0662\u0663")
    ('oneiljose', 'lukaszsorensen', '12125550123')
    """
    return text.translate(_TABLE)


@dataclass(frozen=True, repr=False)
class Folded:
    """A protected string.

    Attributes:
        text: Folded; of a phone number with a plus sign without the country codes 1 and 86.
        head: How many of its first characters may be told; at least 1, fewer than all.
    """

    text: str
    head: int


def folded(value: str, *, unknown: float = UNKNOWN) -> Folded:
    """Folds one string and says where it must stop.

    The rule: stop while at least the share `unknown` is not told. Three exceptions, each for a reason. Of an e-mail
    address only the local part counts, since the domain can be guessed and the local part alone identifies. A first
    word of letters (a given name) may always show, with the first letter of the next word if that has more than two:
    given names identify nobody and are frequent, and some are words of their own (will, mark, grace). And four
    characters (or two ideographs) may show whatever the string, or the guard would act at the start of every word: of
    an e-mail address whose local part is shorter, with the beginning of the domain. The last character is withheld in
    any case.

    >>> [(f.text[: f.head], f.text[f.head :]) for f in map(folded, ("Jane Doe", "+1 (212) 555-0123", "x7k2m9qa@a.org"))]
    [('janed', 'oe'), ('21255', '50123'), ('x7k2', 'm9qaaorg')]
    >>> [(f.text[: f.head], f.text[f.head :]) for f in map(folded, ("anna@example.com", "al@example.com"))]
    [('anna', 'examplecom'), ('alex', 'amplecom')]
    >>> folded("Jane Doe", unknown=0.0).head
    6

    Args:
        value: As it is known.
        unknown: In [0, 1); 0: only the last character is withheld.

    Raises:
        InputError: If the share is out of range, or the string has fewer than two letters and digits.
    """
    in_range(0.0, 0.99, unknown=unknown)
    plain = unicodedata.normalize("NFKC", value).strip()
    text = fold(plain)
    if plain.lstrip(" (").startswith("+") and text.isdigit():
        text = _COUNTRY.sub("", text)
    if len(text) < 2:
        raise InputError("a protected string must have at least two letters or digits")
    if unknown == 0.0:
        return Folded(text, len(text) - 1)
    local = plain.partition("@")[0] if "@" in plain else ""
    counted = len(fold(local)) or len(text)
    words = [fold(word) for word in _WORDS.split(local or plain)]
    words = [word for word in words if word]
    first = len(words[0]) + (len(words[1]) > 2) if len(words) > 1 and not words[0].isdigit() else 0
    least = next((n for n in range(1, len(text)) if weight(text[:n]) >= _LEAST_HEAD), len(text) - 1)
    head = min(max(int(counted * (1.0 - unknown) + 1e-9), first), counted - 1)
    return Folded(text, min(max(head, least), len(text) - 1))


def weight(text: str) -> int:
    """Characters, an ideograph or syllable of East Asia counted twice: what is too short for one is not for the other.

    >>> weight("anna"), weight("王小明")
    (4, 6)
    """
    return sum(2 if unicodedata.east_asian_width(c) == "W" else 1 for c in text)


def fold_all(values: Sequence[str], *, unknown: float = UNKNOWN, shortest: int = SHORTEST) -> list[Folded]:
    """Folds a list; equal ones become one, with the shorter head.

    Args:
        values: Strings; empty ones are an error, like all that are too short.
        unknown: As in `folded`.
        shortest: Least `weight`. Shorter ones would stop ordinary words: spaces do not count, so "Bo Li" is in
            "turbo limit".

    Returns:
        One for each different folded text, in order of code points.

    Raises:
        InputError: If one is too short; names its place in the list, not the string.
    """
    positive_int(shortest=shortest)
    heads: dict[str, int] = {}
    for number, value in enumerate(values, start=1):
        try:
            one = folded(value, unknown=unknown)
        except InputError as error:
            raise InputError(f"protected string {number}: {error}") from None
        if weight(one.text) < shortest:
            raise InputError(
                f"protected string {number} has a weight of {weight(one.text)} characters, fewer than {shortest}: it"
                " would stop ordinary words; leave it out or lower `shortest`"
            )
        heads[one.text] = min(heads.get(one.text, one.head), one.head)
    return [Folded(text, heads[text]) for text in sorted(heads)]
