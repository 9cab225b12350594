"""What a checkpoint of a run holds, and which of those that lie there count; `checkpoint_writers` writes them.

    <run>/checkpoint_000012_9f3c…/model.safetensors    weights of the network that is validated and stored
                                  state.pt             optimiser, schedule, …: the rest of the learner; read with weights_only=True
                                  rank0.pt …           random numbers of each worker
                                  checkpoint.json      number, workers, device, progress, configuration; written last, removed first

The number rises by one with each checkpoint of a run. A folder counts while all of these are there, with one file for each worker: every file is on
the disk before it gets its name. Ray Train registers checkpoints and removes those that are neither the best nor the last; what it noted down itself
(`checkpoint_manager_snapshot.json`) is made anew from the folders whenever a run is started, since Ray does not replace that file in one step.
"""

import json
import shutil
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import ray
import torch

from ray_jobs.run_folder import unwritable
from ray_jobs.run_inputs import Ingest
from sentinode.errors import TrainingError, UsageError
from sentinode.learner import Learner
from sentinode.locations import Location
from sentinode.storage import json_bytes
from sentinode.training import Progress

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.pt"
ABOUT_FILE = "checkpoint.json"
_SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
# To be raised with any change of what the files hold, which `checkpoint_writers` writes.
FORMAT_VERSION = 1
# More than the newest checkpoint took: Adam has no moments before its first step, and an unfreezing network gets more of them.
_ROOM_MARGIN = 1.1


class CheckpointError(TrainingError):
    """A checkpoint cannot be written or read by one worker."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole.

    Attributes
    ----------
    path : Location
    number : int
        Rises by one with each checkpoint of a run.
    world_size : int
        Workers that wrote it.
    ingest : str
        How rows were read: resident or stream.
    device : str
        What the network was trained on: cpu or cuda.
    progress : Progress
    is_weights_only : bool
        Whether it is what is left of a run that nobody goes on with.
    """

    path: Location
    number: int
    world_size: int
    ingest: Ingest
    device: str
    progress: Progress
    is_weights_only: bool = False

    @classmethod
    def open(cls, path: Location) -> "Saved | None":
        """Return the checkpoint in a folder, None if it is not whole.

        Raises
        ------
        UsageError
            Another version of this program made it.
        """
        try:
            about = json.loads((path / ABOUT_FILE).read_bytes().decode())
            names = {entry.name for entry in path.entries()}
        except (OSError, ValueError):
            return None
        if about.get("format_version") != FORMAT_VERSION or "device" not in about:
            # Not for us to say whether it is whole, so it must not be cleared away either.
            raise UsageError(f"{path}: made by another version of sentinode; continue the run with that one, or use another --out")
        progress, weights_only = Progress(**about["progress"]), bool(about.get("weights_only"))
        saved = cls(path, about["number"], about["world_size"], about["ingest"], about["device"], progress, weights_only)
        files = [WEIGHTS_FILE] if weights_only else [WEIGHTS_FILE, STATE_FILE, *map(rank_file, range(saved.world_size))]
        return saved if names.issuperset(files) else None

    @property
    def where(self) -> str:
        """Where the run stood, for people."""
        done = self.progress.epochs_done
        if self.progress.partial:
            return f"within epoch {done + 1}"
        return f"after epoch {done}" if done else "before the first epoch"

    def weights(self) -> dict[str, torch.Tensor]:
        """Read the weights, on the CPU."""
        from safetensors.torch import load, load_file

        file = self.path / WEIGHTS_FILE
        # From disk without a copy in between.
        return load_file(file.local) if file.is_local else load(file.read_bytes())

    def metrics(self) -> dict[str, Any]:
        """Return what Ray is told about the checkpoint."""
        return metrics_of(self.progress, self.number)


def metrics_of(progress: Progress, number: int) -> dict[str, Any]:
    """Return what Ray is told: the numbers of the last epoch, unless the checkpoint lies within the next one.

    `improvement` is the score that the best checkpoint is kept by: 0 within an epoch.
    """
    last: dict[str, Any] = progress.history[-1] if progress.history and progress.partial is None else {}
    about = {"number": number, "epochs_done": progress.epochs_done, "improvement": progress.improvement}
    return {name: value for name, value in last.items() if value is not None} | about


def checkpoint_folders(folder: Location) -> list[Location]:
    """Return the folders of all checkpoints of a run, whole or not."""
    try:
        entries = folder.entries()
    except FileNotFoundError:
        return []
    return [folder / entry.name for entry in entries if entry.is_dir and entry.name.startswith("checkpoint_")]


def saved_checkpoints(folder: Location) -> list[Saved]:
    """Return the whole checkpoints of a run, oldest first."""
    found = [saved for path in checkpoint_folders(folder) if (saved := Saved.open(path)) is not None]
    return sorted(found, key=lambda saved: (saved.number, saved.path.name))


def best_and_last(folder: Location) -> tuple[Saved | None, Saved | None]:
    """Return the checkpoint of the best epoch so far and the newest one; often the same.

    Raises
    ------
    TrainingError
        The run had a best epoch and its checkpoint is gone.
    """
    saved = saved_checkpoints(folder)
    if not saved:
        return None, None
    last = saved[-1]
    if last.progress.best_epoch is None:
        return None, last
    best = next((one for one in reversed(saved) if one.progress.improvement == last.progress.improvements), None)
    if best is None:
        raise TrainingError(f"{folder}: the checkpoint of the best epoch, {last.progress.best_epoch + 1}, is gone")
    return best, last


