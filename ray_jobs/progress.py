"""Progress from workers to the terminal of the driver."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

_POLL_S = 0.5


@ray.remote(num_cpus=0)
class ProgressLog:
    """Keeps the records that workers add, in order."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._records.append(record)

    def since(self, start: int) -> list[dict[str, Any]]:
        """Return the records from index `start` on."""
        return self._records[start:]


@contextmanager
def following(show: Callable[[dict[str, Any]], None]) -> Iterator[Any]:
    """Yield a ProgressLog actor for workers; `show` is called once for each record, in the driver, while the block runs."""
    log = ProgressLog.remote()  # type: ignore[attr-defined]
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
