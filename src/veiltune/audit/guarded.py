"""A local model behind the guard, as the leakage audit sees models: every vector is the one that the API would tell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from veiltune.audit.blackbox import BlackBox, Decoder, Float64, Tokens, Vectors, told
from veiltune.guard.decoding import Guard, GuardState


class GuardedModel(BlackBox):
    """What `veiltune guard serve` answers at /v1/next-token, without the network between.

    Args:
        box: A model that tells whole vectors.
        guard: Stands before it.
        mark: Names the guard, so that a resumed audit does not take another one's answers for its own.
        guarded_by: What the guard is, in words.
    """

    texts_a_part = 400

    def __init__(self, box: BlackBox, guard: Guard, *, mark: str, guarded_by: str = "") -> None:
        self._box, self._guard, self.guarded_by = box, guard, guarded_by
        self.name, self.vocabulary, self.context = f"{box.name} (guarded)", box.vocabulary, box.context
        self.digest = hashlib.sha256(f"{box.digest}\0{mark}".encode()).hexdigest()

    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        """As `BlackBox.next_token_log_probs`; -inf where the guard withholds a token."""
        vectors = self._box.next_token_log_probs(prefixes)
        return self._told([self._guard.start(prefix) for prefix in prefixes], vectors)

    def parts(self, sequences: Sequence[Tokens], *, start: int = 0) -> Iterator[tuple[int, int, Vectors]]:
        """As `BlackBox.parts`; the guard follows each sequence token by token."""
        for number, first, vectors in self._box.parts(sequences, start=start):
            tokens = list(sequences[number])
            states = [self._guard.start(tokens[: first + 1])]
            for token in tokens[first + 1 : first + len(vectors)]:
                states.append(self._guard.advance(states[-1], token))
            yield number, first, self._told(states, vectors)

    def suffix_log_probs(self, prefix: Tokens, suffixes: Sequence[Tokens]) -> Float64:
        """As `BlackBox.suffix_log_probs`: token by token with the cache, shared beginnings once."""
        head, tails = self._suffixed(prefix, suffixes)
        walk, totals = self.decoder([head]), np.zeros(len(tails))
        at = [0] * len(tails)  # row of the walk that each suffix is in
        for step in range(max(map(len, tails), default=0)):
            going = [row for row, tail in enumerate(tails) if len(tail) > step]
            values, _ = told(walk.log_probs[[at[row] for row in going]], [tails[row][step] for row in going])
            totals[going] += values
            onward = [row for row in going if len(tails[row]) > step + 1]
            steps = list(dict.fromkeys((at[row], tails[row][step]) for row in onward))
            if not steps:
                break
            walk.select([parent for parent, _ in steps])
            walk.append([token for _, token in steps])
            places = {one: place for place, one in enumerate(steps)}
            for row in onward:
                at[row] = places[at[row], tails[row][step]]
        return totals

    def decoder(self, prefixes: Sequence[Tokens]) -> Decoder:
        """As `BlackBox.decoder`, with the model's own cache."""
        return _GuardedDecoder(self, self._box.decoder(prefixes), [self._guard.start(prefix) for prefix in prefixes])

    def _told(self, states: Sequence[GuardState], vectors: Vectors) -> Vectors:
        told = [self._guard.told(state, vector) for state, vector in zip(states, vectors, strict=True)]
        return np.stack(told) if told else vectors


class _GuardedDecoder(Decoder):
    def __init__(self, box: GuardedModel, inner: Decoder, states: list[GuardState]) -> None:
        self._box, self._inner, self._states = box, inner, states
        self.log_probs = box._told(states, inner.log_probs)

    def append(self, tokens: Tokens) -> None:
        self._inner.append(tokens)
        pairs = zip(self._states, tokens, strict=True)
        self._states = [self._box._guard.advance(state, int(token)) for state, token in pairs]
        self.log_probs = self._box._told(self._states, self._inner.log_probs)

    def select(self, rows: Sequence[int]) -> None:
        self._inner.select(rows)
        self._states = [self._states[row] for row in rows]
        self.log_probs = self.log_probs[np.asarray(list(rows), dtype=np.int64)]
