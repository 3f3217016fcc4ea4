"""The order of a job's calls: each number once, repeats answered from memory, gaps refused."""

from __future__ import annotations

import asyncio

import pytest

from veiltune.vendor.sequencer import REMEMBERED, SeqGapError, Sequencer, UsedSeqError


class Counter:
    """Work that can be counted."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def work(self, seq: int):
        async def run() -> int:
            self.done.append(seq)
            return seq * 10

        return run


def test_calls_that_arrive_in_any_order_are_carried_out_in_theirs() -> None:
    async def scenario() -> None:
        counter, sequencer = Counter(), Sequencer[int](0)
        answers = await asyncio.gather(*(sequencer.run(s, b"h", counter.work(s)) for s in (2, 0, 1)))
        assert answers == [20, 0, 10]
        assert counter.done == [0, 1, 2]

    asyncio.run(scenario())


def test_a_repeat_is_answered_and_not_carried_out_again() -> None:
    async def scenario() -> None:
        counter, sequencer = Counter(), Sequencer[int](0)
        first = await sequencer.run(0, b"same", counter.work(0))
        again = await sequencer.run(0, b"same", counter.work(0))
        assert (first, again, counter.done) == (0, 0, [0])

    asyncio.run(scenario())


def test_two_copies_that_race_are_carried_out_once() -> None:
    async def scenario() -> None:
        counter, sequencer = Counter(), Sequencer[int](0)
        await asyncio.gather(*(sequencer.run(0, b"same", counter.work(0)) for _ in range(5)))
        assert counter.done == [0]

    asyncio.run(scenario())


def test_another_frame_under_a_used_number_is_refused() -> None:
    async def scenario() -> None:
        counter, sequencer = Counter(), Sequencer[int](0)
        await sequencer.run(0, b"one", counter.work(0))
        with pytest.raises(UsedSeqError, match="seq 0 was used for another frame; expected seq 1"):
            await sequencer.run(0, b"two", counter.work(0))
        assert counter.done == [0]

    asyncio.run(scenario())


def test_a_gap_waits_and_is_then_refused_with_the_expected_number() -> None:
    async def scenario() -> None:
        sequencer = Sequencer[int](4, turn_timeout_seconds=0.05)
        with pytest.raises(SeqGapError, match="expected seq 4, got 6"):
            await sequencer.run(6, b"h", Counter().work(6))
        assert sequencer.next_seq == 4

    asyncio.run(scenario())


def test_work_that_fails_leaves_its_number_unused() -> None:
    async def scenario() -> None:
        counter, sequencer = Counter(), Sequencer[int](0)

        async def broken() -> int:
            raise ValueError

        with pytest.raises(ValueError):
            await sequencer.run(0, b"h", broken)
        assert await sequencer.run(0, b"h", counter.work(0)) == 0

    asyncio.run(scenario())


def test_a_number_too_old_to_remember_is_refused() -> None:
    async def scenario() -> None:
        counter, sequencer = Counter(), Sequencer[int](0)
        for seq in range(REMEMBERED + 1):
            await sequencer.run(seq, b"h", counter.work(seq))
        with pytest.raises(SeqGapError, match="too old to repeat"):
            await sequencer.run(0, b"h", counter.work(0))

    asyncio.run(scenario())
