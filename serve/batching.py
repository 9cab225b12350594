"""Single patches that come at the same time share a forward pass.

A pass begins as soon as the engine is free and takes all that wait by then, so a lone request waits for nobody and a busy engine gets full batches
without a timer. A batch that is full is handed over while the engine still works on the one before, and follows it without a pause. `wait_s` above 0
lets a pass wait for company even where the engine is free.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from sentinode.errors import SentinodeError
from sentinode.images import UInt8Array
from sentinode.probability import Decision

_Waiting = tuple[UInt8Array, asyncio.Future[Decision]]


class Batcher:
    """Gathers patches into batches; of one event loop.

    Parameters
    ----------
    decide : callable
        Coroutine function: list of patches -> list of Decision, in order. Two batches are handed over at a time at most,
        to be worked on one after the other.
    max_batch_size : int
    wait_s : float
        How long a batch that is not full waits for more.
    """

    def __init__(self, decide: Callable[[list[UInt8Array]], Awaitable[list[Decision]]], *, max_batch_size: int, wait_s: float = 0.0) -> None:
        self._decide, self._max_batch_size, self._wait_s = decide, max_batch_size, wait_s
        self._waiting: deque[_Waiting] = deque()
        self._passes: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def classify(self, patch: UInt8Array) -> Decision:
        """Return the decision about one patch; raises what `decide` raised for its batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Decision] = loop.create_future()
        self._waiting.append((patch, future))
        # Not at once: what else has come by now shall share the pass.
        loop.call_soon(self._begin)
        return await future

    def _begin(self, company_is_late: bool = False) -> None:
        """Begin the passes that may begin now."""
        while self._waiting:
            is_full = len(self._waiting) >= self._max_batch_size
            if len(self._passes) >= (2 if is_full else 1):
                return
            if self._wait_s > 0 and not is_full and not company_is_late:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._begin, True)
                return
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            batch = self._next_batch()
            if batch:
                one_pass = asyncio.create_task(self._run(batch))
                self._passes.add(one_pass)
                one_pass.add_done_callback(self._ended)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self._max_batch_size:
            patch, future = self._waiting.popleft()
            # Of a caller that has gone away, or was timed out, nobody needs the answer.
            if not future.done():
                batch.append((patch, future))
        return batch

    def _ended(self, one_pass: asyncio.Task[None]) -> None:
        self._passes.discard(one_pass)
        self._begin()

    async def _run(self, batch: list[_Waiting]) -> None:
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
