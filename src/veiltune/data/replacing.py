"""Replaces values in a text: those that a detector found there, and every other occurrence of known ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from veiltune._validate import one_of
from veiltune.data.propagate import Finder, long_enough
from veiltune.data.pseudonyms import Key, Pseudonyms, Value
from veiltune.data.surrogates import HAN, canonical, written_like

MODES = ("pseudonym", "mask", "remove")
Spans = list[tuple[int, int, str]]
_REACH = 40  # characters of context on each side
# In a context: what stands between white space and punctuation, accents and signs without a width included.
_WORD = re.compile(r"[^\s!-/:-@\[-^`{-~\xab\xbb\u2010-\u2027\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]+")


@dataclass(frozen=True)
class Place:
    """Where a value stands.

    Attributes:
        start: First character.
        end: One past the last.
        key: Type and canonical value.
        found: Whether the detector found it; else it is there only because the value is known.
        old: The value as it is written there; more than what is between start and end where another one overlaps it.
    """

    start: int
    end: int
    key: Key
    found: bool
    old: str


class Replacer:
    """Replaces what a detector found and every other occurrence of known values.

    >>> table = {("name", "ann stone"): "Jo Reed"}
    >>> Replacer([Value("name", "Ann Stone")], table).replace("ANN STONE and Ann Stone.", [])[0]
    'JO REED and Jo Reed.'

    Args:
        values: What to look for everywhere.
        table: What stands in their place, by type and canonical value.
        always: Of them, those that are looked for however short they are.
        mode: One of `MODES`; the table is for "pseudonym" alone.
        alone: If given, values that are not in the table get surrogates as if their record were all there is.
    """

    def __init__(
        self,
        values: Sequence[Value],
        table: dict[Key, str],
        *,
        always: frozenset[Key] = frozenset(),
        mode: str = "pseudonym",
        alone: Pseudonyms | None = None,
    ) -> None:
        self._alone = alone
        self._table, self._mode = table, one_of(MODES, mode=mode)
        self._keys = [(value.type, canonical(value.type, value.text)) for value in values]
        self._texts = [value.text for value in values]
        looked_for: list[tuple[str, int]] = []
        for number, (value, key) in enumerate(zip(values, self._keys, strict=True)):
            if long_enough(value.text) or key in always:
                looked_for += [(form, number) for form in dict.fromkeys((value.text, key[1]))]
        self._finder = Finder(looked_for) if looked_for else None

    def replace(self, text: str, spans: Spans, person: str = "") -> tuple[str, list[Place]]:
        """The text with other values, and the places of the old ones.

        Args:
            text: A document.
            spans: Start, end and type of what a detector found in it, without overlaps.
            person: Whose record it is, where that matters: with `alone`.
        """
        places = self._places(text, spans)
        if not places:
            return text, places
        table = self._table
        if self._alone and self._mode == "pseudonym":
            own = {place.key: Value(place.key[0], place.old, person) for place in places}
            table = self._alone.table([value for key, value in own.items() if key not in table]) | table
        return "".join(self._parts(text, places, table)), places

    def _parts(self, text: str, places: list[Place], table: dict[Key, str]) -> Iterator[str]:
        at = 0
        for place in places:
            yield text[at : place.start]
            if self._mode == "pseudonym":
                yield written_like(place.key[0], place.old, table[place.key])
            elif self._mode == "mask":
                yield f"[{place.key[0].upper()}]"
            at = place.end
        yield text[at:]

    def _places(self, text: str, spans: Spans) -> list[Place]:
        found = [Place(a, b, (type, canonical(type, text[a:b])), True, text[a:b]) for a, b, type in spans]
        known = list(_again(text, found, long_ones=self._alone is not None))
        if self._finder:
            known += (
                Place(a, b, self._keys[number], False, text[a:b])
                for a, b, number in self._finder.find(text)
                if not _is_common_word(self._keys[number][0], self._texts[number], text[a:b])
            )
        covered = {(place.start, place.end) for place in found}
        known = [place for place in known if (place.start, place.end) not in covered]
        return apart(text, [*found, *known]) if known else found


def _is_common_word(type: str, value: str, old: str) -> bool:
    """A name of one word, written small, is a word: "mark", "will"."""
    return type == "name" and " " not in value and old.islower() and not value.islower()


def _again(text: str, found: list[Place], *, long_ones: bool) -> Iterator[Place]:
    """What was found in a text, wherever else the same text has it.

    Names that are too short to be looked for everywhere ("Lee", "王明"); the long ones, in any case and with any white
    space, only where nothing is looked for everywhere.
    """
    for place in found:
        is_long = long_enough(place.old)
        if not (long_ones if is_long else place.key[0] == "name"):
            continue
        before, after = ("", "") if HAN.search(place.old) else (r"(?<!\w)", r"(?!\w)")
        pattern = before + r"\s+".join(map(re.escape, place.old.split())) + after
        for other in re.finditer(pattern, text, re.IGNORECASE if is_long else 0):
            if not _is_common_word(place.key[0], place.old, other[0]):
                yield Place(other.start(), other.end(), place.key, False, other[0])


def apart(text: str, places: list[Place]) -> list[Place]:
    """Places of which no two overlap and that cover all that was covered, but for blanks where one was cut.

    Of two that overlap the longer stays whole, then what the detector found, then the earlier. The other keeps what of
    it is outside; if that is nothing, it goes.

    Args:
        text: Where they are.
        places: In any order.
    """
    taken, kept = bytearray(len(text)), []
    for place in sorted(places, key=lambda p: (p.start - p.end, not p.found, p.start)):
        start, end = taken.find(0, place.start, place.end), taken.rfind(0, place.start, place.end) + 1
        if start < 0:
            continue
        taken[start:end] = b"\1" * (end - start)  # in one piece: those before are longer, so none is in the middle
        while place.start < start < end and text[start].isspace():
            start += 1
        while start < end < place.end and text[end - 1].isspace():
            end -= 1
        if start < end:
            kept.append(replace(place, start=start, end=end))
    return sorted(kept, key=lambda p: p.start)


def context(text: str, places: list[Place], order: int) -> str:
    """What stands around a place: values masked, and every word that is not all small letters, which may be a value.

    Masked are so words with a capital or a digit, and all words of scripts without small letters, Chinese for one. A
    missed value that is written small stays.
    """
    at, parts = 0, []
    for place in places:
        parts += [_WORD.sub(_hidden, text[at : place.start]), f"[{place.key[0].upper()}]"]
        at = place.end
    parts.append(_WORD.sub(_hidden, text[at:]))
    before, here, after = "".join(parts[: 2 * order + 1]), parts[2 * order + 1], "".join(parts[2 * order + 2 :])
    return " ".join(f"{before[-_REACH:]}{here}{after[:_REACH]}".split())


def _hidden(word: re.Match[str]) -> str:
    return word[0] if all(map(str.islower, word[0])) else "_"
