"""What every worker of a run is given; rows lie in Ray's shared memory, once per node.

Torch is imported where it is used: Ray Train's controller and the task that reads the rows handle these objects too, and need none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray

from ray_jobs.failures import task_error
from ray_jobs.waiting import reserved
from sentinode.config import TrainConfig
from sentinode.dataset import IntArray, Patches, PreparedDataset
from sentinode.locations import Location

if TYPE_CHECKING:
    import torch

    from sentinode.ingest import RowSource

Ingest = Literal["resident", "stream"]


@dataclass(frozen=True)
class LoadedRows:
    """The rows of a run.

    Attributes
    ----------
    dataset : PreparedDataset
    train : ObjectRef of Patches or None
        To train on; None where they are streamed from the data set.
    val, calibration : ObjectRef of Patches
        To choose the epoch by, and to calibrate on.
    """

    dataset: PreparedDataset
    train: Any
    val: Any
    calibration: Any

    @property
    def ingest(self) -> Ingest:
        """How the rows to train on are read."""
        return "stream" if self.train is None else "resident"

    def source(self, config: TrainConfig, device: "torch.device") -> "RowSource":
        """Return a worker's source of rows to train on."""
        from sentinode.ingest import ResidentRows, StreamedRows

        if self.train is None:
            return StreamedRows(self.dataset, config.fold, device, config.stream_window_rows)
        return ResidentRows(ray.get(self.train), device)

    def validation(self, config: TrainConfig) -> Patches:
        """Return the rows that choose the epoch."""
        rows: Patches = ray.get(self.val)
        return rows


@dataclass(frozen=True)
class FoldRows:
    """The rows of one fold of a data set of which everything lies in shared memory once; what workers ask of LoadedRows.

    Attributes
    ----------
    dataset : PreparedDataset
    everything : ObjectRef of Patches
        All rows of the splits train and val, in order.
    validates : ObjectRef of ndarray of bool, shape (n,)
        Which of them validate; the others train.
    """

    dataset: PreparedDataset
    everything: Any
    validates: Any
    ingest: Ingest = "resident"

    def source(self, config: TrainConfig, device: "torch.device") -> "RowSource":
        """Return a worker's source of rows to train on."""
        from sentinode.ingest import ResidentRows

        return ResidentRows(ray.get(self.everything), device, np.flatnonzero(~ray.get(self.validates)))

    def validation(self, config: TrainConfig) -> Patches:
        """Return the rows that choose the epoch, as copies."""
        from sentinode.finishing import split_calibration

        val = ray.get(self.everything).take(ray.get(self.validates))
        return split_calibration(val, config.calibration_fraction, config.seed)[0]


def load_rows(dataset: PreparedDataset, config: TrainConfig, ingest: Ingest | None = None) -> LoadedRows:
    """Read the rows into Ray's shared memory, in a task, so that the driver does not hold them.

    Parameters
    ----------
    ingest : str or None
        How an earlier part of the run read them, which decides the order of rows; None for a run that begins.

    Raises
    ------
    SentinodeError
        The data set cannot be read, or lacks the split, the fold, or a class in the rows to train or to validate on.
    """
    from sentinode.ingest import pixel_bytes, resolve_ingest

    if ingest is None:
        ingest = resolve_ingest(config.ingest, pixel_bytes(dataset), _shared_memory_bytes())
    one_set = config.calibration_fraction == 0
    names = [*(["train"] if ingest == "resident" else []), "val", *([] if one_set else ["calibration"])]
    _wait_for_room()
    refs = _load_rows.options(num_returns=len(names)).remote(dataset, config, ingest == "stream")
    loaded = dict(zip(names, refs if len(names) > 1 else [refs], strict=True))
    try:
        # Fails where the task failed; only the small split travels to the driver.
        ray.get(loaded[names[-1]])
    except ray.exceptions.RayError as error:
        raise task_error(error, "reading the data set") from error
    return LoadedRows(dataset, loaded.get("train"), loaded["val"], loaded.get("calibration", loaded["val"]))


