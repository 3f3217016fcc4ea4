"""Finds personal data in a text: by its form, by the words around it, and with Presidio or an NER model if wanted.

    type       found by
    email      form
    phone      form (North American, Chinese, international); others by a word near by and `phonenumbers`
    iban       form, length of the country, remainder
    card       form, issuer, Luhn's check
    us_ssn     form
    zh_id      form, check character
    ip         form
    url        form; only if asked for
    address    form, English and Chinese
    name       words around it, or an e-mail address made from it; with an NER model also its persons

Of two that overlap, the type that comes first in `TYPES` stays.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veiltune._validate import one_of
from veiltune.data import detect_patterns as patterns
from veiltune.data.detect_names import find_addresses, find_names
from veiltune.data.detect_patterns import Place
from veiltune.data.detect_zh import HAN, find_zh_addresses, find_zh_names
from veiltune.data.legible import legible
from veiltune.data.optional import need
from veiltune.errors import InputError

TYPES = ("email", "url", "iban", "zh_id", "card", "us_ssn", "ip", "phone", "address", "name")
DEFAULT_TYPES = tuple(type for type in TYPES if type != "url")
DETECTORS = ("patterns", "presidio", "both")

_FORMS: dict[str, Callable[[str], Iterator[Place]]] = {
    "email": patterns.find_emails,
    "url": patterns.find_urls,
    "iban": patterns.find_ibans,
    "zh_id": patterns.find_zh_ids,
    "card": patterns.find_cards,
    "us_ssn": patterns.find_us_ssns,
    "ip": patterns.find_ips,
    "phone": patterns.find_phones,
}
_PRESIDIO = {
    "EMAIL_ADDRESS": "email",
    "URL": "url",
    "IBAN_CODE": "iban",
    "CREDIT_CARD": "card",
    "US_SSN": "us_ssn",
    "IP_ADDRESS": "ip",
    "PHONE_NUMBER": "phone",
}
_LANGUAGES = ("en", "zh")
_RECOGNISERS = tuple(f"{name}Recognizer" for name in ("CreditCard", "Email", "Iban", "Ip", "Phone", "Url", "UsSsn"))
_NER = {"PERSON": "name", "PER": "name", "FAC": "address", "LOC": "address", "GPE": "address"}
_NER_SCORE = 0.6
_LEAST_PRESIDIO = 0.4
_HAN = re.compile(f"[{HAN}]")


@dataclass(frozen=True, repr=False, order=True)
class Found:
    """Personal data at `text[start:end]`; its repr shows no place.

    Attributes:
        start: First character.
        end: One past the last.
        type: One of `TYPES`.
        score: In (0, 1], how sure; 1 where form or check digit leave no doubt.
    """

    start: int
    end: int
    type: str
    score: float

    def __repr__(self) -> str:
        return f"Found({self.type})"


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What to look for and how; picklable, so that each process can make its own detector.

    Attributes:
        types: Of `TYPES`.
        detector: "patterns" (Veiltune's own), "presidio" (the pattern recognisers of Presidio on a blank spaCy
            pipeline; names and addresses stay ours) or "both", ours first. In bench/scrub.py Presidio's find fewer
            telephone and card numbers, need spaces that Chinese does not have, and take more than ten times as long.
        ner: An installed spaCy model or its folder, for persons and places; "" for none.
    """

    types: tuple[str, ...] = DEFAULT_TYPES
    detector: str = "patterns"
    ner: str = ""


