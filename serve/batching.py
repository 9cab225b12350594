"""Single patches that come at the same time share a forward pass.

A pass begins as soon as the engine is free and takes all that wait by then, so a lone request waits for nobody and a busy engine gets full batches
without a timer. `wait_s` above 0 lets a pass wait for company even where the engine is free.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from sentinode.errors import SentinodeError
from sentinode.images import UInt8Array
from sentinode.probability import Decision


class Batcher:
    """Gathers patches into batches; of one event loop.

    Parameters
    ----------
    decide : callable
        Coroutine function: list of patches -> list of Decision, in order. Called for one batch at a time.
    max_batch_size : int
    wait_s : float
        How long a batch that is not full waits for more.
    """

    def __init__(self, decide: Callable[[list[UInt8Array]], Awaitable[list[Decision]]], *, max_batch_size: int, wait_s: float = 0.0) -> None:
        self._decide, self._max_batch_size, self._wait_s = decide, max_batch_size, wait_s
        self._waiting: deque[tuple[UInt8Array, asyncio.Future[Decision]]] = deque()
        self._full = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def classify(self, patch: UInt8Array) -> Decision:
        """Return the decision about one patch; raises what `decide` raised for its batch."""
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waiting.append((patch, future))
        if len(self._waiting) >= self._max_batch_size:
            self._full.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        try:
            while self._waiting:
                if self._wait_s > 0 and len(self._waiting) < self._max_batch_size:
                    self._full.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._full.wait(), self._wait_s)
                await self._run_one()
        finally:
            # Nothing is awaited between the look at `_waiting` and this, so none is left behind.
            self._worker = None

    async def _run_one(self) -> None:
        batch: list[tuple[UInt8Array, asyncio.Future[Decision]]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            patch, future = self._waiting.popleft()
            # Of a caller that has gone away, or was timed out, nobody needs the answer.
            if not future.done():
                batch.append((patch, future))
        if not batch:
            return
        try:
            decisions = await self._decide([patch for patch, _ in batch])
            if len(decisions) != len(batch):
                raise SentinodeError(f"{len(decisions)} decisions about {len(batch)} patches")
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), decision in zip(batch, decisions, strict=True):
            if not future.done():
                future.set_result(decision)
