"""Who may come in: keys, rates, sizes, time, how many at once, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request

from veiltune.errors import StorageError
from veiltune.guard.engine import Engine
from veiltune.guard.keys import Keys
from veiltune.guard.limits import Budget, RateLimit
from veiltune.guard.questions import Refusal

_DRAINED = 8  # times the largest body are read of one that is too large
_NOBODY = "anyone"  # whose budget it is where no keys are asked for


class Door:
    """Checks a request before the model sees it. No name, key, prompt or token is ever logged.

    Args:
        keys: None: anyone may ask, and all share one rate and one budget.
        rate: None: as often as they like.
        budget: None: as much as they like.
        max_body_bytes: Of one request.
        concurrent: Requests that are answered or wait for an answer.
        read_seconds: In which a body must have come in.
    """

    def __init__(
        self,
        *,
        keys: Keys | None = None,
        rate: RateLimit | None = None,
        budget: Budget | None = None,
        max_body_bytes: int = 2**20,
        concurrent: int = 64,
        read_seconds: float = 10.0,
    ) -> None:
        self._keys, self._rate, self._budget = keys, rate, budget
        self.max_body_bytes, self._concurrent, self.read_seconds = max_body_bytes, concurrent, read_seconds
        self._inside = 0

    def enter(self, request: Request) -> str:
        """Whose request it is.

        Raises:
            Refusal: 401 without a good key, 429 if it comes too soon.
        """
        who: str | None = _NOBODY
        if self._keys is not None:
            who = self._keys.owner(request.headers.get("authorization", ""))
        if who is None:
            raise Refusal(401, "unauthorized", "send a valid key as Authorization: Bearer KEY")
        if self._rate is not None and (wait := self._rate.wait(who)):
            raise Refusal(429, "rate_limited", "too many requests; wait as Retry-After says", retry_after=wait)
        return who

    async def body(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            Refusal: 415 if it is not said to be JSON, 413 if it is too large, 408 if it comes too slowly.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another site cannot send without asking first
            raise Refusal(415, "not_json", "Content-Type must be application/json")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > _DRAINED * self.max_body_bytes:
                        break
                    if size <= self.max_body_bytes:
                        parts.append(part)
                    else:  # read on and forget, since who is still sending does not read the refusal
                        parts.clear()
        except TimeoutError:
            raise Refusal(408, "too_slow", f"the request must come in within {self.read_seconds:g} seconds") from None
        if size > self.max_body_bytes:
            raise Refusal(413, "too_large", f"a request may have {self.max_body_bytes} bytes")
        return b"".join(parts)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of the places for requests that are answered.

        Raises:
            Refusal: 503 if all are taken.
        """
        if self._inside >= self._concurrent:
            raise Refusal(503, "busy", "too many requests at once; come back soon", retry_after=1.0)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def charge(self, who: str, cost: int) -> None:
        """Takes queries off a budget, on disk, before anything is answered.

        Raises:
            Refusal: 429 if too few are left, 503 if the disk is full.
        """
        if self._budget is None or not cost:
            return
        try:
            enough = await asyncio.to_thread(self._budget.charge, who, cost)
        except StorageError:
            raise Refusal(503, "storage", "the server cannot count queries now", retry_after=30.0) from None
        if not enough:
            raise Refusal(
                429, "budget_exhausted", f"the budget of this key has not the {cost} queries left that this takes"
            )


class Metrics:
    """What Prometheus may read: counts and times, without names, prompts or tokens."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter(
            "veiltune_requests", "Requests by endpoint and status.", ["endpoint", "status"], **made
        )
        self._seconds = Histogram("veiltune_request_seconds", "Time to the end of the answer.", ["endpoint"], **made)
        gauges = {
            "waiting": ("veiltune_jobs_waiting", "Jobs that have not begun."),
            "writing": ("veiltune_texts_writing", "Texts that are being written."),
            "tokens": ("veiltune_tokens_written", "Tokens written since the start."),
            "vectors": ("veiltune_vectors_told", "Next-token vectors told since the start."),
            "sealed": ("veiltune_positions_sealed", "Positions after a head of a protected string."),
        }
        for attribute, (name, text) in gauges.items():
            Gauge(name, text, **made).set_function(partial(_reading, engine, attribute))

    def count(self, endpoint: str, status: int, began: float) -> None:
        """One answered request; `began` is of time.perf_counter."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(time.perf_counter() - began)


def _reading(engine: Engine, attribute: str) -> float:
    return float(getattr(engine, attribute))


def retry_header(seconds: float | None) -> dict[str, str]:
    """Retry-After in whole seconds, rounded up."""
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}