class Detector:
    """Finds personal data in one text at a time; holds no text.

    >>> text = "Dear Ann Stone, we ring 212-555-0123 or write to ann.stone@example.org."
    >>> [(found.type, text[found.start : found.end]) for found in Detector().find(text)]
    [('name', 'Ann Stone'), ('phone', '212-555-0123'), ('email', 'ann.stone@example.org')]

    Guarantee:
        None. A detector that misses nothing does not exist; `bench/scrub.py` measures what this one finds on texts
        with known personal data. Forms with check digits are reliable, names and addresses are not.

    Args:
        options: See `DetectorOptions`.

    Raises:
        InputError: If a type or detector is unknown, or a package or model that it needs is not installed.
    """

    def __init__(self, options: DetectorOptions | None = None) -> None:
        options = options or DetectorOptions()
        self.types = tuple(one_of(TYPES, type=type) for type in options.types)
        if not self.types:
            raise InputError(f"types must name at least one of {', '.join(TYPES)}")
        self._own = one_of(DETECTORS, detector=options.detector) != "presidio"
        self._presidio = _load_presidio() if options.detector != "patterns" else None
        self._ner = _load_ner(options.ner) if options.ner else None
        if "phone" in self.types:
            need("phonenumbers", "telephone numbers")

    def find(self, text: str) -> list[Found]:
        """What was found, in the order of the text, without overlaps; of two that overlap the surer type stays.

        Args:
            text: A document; it is read as `legible` shows it.
        """
        seen, places = legible(text)
        found = self._find(seen)
        if places is None:
            return found
        return [replace(one, start=places[one.start], end=places[one.end]) for one in found]

    def _find(self, text: str) -> list[Found]:
        candidates: list[Found] = []
        if self._own:
            for type, find in _FORMS.items():
                if type in self.types:
                    candidates += (Found(start, end, type, score) for start, end, score in find(text))
        candidates = without_overlaps(candidates)
        if self._presidio:
            more = [found for found in self._by_presidio(text) if found.type in self.types]
            candidates = without_overlaps(candidates + [found for found in more if not _overlaps(found, candidates)])
        if not self._ner and not {"address", "name"} & set(self.types):
            return candidates
        chinese = _HAN.search(text) is not None
        if "address" in self.types:
            find_places = find_zh_addresses if chinese else find_addresses
            candidates += (Found(start, end, "address", score) for start, end, score in find_places(text))
        if "name" in self.types:
            anchors = [(found.type, found.start, found.end) for found in candidates]
            names = list(find_names(text, anchors)) + (list(find_zh_names(text, anchors)) if chinese else [])
            candidates += (Found(start, end, "name", score) for start, end, score in names)
        if self._ner:
            candidates += (found for found in self._by_ner(text) if found.type in self.types)
        return without_overlaps(candidates)

    def _by_presidio(self, text: str) -> Iterator[Found]:
        assert self._presidio is not None
        language = "zh" if _HAN.search(text) else "en"
        for result in self._presidio.analyze(text, language, entities=list(_PRESIDIO), score_threshold=_LEAST_PRESIDIO):
            yield Found(result.start, result.end, _PRESIDIO[result.entity_type], float(result.score))

    def _by_ner(self, text: str) -> Iterator[Found]:
        assert self._ner is not None
        for entity in self._ner(text).ents:
            if entity.label_ in _NER and entity.text.strip():
                yield Found(entity.start_char, entity.end_char, _NER[entity.label_], _NER_SCORE)


def without_overlaps(candidates: Sequence[Found]) -> list[Found]:
    """Keeps, of those that overlap, the one whose type comes first in `TYPES`, then the longer, the surer, the earlier.

    >>> without_overlaps([Found(0, 9, "phone", 1.0), Found(5, 30, "iban", 1.0), Found(40, 44, "name", 0.5)])
    [Found(iban), Found(name)]
    """
    if len(candidates) < 2:
        return list(candidates)
    kept: list[Found] = []  # disjoint, in the order of the text
    for found in sorted(candidates, key=lambda f: (TYPES.index(f.type), f.start - f.end, -f.score, f.start)):
        if not _overlaps(found, kept):
            bisect.insort(kept, found)
    return kept


def _overlaps(found: Found, kept: list[Found]) -> bool:
    """Whether one overlaps others, disjoint and in order: only the last that begins before its end can."""
    before = bisect.bisect_left(kept, found.end, key=lambda other: other.start)
    return before > 0 and kept[before - 1].end > found.start


def _load_presidio() -> Any:
    """Presidio's pattern recognisers for our types, on a pipeline that only splits words; loads no model."""
    presidio = need("presidio_analyzer", "Presidio's recognisers")
    spacy = need("spacy", "Presidio's recognisers")
    tld = need("tldextract.tldextract", "Presidio's recognisers")
    tld.TLD_EXTRACTOR = tld.TLDExtract(suffix_list_urls=())  # it would fetch a list over the network
    engine = need("presidio_analyzer.nlp_engine", "Presidio's recognisers").SpacyNlpEngine(
        models=[{"lang_code": code, "model_name": "blank"} for code in _LANGUAGES]
    )
    engine.nlp = {code: spacy.blank(code) for code in _LANGUAGES}
    kinds = need("presidio_analyzer.predefined_recognizers", "Presidio's recognisers")
    recognisers = [getattr(kinds, kind)(supported_language=code) for code in _LANGUAGES for kind in _RECOGNISERS]
    registry = presidio.RecognizerRegistry(recognizers=recognisers, supported_languages=list(_LANGUAGES))
    return presidio.AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=list(_LANGUAGES))


def _load_ner(model: str) -> Any:
    try:
        return need("spacy", "NER models").load(model)
    except OSError:
        raise InputError(
            f"{model} is no installed spaCy model and no folder of one; install it, or leave --ner out"
        ) from None
