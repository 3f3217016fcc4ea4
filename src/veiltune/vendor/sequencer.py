"""Puts the calls of one job in order: each number is carried out once, a repeat is answered from memory.

================================  =======================================================
a call with                       gets
================================  =======================================================
the next number                   carried out; the number is used only if it succeeds
a used number, the same frame     the same answer again; nothing is done
a used number, another frame      ALREADY_EXISTS
a later number                    waits for its turn, then ABORTED: open the job again
a number too old to remember      ABORTED: open the job again
================================  =======================================================
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from veiltune.errors import ProtocolError

REMEMBERED = 128
TURN_TIMEOUT_SECONDS = 30.0

Reply = TypeVar("Reply")


class UsedSeqError(ProtocolError):
    """Another frame was sent under a number that is used."""


class SeqGapError(ProtocolError):
    """The numbers between the last call and this one never came."""


class Sequencer(Generic[Reply]):
    """The order of one job's calls; one a job, used from one event loop."""

    def __init__(self, next_seq: int, *, turn_timeout_seconds: float = TURN_TIMEOUT_SECONDS) -> None:
        self.next_seq = next_seq
        self.waiting = 0
        self._timeout = turn_timeout_seconds
        self._turn = asyncio.Condition()
        self._answers: OrderedDict[int, tuple[bytes, Reply]] = OrderedDict()

    async def run(self, seq: int, payload_hash: bytes, work: Callable[[], Awaitable[Reply]]) -> Reply:
        """Carries out `work` when it is this number's turn, or answers from memory.

        A caller that goes away stops nothing: its call is finished and remembered, so that a repeat finds the answer.
        """
        return await asyncio.shield(self._run(seq, payload_hash, work))

    def keep_last(self) -> None:
        """Forgets all answers but the last."""
        while len(self._answers) > 1:
            self._answers.popitem(last=False)

    async def _run(self, seq: int, payload_hash: bytes, work: Callable[[], Awaitable[Reply]]) -> Reply:
        self.waiting += 1
        try:
            async with self._turn:
                await self._wait_for(seq)
                if seq < self.next_seq:
                    return self._replay(seq, payload_hash)
                reply = await work()
                self._remember(seq, payload_hash, reply)
                self._turn.notify_all()
                return reply
        finally:
            self.waiting -= 1

    async def _wait_for(self, seq: int) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._turn.wait_for(lambda: self.next_seq >= seq)
        except TimeoutError:
            raise SeqGapError(f"expected seq {self.next_seq}, got {seq}; the calls between never came") from None

    def _replay(self, seq: int, payload_hash: bytes) -> Reply:
        if seq not in self._answers:
            raise SeqGapError(
                f"expected seq {self.next_seq}, got {seq}, which is too old to repeat; open the job again"
            )
        known_hash, reply = self._answers[seq]
        if known_hash != payload_hash:
            raise UsedSeqError(f"seq {seq} was used for another frame; expected seq {self.next_seq}")
        return reply

    def _remember(self, seq: int, payload_hash: bytes, reply: Reply) -> None:
        self._answers[seq] = (payload_hash, reply)
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
        self.next_seq = seq + 1
