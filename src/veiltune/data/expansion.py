"""Templates to texts: choices, fillers, and personal values whose places are remembered.

A template is plain text with ``[a|b]`` for a choice (choices may be nested) and ``{slot}`` for something filled in. The
slots name, email, phone, home and work are personal data and are filled last, so that the same expansion serves two
persons.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Mapping, Sequence

from veiltune.data.manifest import TYPES, Span

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([a-z_]+)\}")
_CJK = re.compile(r"[\u3400-\u9fff]")
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_STEADY = frozenset({"product", "department", "event", "course", "symptom", "ref"})  # the same all through a text


def seeded(*parts: object) -> random.Random:
    """A generator of its own for each purpose: the same parts give the same numbers in every process.

    >>> seeded(0, "coin", 7).random() == seeded(0, "coin", 7).random() != seeded(1, "coin", 7).random()
    True
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


@functools.cache
def fields(template: str) -> frozenset[str]:
    """The types of personal data that a template mentions.

    >>> sorted(fields("{name} owes {amount}, see {email}"))
    ['email', 'name']
    """
    return frozenset(_SLOT.findall(template)) & frozenset(TYPES)


def expand(template: str, rng: random.Random, fillers: Mapping[str, Sequence[str]]) -> str:
    """Makes every choice and fills every slot but the personal ones.

    >>> expand("[Hello|Hello], {name} is away [on {day}|on {day}].", seeded(0), {"day": ["Monday"]})
    'Hello, {name} is away on Monday.'

    Args:
        template: See the module.
        rng: Of choices and fillers.
        fillers: Words by slot, and the forms of dates and amounts; numbers, times and references are made here.
    """
    text = template
    while "[" in text:
        text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    steady: dict[str, str] = {}

    def replacement(match: re.Match[str]) -> str:
        if match[1] in TYPES:
            return match[0]
        slot = match[1].removesuffix("_cap")
        word = steady.get(slot) or _filler(slot, rng, fillers)
        if slot in _STEADY:
            steady[slot] = word
        return word if slot == match[1] else word[0].upper() + word[1:]

    return _SLOT.sub(replacement, text)


def fill(expansion: str, values: Mapping[str, str]) -> tuple[str, tuple[Span, ...]]:
    """Puts a person's values in and says where they stand.

    >>> text, (span,) = fill("write to {email}.", {"email": "a@example.com"})
    >>> text, text[span.start : span.end]
    ('write to a@example.com.', 'a@example.com')
    """
    parts: list[str] = []
    spans: list[Span] = []
    length = done = 0
    for match in _SLOT.finditer(expansion):
        start = length + match.start() - done
        parts += [expansion[done : match.start()], values[match[1]]]
        length, done = start + len(parts[-1]), match.end()
        spans.append(Span(match[1], start, length))
    return "".join([*parts, expansion[done:]]), tuple(spans)


def count_words(text: str) -> int:
    """Words between blanks; where a text is Chinese, characters.

    >>> count_words("two words"), count_words("云川市 ok")
    (2, 4)
    """
    characters = len(_CJK.findall(text))
    return characters + len(_CJK.sub(" ", text).split()) if characters else len(text.split())


def _filler(slot: str, rng: random.Random, fillers: Mapping[str, Sequence[str]]) -> str:
    match slot:
        case "amount" | "price":
            whole = rng.randint(40, 980) if slot == "amount" else rng.randint(2, 29)
            return fillers["money_form"][0].format(money=f"{whole}.{rng.randint(0, 99):02d}")
        case "count":
            return str(rng.randint(2, 9))
        case "many":
            return str(rng.randint(12, 48))
        case "time":
            return f"{rng.randint(10, 18)}:{rng.randint(0, 11) * 5:02d}"
        case "date":
            return fillers["date_form"][0].format(number=rng.randint(1, 28), month=rng.choice(fillers["month"]))
        case "ref":
            return f"{rng.choice(_LETTERS)}{rng.choice(_LETTERS)}-{rng.randint(1000, 9999)}"
    return rng.choice(fillers[slot])
