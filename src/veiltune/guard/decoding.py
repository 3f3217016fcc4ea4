"""The guard on a model's answers, composed: n-gram filter, protected strings, then temperature, top-k and rounding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from veiltune._validate import in_range, positive_int
from veiltune.errors import InputError
from veiltune.guard.memfree import NgramFilter
from veiltune.guard.protected import START, ProtectedStrings, TextState
from veiltune.guard.vectors import Seal, Shape, Vector, best, normalised, without
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
    (3) temperature, top-k, rounding. Drawn from: the same, but before (3) these tokens, and those that would repeat an
    n-gram, are ruled out; after a head, where all are sealed, only blanks and punctuation are left (the server ends the
    text there). Sealing comes before top-k, or the cut would show what the model preferred.

    Guarantee:
        Drawn text adds nothing to the head of a protected string, and so completes none (see `ProtectedStrings`); nor
        does it repeat an n-gram of the filter with one of the `candidates` likeliest tokens. After a head, as long as
        its withheld part is, neither told vectors nor drawn text depend on the model at all. What is sealed, and what
        is ruled out, depends on heads and lengths, not on what is withheld: somebody whom the model never saw is not
        given away by the list, beyond the head. Against: anyone who chooses prompts and seeds, sees vectors or text,
        and knows the reference and the model that training started from. What it does not cover: the heads themselves
        (which prefixes are heads can be found out, since what follows is sealed); a withheld part without its head
        before it, or after a head with a letter changed; a right guess of the whole withheld part, which what the model
        says after it may confirm; n-grams that end in a token that the model hardly expects; vectors elsewhere, which
        may still tell whether a record was in the training data; and secrets that are on no list. Against those, train
        with privacy.

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
        self._silent = np.full(vocabulary.size, -np.inf, dtype=np.float32)
        if len(vocabulary.silent):
            self._silent[vocabulary.silent] = self._seal.whole[vocabulary.silent]
            self._silent = normalised(self._silent)
        self._silent.flags.writeable = False

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
            ids = self.protected.withheld(state.text)
            if ids is None:
                return self._silence()
            sealed = without(sealed, ids)
        return self.shape.of(without(sealed, repeated))

    def _silence(self) -> Vector:
        if not len(self.vocabulary.silent):
            raise InputError(
                "after a head the guard leaves blanks and punctuation only, and the model has no such token"
            )
        return self.shape.of(self._silent)

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
    """A guard in `transformers.generate`: ``model.generate(..., logits_processor=[GuardProcessor(guard, eos)])``.

    Put it first. After a head of a protected string it ends the text. It remembers the texts of the last steps, so a
    step costs one token a text, whatever the order in which beams come; an unknown text is read from its start.

    Guarantee:
        As `Guard.drawn`, of what generate draws from. Processors after it must only make tokens less likely, not bring
        back what has probability zero.

    Args:
        guard: For the model's vocabulary.
        eos_token_id: The token that ends a text; None: after a head come blanks and punctuation.

    Raises:
        InputError: If it is not in the vocabulary.
    """

    def __init__(self, guard: Guard, eos_token_id: int | None = None) -> None:
        if eos_token_id is not None:
            in_range(0, guard.vocabulary.size - 1, eos_token_id=eos_token_id)
        self.guard, self._eos = guard, eos_token_id
        self._known: dict[bytes, GuardState] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) ids and (B, V) scores to (B, V) log-probabilities, on the scores' device."""
        rows = input_ids.cpu().numpy()
        vectors = scores.float().log_softmax(-1).cpu().numpy()
        states = [self._state(row) for row in rows]
        if len(self._known) > _ROWS_KEPT:
            self._known = {}
        self._known |= {row.tobytes(): state for row, state in zip(rows, states, strict=True)}
        drawn = [self._drawn(state, vector) for state, vector in zip(states, vectors, strict=True)]
        return torch.from_numpy(np.stack(drawn)).to(scores.device, scores.dtype)

    def _drawn(self, state: GuardState, vector: Vector) -> Vector:
        if self._eos is None or not self.guard.withholds(state):
            return self.guard.drawn(state, vector)
        ended = np.full_like(vector, -np.inf)
        ended[self._eos] = 0.0
        return ended

    def _state(self, row: Int64) -> GuardState:
        before = self._known.get(row[:-1].tobytes())
        return self.guard.start(row.tolist()) if before is None else self.guard.advance(before, int(row[-1]))
