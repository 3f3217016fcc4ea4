"""The guard on a model's answers, composed: n-gram filter, protected strings, then temperature, top-k and rounding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from veiltune._validate import positive_int
from veiltune.errors import InputError
from veiltune.guard.memfree import NgramFilter
from veiltune.guard.protected import START, ProtectedStrings, TextState
from veiltune.guard.vectors import Seal, Shape, Vector, best, without
from veiltune.guard.vocabulary import Int64, Vocabulary

_NONE: Int64 = np.zeros(0, dtype=np.int64)
_ROWS_KEPT = 4096


class GuardState(NamedTuple):
    """What the guard remembers of a text.

    Attributes:
        text: For the protected strings.
        recent: The last tokens, for the n-gram filter.
    """

    text: TextState
    recent: tuple[int, ...]


class Guard:
    """Turns a model's vector into what is told, and into what is drawn from.

    The order is fixed. Told: (1) where the n-gram filter finds one of the likeliest tokens, all of these likeliest are
    sealed among themselves; (2) tokens that would tell a withheld part of a protected string are sealed;
    (3) temperature, top-k, rounding. Drawn from: the same, but before (3) tokens that would complete a protected
    string, or repeat an n-gram, are ruled out. Sealing comes before top-k, or the cut would show what the model
    preferred.

    Guarantee:
        Drawn text contains no protected string (see `ProtectedStrings`) and no n-gram of the filter. After the head of
        a protected string, as long as its withheld part is, told vectors do not depend on the model at all; and where
        they are sealed depends on heads and lengths, not on what is withheld. Against: anyone who chooses prompts, sees
        vectors or text, and knows the reference and the model that training started from. What it does not cover: the
        heads themselves (which prefixes are heads can be found out, since what follows is sealed); a withheld part
        without its head before it, or after a head with a letter changed; a right guess of the whole withheld part,
        which what the model says after it may confirm; vectors elsewhere, which may still tell whether a record was
        in the training data; and secrets that are on no list. Against those, train with privacy.

    Args:
        vocabulary: Of the model.
        protected: None: no strings.
        ngrams: None: no filter.
        candidates: How many of the likeliest tokens the n-gram filter looks at.
        reference: (V,) positive shares for sealing; None: all alike.
        shape: Of every vector.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        protected: ProtectedStrings | None = None,
        ngrams: NgramFilter | None = None,
        candidates: int = 50,
        reference: Any = None,
        shape: Shape | None = None,
    ) -> None:
        self.vocabulary, self.protected, self.ngrams = vocabulary, protected, ngrams
        self.candidates, self.shape = positive_int(candidates=candidates), shape or Shape()
        self._seal = Seal(np.ones(vocabulary.size) if reference is None else reference)
        self._window = ngrams.n - 1 if ngrams else 0

    def start(self, token_ids: Iterable[int]) -> GuardState:
        """The state after a prompt."""
        ids = list(token_ids)
        text = self.protected.start(ids) if self.protected else START
        return GuardState(text, tuple(ids[len(ids) - self._window :] if self._window < len(ids) else ids))

    def advance(self, state: GuardState, token: int) -> GuardState:
        """The state after one more token."""
        text = self.protected.advance(state.text, token) if self.protected else START
        return GuardState(text, (*state.recent, token)[-self._window :] if self._window else ())

    def told(self, state: GuardState, log_probs: Vector) -> Vector:
        """What someone who asks for the vector is told.

        Args:
            state: Of the text so far.
            log_probs: (V,) float32 of the model, natural.

        Returns:
            (V,) float32, adding up to 1; the same object if nothing was done.
        """
        return self.shape.of(self._sealed(state, self._checked(log_probs))[0])

    def drawn(self, state: GuardState, log_probs: Vector) -> Vector:
        """What the next token of a text is drawn from; as `told`, with some tokens ruled out.

        Raises:
            InputError: If no token is left.
        """
        sealed, repeated = self._sealed(state, self._checked(log_probs))
        if self.protected:
            sealed = without(sealed, self.protected.completing(state.text))
        return self.shape.of(without(sealed, repeated))

    def withholds(self, state: GuardState) -> bool:
        """Whether all tokens are sealed here, since a head of a protected string has just ended."""
        return self.protected is not None and self.protected.withheld(state.text) is None

    def _checked(self, log_probs: Vector) -> Vector:
        if log_probs.shape != (self.vocabulary.size,):
            raise InputError(f"the guard is for vectors of {self.vocabulary.size}, got shape {log_probs.shape}")
        return log_probs

    def _sealed(self, state: GuardState, log_probs: Vector) -> tuple[Vector, Int64]:
        """(sealed vector, tokens that would repeat an n-gram)."""
        likeliest, repeated = self._repeated(state, log_probs)
        vector = self._seal.among(log_probs, likeliest) if len(repeated) else log_probs
        if self.protected:
            ids = self.protected.withheld(state.text)
            vector = self._seal.whole if ids is None else self._seal.of(vector, ids)
        return vector, repeated

    def _repeated(self, state: GuardState, log_probs: Vector) -> tuple[Int64, Int64]:
        """(the likeliest tokens, those of them that would repeat an n-gram)."""
        if self.ngrams is None or len(state.recent) < self._window:
            return _NONE, _NONE
        likeliest = best(log_probs, self.candidates)
        return likeliest, likeliest[self.ngrams.repeats(state.recent, likeliest)]


class GuardProcessor(LogitsProcessor):
    """A guard in `transformers.generate`: ``model.generate(..., logits_processor=[GuardProcessor(guard)])``.

    Put it first. It remembers the texts of the last steps, so a step costs one token a text, whatever the order in
    which beams come; an unknown text is read from its start.

    Guarantee:
        As `Guard.drawn`, of what generate draws from. Processors after it must only make tokens less likely, not bring
        back what has probability zero.

    Args:
        guard: For the model's vocabulary.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._known: dict[bytes, GuardState] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) ids and (B, V) scores to (B, V) log-probabilities, on the scores' device."""
        rows = input_ids.cpu().numpy()
        vectors = scores.float().log_softmax(-1).cpu().numpy()
        states = [self._state(row) for row in rows]
        if len(self._known) > _ROWS_KEPT:
            self._known = {}
        self._known |= {row.tobytes(): state for row, state in zip(rows, states, strict=True)}
        drawn = [self.guard.drawn(state, vector) for state, vector in zip(states, vectors, strict=True)]
        return torch.from_numpy(np.stack(drawn)).to(scores.device, scores.dtype)

    def _state(self, row: Int64) -> GuardState:
        before = self._known.get(row[:-1].tobytes())
        return self.guard.start(row.tolist()) if before is None else self.guard.advance(before, int(row[-1]))
