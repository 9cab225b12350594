"""What every worker of a run starts from, put into Ray's shared memory once per node: rows, and the initial weights."""

from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch

from ray_jobs.failures import task_error
from sentinode.config import TrainConfig
from sentinode.dataset import Patches, PreparedDataset
from sentinode.finishing import split_calibration
from sentinode.ingest import ResidentRows, RowSource, StreamedRows, pixel_bytes, resolve_ingest
from sentinode.model import initial_state

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

    def source(self, config: TrainConfig, device: torch.device) -> RowSource:
        """Return a worker's source of rows to train on."""
        if self.train is None:
            return StreamedRows(self.dataset, config.fold, device, config.stream_window_rows)
        return ResidentRows(ray.get(self.train), device)


def load_rows(dataset: PreparedDataset, config: TrainConfig, ingest: Ingest | None = None) -> LoadedRows:
    """Read the rows into Ray's shared memory, in a task, so that the driver does not hold them.

    Parameters
    ----------
    ingest : str or None
        How an earlier part of the run read them, which decides the order of rows; None for a run that begins.

    Raises
    ------
    SentinodeError
        The data set cannot be read, or lacks the split or fold.
    """
    if ingest is None:
        ingest = resolve_ingest(config.ingest, pixel_bytes(dataset), _shared_memory_bytes())
    one_set = config.calibration_fraction == 0
    names = [*(["train"] if ingest == "resident" else []), "val", *([] if one_set else ["calibration"])]
    refs = _load_rows.options(num_returns=len(names)).remote(dataset, config.fold, config.calibration_fraction, config.seed, ingest == "stream")
    loaded = dict(zip(names, refs if len(names) > 1 else [refs], strict=True))
    try:
        # Fails where the task failed; only the small split travels to the driver.
        ray.get(loaded[names[-1]])
    except ray.exceptions.RayError as error:
        raise task_error(error, "reading the data set") from error
    return LoadedRows(dataset, loaded.get("train"), loaded["val"], loaded.get("calibration", loaded["val"]))


@ray.remote(num_cpus=1)
def _load_rows(dataset: PreparedDataset, fold: int | None, calibration_fraction: float, seed: int, stream: bool) -> Any:
    if stream:
        train, val = [], dataset.read_val(fold)
    else:
        rows, val = dataset.read_train_and_val(fold)
        train = [rows]
    result: list[Patches] = [*train, *([val] if calibration_fraction == 0 else split_calibration(val, calibration_fraction, seed))]
    return result if len(result) > 1 else result[0]


def _shared_memory_bytes() -> int:
    """Return the shared memory of the node that has the least."""
    return int(min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]))


def initial_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return the weights that a run starts from, a function of the seed: made here, so that a path or a download does not depend on the workers.

    Raises
    ------
    UsageError
        The weights cannot be had or do not fit the architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return initial_state(config.arch, config.weights, input_size_px=config.input_size_px)
