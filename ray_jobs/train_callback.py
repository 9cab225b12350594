"""Tells the driver what Ray Train's controller sees: epochs whose checkpoint is safe, and failures that are repaired."""

from typing import Any

from ray.train import UserCallback

from ray_jobs.failures import worker_root
from sentinode.errors import one_line


class TellDriver(UserCallback):  # type: ignore[misc]
    """Adds records to a ProgressLog.

    An epoch is told when its checkpoint is registered, so that nothing is told, or recorded by a tracker, that a failure could undo.
    """

    def __init__(self, log: Any, max_failures: int) -> None:
        self._log, self._max_failures = log, max_failures
        self._failures = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Tell of an epoch; what has no epoch of its own is a checkpoint within one."""
        if "epoch" in metrics[0]:
            self._log.add.remote({"kind": "epoch", **metrics[0]})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Tell of a failure that is repaired."""
        self._failures += 1
        if self._failures <= self._max_failures:
            reason = one_line(worker_root(worker_exceptions))
            self._log.add.remote({"kind": "note", "text": f"a worker failed, {self._failures} of {self._max_failures} that are repaired: {reason}"})
