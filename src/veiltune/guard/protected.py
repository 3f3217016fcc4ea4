"""Protected strings against token ids: which tokens would tell of a withheld part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from veiltune.guard.folding import SHORTEST, UNKNOWN, fold_all
from veiltune.guard.trie import Automaton, contained, ended
from veiltune.guard.vocabulary import Int64, TokenTexts, Vocabulary

_KEPT = 200_000  # states whose tokens are kept
_BUSY = 64  # strings through a state from which on its tokens are looked up in advance
_NONE: Int64 = np.zeros(0, dtype=np.int64)


class TextState(NamedTuple):
    """What the guard remembers of a text; depends on its folded characters only.

    Attributes:
        heads: State of the automaton of heads.
        sealed: Characters that are still to be withheld after a head.
        pending: Bytes that wait for the rest of their character.
    """

    heads: int
    sealed: int
    pending: bytes


START = TextState(0, 0, b"")


class ProtectedStrings:
    """A set of protected strings, compiled for one vocabulary.

    One question is answered for a text and every token at once: would the token tell a character of the part that must
    stay unknown? The answer is the same for all strings with the same heads and lengths. It knows nothing of the
    withheld characters, which are not even kept, and so it cannot tell them to whoever asks often.

    A text that already contains a protected string is no exception: an exception would tell whoever guesses that a
    guess was right.

    >>> tokens = [bytes([code]) for code in range(128)] + [b" Doe", b"e D", b"Day is"]
    >>> guard = ProtectedStrings(["Jane Doe"], Vocabulary(tokens))
    >>> guard.withheld(guard.read(b"Jane")).tolist(), guard.withheld(guard.read(b"JANE-d.")) is None
    ([128, 130], True)

    Guarantee:
        Text drawn without the `withheld` tokens, and ended where all are, never completes a protected string, in any
        case (but for the dotless i), width or accent that Unicode writes as a mark of its own (not the strokes of ø and
        ł), with any punctuation between, however it is cut into tokens. It does not cover other
        writings: look-alike letters of other scripts, digits in words, translations, a string told backwards or in
        pieces with letters between.

    Args:
        values: The strings.
        vocabulary: Of the model.
        unknown: Share of each string that must stay unknown; 0: only its last character.
        shortest: As in `folding.fold_all`.

    Raises:
        InputError: As `folding.fold_all`.

    Attributes:
        count: Different strings.
        build_seconds: What it took.
    """

    def __init__(
        self,
        values: Sequence[str],
        vocabulary: Vocabulary,
        *,
        unknown: float = UNKNOWN,
        shortest: int = SHORTEST,
    ) -> None:
        began = time.perf_counter()
        strings = fold_all(values, unknown=unknown, shortest=shortest)
        tails: dict[str, int] = {}
        for one in strings:
            head = one.text[: one.head]
            tails[head] = max(tails.get(head, 0), len(one.text) - one.head)
        self.count, self.vocabulary = len(strings), vocabulary
        heads = sorted(tails)
        self._heads = Automaton(heads, [tails[head] for head in heads])
        self._passing = _Tokens(self._heads, vocabulary)
        self.build_seconds = time.perf_counter() - began

    @property
    def nbytes(self) -> int:
        """Bytes of the automaton."""
        return self._heads.nbytes

    def start(self, token_ids: Iterable[int]) -> TextState:
        """The state after a prompt."""
        state = START
        for token in token_ids:
            state = self.advance(state, token)
        return state

    def read(self, text: bytes) -> TextState:
        """The state after a text in UTF-8, whatever its tokens."""
        return self._moved(START, self.vocabulary.folded(START.pending, text))

    def advance(self, state: TextState, token: int) -> TextState:
        """The state after one more token."""
        return self._moved(state, self.vocabulary.append(state.pending, token))

    def _moved(self, state: TextState, added: tuple[str, bytes]) -> TextState:
        heads, sealed, _ = state
        for code in map(ord, added[0]):
            heads = self._heads.step(heads, code)
            sealed = max(sealed - 1, self._heads.worth[heads])
        return TextState(heads, max(sealed, 0), added[1])

    def withheld(self, state: TextState) -> Int64 | None:
        """Ids of the tokens that would tell a withheld character; None: all, since a head has just ended."""
        return None if state.sealed else self._passing.after(state.heads, state.pending)


class _Tokens:
    """Tokens that go on after a string of an automaton, for each state; looked up once and kept."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary) -> None:
        self._automaton, self._vocabulary = automaton, vocabulary
        self._whole: dict[tuple[int, bytes], Int64] = {}
        self._plain: dict[int, Int64] = {}
        self._later: dict[tuple[int, bytes], Int64] = {}
        for node in np.flatnonzero(np.asarray(automaton.hi) - np.asarray(automaton.lo) > _BUSY).tolist():
            self._through(node, b"")

    def after(self, state: int, pending: bytes) -> Int64:
        key = (state, pending)
        if key not in self._whole:
            parts = [
                part for node in self._automaton.chain(state) for part in self._through(node, pending) if len(part)
            ]
            _room(self._whole)
            self._whole[key] = np.unique(np.concatenate(parts)) if parts else _NONE
        return self._whole[key]

    def _through(self, node: int, pending: bytes) -> tuple[Int64, Int64]:
        """Of the strings that go through one node: tokens that do not mind the bytes that wait, and those that do."""
        if node not in self._plain:
            _room(self._plain)
            self._plain[node] = self._found(node, self._vocabulary.plain)
        key = (node, pending)
        if key not in self._later:
            _room(self._later)
            self._later[key] = self._found(node, self._vocabulary.later(pending))
        return self._plain[node], self._later[key]

    def _found(self, node: int, texts: TokenTexts) -> Int64:
        """Node 0 stands for all strings that lie within a token."""
        rows = ended(self._automaton, node, texts.trie) if node else contained(self._automaton, texts.trie)
        return np.concatenate(texts.ids(rows)) if rows else _NONE


def _room(kept: dict[Any, Int64]) -> None:
    if len(kept) >= _KEPT:
        kept.clear()
