"""Personal data that has a form of its own: e-mail addresses, telephone numbers, and numbers with a check digit.

Each `find_` function takes a text and yields `(start, end, score)` of characters; none knows any word list of the
synthetic corpora. The regular expressions begin with a digit wherever they can, which is what makes them fast.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterator

from veiltune.data.optional import need

Place = tuple[int, int, float]

CERTAIN, LIKELY, WEAK = 1.0, 0.8, 0.5

_LOCAL = re.compile(r"[\w.+%'-]*[\w+%-]$")
_CJK = r"\u3000-\u9fff\uff00-\uffef"
_DOMAIN = re.compile(
    rf"(?:[^\W_{_CJK}](?:[^\W{_CJK}]|-(?=[\w-])){{0,62}}\.)+[^\W\d_{_CJK}]{{2,24}}(?![^\W{_CJK}]|-[A-Za-z0-9])"
)
_LONGEST_LOCAL = 64


def find_emails(text: str) -> Iterator[Place]:
    """Addresses with a dotted domain.

    >>> [text[a:b] for text in ["write to (ann.stone@example.org)."] for a, b, _ in find_emails(text)]
    ['ann.stone@example.org']
    """
    at = text.find("@")
    while at >= 0:
        before, domain = max(0, at - _LONGEST_LOCAL), _DOMAIN.match(text, at + 1)
        local = _local_part(text[before:at]) if domain else ""
        if domain and local:
            yield at - len(local), domain.end(), CERTAIN
        at = text.find("@", domain.end() if domain else at + 1)


def _local_part(before: str) -> str:
    """What ends a text and may stand before an @; after Chinese, only the ASCII letters belong to it."""
    found = _LOCAL.search(before)
    local = found[0] if found else ""
    if not local.isascii():
        ascii_tail = re.search(r"[A-Za-z0-9._+%'-]+$", local)
        if ascii_tail and re.search(f"[{_CJK}]$", local[: ascii_tail.start()]):
            local = ascii_tail[0]
    return local.lstrip(".'-")


# Where a telephone or card number can be: seven digits with at most three separators between two of them.
_RUN = re.compile(r"[+(0-9](?:[ \u00a0().\-/]{0,3}[0-9]){6,}(?:\s?(?:x|ext\.?)\s?[0-9]{1,5})?")
_EDGE = r"(?<![0-9A-Za-z_@])(?<![0-9][.,:/-])"
_END = r"(?![0-9A-Za-z_])(?![.,:/-][0-9])"
_NANP = re.compile(
    _EDGE + r"(?:\+?1[ .-]?)?(?:\([2-9][0-9]{2}\)[ .-]?|[2-9][0-9]{2}([ .-]))[2-9][0-9]{2}(?(1)\1|[ .-])[0-9]{4}"
    r"(?:\s?(?:x|ext\.?)\s?[0-9]{1,5})?" + _END
)
_CHINESE_MOBILE = re.compile(_EDGE + r"(?<![+])(?:(?:\+|00)86[ -]?)?1[2-9][0-9]([ -]?)[0-9]{4}\1[0-9]{4}" + _END)
_CHINESE_LANDLINE = re.compile(_EDGE + r"(?:(?:\+|00)86[ -]?0?|0)(?:10|2[0-9]|[3-9][0-9]{2})-[2-8][0-9]{6,7}" + _END)
_INTERNATIONAL = re.compile(
    _EDGE.replace("(?<![0-9][.,:/-])", "") + r"\+[1-9](?:[ \u00a0.\-/]?(?:\(0?\)[ ]?|[()])?[0-9]){6,14}\)?" + _END
)
_WEAK_PHONE = re.compile(_EDGE + r"\(?[0-9][0-9()]*(?:[ \u00a0.\-/]{1,2}\(?[0-9]+\)?){0,5}(?:x[0-9]{1,5})?" + _END)
_PHONE_CUE = re.compile(
    r"\b(?:phone|telephone|tel|call|mobile|cell|fax|ring|sms|text|whatsapp|my number|reach|contact|answer(?:ing)?)\b"
    r"|电话|手机|致电|拨打|传真",
    re.IGNORECASE,
)
_PHONE_AFTER = re.compile(r"[ ,(-]{0,2}(?:office|fax|mobile|cell|home)\b", re.IGNORECASE)
_REGIONS = ("US", "GB", "CN", "DE", "FR", "ES", "IT", "NL")
_CUE_REACH = 40


def find_phones(text: str) -> Iterator[Place]:
    """Numbers in North American, Chinese or international form; others where a word near by says telephone.

    A form that is shared with other numbers counts only after such a word, if `phonenumbers` holds it for possible, or
    with a leading zero if it holds it for valid.

    >>> text = "Call (632) 555-0146 or +49 30 901820; order 2018-01-14."
    >>> [text[a:b] for a, b, _ in find_phones(text)]
    ['(632) 555-0146', '+49 30 901820']
    """
    for run in _RUN.finditer(text):
        yield from _phones_in(text, run.start(), run.end())


def _phones_in(text: str, start: int, end: int) -> Iterator[Place]:
    taken = start
    for pattern in (_NANP, _CHINESE_MOBILE, _CHINESE_LANDLINE):
        for found in pattern.finditer(text, start, end):
            if _ends_well(text, found.end()):
                yield found.start(), found.end(), CERTAIN
                taken = max(taken, found.end())
    if taken > start:
        return
    for found in _INTERNATIONAL.finditer(text, start, end):
        if _ends_well(text, found.end()) and _possible(found[0], None):
            yield found.start(), found.end(), CERTAIN
            return
    for found in _WEAK_PHONE.finditer(text, start, end):
        digits = sum(c.isdigit() for c in found[0])
        if 7 <= digits <= 15 and _ends_well(text, found.end()) and _weak_phone(text, found.start(), found[0]):
            yield found.start(), found.end(), WEAK


def _ends_well(text: str, at: int) -> bool:
    """What `_END` says, also at the end of a run, behind which a lookahead sees nothing."""
    return not re.match(r"[0-9A-Za-z_]|[.,:/-][0-9]", text[at : at + 2])


def _weak_phone(text: str, start: int, number: str) -> bool:
    if _DATE.match(number):
        return False
    said = _PHONE_CUE.search(text, max(0, start - _CUE_REACH), start) or _PHONE_AFTER.match(text, start + len(number))
    if said:
        return any(_possible(number, region) for region in _REGIONS)
    grouped = len(re.findall("[0-9]+", number)) > 1
    return grouped and number.lstrip("(").startswith("0") and any(_valid(number, region) for region in _REGIONS)


_DATE = re.compile(
    r"(?:19|20)[0-9]{2}[-/.][01]?[0-9][-/.][0-3]?[0-9]|[0-3]?[0-9][-/.][0-3]?[0-9][-/.](?:19|20)?[0-9]{2}$"
)


def _possible(number: str, region: str | None) -> bool:
    return _known_number(number, region, valid=False)


def _valid(number: str, region: str | None) -> bool:
    return _known_number(number, region, valid=True)


@functools.lru_cache(maxsize=4096)
def _known_number(number: str, region: str | None, *, valid: bool) -> bool:
    phonenumbers = need("phonenumbers", "telephone numbers")
    try:
        parsed = phonenumbers.parse(number, region)
    except phonenumbers.NumberParseException:
        return False
    return bool(phonenumbers.is_valid_number(parsed) if valid else phonenumbers.is_possible_number(parsed))


_CARD = re.compile(_EDGE + r"[0-6][0-9]{3,18}(?:[ -][0-9]{1,6}){0,5}")
_CARD_LENGTHS = (19, 16, 15, 14, 13, 18, 17, 12)  # where a number follows: rather too much than too little
_IN_ACCOUNT = re.compile(r"(?<![^\W_])[A-Za-z]{2}[0-9]{2}(?:[ ][0-9A-Za-z]{4})*[ ]$")
_LONGEST_ACCOUNT = 42


def find_cards(text: str) -> Iterator[Place]:
    """Payment cards: 12 to 19 digits, in groups or not, that begin as an issuer's do and pass Luhn's check.

    >>> text = "card 4111 1111 1111 1111 10 times, not 4111 1111 1111 1112"
    >>> [text[a:b] for a, b, _ in find_cards(text)]
    ['4111 1111 1111 1111']
    """
    for run in _RUN.finditer(text):
        if run.end() - run.start() < 12:
            continue
        for found in _CARD.finditer(text, run.start(), run.end()):
            end = _card_end(text, found.start(), found[0])
            if end and not _IN_ACCOUNT.search(text, max(0, found.start() - _LONGEST_ACCOUNT), found.start()):
                yield found.start(), end, CERTAIN


def _card_end(text: str, start: int, written: str) -> int:
    """Where a card ends that begins here, 0 if none does: after a group of digits, of which the first are whole."""
    ends: dict[int, int] = {}
    count = 0
    for group in re.finditer("[0-9]+", written):
        count += len(group[0])
        ends[count] = start + group.end()
        if len(group[0]) > 6 or len(group[0]) < 3:
            break
    for length in _CARD_LENGTHS:
        end = ends.get(length, 0)
        if end and _ends_well(text, end) and is_card(re.sub("[ -]", "", text[start:end])):
            return end
    return 0


_FROM_16 = (16, 17, 18, 19)
_ISSUERS = tuple(
    (re.compile(prefix), lengths)
    for prefix, lengths in (
        ("4", (13, 16, 19)),  # Visa
        ("5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)", (16,)),  # Mastercard
        ("3[47]", (15,)),  # American Express
        ("6011|64[4-9]|65|62|35", _FROM_16),  # Discover, UnionPay, JCB
        ("30[0-59]|3[689]", (14, 15, *_FROM_16)),  # Diners Club
        ("1800|2131", (15,)),  # JCB
        ("50|5[6-9]|6|0604", (12, 13, 14, 15, *_FROM_16)),  # Maestro
    )
)


def is_card(digits: str) -> bool:
    """Whether digits are a card number by issuer, its lengths and Luhn's check."""
    lengths = next((lengths for prefix, lengths in _ISSUERS if prefix.match(digits)), ())
    return len(digits) in lengths and luhn_digit(digits[:-1]) == digits[-1]


