"""Ray Train's trainer of a run: how many workers, how often what is repaired, which checkpoints are kept."""

import os
from collections.abc import Sequence
from typing import Any

from ray_jobs.checkpoints import tidy
from ray_jobs.cluster import resources_text
from ray_jobs.run_inputs import FoldRows, LoadedRows, Loop
from ray_jobs.store_file_system import storage_of
from ray_jobs.train_loop import train_loop_per_worker
from sentinode.config import TrainConfig
from sentinode.locations import Location

# Worker groups that could not be started before a run gives up: enough for a node that dies while starting, not for ever. They are added up over
# the whole of a run; where nodes come and go, each that goes at the wrong moment costs one.
_START_FAILURES = 3
_ELASTIC_START_FAILURES = 30
# How often Ray Train's controller looks after the workers; its own 2 s delay what is told of an epoch, and every repair.
_POLL_S = 0.5
# How often an elastic run looks whether the cluster has room for more workers; each change starts them all anew.
_RESIZE_CHECK_S = 60.0
# Whenever the number of workers changes, what was done since the last checkpoint is done again: no more of it than lies between two such looks.
_ELASTIC_CHECKPOINT_INTERVAL_S = 60.0


def make_trainer(
    config: TrainConfig,
    folder: Location,
    run_id: str,
    rows: LoadedRows | FoldRows,
    initial: Any,
    *,
    use_gpu: bool,
    log: Any = None,
    checkpoint_interval_s: float | None = None,
    waits: bool = False,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Return a TorchTrainer whose run lies in `folder`; `.fit()` resumes a run that lies there already.

    `run_id` is that of the folder's request, `initial` a reference to `initial_weights` or, for a run that is resumed, None, `log` a ProgressLog
    actor or None; `waits` as in `Loop`; `callbacks` are Ray Train's.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ray_jobs.process_group import TorchConfigAtNodeAddresses

    tidy(folder)
    files, path = storage_of(folder, folder, run_id)
    parent = os.path.dirname(path)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_S))
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    start_failures = _ELASTIC_START_FAILURES if is_elastic(config) else _START_FAILURES
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"loop": Loop(config, folder, run_id, rows, initial, log, checkpoint_interval_s, waits)},
        torch_config=TorchConfigAtNodeAddresses(),
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=resources, elastic_resize_monitor_interval_s=_RESIZE_CHECK_S
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=parent,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=start_failures),
            # One best is kept, and Ray Train never deletes the last.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute="improvement",
                checkpoint_score_order="max",
            ),
            callbacks=list(callbacks),
        ),
    )


def is_elastic(config: TrainConfig) -> bool:
    """Tell whether the number of workers follows the room that the cluster has."""
    return isinstance(config.workers, tuple)


def checkpoint_interval_s(config: TrainConfig) -> float | None:
    """Return how often a run checkpoints within an epoch, None for never; one whose workers come and go at least once a minute."""
    interval_s = config.checkpoint_interval_s
    return min(interval_s, _ELASTIC_CHECKPOINT_INTERVAL_S) if interval_s is not None and is_elastic(config) else interval_s


def room_text(config: TrainConfig, *, use_gpu: bool) -> str:
    """Return what a run needs to go on, in words: "2 workers with 1 GPU and 1 CPU each"."""
    workers = f"{config.min_workers} worker{'' if config.min_workers == 1 else 's'}"
    return f"{workers} with {resources_text(config.cpus_per_worker, int(use_gpu))} each"
