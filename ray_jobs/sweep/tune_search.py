"""Ray Tune carries out the course of a sweep: processes, their resources, what is lost with a node."""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_jobs.cluster import signal_handlers_kept
from ray_jobs.sweep.course import Course
from ray_jobs.sweep.trial import Shared, Trial
from ray_jobs.verb import say
from ray_jobs.waiting import wait_told
from sentinode.errors import one_line, root_of

# A driver of workers only waits; Ray refuses 0 for it.
DRIVER_CPUS = 0.1
SAFE_NODE_RESOURCE = "sentinode_driver"
"""Where nodes offer it, drivers of workers run on these and nowhere else: on nodes that are not taken away (cluster.yaml)."""


class _StateElsewhere:
    """Tune stores what it is given, as pickles that it would read again. Nothing of ours is to be had from there: our state is the journal."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Points(_StateElsewhere, Searcher):  # type: ignore[misc]
    """Asks the course for the next trial."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        try:
            job = self._course.next_job()
        except StopIteration:
            return str(Searcher.FINISHED)
        return None if job is None else job.to_config()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: _Ends tells the course."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Decisions(_StateElsewhere, FIFOScheduler):  # type: ignore[misc]
    """Hands each epoch to the course, which tells whether the trial goes on."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self._course.hear(trial.config["number"], result)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


class _Ends(_StateElsewhere, Callback):  # type: ignore[misc]
    """Tells the course how trials end, and notes that one has begun."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self.any_began = threading.Event()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.any_began.set()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._course.ended(trial.config["number"], trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Errors of the training are told as results: this one took the process.
        error = trial.get_pickled_error() or trial.get_error() or RuntimeError("its process was lost")
        self._course.ended(trial.config["number"], {}, f"its process was lost: {one_line(root_of(error))}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._course.began_again(trial.config["number"])


def tune_search(course: Course, shared: Shared, *, gpus: float, max_failures: int, verbose: bool = False) -> bool:
    """Carry out a course; False where a signal stopped it.

    Parameters
    ----------
    gpus : float
        Of each worker, 0 on CPUs.
    max_failures : int
        Processes of one trial that are replaced when they are lost.
    verbose : bool
        Whether Tune may log.
    """
    # Tune's own loggers and its box of settings: trials.csv, the report and the terminal say the same to people.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    from ray import tune

    # What it logs of lost processes the course tells in a line.
    logging.getLogger("ray.tune").setLevel(logging.DEBUG if verbose else logging.CRITICAL)
    workers, cpus = shared.sweep.workers_per_trial, float(shared.base.cpus_per_worker)
    # Several workers get their own resources from Ray Train.
    own = _driver_resources() if workers > 1 else {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    trainable = tune.with_resources(tune.with_parameters(Trial, shared=shared), tune.PlacementGroupFactory([own]))
    # A process that drives workers is ended with its trial, and they with it; kept for another one it would keep them for as long as none comes.
    reuse = workers == 1
    ends = _Ends(course)
    # What Tune writes down is not read again, so it need not be where every node sees it.
    with tempfile.TemporaryDirectory(prefix="sentinode-tune-") as scratch, signal_handlers_kept():
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(num_samples=-1, search_alg=_Points(course), scheduler=_Decisions(course), reuse_actors=reuse),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                callbacks=[ends],
                failure_config=tune.FailureConfig(max_failures=max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                verbose=0,
            ),
        )
        waits = wait_told(own.get("CPU", 0.0), own.get("GPU", 0.0), "begin a trial", ends.any_began.is_set)
        with _stopping_on_signal(course, shared.log) as stopped, waits:
            tuner.fit()
    return not stopped()


def _driver_resources() -> dict[str, float]:
    return {SAFE_NODE_RESOURCE: 1.0} if ray.cluster_resources().get(SAFE_NODE_RESOURCE) else {"CPU": DRIVER_CPUS}


@contextmanager
def _stopping_on_signal(course: Course, log: Any) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C (and SIGTERM, `ray_jobs.verb`) stop the sweep in order: trials make a checkpoint within their epoch. A second one ends at once."""
    came = threading.Event()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()
        course.stopping = True
        # Not in the handler: it may have interrupted Ray.
        threading.Thread(target=ask, name="stopping", daemon=True).start()

    def ask() -> None:
        say("stopping: running trials make a checkpoint first; once more stops at once")
        ray.get(log.request_stop.remote())

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, on_signal)
    yield came.is_set
