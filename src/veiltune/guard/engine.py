"""The model behind the API: one thread that computes for all callers together (continuous batching)."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from veiltune._validate import positive_int
from veiltune.dp.decoding import causal_lm
from veiltune.errors import InputError
from veiltune.guard.decoding import Guard, GuardState
from veiltune.guard.jobs import Reading, TextJob, VectorJob, fail, told_of
from veiltune.guard.rows import Rows
from veiltune.guard.vectors import Vector
from veiltune.models.families import longest_sequence
from veiltune.models.surgery import backbone_of

log = logging.getLogger(__name__)

_PROMPTS = 64  # answered at once, since each takes a vector
_POSITIONS = 64  # of an echoed prompt whose vectors are held at once


class Engine:
    """Answers jobs in a thread of its own; `submit` and `close` may be called from any thread.

    Between two steps of the texts that are being written, prompts that came in meanwhile join the batch, and one batch
    of next-token questions, alike in length, is answered. So nobody waits for another's long text.

    Args:
        model: A causal language model of `FAMILIES`; moved to the device and put in eval mode.
        guard: Between the model and all answers; None: answers are the model's own.
        slots: Texts that are written at the same time.
        batch_tokens: Positions in one pass over prompts, padding included (a longer prompt goes alone).
        device: Where to compute.

    Raises:
        UnsupportedModelError: If it is no causal language model of a known family.
        InputError: If the guard is for another vocabulary.

    Attributes:
        vocabulary: V.
        context: Longest prompt.
        tokens: Tokens written so far.
        vectors: Next-token vectors told so far.
        sealed: Positions after a head of a protected string, where the guard withheld what comes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        guard: Guard | None = None,
        slots: int = 16,
        batch_tokens: int = 2048,
        device: str | torch.device = "cpu",
    ) -> None:
        causal = causal_lm(model)
        model.to(device).eval()
        self._device, self._guard = torch.device(device), guard
        self._backbone: Any = backbone_of(causal)
        self._head: Any = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.vocabulary, self.context = int(self._head.weight.shape[0]), longest_sequence(causal.config)
        if guard is not None and guard.vocabulary.size != self.vocabulary:
            raise InputError(f"the guard is for {guard.vocabulary.size} tokens, the model has {self.vocabulary}")
        self._slots, self._batch_tokens = positive_int(slots=slots), positive_int(batch_tokens=batch_tokens)
        self._texts: deque[TextJob] = deque()
        self._readings: list[Reading] = []
        self._rows = Rows(self._backbone, self._device)
        self._wake, self._stopping = threading.Condition(), False
        self.tokens = self.vectors = self.sealed = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._texts) + len(self._readings)

    @property
    def writing(self) -> int:
        """Texts that are being written."""
        return len(self._rows.jobs)

    def submit(self, job: VectorJob | TextJob) -> Future[Any]:
        """Queues a job; returns its future.

        Raises:
            InputError: If a prompt is empty, too long or has ids outside the vocabulary, or the engine is closed.
        """
        prompts = job.prompts if isinstance(job, VectorJob) else [job.prompt]
        for ids in prompts:
            self.check(ids, 0 if isinstance(job, VectorJob) else job.max_tokens)
        with self._wake:
            if self._stopping:
                raise InputError("the server is stopping")
            if isinstance(job, VectorJob):
                self._readings += job.readings()
            else:
                self._texts.append(job)
            self._wake.notify()
        return job.done

    def close(self) -> None:
        """Ends the thread; jobs that are not answered fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def check(self, ids: Sequence[int], new: int) -> None:
        """Whether a prompt and so many new tokens can be computed.

        Raises:
            InputError: If it is empty, too long or has ids outside the vocabulary.
        """
        if not 1 <= len(ids) <= self.context - max(0, new - 1):
            raise InputError(
                f"a prompt and its new tokens must be 1 to {self.context} tokens together, got {len(ids)} and {new}"
            )
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise InputError(f"token ids must be in 0..{self.vocabulary - 1}; is the tokenizer the model's?")

    def _run(self) -> None:
        while self._wait():
            for work in (self._admit, self._answer, self._write):
                with torch.inference_mode():
                    work()
        stopped = InputError("the server is stopping")
        left: list[VectorJob | TextJob] = [*self._texts, *self._rows.drop(), *(one.job for one in self._readings)]
        for job in left:
            fail(job.done, stopped)

    def _wait(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._texts or self._readings or self._rows.jobs)
            return not self._stopping

    def _admit(self) -> None:
        """Reads the prompts of texts that find a place, together."""
        chosen: list[TextJob] = []
        with self._wake:
            longest = 0
            while self._texts and len(self._rows.jobs) + len(chosen) < self._slots:
                longest = max(longest, len(self._texts[0].prompt))
                if chosen and longest * (len(chosen) + 1) > self._batch_tokens:
                    break
                chosen.append(self._texts.popleft())
        for job in [job for job in chosen if job.echo]:
            self._guarded([job], partial(self._echo, job))
        if going := [job for job in chosen if not job.done.done()]:
            self._guarded(going, partial(self._read, going))

    def _read(self, jobs: list[TextJob]) -> None:
        hidden, read = self._rows.begin(jobs)
        for job in jobs:
            job.state = self._guard.start(job.prompt) if self._guard else None
        self._rows.join(read, self._next(jobs, hidden))

    def _write(self) -> None:
        """One more token of every text."""
        jobs = self._rows.jobs
        if jobs:
            self._guarded(jobs, lambda: self._rows.keep(self._next(jobs, self._rows.step())))

    def _next(self, jobs: Sequence[TextJob], hidden: Tensor) -> list[int]:
        """Draws a token for each; the numbers of those that go on."""
        vectors, going = self._log_probs(hidden), []
        for row, (job, vector) in enumerate(zip(jobs, vectors, strict=True)):
            if job.done.cancelled():
                continue
            try:
                goes_on = self._one(job, vector)
            except Exception as error:
                log.error("a text failed: %s", type(error).__name__)
                fail(job.done, error)
                continue
            if goes_on:
                going.append(row)
        return going

    def _one(self, job: TextJob, vector: Vector) -> bool:
        guard = self._guard
        if guard is not None and guard.withholds(job.state):
            self.sealed += 1
            job.end_now("content_filter")
            return False
        token = job.draw(vector if guard is None else guard.drawn(job.state, vector))
        if job.logprobs is not None:
            told = vector if guard is None else guard.told(job.state, vector)
            job.told.append(told_of(told, token, job.logprobs))
        self.tokens += 1
        if guard is not None:
            job.state = guard.advance(job.state, token)
        return job.add(token)

    def _echo(self, job: TextJob) -> None:
        """The told log-probabilities of a prompt's own tokens."""
        if job.logprobs is not None:
            guard = self._guard
            state = guard.start(job.prompt[:1]) if guard else None
            (hidden,) = self._hidden([job.prompt])
            for first in range(0, len(job.prompt) - 1, _POSITIONS):
                stop = min(first + _POSITIONS, len(job.prompt) - 1)
                for place, vector in enumerate(self._log_probs(hidden[first:stop]), start=first + 1):
                    token = job.prompt[place]
                    told = guard.told(state, vector) if guard and state else vector
                    job.told.append(told_of(told, token, job.logprobs))
                    state = guard.advance(state, token) if guard and state else None
        if not job.max_tokens:
            job.end_now()

    def _answer(self) -> None:
        """One batch of next-token questions: the oldest, and those nearest to it in length."""
        with self._wake:
            if not self._readings:
                return
            size = len(self._readings[0].ids)
            order = np.argsort([abs(len(one.ids) - size) for one in self._readings], kind="stable").tolist()
            chosen: list[int] = []
            longest = vectors = 0
            for place in order:
                longest = max(longest, len(self._readings[place].ids))
                vectors += len(self._readings[place].asked)
                if chosen and (vectors > _PROMPTS or longest * (len(chosen) + 1) > self._batch_tokens):
                    break
                chosen.append(place)
            batch = [self._readings[place] for place in chosen]
            taken = set(chosen)
            self._readings = [one for place, one in enumerate(self._readings) if place not in taken]
        self._guarded([one.job for one in batch], lambda: self._tell(batch))

    def _tell(self, batch: list[Reading]) -> None:
        batch = [one for one in batch if not one.job.done.done()]
        if not batch:
            return
        hidden = self._hidden([one.ids for one in batch])
        places = [(row, length - 1) for row, one in enumerate(batch) for _, length in one.asked]
        vectors = iter(self._log_probs(torch.stack([hidden[place] for place in places])))
        for one in batch:
            state, read = None, 0
            for number, length in one.asked:
                vector = next(vectors)
                if self._guard is not None:
                    state = self._after(state, one.ids[read:length])
                    self.sealed += self._guard.withholds(state)
                    vector = self._guard.told(state, vector)
                    read = length
                self.vectors += 1
                one.job.take(number, vector)

    def _after(self, state: GuardState | None, ids: Sequence[int]) -> GuardState:
        """The guard's state after so many tokens more; None: from the beginning."""
        assert self._guard is not None
        return self._guard.start(ids) if state is None else reduce(self._guard.advance, ids, state)

    def _hidden(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(n, T, H); padded at the end and without a mask, since no position sees what follows it."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prompts], device=self._device)
        places = torch.arange(longest, device=self._device).expand_as(ids)
        states: Tensor = self._backbone(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        return states

    def _log_probs(self, hidden: Tensor) -> Vector:
        """(n, H) to (n, V)."""
        logits = self._head(hidden.to(self._head.weight.dtype)).float()
        vectors: Vector = logits.log_softmax(-1).cpu().numpy()
        return vectors

    def _guarded(self, jobs: Sequence[VectorJob | TextJob], work: Any) -> None:
        """Runs a piece of work; a failure is its jobs' and nobody else's."""
        try:
            work()
        except Exception as error:
            log.error("a batch failed: %s", type(error).__name__)
            if any(job in self._rows.jobs for job in jobs):
                jobs = [*jobs, *self._rows.drop()]
            for job in jobs:
                fail(job.done, error)
