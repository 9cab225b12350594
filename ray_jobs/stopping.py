"""Ctrl-C and SIGTERM while a run is trained: the wish travels to the workers, they checkpoint within the epoch, the command ends with code 3.

A second signal ends at once, and so does the first where no worker trains yet or none answers in time; the run then goes on from its last checkpoint.
The controller ends with it, on which `TorchTrainer.fit` raises RayActorError.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

import ray

from ray_jobs.verb import say
from sentinode.training import Wish

# For the step or the validation that goes on, and for writing a checkpoint. Ample: who cannot wait signals twice.
_CHECKPOINT_WAIT_S = 600.0
_ABORT_WAIT_S = 10.0
_ASK_EVERY_S = 0.25


class StopOnSignal:
    """The driver's side: what SIGINT does while `TorchTrainer.fit` runs in the main thread (SIGTERM takes the same road, `ray_jobs.verb`).

    Attributes
    ----------
    requested : bool
        Whether a signal has come.
    """

    def __init__(self, log: Any) -> None:
        self.requested = False
        self._log = log
        self._controller: Any = None
        self._ended = threading.Event()
        # Set when nothing is waited for any more: training has ended, or a second signal has come.
        self._waited_enough = threading.Event()

    def install(self, controller: Any) -> None:
        """Handle SIGINT from now on; takes the place of `TorchTrainer._register_sigint_handler`, whose handler loses what the epoch has done."""
        self._controller = controller
        signal.signal(signal.SIGINT, self._on_signal)

    def over(self) -> None:
        """Training has ended: nothing is left to be aborted."""
        self._ended.set()
        self._waited_enough.set()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # A handler runs in the middle of whatever the main thread does in Ray, where an exception would come out as another one: it raises none.
        if self.requested:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._waited_enough.set()
            return
        self.requested = True
        threading.Thread(target=self._stop, name="stopping", daemon=True).start()

    def _stop(self) -> None:
        try:
            trains = ray.get(self._log.request_stop.remote(), timeout=_ABORT_WAIT_S)
        except ray.exceptions.RayError:
            trains = False
        if trains:
            say("stopping: a checkpoint is made first; once more stops at once")
            self._waited_enough.wait(_CHECKPOINT_WAIT_S)
        if self._ended.is_set():
            return
        self._controller.abort.remote()
        if not self._ended.wait(_ABORT_WAIT_S):
            ray.kill(self._controller)


class Wishes:
    """A worker's side: what it wishes between two steps. Only rank 0 listens, since of all workers' wishes the largest holds.

    Parameters
    ----------
    log : ActorHandle or None
        A ProgressLog; without one nothing stops training.
    rank : int
    interval_s : float or None
        A checkpoint is wished when the last one is that long ago.
    """

    def __init__(self, log: Any, rank: int, interval_s: float | None) -> None:
        self._asks = log.stop_requested.remote() if rank == 0 and log is not None else None
        self._interval_s = interval_s if rank == 0 else None
        self._asked = self._saved = time.monotonic()
        self._stops = False

    def stop(self) -> None:
        """A stop was heard of elsewhere."""
        self._stops = True

    def saved(self) -> None:
        """A checkpoint has been made."""
        self._saved = time.monotonic()

    def __call__(self) -> Wish:
        """Return the wish; costs next to nothing."""
        now = time.monotonic()
        if self._stops:
            return Wish.STOP
        if self._asks is not None and now - self._asked >= _ASK_EVERY_S:
            self._asked = now
            if self._stop_requested():
                return Wish.STOP
        return Wish.CHECKPOINT if self._interval_s is not None and now - self._saved >= self._interval_s else Wish.GO_ON

    def _stop_requested(self) -> bool:
        answered, _ = ray.wait([self._asks], timeout=0)
        if not answered:
            return False
        try:
            return bool(ray.get(self._asks))
        except ray.exceptions.RayError:
            # The log is gone, and with it the driver; whoever ended that ends this process too.
            self._asks = None
            return False
