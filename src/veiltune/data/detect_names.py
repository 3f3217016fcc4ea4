"""Names and postal addresses by what stands around them: no list of names is used, and far from all are found.

Names need a sign in the text: a title, a greeting, a label, a closing formula, an e-mail address that is made from the
name. What is found once is then looked for everywhere, see propagate.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from veiltune.data.detect_patterns import LIKELY, WEAK, Place

_UPPER, _LETTER = "A-Z\u00c0-\u00d6\u00d8-\u00de\u0104\u010c\u0141\u015a\u0160\u017d", r"[^\W\d_]"
_MORE = rf"(?:['\u2019-]{_LETTER}+)*+"
_WORD = rf"(?:[{_UPPER}]{_LETTER}+{_MORE}|[{_UPPER}]['\u2019][{_UPPER}]{_LETTER}+{_MORE})"
_INITIAL = rf"(?:[{_UPPER}]\.[ ]?)"
_FULL = rf"{_WORD}[ ](?:{_INITIAL}{{0,2}}|(?:{_WORD}|van|von|de|der|da|di|la|le|bin|al)[ ]){_WORD}"
_FULL_OR_TWO = rf"(?:{_INITIAL}{{1,2}}{_WORD}|{_FULL}|{_WORD}[ ]{_WORD})"
_ANY = rf"(?:{_FULL_OR_TWO}|{_WORD})"

# Words with a capital letter that a sign may stand before and that begin or end no name.
_NO_NAME = (
    "account accounts address agent all also and another answer april august bank best board box bureau call card case"
    " center centre chair city claim client clinic club code colleague colleagues college committee company contact"
    " council court customer customers date dear december delivery department desk director doctor email everyone"
    " everybody february file first floor folks for form friday friend friends from front good guest guests hello help"
    " hi home hospital hotel hotline house human i if in information insurance invoice it january july june kind"
    " library madam manager march may member members monday morning my name new no not note november number october"
    " office on one online order our page parents participants patient payment phone please police policy post private"
    " problem project question reference regards report residents resources room route sales saturday school september"
    " server service services shop sir sirs staff status store street subject sunday support team tel telephone thank"
    " thanks the this thursday ticket to train tuesday university update user visitor we website wednesday welcome"
    " whom world yes you your yours"
)
_NOT_NAMES = frozenset(_NO_NAME.split())
_BEFORE = (
    (r"\b(?:Mr|Mrs|Ms|Mx|Miss|Dr|Prof|Professor|Madam|Herr|Frau|Sr|Sra)\b\.?[ ]", _ANY),
    (r"\b(?:Dear|Hello|Hi|Hey|Good (?:morning|afternoon|evening|day)|Attn:?|Attention:?)[, ]+", _FULL_OR_TWO),
    (r"\b[Nn]ame[ds]?(?:[ ](?:is|was)|:)[ ]?", _ANY),
    (r"\b(?:[Cc]ustomer|[Pp]atient|[Cc]lient|[Ee]mployee|[Cc]ontact|[Gg]uest|[Tt]enant|[Cc]aller|[Vv]isitor|[Uu]ser"
     r"|[Ss]ender|[Rr]ecipient|[Mm]ember|[Aa]pplicant|[Ss]tudent|[Pp]assenger|[Oo]wner|[Aa]ttendee|[Hh]older|To)"
     r"(?:[ ](?:is|was))?:?[ ]", _FULL_OR_TWO),
    (r"\b(?:[Mm]y name is|[Ii] am|I'm|[Tt]his is|[Ss]igned(?: by)?:?|[Cc]ongratulations,?|[Cc]\/o|[Oo]n behalf of"
     r"|[Ff]or)[ ]",
     _FULL_OR_TWO),
    (r"(?:[Rr]egards|[Ww]ishes|[Tt]hanks|[Tt]hank you|[Ss]incerely|[Ff]aithfully|[Tt]ruly|[Cc]heers|[Gg]reetings"
     r"|[Bb]est),?[ ]?(?:\n|[ ])+", _FULL_OR_TWO),
)  # fmt: skip
_SIGNS = tuple((re.compile(rf"{sign}\Z"), re.compile(name)) for sign, name in _BEFORE)
_SIGN_REACH = 30
# What a sign can end with: most capital words are ruled out by the word before them.
_LAST_WORDS = (
    "mr mrs ms mx miss dr prof professor madam herr frau sr sra dear hello hi hey morning afternoon evening day attn"
    " attention name named names is was customer patient client employee contact guest tenant caller visitor user"
    " sender recipient member applicant student passenger owner attendee holder to am i'm signed by congratulations"
    " c/o of for regards wishes thanks you sincerely faithfully truly cheers greetings best"
)
_SIGN_ENDS = frozenset(_LAST_WORDS.split())
_CAPITAL = re.compile(rf"[{_UPPER}](?<=\s.)")
_LONGEST_END = 24
_OWN_LINE = re.compile(rf"(?:^|\n)(?:{_WORD}:[ ])?({_WORD}[ ](?:{_INITIAL})?{_WORD})\.?[ ]?(?=\n|$)")
_ADJACENT = re.compile(rf"({_WORD}[ ](?:{_INITIAL})?{_WORD})(?:,[ ](?:phone[ ]|tel\.?[ ])?|[ ]\(|:[ ])$")
_ADJACENT_REACH = 60


def find_names(text: str, anchors: list[tuple[str, int, int]]) -> Iterator[Place]:
    r"""English names by the signs around them.

    >>> text = "Dear Ann Stone, Mr Lee wrote.\nKind regards,\nJo Q. Reed"
    >>> sorted({text[a:b] for a, b, _ in find_names(text, [])})
    ['Ann Stone', 'Jo Q. Reed', 'Lee']

    Args:
        text: A document.
        anchors: Type, start and end of what was found in it already; a name often stands before an address or number,
            and an e-mail address often tells its owner's name.
    """
    for capital in _CAPITAL.finditer(text):
        at = capital.start()
        words = text[max(0, at - _LONGEST_END) : at].split()
        if not words or words[-1].rstrip(":,.").lower() not in _SIGN_ENDS:
            continue
        for sign, name in _SIGNS:
            named = name.match(text, at) if sign.search(text, max(0, at - _SIGN_REACH), at) else None
            if named:
                yield from _cleaned(text, *named.span(), LIKELY)
    for found in _OWN_LINE.finditer(text):
        yield from _cleaned(text, *found.span(1), WEAK)
    for type, start, end in anchors:
        if type in ("email", "phone", "address") and (
            before := _ADJACENT.search(text, max(0, start - _ADJACENT_REACH), start)
        ):
            yield from _cleaned(text, *before.span(1), WEAK)
        if type == "email":
            yield from _named_by(text[start:end], text)


def _cleaned(text: str, start: int, end: int, score: float) -> Iterator[Place]:
    """Leaves out words that are no names at both ends; nothing where one remains in the middle."""
    words = [(m.start() + start, m.end() + start) for m in re.finditer(r"\S+", text[start:end])]
    while words and text[slice(*words[0])].lower() in _NOT_NAMES:
        words.pop(0)
        score = WEAK
    while words and text[slice(*words[-1])].lower() in _NOT_NAMES:
        words.pop()
        score = WEAK
    dropped = score == WEAK and len(words) < 2
    if words and not dropped and not any(text[slice(*word)].lower() in _NOT_NAMES for word in words):
        yield words[0][0], words[-1][1], score


def _named_by(email: str, text: str) -> Iterator[Place]:
    """First.Last@ or FirstLast@: the same two words in the text, capitalised, in either order."""
    local = email.partition("@")[0]
    parts = (
        re.findall(r"[^\W\d_]{2,}", local) if re.search(r"[._-]", local) else re.findall(rf"[{_UPPER}][a-z]+", local)
    )
    if len(parts) != 2:
        return
    first, last = (re.escape(part) for part in parts)
    pattern = rf"(?<!\w)(?:{first}[ ](?:{_INITIAL})?{last}|{last},?[ ]{first})(?!\w)"
    for found in re.finditer(pattern, text, re.IGNORECASE):
        if found[0][0].isupper():
            yield found.start(), found.end(), LIKELY


_KIND = (
    "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Court|Ct|Boulevard|Blvd|Square|Sq|Terrace|Ter|Crescent|Cres|Parkway"
    "|Pkwy|Plaza|Place|Pl|Way|Close|Highway|Hwy|Circle|Cir|Trail|Trl|Row|Mews|Alley|Loop|Pike|Grove|Gardens|Walk|Quay"
    "|Route|Freeway|Hollow|Bypass|Spur"
)
_UNIT = r"(?:Suite|Room|Office|Unit|Apt\.?|Apartment|Flat|Floor|Ste\.?)[ ]?#?[0-9]{1,5}[A-Za-z]?"
_PLACE = rf"(?:,[ ]|,?\n[ ]?){_WORD}(?!\w)(?:[ -]{_WORD}(?!\w)){{0,2}}"
_CODE = r"(?:[0-9]{5}(?:-[0-9]{4})?|[A-Z]{1,2}[0-9][0-9A-Z]?[ ][0-9][A-Z]{2})(?!\w)"  # American, German, ...; British
_STATE = rf"(?:[A-Z]{{2}}\b|{_WORD}(?:[ ]{_WORD})?(?=,?\s{_CODE}))"
_TAIL = rf"(?:,?\s{_UNIT})?(?:{_PLACE})?(?:,?\s{_STATE})?(?:,?\s{_CODE})?"
_STREET = re.compile(
    rf"[0-9](?<![\w.].)[0-9]{{0,5}}[A-Za-z]?[ ](?:{_WORD}\.?[ ]|[0-9]{{1,3}}(?:st|nd|rd|th)[ ]){{1,4}}"
    rf"(?:{_KIND})\b(?:\.(?=,))?{_TAIL}"
)
_UNIT_BEFORE = re.compile(rf"{_UNIT},[ ]$")
_HOUSE_NUMBER = re.compile(r"[0-9](?<=[\w.][ ].)[0-9]{0,3}(?!\w)")
_SUFFIXES = (
    *("straße", "strasse", "str.", "weg", "gatan", "gata", "vej", "veien", "vegen", "katu", "gade", "utca"),
    *("laan", "straat", "platz", "gasse", "tie"),
)
_PREFIXES = ("Rue ", "Via ", "Calle ", "Avenida ", "Rua ", "Viale ", "Piazza ", "ul. ", "Ul. ")
_EUROPEAN = re.compile(
    rf"(?<!\w)(?:(?:{'|'.join(map(re.escape, _PREFIXES))})(?:[\w'\u2019-]+[ ]){{1,4}}"
    rf"|{_LETTER}*(?:{'|'.join(map(re.escape, _SUFFIXES))})[ ])\Z"
)
_AFTER = re.compile(_TAIL)
_STREET_REACH = 60
_BOX = re.compile(
    r"\b(?:P\.?[ ]?O\.?[ ]Box[ ][0-9]{1,6}|PSC[ ][0-9]{1,5},[ ]Box[ ][0-9]{1,5}(?:\sA[PF]O[ ]A[APE][ ][0-9]{5})?)"
)


def find_addresses(text: str) -> Iterator[Place]:
    """Postal addresses of English and some European forms: number and street, with what belongs to it.

    >>> text = "Send it to Suite 12, 4004 Old Mill Road, Denham, or to Lindenweg 7."
    >>> [text[a:b] for a, b, _ in find_addresses(text)]
    ['Suite 12, 4004 Old Mill Road, Denham', 'Lindenweg 7']
    """
    for found in _STREET.finditer(text):
        unit = _UNIT_BEFORE.search(text, max(0, found.start() - 24), found.start())
        yield unit.start() if unit else found.start(), found.end(), LIKELY
    for number in _HOUSE_NUMBER.finditer(text):
        before = text[max(0, number.start() - _STREET_REACH) : number.start() - 1]
        if not before.endswith(_SUFFIXES) and not any(prefix in before for prefix in _PREFIXES):
            continue
        street = _EUROPEAN.search(text, max(0, number.start() - _STREET_REACH), number.start())
        after = _AFTER.match(text, number.end())
        if street and after:
            yield street.start(), after.end(), WEAK
    for found in _BOX.finditer(text):
        yield found.start(), found.end(), WEAK
