"""Tune's trainable: one trial, which trains one epoch at each step; Tune hears of an epoch and decides whether there is a next one.

A trial with one worker trains in the actor that Tune made for it, and the next trial in the same process: what the start of a process costs (Python,
torch, on a GPU its context) is paid once for each trial that runs at a time, not for each trial. With several workers it drives a TorchTrainer.

What a step returns
    record    JSON of an epoch's record; `fold`, the fold it was of; `fold_over`, `last`: none of it, of the trial, follows; `gflops`, if asked for
    done      True alone, or with one of: `interrupted`, to be continued; `failed`, one line; `broken`, one line: no trial could go on
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.tune import Trainable

from ray_jobs.checkpoints import CheckpointError
from ray_jobs.run_folder import REQUEST_FILE, features_folder, problem_with
from ray_jobs.run_inputs import FoldRows, LoadedRows, load_rows
from ray_jobs.sweep.group_training import GroupTraining
from ray_jobs.sweep.lone_training import LoneTraining
from ray_jobs.train import check_device, initial_weights
from sentinode.config import SweepConfig, TrainConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import SentinodeError, StorageError, UsageError, one_line, root_of
from sentinode.flops import gflops_per_patch
from sentinode.locations import Location
from sentinode.search.journal import TrialRecord
from sentinode.storage import json_bytes
from sentinode.training import Interrupted

_WEIGHT_FIELDS = ("arch", "weights", "input_size_px", "seed")


@dataclass(frozen=True)
class Shared:
    """What the trials of a sweep have in common, put into Ray's shared memory once.

    Attributes
    ----------
    sweep : SweepConfig
    base : TrainConfig
        What `rows` and `initial` were made for; a trial that differs in that makes its own.
    dataset : PreparedDataset
    folder : Location
        The sweep's; trials lie in its folder `trials`.
    run_id : str
        Of its request.
    rows : dict of (int or None) to (LoadedRows or FoldRows)
        By fold; {None: …} without folds.
    initial : ObjectRef of dict of str to tensor, or None
        Weights to start from; None where the space decides on them.
    log : ActorHandle
        A ProgressLog, whose wish to stop holds for all trials.
    use_gpu : bool
    current_folder : str
        The command's: what relative paths in the configuration begin from.
    """

    sweep: SweepConfig
    base: TrainConfig
    dataset: PreparedDataset
    folder: Location
    run_id: str
    rows: dict[int | None, LoadedRows | FoldRows]
    initial: Any
    log: Any
    use_gpu: bool
    current_folder: str


@dataclass(frozen=True)
class Job:
    """Which trial: what Tune calls its configuration, made from a TrialRecord.

    Attributes
    ----------
    number : int
    point : dict
    seed : int
    told : dict of (int or None) to int
        Epochs that the journal holds, by fold.
    """

    number: int
    point: dict[str, Any]
    seed: int
    told: dict[int | None, int]

    @classmethod
    def of(cls, trial: TrialRecord) -> "Job":
        """Make it of what the journal knows."""
        return cls(trial.number, trial.point, trial.seed, trial.told)

    def to_config(self) -> dict[str, Any]:
        """Return it for Tune, which looks into mappings for things of its own: as text."""
        return {"number": self.number, "job": json.dumps({"point": self.point, "seed": self.seed, "told": list(self.told.items())})}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Job":
        """Undo `to_config`."""
        job = json.loads(config["job"])
        return cls(config["number"], job["point"], job["seed"], dict(map(tuple, job["told"])))


class Trial(Trainable):  # type: ignore[misc]
    """See the module."""

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        """Take what all trials share, and the first trial of this process."""
        self._shared = shared
        self._training: LoneTraining | GroupTraining | None = None
        # Rows that a point of the space asks for, which are not those of the base.
        self._other_rows: tuple[tuple[Any, ...], LoadedRows] | None = None
        self._left_over: Exception | None = None
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial into this process; what goes wrong with the end of the one before, its first step tells: Tune would fail this one."""
        try:
            self.cleanup()
        except Exception as error:
            self._left_over = error
        self._take(new_config)
        return True

    def cleanup(self) -> None:
        """End what trains; what it has to write is on the disk then."""
        training, self._training = self._training, None
        if training is not None:
            training.close()

    def _take(self, config: dict[str, Any]) -> None:
        self._job = Job.from_config(config)
        self._folds = list(self._shared.rows)
        self._told = dict(self._job.told)
        self._gflops: float | None = None

    def step(self) -> dict[str, Any]:
        """Train an epoch. An error is told, not raised: what Tune hears of by an exception it tries again, in another process."""
        try:
            if self._left_over is not None:
                raise self._left_over
            return self._epoch()
        except Interrupted:
            return {"done": True, "interrupted": True}
        except (CheckpointError, StorageError) as error:
            return {"done": True, "broken": one_line(error)}
        except Exception as error:
            root = root_of(error)
            if self._left_over is not None or isinstance(root, torch.AcceleratorError):
                # The process is not fit for any trial: after such an error every call of CUDA fails.
                raise
            line = one_line(root)
            return {"done": True, "failed": line if isinstance(root, SentinodeError) else f"{type(root).__name__}: {line}"}

    def _epoch(self) -> dict[str, Any]:
        while self._folds:
            fold = self._folds[0]
            if self._training is None:
                self._training = self._open(fold)
            record = self._training.next_epoch()
            if record is None:
                self.cleanup()
                self._folds.pop(0)
                continue
            self._told[fold] = self._told.get(fold, 0) + 1
            fold_over = self._training.is_over
            last = fold_over and len(self._folds) == 1
            return {"record": json.dumps(record), "fold": fold, "fold_over": fold_over, "last": last, "gflops": self._gflops}
        return {"done": True}

    def _open(self, fold: int | None) -> LoneTraining | GroupTraining:
        shared, job = self._shared, self._job
        config = trial_config(shared.sweep, job.point, job.seed, fold)
        check_device(config, use_gpu=shared.use_gpu)
        if shared.sweep.cost == "gflops":
            self._gflops = gflops_per_patch(config.arch, config.input_size_px, config.tta)
        if problem := problem_with(shared.folder, shared.run_id):
            raise UsageError(problem)
        folder = trial_folder(shared.folder, job.number, fold)
        try:
            (folder / REQUEST_FILE).write_bytes(json_bytes({"id": shared.run_id, "verb": "trial"}))
        except OSError as error:
            # Not this trial's fault: the next one would meet it too.
            raise StorageError(f"{folder}: cannot be written ({error.strerror or error})") from error
        rows = self._rows(config, fold)
        told = self._told.get(fold, 0)
        if config.max_workers == 1:
            features, initial = features_folder(shared.folder, shared.dataset.manifest.fingerprint), self._initial(config)
            return LoneTraining(config, folder, shared.run_id, rows, initial, use_gpu=shared.use_gpu, log=shared.log, features=features, told=told)
        initial = self._initial(config)
        return GroupTraining(config, folder, shared.run_id, rows, initial, use_gpu=shared.use_gpu, log=shared.log, told=told)

    def _rows(self, config: TrainConfig, fold: int | None) -> LoadedRows | FoldRows:
        key = rows_key(config)
        if fold is not None or key == rows_key(self._shared.base):
            return self._shared.rows[fold]
        if self._other_rows is None or self._other_rows[0] != key:
            # One at a time: they are as large as the data set.
            self._other_rows = None
            self._other_rows = key, load_rows(self._shared.dataset, config)
        return self._other_rows[1]

    def _initial(self, config: TrainConfig) -> Callable[[], dict[str, torch.Tensor]]:
        shared = self._shared
        if shared.initial is not None and all(getattr(config, name) == getattr(shared.base, name) for name in _WEIGHT_FIELDS):
            return lambda: ray.get(shared.initial)  # type: ignore[no-any-return]
        # Tune's processes have current folders of their own.
        is_path = config.weights not in ("imagenet", "none") and "://" not in config.weights
        found = str(Path(shared.current_folder, Path(config.weights).expanduser())) if is_path else config.weights
        return lambda: initial_weights(config.model_copy(update={"weights": found}))


def trial_config(sweep: SweepConfig, point: dict[str, Any], seed: int, fold: int | None) -> TrainConfig:
    """Return what a trial trains with, on one fold or, None, on what `base` says."""
    config = sweep.train_config(point)
    return config.model_copy(update={"seed": seed} | ({"fold": fold} if fold is not None else {}))


def trial_folder(sweep_folder: Location, number: int, fold: int | None) -> Location:
    """Return where a trial's checkpoints lie."""
    folder = sweep_folder / f"trials/{number:05d}"
    return folder if fold is None else folder / f"fold-{fold}"


def rows_key(config: TrainConfig) -> tuple[Any, ...]:
    """Return what decides which rows are read, and how; the seed only where it deals rows out."""
    seed = config.seed if config.calibration_fraction else None
    return (config.fold, config.calibration_fraction, seed, config.ingest)