def load_folds(dataset: PreparedDataset, config: TrainConfig, folds: Sequence[int]) -> "dict[int, LoadedRows | FoldRows]":
    """Read the rows of several folds into Ray's shared memory: each row once, where they fit, however many folds there are.

    Raises
    ------
    SentinodeError
        As `load_rows`, for any of the folds.
    """
    from sentinode.ingest import pixel_bytes, resolve_ingest

    if resolve_ingest(config.ingest, pixel_bytes(dataset), _shared_memory_bytes()) == "stream":
        return {fold: load_rows(dataset, config.model_copy(update={"fold": fold}), "stream") for fold in folds}
    _wait_for_room()
    everything, *validates = _load_folds.options(num_returns=1 + len(folds)).remote(dataset, config, folds)
    try:
        ray.get(validates)
    except ray.exceptions.RayError as error:
        raise task_error(error, "reading the data set") from error
    return {fold: FoldRows(dataset, everything, mask) for fold, mask in zip(folds, validates, strict=True)}


def _wait_for_room() -> None:
    """Wait for a CPU, and say so where that takes long.

    The task is not put into what was reserved: where the node that holds the rows is lost, Ray runs it again under the same conditions.
    """
    with reserved(1, 0, "read the data set"):
        return


@ray.remote(num_cpus=1)
def _load_folds(dataset: PreparedDataset, config: TrainConfig, folds: Sequence[int]) -> Any:
    from sentinode.finishing import split_calibration
    from sentinode.training import class_weight

    masks = []
    for fold in folds:
        shards, validates = dataset.train_and_val_rows(fold)
        masks.append(validates)
    everything = dataset.read_shards(shards)
    no_pixels = np.empty((len(everything), 0, 0, 3), np.uint8)
    for validates in masks:
        # As in `_load_rows`: told now what no trial could train or validate on.
        class_weight(everything.labels[~validates], config)
        few = Patches(everything.ids[validates], everything.labels[validates], everything.groups[validates], no_pixels[validates])
        split_calibration(few, config.calibration_fraction, config.seed)
    return [everything, *masks]


@ray.remote(num_cpus=1)
def _load_rows(dataset: PreparedDataset, config: TrainConfig, stream: bool) -> Any:
    if stream:
        train, val = [], dataset.read_val(config.fold)
        labels = _labels_to_train_on(dataset, config.fold)
    else:
        rows, val = dataset.read_train_and_val(config.fold)
        train, labels = [rows], rows.labels
    result: list[Patches] = [*train, val]
    # A class that is absent is told now, not after hours of training; the imports take seconds, which nobody else needs to wait.
    if len(np.unique(labels)) < 2:
        from sentinode.training import class_weight

        class_weight(labels, config)
    if config.calibration_fraction > 0 or len(np.unique(val.labels)) < 2:
        from sentinode.finishing import split_calibration

        choosing, calibrating = split_calibration(val, config.calibration_fraction, config.seed)
        result = [*train, choosing, calibrating]
    return result if len(result) > 1 else result[0]


def _labels_to_train_on(dataset: PreparedDataset, fold: int | None) -> IntArray:
    shards, validates = dataset.train_and_val_rows(fold)
    return dataset.labels_in(shards)[~validates]


def _shared_memory_bytes() -> int:
    """Return the shared memory of the node that has the least."""
    return int(min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]))


@dataclass(frozen=True)
class Loop:
    """What the training loop of a worker is given.

    Attributes
    ----------
    config : TrainConfig
    folder : Location
        The run's, the same for every worker.
    run_id : str
        By which a worker knows that it sees that folder (`run_folder.problem_with`).
    rows : LoadedRows or FoldRows
    initial : ObjectRef of dict of str to tensor, or None
        Weights to start from; None for a run that goes on.
    log : ActorHandle or None
        A ProgressLog.
    checkpoint_interval_s : float or None
        None for no checkpoints within an epoch.
    waits : bool
        Whether to ask the log after each epoch for leave to train another one.
    """

    config: TrainConfig
    folder: Location
    run_id: str
    rows: LoadedRows | FoldRows
    initial: Any
    log: Any = None
    checkpoint_interval_s: float | None = None
    waits: bool = False