def last_good(folder: Location) -> Saved | None:
    """Return the newest checkpoint whose weights are all finite."""
    for saved in reversed(saved_checkpoints(folder)):
        if all(bool(torch.isfinite(value).all()) for value in saved.weights().values() if value.is_floating_point()):
            return saved
    return None


def tidy(folder: Location) -> None:
    """Keep the best and the newest checkpoint of a run that nobody writes now, remove what else a killed one left, and tell Ray Train about the two.

    Raises
    ------
    TrainingError
        The checkpoint of the best epoch is gone.
    StorageError
        The disk is full.
    UsageError
        What lies there cannot be changed.
    """
    best, last = best_and_last(folder)
    kept = [saved for saved in (best, last if last is not best else None) if saved is not None]
    for path in checkpoint_folders(folder):
        if path not in [saved.path for saved in kept]:
            _remove(path)
    snapshot = folder / _SNAPSHOT_FILE
    if last is None:
        snapshot.remove()
        return
    # Ray sorts by score, ties by age.
    kept.sort(key=lambda saved: (saved.progress.improvement, saved.number))
    results = [{"checkpoint_dir_name": saved.path.name, "metrics": saved.metrics()} for saved in kept]
    notes = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": [saved.number for saved in kept],
        "latest_checkpoint_result": next(result for result in results if result["checkpoint_dir_name"] == last.path.name),
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": last.number + 1,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    try:
        snapshot.write_bytes(json_bytes(notes))
    except OSError as error:
        raise unwritable(folder, error) from error


def is_settled(folder: Location, epochs: int) -> bool:
    """Whether the checkpoint after so many epochs is on the disk and `tidy` has gone over it, so that whoever wrote it touches nothing any more."""
    try:
        noted = json.loads((folder / _SNAPSHOT_FILE).read_bytes().decode())["latest_checkpoint_result"]["checkpoint_dir_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    _, last = best_and_last(folder)
    return last is not None and (last.is_weights_only or (noted == last.path.name and len(last.progress.history) >= epochs))


def epochs_saved(folder: Location) -> int:
    """Return how many epochs the newest checkpoint of a run knows of."""
    _, last = best_and_last(folder)
    return 0 if last is None else len(last.progress.history)


def keep_weights_only(folder: Location) -> None:
    """Leave of a run that is settled, and that nobody goes on with, the weights of its best epoch: a third of one checkpoint.

    Raises
    ------
    TrainingError, UsageError
        As `tidy`.
    """
    best, _ = best_and_last(folder)
    if best is None:
        return
    about = json.loads((best.path / ABOUT_FILE).read_bytes().decode())
    # Its history is that of the best epoch; what came after stands in the sweep's journal.
    try:
        (best.path / ABOUT_FILE).write_bytes(json_bytes(about | {"weights_only": True}))
        for entry in best.path.entries():
            if entry.name not in (ABOUT_FILE, WEIGHTS_FILE):
                (best.path / entry.name).remove()
    except OSError as error:
        raise unwritable(folder, error) from error
    for path in checkpoint_folders(folder):
        if path != best.path:
            _remove(path)


def remove_newer(folder: Location, number: int) -> None:
    """Remove what an attempt that failed has written after checkpoint `number`, which the run goes on from.

    Raises
    ------
    UsageError
        It cannot be removed.
    """
    for path in checkpoint_folders(folder):
        if not path.name.split("_")[1].isdigit() or int(path.name.split("_")[1]) > number:
            _remove(path)


def _remove(path: Location) -> None:
    """Remove a checkpoint so that it no longer counts from the first moment on: killed in the middle, it must not be taken for the newest one."""
    try:
        (path / ABOUT_FILE).remove()
        path.remove_tree()
    except OSError as error:
        raise unwritable(path, error) from error


def lacking_room(folder: Location, learner: Learner) -> str | None:
    """Return a line for people where the file system has no room for one more checkpoint, None where it has; an object store always has."""
    if not folder.is_local:
        return None
    usage = shutil.disk_usage(folder.local)
    saved = saved_checkpoints(folder)
    if saved:
        needed = _ROOM_MARGIN * sum(entry.size for entry in saved[-1].path.entries())
    else:
        # The weights, and two moments for each of those that train (Adam's).
        needed = sum(value.nbytes * (3 if value.requires_grad else 1) for value in learner.model.parameters())
    if usage.total == 0 or usage.free >= needed:  # some network file systems do not tell
        return None
    return f"{folder}: no room for a checkpoint ({needed / 2**20:.0f} MiB needed, {usage.free / 2**20:.0f} MiB free)"


def restore(learner: Learner, saved: Saved, rank: int) -> None:
    """Bring a learner, and the random numbers of this worker, to where the checkpoint was taken."""
    learner.restore(saved.weights(), _tensors(saved.path / STATE_FILE))
    try:
        random = _tensors(saved.path / rank_file(rank))
    except FileNotFoundError:  # the group has grown
        return
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and learner.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], learner.device)


def _tensors(file: Location) -> Any:
    return torch.load(file.local if file.is_local else BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)


def rank_file(rank: int) -> str:
    """Return the name of a worker's file of random numbers."""
    return f"rank{rank}.pt"
