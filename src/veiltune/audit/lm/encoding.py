"""Texts to token sequences as the model was trained on them, and where in them the personal data stand.

A sequence is ``[bos] text eos``, with bos only where the tokenizer itself begins texts with it, as in training
(`veiltune.dp.encoding`). Without bos nothing predicts the first token, so it is not scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from veiltune.data.manifest import Span
from veiltune.errors import InputError


@dataclass(frozen=True, repr=False)
class Sequenced:
    """One text in tokens; its repr shows the length only.

    Attributes:
        ids: The whole sequence.
        ranges: For each span of the text, first and behind-last position of its tokens in `ids`; None if a part of it
            is not scored: cut off, or the very first token.
        cut: Whether the text was longer than the model's context.
    """

    ids: list[int]
    ranges: tuple[tuple[int, int] | None, ...] = ()
    cut: bool = False

    def __repr__(self) -> str:
        return f"Sequenced({len(self.ids)} tokens, {len(self.ranges)} spans)"


class Encoder:
    """A tokenizer, and how its model's texts begin and end.

    Args:
        tokenizer: A fast Hugging Face tokenizer with an end-of-text token.
        context: Longest sequence, in tokens.

    Raises:
        InputError: If the tokenizer is slow (it cannot say where a token stands in the text) or has no end.
    """

    def __init__(self, tokenizer: Any, *, context: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError("the audit needs a fast tokenizer (tokenizer.json); convert it with transformers")
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token; use that of a causal language model")
        self.tokenizer, self.context = tokenizer, context
        self.eos = int(tokenizer.eos_token_id)
        begun = list(tokenizer(["a"], verbose=False)["input_ids"][0][:1])
        self.start = begun if begun == [tokenizer.bos_token_id] else []

    @property
    def opening(self) -> list[int]:
        """What a text that is sampled from nothing begins with."""
        return self.start or [self.eos]

    def texts(self, texts: Sequence[str], spans: Iterable[Sequence[Span]] | None = None) -> list[Sequenced]:
        """Whole documents, with the positions of their spans."""
        if not texts:
            return []
        marked = list(spans) if spans is not None else [()] * len(texts)
        found = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            self._sequenced(list(ids), offsets, own)
            for ids, offsets, own in zip(found["input_ids"], found["offset_mapping"], marked, strict=True)
        ]

    def split(self, text: str, at: int) -> tuple[list[int], list[int]]:
        """The tokens before a character, the opening included, and those that reach behind it; without end.

        The whole text is tokenized at once, so that the border falls as it does in training. What reaches over the
        border belongs to the second part.
        """
        found = self.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(found["input_ids"][0]), found["offset_mapping"][0]
        first = next((number for number, (_, end) in enumerate(offsets) if end > at), len(ids))
        return [*self.start, *ids[:first]], ids[first:]

    def prompt(self, text: str) -> list[int]:
        """A text to be continued."""
        return self.start + list(self.tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _sequenced(self, ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> Sequenced:
        whole = [*self.start, *ids, self.eos]
        kept = whole[: self.context]
        ranges = tuple(self._range(offsets, span, len(kept)) for span in spans)
        return Sequenced(kept, ranges, cut=len(whole) > len(kept))

    def _range(self, offsets: Sequence[tuple[int, int]], span: Span, length: int) -> tuple[int, int] | None:
        inside = [number for number, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
        if not inside:
            return None
        first, last = inside[0] + len(self.start), inside[-1] + 1 + len(self.start)
        return (first, last) if first >= 1 and last <= length else None
