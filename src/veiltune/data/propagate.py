"""Looks for many values at once, wherever they stand: Aho-Corasick over a normalised text.

A text is compared as `legible` shows it, casefolded and in NFKC, character by character, any white space as a blank;
places are those of the text as it was. A value that begins or ends with a letter or digit must not be inside a longer
word, unless the letters are Chinese, which have no word boundaries.

Source: Aho and Corasick 1975.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from veiltune.data.legible import legible
from veiltune.data.optional import need

LEAST_LETTERS = 4
LEAST_HAN = 3
_SPECIAL = "\uffff"  # stands for a character whose normal form is not one character
_COMBINED = re.compile(r".[\u0300-\u036f]*", re.DOTALL)
_HAN = re.compile(r"[\u3400-\u9fff]")


class _Fold(dict[int, int]):
    """A translation table that learns each character when it first comes."""

    def __missing__(self, code: int) -> int:
        plain = _plain(chr(code))
        value = ord(plain) if len(plain) == 1 and not 0x300 <= code <= 0x36F else ord(_SPECIAL)
        self[code] = value
        return value


_FOLD = _Fold()


@cache
def _plain(unit: str) -> str:
    if unit.isspace():
        return " "
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", unit).casefold())


def fold(text: str) -> tuple[str, list[int] | None]:
    r"""The form in which values are compared, and where each of its characters comes from.

    >>> fold("Ann\nSTONE"), fold("Straße")[0]
    (('ann stone', None), 'strasse')

    Returns:
        The folded text, and for each of its characters and its end the place in the text; None if they are the same.
    """
    text, seen_at = legible(text)
    if text.isascii():
        return text.lower().translate(_BLANKS), seen_at
    folded = text.translate(_FOLD)
    if _SPECIAL not in folded:
        return folded, seen_at
    parts, places = [], []
    for unit in _COMBINED.finditer(text):
        plain = _plain(unit[0])
        parts.append(plain)
        places += [unit.start()] * len(plain)
    places.append(len(text))
    return "".join(parts), [seen_at[place] for place in places] if seen_at else places


_BLANKS = dict.fromkeys(map(ord, "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f"), " ")


def long_enough(value: str) -> bool:
    """Whether a value is long enough to be looked for everywhere: 4 letters or digits, or 3 Chinese characters.

    >>> long_enough("Ann"), long_enough("Anne"), long_enough("王明"), long_enough("王小明")
    (False, True, False, True)
    """
    if _HAN.search(value):
        return len(value) >= LEAST_HAN
    return sum(map(str.isalnum, value)) >= LEAST_LETTERS


class Finder:
    r"""Finds values in texts.

    >>> finder = Finder({"Ann Stone": 0, "王小明": 1})
    >>> text = "ANN  stone, Joann Stone, ann\nstone; 我是王小明。"
    >>> [(text[a:b], which) for a, b, which in finder.find(text)]
    [('ANN  stone', 0), ('ann\nstone', 0), ('王小明', 1)]

    Args:
        values: What to look for, with a number each that is given back; two that are the same after normalisation
            share the first one's. None of them may be blank.

    Raises:
        InputError: If pyahocorasick is not installed.
    """

    def __init__(self, values: Iterable[tuple[str, int]] | dict[str, int]) -> None:
        ahocorasick = need("ahocorasick", "values that are looked for everywhere")
        self._automaton: Any = ahocorasick.Automaton(ahocorasick.STORE_INTS)  # a third of the memory of objects
        self._lengths: array[int] = array("l")
        self._numbers: array[int] = array("l")
        for value, number in values.items() if isinstance(values, dict) else values:
            folded = fold(value)[0].strip()
            if folded and folded not in self._automaton:
                self._automaton.add_word(folded, len(self._lengths))
                self._lengths.append(len(folded))
                self._numbers.append(number)
        self._empty = not len(self._automaton)
        if not self._empty:
            self._automaton.make_automaton()

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """Start, end and number of each value in the text, in order; one that is inside a longer one is left out."""
        if self._empty:
            return []
        folded, places = fold(text)
        hits = list(self._hits(folded))
        kept: list[tuple[int, int, int]] = []
        for start, end, number in _outermost(hits):
            if places:
                start, end = places[start], _end(places, end)
            kept.append((start, end, number))
        return kept

    def _hits(self, folded: str) -> Iterator[tuple[int, int, int]]:
        for last, word in self._automaton.iter(folded):
            start, end = last + 1 - self._lengths[word], last + 1
            if not (_inside_word(folded, start) or _inside_word(folded, end)):
                yield start, end, self._numbers[word]


def _inside_word(text: str, at: int) -> bool:
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    return before.isalnum() and after.isalnum() and not _HAN.match(before) and not _HAN.match(after)


def _end(places: list[int], end: int) -> int:
    """A character that folds to several is taken whole."""
    while end < len(places) - 1 and places[end] == places[end - 1]:
        end += 1
    return places[end]


def _outermost(hits: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    kept: list[tuple[int, int, int]] = []
    for hit in sorted(hits, key=lambda hit: (hit[0], -hit[1])):
        if not kept or hit[1] > kept[-1][1]:
            kept.append(hit)
    return kept
