"""What the processes of a run tell each other: workers tell the terminal how far they are, the terminal tells workers to stop."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

_POLL_S = 0.5


@ray.remote(num_cpus=0)
class ProgressLog:
    """Keeps the records that are added, in order, one wish: to stop, and how many epochs may be trained for now.

    Parameters
    ----------
    allowed : int or None
        See `allow`; None for as many as are due.
    """

    def __init__(self, allowed: int | None = None) -> None:
        self._records: list[dict[str, Any]] = []
        self._allowed = allowed
        self._asked = asyncio.Condition()
        self._stop = asyncio.Event()
        self._heard = False

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._records.append(record)

    def since(self, start: int) -> list[dict[str, Any]]:
        """Return the records from index `start` on."""
        return self._records[start:]

    async def request_stop(self) -> bool:
        """Let `stop_requested` and `allowed` return; tell whether any worker that still trains has called the former."""
        self._stop.set()
        async with self._asked:
            self._asked.notify_all()
        return self._heard

    async def allow(self, epochs: int) -> None:
        """Let so many epochs of the run be trained."""
        async with self._asked:
            self._allowed = epochs
            self._asked.notify_all()

    async def allowed(self, epochs_done: int) -> bool:
        """Return True once another epoch may be trained after so many, False once a stop is requested."""
        async with self._asked:
            await self._asked.wait_for(lambda: self._allowed is None or self._allowed > epochs_done or self._stop.is_set())
            return not self._stop.is_set()

    def workers_ended(self) -> None:
        """Note that nobody listens any more, until workers that start anew do."""
        self._heard = False

    async def stop_requested(self) -> bool:
        """Return, True, once a stop is requested."""
        self._heard = True
        return await self._stop.wait()


@contextmanager
def following(show: Callable[[dict[str, Any]], None]) -> Iterator[Any]:
    """Yield a ProgressLog actor; `show` is called once for each record, in the driver, while the block runs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver: on any other node it would be lost with that node, though the run is not.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    log = ProgressLog.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    stop = threading.Event()
    seen = 0

    def poll() -> None:
        nonlocal seen
        try:
            for record in ray.get(log.since.remote(seen), timeout=30):
                seen += 1
                show(record)
        except ray.exceptions.RayError:
            # Progress is only for people: a run must not fail because its display did.
            return

    def follow() -> None:
        while not stop.wait(_POLL_S):
            poll()

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield log
    finally:
        stop.set()
        thread.join()
        poll()
        ray.kill(log)
