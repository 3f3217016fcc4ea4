"""Which tokens are personal data: e-mails, numbers and phones by their form, names and places by the user's own list.

A pattern finds what has a form. Names have none: give them as terms, one a line. What is neither is not counted as
personal, which the report says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from veiltune.errors import DataError

PATTERNS = (
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",  # e-mail addresses
    r"(?:https?://|www\.)\S+",
    r"\+?\(?\d(?:[\d\s().x/-]{5,}\d)",  # phone, card and account numbers, dates
    r"\b[A-Z]{0,4}-?\d{3,}[\w-]*",  # order and customer numbers, postal codes
)
_LONGEST_LIST = 100_000


def read_terms(path: Path) -> tuple[str, ...]:
    """Names, places and other personal terms, one a line, empty lines skipped.

    Raises:
        DataError: If the file cannot be read, is not UTF-8, has no term or too many.
    """
    try:
        terms = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
    if not 0 < len(terms) <= _LONGEST_LIST:
        raise DataError(f"{path} has {len(terms)} terms; expected 1 to {_LONGEST_LIST:,}, one a line")
    return terms


class PersonalTagger:
    """Finds personal data in a text.

    >>> tagger = PersonalTagger(["Ada Ray"])
    >>> sorted(tagger.spans("I am Ada Ray, order 4711, ada@ray.org"))
    [(5, 12), (20, 24), (26, 37)]

    Args:
        terms: Of the user; found as whole words in any case.
    """

    def __init__(self, terms: Sequence[str] = ()) -> None:
        longest_first = sorted(set(terms), key=lambda term: (-len(term), term))
        listed = [rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"] if terms else []
        self._patterns = [re.compile(p) for p in PATTERNS] + [re.compile(p, re.IGNORECASE) for p in listed]

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of each find; finds of different kinds may overlap."""
        for pattern in self._patterns:
            for match in pattern.finditer(text):
                yield match.span()

    def tag(self, tokenizer: PreTrainedTokenizerBase, text: str, *, length: int) -> list[bool]:
        """Whether each of the first `length` tokens of a text belongs to personal data; special tokens never do."""
        encoded = tokenizer(text, truncation=True, max_length=max(length, 1), return_offsets_mapping=True)
        spans = list(self.spans(text))
        tags = [
            any(start < last and first < end for first, last in spans) and start < end
            for start, end in encoded["offset_mapping"]
        ]
        return (tags + [False] * length)[:length]
