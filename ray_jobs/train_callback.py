"""Tells the driver what Ray Train's controller sees: epochs whose checkpoint is safe, failures that are repaired, and waiting for room."""

import time
from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

from ray_jobs.failures import worker_root
from sentinode.errors import one_line

# A group that starts anew finds its room within seconds; only what takes longer is told.
_SILENT_WAIT_S = 10.0
# The controller of an elastic run asks again without a pause while there is no room, and would take a whole CPU for it.
_PAUSE_S = 0.5
_TRAINING = ("RUNNING", "PREEMPTING")
_LOOKING_FOR_ROOM = ("INITIALIZING", "RESTARTING", "RESCHEDULING")


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


class TellOfWaiting(ControllerCallback):  # type: ignore[misc]
    """Tells of workers that cannot be started for lack of room, and lets a ProgressLog know when none are left to hear a wish.

    Parameters
    ----------
    log : ActorHandle
        A ProgressLog.
    need : str
        What is waited for, for people: "2 workers with 1 CPU and 1 GPU each".
    """

    def __init__(self, log: Any, need: str) -> None:
        self._log, self._need = log, need
        self._idle_since = time.monotonic()
        self._told = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Follow the controller from state to state; where there is no room the next one is the same again."""
        before, now = previous_state._state_type.name, current_state._state_type.name
        if now in _TRAINING:
            self._told = False
            return
        if before in _TRAINING:
            self._idle_since = time.monotonic()
            self._log.workers_ended.remote()
        if now in _LOOKING_FOR_ROOM and not self._told and time.monotonic() - self._idle_since >= _SILENT_WAIT_S:
            self._told = True
            self._log.add.remote({"kind": "waiting", "text": f"waiting for room: {self._need}"})
        if current_state is previous_state:
            time.sleep(_PAUSE_S)
