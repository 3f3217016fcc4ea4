"""The tokens of a tokenizer as bytes and as folded text, also where a token holds only a part of a character."""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veiltune.errors import InputError
from veiltune.guard.folding import fold
from veiltune.guard.trie import Trie

Int64 = NDArray[np.int64]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REST = "\U0010ffff"  # stands for the first bytes of a character whose rest has not come; in no folded text
_FIRST_LATER, _LAST_LATER = 0x80, 0xBF  # a byte of UTF-8 that goes on with a character
_PENDINGS = 4096  # tables kept for texts that end within a character


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token adds to the decoded text, in UTF-8; b"" for special tokens.

    Byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece pieces with byte fallback, and vocabularies of plain text.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Raises:
        InputError: If decoding does not put together what the pieces say, or the tokenizer has no pieces.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special, added = set(tokenizer.all_special_ids), set(tokenizer.get_added_vocab().values())
    core = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = "ByteLevel" in repr(getattr(core, "decoder", None))
    table = _byte_level() if byte_level else None
    found = []
    for token, piece in enumerate(pieces):
        if token in special or piece is None:
            found.append(b"")
        elif token in added:
            found.append(piece.encode())
        elif table is not None:
            found.append(b"".join(table[c] if c in table else c.encode() for c in piece))
        elif byte := _BYTE.fullmatch(piece):
            found.append(bytes([int(byte[1], 16)]))
        else:
            found.append(piece.removeprefix("##").replace("\u2581", " ").encode("utf-8", "ignore"))
    _check(tokenizer, found)
    return found


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, bytes]:
    """The letters by which byte-level BPE writes bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    letters = {chr(byte): bytes([byte]) for byte in kept}
    return letters | {chr(256 + index): bytes([byte]) for index, byte in enumerate(moved)}


def _check(tokenizer: Any, found: list[bytes]) -> None:
    """Decoding must say the same, or the guard would look at another text than the one that is emitted."""
    for probe in ("Ann Lee, 12 Elm St", "a.b@c.org +1 212", "王小明 é"):
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        told = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if fold(told) != fold(b"".join(found[token] for token in ids).decode("utf-8", "replace")):
            raise InputError(
                "the tokenizer writes its tokens in a way that the guard cannot read; use a fast tokenizer"
            )


class TokenTexts:
    """Folded texts in a trie, each with the tokens that have it.

    Attributes:
        trie: Of the different texts that are not empty.
    """

    def __init__(self, texts: dict[int, str]) -> None:
        held: dict[str, list[int]] = {}
        for token, text in texts.items():
            if text:
                held.setdefault(text, []).append(token)
        order = sorted(held)
        self.trie = Trie(order)
        self._ids = np.array([token for text in order for token in held[text]], dtype=np.int64)
        self._starts = np.cumsum([0, *(len(held[text]) for text in order)])

    def ids(self, rows: list[tuple[int, int]]) -> list[Int64]:
        """The tokens of ranges of rows."""
        return [self._ids[self._starts[lo] : self._starts[hi]] for lo, hi in rows]


class Vocabulary:
    """What each token does to a folded text, after any beginning of a character.

    Attributes:
        size: V of the model; ids beyond the tokenizer's have no text.
        plain: The texts of the tokens that do not begin within a character: bytes that wait do not change them.
        silent: Ids of blanks and punctuation: tokens with a text that has no letter and no digit, whatever is before.
    """

    def __init__(self, tokens: list[bytes], *, size: int | None = None) -> None:
        self.size = len(tokens) if size is None else size
        if self.size < len(tokens):
            raise InputError(f"the model knows {self.size} tokens and the tokenizer {len(tokens)}; they do not fit")
        self._tokens = tokens + [b""] * (self.size - len(tokens))
        later = [i for i, t in enumerate(self._tokens) if t and _FIRST_LATER <= t[0] <= _LAST_LATER]
        self._later = set(later)
        fresh = {token: self._row(b"", token) for token in range(self.size)}
        self.plain = TokenTexts({token: text for token, text in fresh.items() if token not in self._later})
        told = (i for i, text in fresh.items() if not text and self._tokens[i] and i not in self._later)
        self.silent: Int64 = np.fromiter(told, dtype=np.int64)
        self._tables: dict[bytes, TokenTexts] = {b"": TokenTexts({token: fresh[token] for token in later})}
        self._fresh = [fold(t.decode()) if t.isascii() else None for t in self._tokens]

    @classmethod
    def of(cls, tokenizer: Any, *, size: int | None = None) -> Vocabulary:
        """Of a Hugging Face tokenizer; as `token_bytes`."""
        return cls(token_bytes(tokenizer), size=size)

    def append(self, pending: bytes, token: int) -> tuple[str, bytes]:
        """(folded characters that a token adds, bytes that wait for the rest of their character)."""
        known = self._fresh[token]
        if known is not None:
            return (known, b"") if self._tokens[token] else ("", pending)
        return self.folded(pending, self._tokens[token])

    @staticmethod
    def folded(pending: bytes, added: bytes) -> tuple[str, bytes]:
        """As `append`, of any bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(pending + added)
        return fold(text), decoder.getstate()[0]

    def later(self, pending: bytes) -> TokenTexts:
        """The texts, after some bytes that wait, of the tokens that begin within a character."""
        if pending not in self._tables:
            if len(self._tables) >= _PENDINGS:
                self._tables = {b"": self._tables[b""]}
            self._tables[pending] = TokenTexts({token: self._row(pending, token) for token in self._later})
        return self._tables[pending]

    def _row(self, pending: bytes, token: int) -> str:
        text, rest = self.folded(pending, self._tokens[token])
        return text + _REST if rest and self._tokens[token] else text
