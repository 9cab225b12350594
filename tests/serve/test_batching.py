"""How single requests share forward passes."""

import asyncio
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from sentinode.errors import SentinodeError
from sentinode.images import UInt8Array
from sentinode.probability import Decision
from serve.batching import Batcher


def patch(number: int) -> UInt8Array:
    return np.full((1, 1, 3), number, np.uint8)


def decision(number: float) -> Decision:
    return Decision(logit=number, probability=0.5, prediction="Normal", confidence=0.5, review_reasons=())


class Engine:
    """Answers with the patch's number, one batch at a time; batches are let through by `go`."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Semaphore(0 if held else 1_000_000)
        self.handed_over = 0
        self._turn = asyncio.Lock()

    async def __call__(self, patches: list[UInt8Array]) -> list[Decision]:
        self.handed_over += 1
        assert self.handed_over <= 2
        async with self._turn:
            batch = [int(one[0, 0, 0]) for one in patches]
            self.batches.append(batch)
            await self.go.acquire()
            self.handed_over -= 1
        if 99 in batch:
            raise ValueError("broken")
        return [decision(number) for number in batch]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_a_lone_request_waits_for_nobody_and_those_that_come_meanwhile_share_the_next_pass() -> None:
    async def test() -> None:
        engine = Engine(held=True)
        batcher = Batcher(engine, max_batch_size=4)
        tasks = [asyncio.create_task(batcher.classify(patch(0)))]
        await settle()
        assert engine.batches == [[0]]
        tasks += [asyncio.create_task(batcher.classify(patch(number))) for number in range(1, 8)]
        await settle()
        for _ in range(3):
            engine.go.release()
            await settle()
        assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
        assert [(await task).logit for task in tasks] == list(range(8))
        # And again, after it was idle.
        engine.go.release()
        assert (await batcher.classify(patch(9))).logit == 9

    run(test)


def test_a_full_batch_is_handed_over_before_its_turn_and_one_that_may_still_grow_is_not() -> None:
    async def test() -> None:
        engine = Engine(held=True)
        batcher = Batcher(engine, max_batch_size=4)
        tasks = [asyncio.create_task(batcher.classify(patch(0)))]
        await settle()
        tasks += [asyncio.create_task(batcher.classify(patch(number))) for number in range(1, 4)]
        await settle()
        assert engine.handed_over == 1
        tasks += [asyncio.create_task(batcher.classify(patch(number))) for number in range(4, 20)]
        await settle()
        assert engine.handed_over == 2
        for _ in range(6):
            engine.go.release()
            await settle()
        assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19]]
        assert [(await task).logit for task in tasks] == list(range(20))

    run(test)


def test_ten_thousand_answers_never_mix() -> None:
    async def test() -> None:
        engine = Engine()
        batcher = Batcher(engine, max_batch_size=16)

        async def ask(number: int) -> bool:
            await asyncio.sleep(0.0001 * (number * 7919 % 13))
            return (await batcher.classify(patch(number % 90))).logit == number % 90

        assert all(await asyncio.gather(*(ask(number) for number in range(10_000))))
        assert sum(map(len, engine.batches)) == 10_000
        assert max(map(len, engine.batches)) == 16

    run(test)


def test_an_error_is_that_of_its_batch_alone() -> None:
    async def test() -> None:
        engine = Engine(held=True)
        batcher = Batcher(engine, max_batch_size=2)
        tasks = [asyncio.create_task(batcher.classify(patch(number))) for number in (1, 99, 3, 4, 5)]
        for _ in range(4):
            engine.go.release()
            await settle()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError, Decision, Decision, Decision]

    run(test)


def test_answers_that_are_not_one_for_each_patch_are_given_to_nobody() -> None:
    async def test() -> None:
        async def too_few(patches: list[UInt8Array]) -> list[Decision]:
            return [decision(0)] * (len(patches) - 1)

        with pytest.raises(SentinodeError, match="0 decisions about 1 patches"):
            await Batcher(too_few, max_batch_size=2).classify(patch(0))

    run(test)


def test_who_has_gone_away_takes_no_place() -> None:
    async def test() -> None:
        engine = Engine(held=True)
        batcher = Batcher(engine, max_batch_size=2)
        tasks = [asyncio.create_task(batcher.classify(patch(number))) for number in range(7)]
        await settle()
        # Of those who wait; the first two batches are handed over.
        for gone in (0, 4, 5):
            tasks[gone].cancel()
        await settle()
        for _ in range(3):
            engine.go.release()
            await settle()
        assert engine.batches == [[0, 1], [2, 3], [6]]
        assert [(await tasks[number]).logit for number in (1, 2, 3, 6)] == [1, 2, 3, 6]

    run(test)


def test_nothing_is_left_behind_by_callers_who_come_and_go() -> None:
    async def test() -> None:
        generator = np.random.default_rng(0)
        engine = Engine()
        batcher = Batcher(engine, max_batch_size=4)

        async def ask(number: int, patience: int) -> None:
            task = asyncio.create_task(batcher.classify(patch(number)))
            for _ in range(patience):
                await asyncio.sleep(0)
            if patience < 8:
                task.cancel()
            with suppress(asyncio.CancelledError):
                assert (await task).logit == number

        for _ in range(300):
            await asyncio.gather(*(ask(int(number), int(number) % 10) for number in generator.integers(0, 90, int(generator.integers(1, 12)))))
        await settle()
        # A pass that was still counted would keep a lone request waiting for company.
        assert (await asyncio.wait_for(batcher.classify(patch(7)), 5)).logit == 7
        assert not batcher._passes

    run(test)


def test_a_pass_may_wait_for_company_until_it_is_full() -> None:
    async def test() -> None:
        engine = Engine()
        batcher = Batcher(engine, max_batch_size=3, wait_s=60)
        tasks = [asyncio.create_task(batcher.classify(patch(number))) for number in range(2)]
        await settle()
        assert engine.batches == []
        tasks.append(asyncio.create_task(batcher.classify(patch(2))))
        await asyncio.gather(*tasks)
        assert engine.batches == [[0, 1, 2]]
        soon = Batcher(engine, max_batch_size=3, wait_s=0.01)
        assert (await soon.classify(patch(7))).logit == 7

    run(test)
