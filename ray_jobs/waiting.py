"""Waiting for CPUs and GPUs that others hold, and saying so: to its caller, work that cannot be scheduled yet looks like work that runs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from ray_jobs.autoscaling import places_on
from ray_jobs.cluster import resources_text
from ray_jobs.verb import say

_SILENT_WAIT_S = 30.0
"""How long work may wait for its resources before the terminal says so."""
_ANSWER_TIMEOUT_S = 5
"""The end of a verb waits no longer for an answer that nobody needs any more."""


@contextmanager
def reserved(cpus: float, gpus: float, purpose: str) -> Iterator[Any]:
    """Yield a scheduling strategy for one task with these resources, which are its own inside the block.

    Waits for them, and says so where that takes long: a task that cannot be scheduled yet looks to its caller like one that runs.

    Parameters
    ----------
    cpus, gpus : float
    purpose : str
        What for, after "waiting for 1 CPU to", e.g. "read the data set".
    """
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": cpus} | ({"GPU": gpus} if gpus else {})])
    try:
        tells_at: float | None = time.monotonic() + _SILENT_WAIT_S
        # In short waits, between which Ctrl-C is heard.
        while not group.wait(1):
            if tells_at is not None and time.monotonic() >= tells_at:
                _tell(cpus, gpus, purpose)
                tells_at = None
        yield PlacementGroupSchedulingStrategy(group)
    finally:
        remove_placement_group(group)


@contextmanager
def wait_told(cpus: float, gpus: float, purpose: str, works: Callable[[], bool]) -> Iterator[None]:
    """Say so where nothing of what the block does has begun after a while, and no node has room for it. The work itself is none of its concern.

    Parameters
    ----------
    cpus, gpus : float
        Of the first task or worker.
    purpose : str
        As for `reserved`.
    works : callable
        Tells whether any of it runs; asked now and then by another thread, until it does.
    """
    ended = threading.Event()

    def watch() -> None:
        try:
            while not ended.wait(_SILENT_WAIT_S) and not works():
                if not _has_room(cpus, gpus):
                    _tell(cpus, gpus, purpose)
                    return
        except Exception:
            # A line for people: whatever keeps it from being told, an API that is off above all, must not keep the work from being done.
            return

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def data_tasks_run() -> bool:
    """Tell whether any `map_batches` of this process works, by Ray's state API, which needs the dashboard."""
    from ray.util.state import list_tasks

    job = ray.get_runtime_context().get_job_id()
    filters = [("job_id", "=", job), ("state", "=", "RUNNING")]
    running = list_tasks(filters=filters, limit=1000, timeout=_ANSWER_TIMEOUT_S, raise_on_missing_output=False)
    # "MapBatches(…)", and of actors "MapWorker(MapBatches(…)).…".
    return any("MapBatches(" in task.name for task in running)


def _has_room(cpus: float, gpus: float) -> bool:
    from ray._private.state import available_resources_per_node

    return any(places_on(node, cpus, gpus) for node in available_resources_per_node().values())


def _tell(cpus: float, gpus: float, purpose: str) -> None:
    say(f"waiting for {resources_text(cpus, gpus)} to {purpose}; the cluster's are taken")
