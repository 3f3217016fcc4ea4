"""What the engine is asked to do, and what it answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from veiltune.guard.vectors import Vector, best, tempered
from veiltune.guard.vocabulary import Int64

_PARTIAL = 1024  # of the likeliest tokens, among which a nucleus is looked for first


class Told(NamedTuple):
    """One position of an answer: a token, its log-probability, and the likeliest tokens with theirs."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


def told_of(vector: Vector, token: int, k: int) -> Told:
    """Reads one position off a told vector."""
    ids = best(vector, k)
    return Told(token, float(vector[token]), tuple(zip(ids.tolist(), vector[ids].tolist(), strict=True)))


@dataclass(eq=False)
class VectorJob:
    """The told vector after each prompt.

    Attributes:
        prompts: Token ids, each at least one.
        done: Receives the (n, V) vectors.
    """

    prompts: list[list[int]]
    done: Future[Vector] = field(default_factory=Future)
    vectors: dict[int, Vector] = field(default_factory=dict)

    def readings(self) -> list[Reading]:
        """What has to be read: a prompt that another one begins with is a part of that one's reading.

        So a vector at each token of a text costs one pass over the text. Only one job's own prompts are put together:
        how long an answer takes tells nothing of what others ask.

        >>> [(one.ids, one.asked) for one in VectorJob([[5], [5, 6, 7], [5, 6], [8]]).readings()]
        [([8], [(3, 1)]), ([5, 6, 7], [(0, 1), (2, 2), (1, 3)])]
        """
        found: list[Reading] = []
        for number in sorted(range(len(self.prompts)), key=self.prompts.__getitem__, reverse=True):
            ids = self.prompts[number]  # in this order, a beginning comes right after what it is a beginning of
            if not found or found[-1].ids[: len(ids)] != ids:
                found.append(Reading(self, ids))
            found[-1].asked.insert(0, (number, len(ids)))
        return found

    def take(self, number: int, vector: Vector) -> None:
        """Receives one vector; the last one completes the job."""
        self.vectors[number] = vector
        if len(self.vectors) == len(self.prompts):
            finish(self.done, np.stack([self.vectors[i] for i in range(len(self.prompts))]))


@dataclass(frozen=True, eq=False)
class Reading:
    """One text that is read for a job.

    Attributes:
        job: Whose.
        ids: Of the text.
        asked: Number and length of each of the job's prompts that is a beginning of it, the shortest first.
    """

    job: VectorJob
    ids: list[int]
    asked: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """A continuation.

    Attributes:
        ids: Without the end token.
        told: One a token, the end token too, if asked for; with echo the prompt's from the second on come first.
        finished: "stop" (end token or a stop text), "length" or "content_filter" (what comes next is withheld).
    """

    ids: list[int]
    told: list[Told]
    finished: str


@dataclass(eq=False)
class TextJob:
    """A continuation of one prompt, token by token.

    Attributes:
        prompt: Token ids, at least one.
        max_tokens: At most so many new ones; 0 is possible with echo.
        temperature: 0: always the likeliest.
        top_p: Mass of the nucleus that is drawn from.
        seed: None: from the operating system.
        logprobs: How many of the likeliest tokens to tell; None: none, and no log-probabilities.
        echo: Whether to tell the prompt's own tokens too.
        end: Ids that end the text.
        stops: Called with the new tokens so far; True ends the text.
        notify: Called with the new tokens after each one.
        done: Receives the text.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    end: frozenset[int] = frozenset()
    stops: Callable[[Sequence[int]], bool] | None = None
    notify: Callable[[list[int]], None] | None = None
    done: Future[Text] = field(default_factory=Future)
    ids: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    state: Any = None

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(secrets.randbits(128) if self.seed is None else self.seed)

    def draw(self, vector: Vector) -> int:
        """One token from a vector, by the job's temperature and nucleus."""
        if self.temperature == 0.0:
            return int(vector.argmax())
        if self.temperature != 1.0:
            vector = tempered(vector, self.temperature)
        ids = None if self.top_p >= 1.0 else _nucleus(vector, self.top_p)
        sums = np.exp(vector if ids is None else vector[ids]).cumsum(dtype=np.float64)
        place = min(int(np.searchsorted(sums, self._random.random() * sums[-1], side="right")), len(sums) - 1)
        while place and sums[place] == sums[place - 1]:  # rounding put the draw behind the last possible token
            place -= 1
        return place if ids is None else int(ids[place])

    def add(self, token: int) -> bool:
        """Takes a token into the text; returns whether the text goes on."""
        if token in self.end:
            return self._finish("stop")
        self.ids.append(token)
        if self.notify is not None:
            self.notify(list(self.ids))
        if self.stops is not None and self.stops(self.ids):
            return self._finish("stop")
        return len(self.ids) < self.max_tokens or self._finish("length")

    def _finish(self, why: str) -> bool:
        finish(self.done, Text(self.ids, self.told, why))
        return False

    def end_now(self, why: str = "length") -> None:
        """Completes a job before its next token."""
        self._finish(why)


def finish(done: Future[Any], value: Any) -> None:
    """Hands over an answer, unless nobody waits any more."""
    if not done.done() and done.set_running_or_notify_cancel():
        done.set_result(value)


def fail(done: Future[Any], error: BaseException) -> None:
    """Hands over a failure, unless nobody waits any more."""
    if not done.done() and done.set_running_or_notify_cancel():
        done.set_exception(error)


def _nucleus(vector: Vector, mass: float) -> Int64:
    """The fewest likeliest tokens that have the mass together (Holtzman et al. 2020, arXiv:1904.09751)."""
    for k in (_PARTIAL, len(vector)):
        ids = best(vector, k)
        sums = np.exp(vector[ids]).cumsum(dtype=np.float64)
        if sums[-1] >= mass or k >= len(vector):
            break
    return ids[: int(np.searchsorted(sums, mass)) + 1]
