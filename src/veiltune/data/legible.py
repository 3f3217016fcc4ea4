"""A text as its reader sees it, so that what cannot be seen hides nothing from a detector or from a search."""

# ruff: noqa: RUF002

from __future__ import annotations

import re

_HIDDEN = "\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"
_ODD_BLANK = "\t\x0b\x0c\r\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_SPACING = rf"[ {_ODD_BLANK}{_HIDDEN}]"
_FULL_WIDTH = r"\uff0b\uff0d\uff0e\uff10-\uff19\uff20-\uff3a\uff3f\uff41-\uff5a"
_WIDE = str.maketrans({code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)})
_ODD = re.compile(
    rf"{_SPACING}++(?=\n)|(?<=\n){_SPACING}+|{_SPACING}{{2,}}|[{_ODD_BLANK}{_HIDDEN}]"
    rf"|[{_FULL_WIDTH}]|[\u2010\u2011\u2019\u02bc]|(?<=[0-9])[\u2012\u2013\u2212](?=[0-9])"
)
_BLANK = re.compile(rf"[ {_ODD_BLANK}]")
_ODD_IN_ASCII = ("  ", "\t", "\r", " \n", "\n ", "\x0b", "\x0c")
_ODD_BEYOND = re.compile(
    rf"[{_ODD_BLANK}{_HIDDEN}{_FULL_WIDTH}\u2010-\u2013\u2212\u2019\u02bc]"
)  # far faster than `_ODD`


def legible(text: str) -> tuple[str, list[int] | None]:
    r"""The text without invisible characters and with usual ones for odd ones, and where each character comes from.

    A run of blanks of any kind is one space, or nothing at the beginning or end of a line; full-width letters, digits
    and the signs of addresses are ASCII, and so are hyphens and apostrophes that look alike and dashes between digits.
    Chinese punctuation stays.

    >>> legible("Ann\t Stone, ann\u200b@example.org")[0], legible("１３８\u2011０013")[0], legible("Ann Stone")
    ('Ann Stone, ann@example.org', '138-0013', ('Ann Stone', None))

    Returns:
        The legible text, and for each of its characters and its end the place in the text; None if they are the same.
    """
    if not any(odd in text for odd in _ODD_IN_ASCII) and (text.isascii() or not _ODD_BEYOND.search(text)):
        return text, None
    parts: list[str] = []
    places: list[int] = []
    at = 0
    for odd in _ODD.finditer(text):
        parts += [text[at : odd.start()], plain := _usual(text, odd)]
        places += range(at, odd.start())
        places += [odd.start()] * len(plain)
        at = odd.end()
    seen = "".join([*parts, text[at:]])
    return (text, None) if seen == text else (seen, [*places, *range(at, len(text) + 1)])


def _usual(text: str, odd: re.Match[str]) -> str:
    """What stands in the place of something odd: one character or none."""
    if odd[0][0] >= "\uff01" and odd[0][0] != "\ufeff":
        return odd[0].translate(_WIDE)
    if odd[0] in "\u2019\u02bc":
        return "'"
    if "\u2010" <= odd[0][0] <= "\u2013" or odd[0] == "\u2212":
        return "-"
    at_an_edge = text[odd.end() : odd.end() + 1] == "\n" or text[max(0, odd.start() - 1) : odd.start()] == "\n"
    return " " if _BLANK.search(odd[0]) and not at_an_edge else ""