def luhn_digit(digits: str) -> str:
    """The check digit that follows.

    >>> luhn_digit("7992739871")
    '3'
    """
    doubled = (int(d) * (2 - i % 2) for i, d in enumerate(reversed(digits)))
    return str(-sum(d // 10 + d % 10 for d in doubled) % 10)


_IBAN_COUNTRIES = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 "
    "FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
    "LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 "
    "SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
)
IBAN_LENGTHS = {code[:2]: int(code[2:]) for code in _IBAN_COUNTRIES.split()}
_IBAN_START = re.compile(r"[0-9](?<=[A-Za-z]{2}.)(?<![^\W_][A-Za-z]{2}.)[0-9](?=[ \n-]?[0-9A-Za-z]{4})")
_IBAN_REST = re.compile(r"(?:[ \n-]?[0-9A-Za-z])*")


def find_ibans(text: str) -> Iterator[Place]:
    """International bank account numbers: the country's length, and the remainder modulo 97 is 1.

    >>> text = "to GB82 WEST 1234 5698 7654 32 please"
    >>> [text[a:b] for a, b, _ in find_ibans(text)]
    ['GB82 WEST 1234 5698 7654 32']
    """
    for begin in _IBAN_START.finditer(text):
        start = begin.start() - 2
        length = IBAN_LENGTHS.get(text[start : start + 2].upper(), 0)
        if not length:
            continue
        rest = _IBAN_REST.match(text, begin.end(), begin.end() + 2 * length)
        end = _end_of(text, begin.end(), rest.end() if rest else begin.end(), length - 4)
        if end and iban_remainder(re.sub("[ \n-]", "", text[start:end])) == 1:
            yield start, end, CERTAIN


def _end_of(text: str, start: int, limit: int, count: int) -> int:
    """The end of so many letters and digits, 0 if there are fewer or if the last is in the middle of a word."""
    for at in range(start, limit):
        count -= text[at].isalnum()
        if not count:
            return 0 if text[at + 1 : at + 2].isalnum() and text[at + 1].isascii() else at + 1
    return 0


def iban_remainder(iban: str) -> int:
    """The remainder modulo 97 of an IBAN without spaces; 1 for a good one."""
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97


_SSN = re.compile(r"[0-9](?<![0-9A-Za-z_@].)(?<![0-9][.,:/-].)[0-9]{2}-[0-9]{2}-[0-9]{4}" + _END)
_BARE_SSN = re.compile(_EDGE + r"[0-8][0-9]{8}" + _END)
_SSN_CUE = re.compile(r"\b(?:ssn|social security)\b", re.IGNORECASE)


def find_us_ssns(text: str) -> Iterator[Place]:
    """Social security numbers of the United States: with hyphens, or bare after a word that says so.

    >>> text = "SSN 078-05-1120, not 000-12-3456 nor 123-00-4567"
    >>> [text[a:b] for a, b, _ in find_us_ssns(text)]
    ['078-05-1120']
    """
    for found in _SSN.finditer(text):
        if _is_ssn(found[0].replace("-", "")):
            yield found.start(), found.end(), LIKELY
    if not any(word in text for word in ("ocial", "ssn", "SSN")):
        return
    for found in _BARE_SSN.finditer(text):
        if _is_ssn(found[0]) and _SSN_CUE.search(text, max(0, found.start() - _CUE_REACH), found.start()):
            yield found.start(), found.end(), LIKELY


def _is_ssn(digits: str) -> bool:
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


_ZH_ID = re.compile(
    r"[1-9](?<![0-9A-Za-z].)[0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx]"
    r"(?![0-9A-Za-z])"
)
_ZH_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def find_zh_ids(text: str) -> Iterator[Place]:
    """Chinese resident identity numbers, with their check character (GB 11643).

    >>> text = "身份证11010519491231002X"
    >>> [text[a:b] for a, b, _ in find_zh_ids(text)]
    ['11010519491231002X']
    """
    for found in _ZH_ID.finditer(text):
        if zh_check(found[0][:17]) == found[0][17].upper():
            yield found.start(), found.end(), CERTAIN


def zh_check(digits: str) -> str:
    """The check character after 17 digits."""
    return "10X98765432"[sum(int(d) * w for d, w in zip(digits, _ZH_WEIGHTS, strict=True)) % 11]


_IPV4 = re.compile(r"[0-9](?<![0-9A-Za-z.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z]|\.[0-9])")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z:.])(?=[0-9A-Fa-f:]*[0-9])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![0-9A-Za-z:])"
)


def find_ips(text: str) -> Iterator[Place]:
    """IPv4 and IPv6 addresses.

    >>> text = "from 192.168.1.77 and 2001:db8::1, version 1.2.3.400"
    >>> [text[a:b] for a, b, _ in find_ips(text)]
    ['192.168.1.77', '2001:db8::1']
    """
    patterns = (_IPV4, _IPV6) if text.count(":") > 2 else (_IPV4,)
    for pattern in patterns:
        for found in pattern.finditer(text):
            try:
                ipaddress.ip_address(found[0])
            except ValueError:
                continue
            yield found.start(), found.end(), LIKELY


_URL = re.compile(rf"(?:https?://|www\.)[^\s<>\"'{_CJK}]+[^\s<>\"'.,;:!?)\]{_CJK}]")


def find_urls(text: str) -> Iterator[Place]:
    """Web addresses that begin with http or www."""
    if "://" in text or "www." in text:
        for found in _URL.finditer(text):
            yield found.start(), found.end(), LIKELY
