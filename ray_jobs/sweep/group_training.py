"""One training with several workers, an epoch at a time: a TorchTrainer of its own in a thread (the only way that Ray 2.60 joins Tune and Train)."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
import torch

from ray_jobs.checkpoints import best_and_last
from ray_jobs.failures import training_error
from ray_jobs.progress import ProgressLog
from ray_jobs.run_inputs import FoldRows, LoadedRows
from ray_jobs.trainer import checkpoint_interval_s, make_trainer, room_text
from sentinode.config import TrainConfig
from sentinode.errors import TrainingError, UsageError
from sentinode.locations import Location
from sentinode.training import Interrupted, Progress

_POLL_S = 0.1
# For the step or the validation that goes on, and for writing a checkpoint.
_END_WAIT_S = 120.0


class GroupTraining:
    """As LoneTraining, with `config.workers` workers.

    They begin an epoch when it is asked for, so that a trial that is stopped has trained none in vain. They end in order, also where the trial is
    stopped: left to Ray, they would be found orphaned, and ended, some seconds after it.

    Parameters
    ----------
    run_id : str
        Of the request in `folder`.
    Others as LoneTraining.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Location,
        run_id: str,
        rows: LoadedRows | FoldRows,
        initial: Callable[[], dict[str, torch.Tensor]],
        *,
        use_gpu: bool,
        log: Any = None,
        told: int = 0,
    ) -> None:
        _, last = best_and_last(folder)
        self._config, self._folder, self._run_id = config, folder, run_id
        self._rows, self._initial, self._use_gpu = rows, None if last is not None else initial, use_gpu
        self._history: list[dict[str, Any]] = [] if last is None else last.progress.history
        self._progress = last.progress if last is not None else Progress()
        self._told = told = min(told, len(self._history))
        self._sweeps_log = log
        self._stops = log.stop_requested.remote() if log is not None else None
        self._log = ProgressLog.remote(told + 1)  # type: ignore[attr-defined]
        self._seen = 0
        self._ready: deque[dict[str, Any]] = deque(self._history[told:])
        self._outcome: dict[str, str] | None = None
        self._error: BaseException | None = None
        self._stopping = self._ended = False
        self._thread: threading.Thread | None = None

    def _start(self) -> threading.Thread:
        from ray_jobs.train_callback import TellDriver, TellOfWaiting

        config = self._config
        trainer = make_trainer(
            config,
            self._folder,
            self._run_id,
            self._rows,
            ray.put(self._initial()) if self._initial is not None else None,
            use_gpu=self._use_gpu,
            log=self._log,
            checkpoint_interval_s=checkpoint_interval_s(config),
            waits=True,
            callbacks=[TellDriver(self._log, config.max_failures), TellOfWaiting(self._log, room_text(config, use_gpu=self._use_gpu))],
        )
        self._thread = threading.Thread(target=self._fit, args=(trainer,), name="trainer", daemon=True)
        self._thread.start()
        return self._thread

    def _fit(self, trainer: Any) -> None:
        try:
            self._outcome = trainer.fit().return_value or {}
        except Exception as error:
            self._error = error

    def next_epoch(self) -> dict[str, Any] | None:
        """Wait for an epoch whose checkpoint is safe and return its record; None where none is left. Raises as LoneTraining, and UsageError."""
        while not self._ready:
            if self._ended or (self._thread is None and self._history and self._progress.is_over(self._config)):
                return None
            thread = self._thread or self._start()
            ray.get(self._log.allow.remote(self._told + 1))
            # In this order: what a thread that has ended told is there.
            ended = not thread.is_alive()
            self._collect()
            if self._ready:
                break
            if ended:
                self._thread, self._ended = None, True
                self._check()
                return None
            thread.join(_POLL_S)
            if self._stops is not None and not self._stopping and ray.wait([self._stops], timeout=0)[0]:
                self._stop()
        self._told += 1
        return self._ready.popleft()

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left to be told of."""
        if self._ready:
            return False
        progress = Progress()
        for record in self._history[: self._told]:
            progress.add(record, self._config.selection_metric)
        return bool(progress.history) and progress.is_over(self._config)

    def _collect(self) -> None:
        records = ray.get(self._log.since.remote(self._seen))
        self._seen += len(records)
        for record in records:
            if record["kind"] == "waiting" and self._sweeps_log is not None:
                self._sweeps_log.add.remote(record)
            if record["kind"] == "epoch" and record["epoch"] >= self._next_epoch_number():
                # Ray is told only of what has a value; the loop's own records have them all.
                whole = {"val_roc_auc": None, "train_loss": None} | {name: value for name, value in record.items() if name not in _ABOUT}
                self._history.append(whole)
                self._ready.append(whole)

    def _next_epoch_number(self) -> int:
        return self._history[-1]["epoch"] + 1 if self._history else -1

    def _check(self) -> None:
        if self._error is not None:
            error = self._error if isinstance(self._error, Exception) else RuntimeError(str(self._error))
            raise training_error(error, self._folder) from self._error
        for kind, message in (self._outcome or {}).items():
            if kind == "stopped":
                raise Interrupted(message)
            raise UsageError(message) if kind == "usage" else TrainingError(message)

    def _stop(self) -> None:
        self._stopping = True
        ray.get(self._log.request_stop.remote())

    def close(self) -> None:
        """End the workers, if any train, and wait until they have."""
        if self._thread is not None and self._thread.is_alive():
            self._stop()
            self._thread.join(_END_WAIT_S)
        ray.kill(self._log)


_ABOUT = ("kind", "number", "epochs_done", "improvement")
