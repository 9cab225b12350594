"""How checkpoints of a run reach the storage while training goes on; what they hold: see `checkpoints`."""

import errno
import io
import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ray_jobs.checkpoints import ABOUT_FILE, FORMAT_VERSION, STATE_FILE, WEIGHTS_FILE, CheckpointError, metrics_of, rank_file, tidy
from ray_jobs.run_folder import problem_with
from ray_jobs.run_inputs import Ingest
from ray_jobs.store_file_system import storage_of
from sentinode.config import TrainConfig
from sentinode.errors import StorageError, one_line
from sentinode.learner import Learner
from sentinode.locations import Location
from sentinode.training import Progress


class _Numbered:
    """Counts the checkpoints of one worker, and copies what goes into each."""

    def __init__(self, config: TrainConfig, ingest: Ingest, rank: int, world_size: int, number: int) -> None:
        self.number, self._rank = number, rank
        self._about = {"format_version": FORMAT_VERSION, "world_size": world_size, "ingest": ingest, "config": config.model_dump(mode="json")}

    def next(self, learner: Learner, progress: Progress) -> "tuple[_Copy, str]":
        """Return the copy of the next checkpoint and the name of its folder."""
        self.number += 1
        about = {**self._about, "number": self.number, "device": learner.device.type, "progress": asdict(progress)}
        # Random: what an attempt that failed left under the same number must not be mixed with this one.
        return _Copy.of(learner, self._rank, about), f"checkpoint_{self.number:06d}_{os.urandom(6).hex()}"


class CheckpointWriter:
    """Saves the checkpoints of one worker in the background.

    Parameters
    ----------
    folder : Location
        The run's, the same for every worker.
    run_id : str
        Of its request: nothing is written where another one stands there.
    config : TrainConfig
    ingest : str
        How rows are read.
    rank, world_size : int
    number : int
        Of the checkpoint that the run goes on from, 0 for none.
    """

    def __init__(self, folder: Location, run_id: str, config: TrainConfig, ingest: Ingest, rank: int, world_size: int, number: int) -> None:
        self._folder, self._run_id = folder, run_id
        self._numbered = _Numbered(config, ingest, rank, world_size, number)
        self._written = threading.Event()
        self._written.set()
        self._error: CheckpointError | None = None

    def save(self, learner: Learner, progress: Progress) -> None:
        """Copy the state and return; writing it and telling Ray go on in a thread. Every worker must call this the same number of times.

        If the checkpoint before is still being written, that is waited for: there is one copy in memory at most.

        Raises
        ------
        CheckpointError
            The checkpoint before could not be written.
        """
        import ray.train

        self._written.wait()
        if self._error is not None:
            raise self._error
        copy, name = self._numbered.next(learner, progress)
        self._written.clear()
        ray.train.report(
            metrics_of(progress, self._numbered.number),
            # Stands for the copy in memory, which is not a folder.
            checkpoint=_registered(self._folder, self._folder, self._run_id),
            checkpoint_dir_name=name,  # rank 0's holds for all
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=self._upload(copy),
        )

    def _upload(self, copy: "_Copy") -> Callable[[Any, str], Any]:
        content: list[_Copy] = [copy]

        def upload(_: Any, name: str) -> Any:
            try:
                # Taken out: Ray keeps this function until its turn comes, and the copy must not stay in memory that long.
                content.pop().write(self._folder, self._run_id, self._folder / name)
            except CheckpointError as error:
                self._error = error
                raise
            finally:
                self._written.set()
            return _registered(self._folder / name, self._folder, self._run_id)

        return upload


class LoneCheckpointWriter:
    """Saves the checkpoints of a training that is one process's own, without Ray Train, in the background; what is left is as `tidy` leaves it.

    Parameters
    ----------
    folder : Location
        The run's.
    run_id : str
        Of its request.
    config : TrainConfig
    ingest : str
        How rows are read.
    number : int
        Of the checkpoint that the run goes on from, 0 for none.
    """

    def __init__(self, folder: Location, run_id: str, config: TrainConfig, ingest: Ingest, number: int) -> None:
        self._folder, self._run_id = folder, run_id
        self._numbered = _Numbered(config, ingest, 0, 1, number)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, learner: Learner, progress: Progress) -> None:
        """Copy the state and return; it is written in a thread, once the one before has been; raises as `wait`."""
        self.wait()
        copy, name = self._numbered.next(learner, progress)
        # No daemon: a process that is asked to end writes what it has begun.
        self._thread = threading.Thread(target=self._write, args=(copy, self._folder / name), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises
        ------
        CheckpointError
            A checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write(self, copy: "_Copy", path: Location) -> None:
        try:
            copy.write(self._folder, self._run_id, path)
            tidy(self._folder)
        except Exception as error:
            self._error = error


@dataclass(frozen=True)
class _Copy:
    """One worker's part of a checkpoint, in memory of its own."""

    rank: int
    random: dict[str, torch.Tensor]
    # Rank 0's only.
    weights: dict[str, torch.Tensor] | None
    state: dict[str, Any] | None
    about: dict[str, Any] | None

    @classmethod
    def of(cls, learner: Learner, rank: int, about: dict[str, Any]) -> "_Copy":
        random = {"cpu": torch.get_rng_state()}
        if learner.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(learner.device)
        if rank > 0:
            return cls(rank, random, None, None, None)
        # safetensors wants them contiguous, whatever the network's memory format.
        weights = {name: torch.empty(value.shape, dtype=value.dtype).copy_(value) for name, value in learner.kept.state_dict().items()}
        return cls(rank, random, weights, _copied(learner.state()), about)

    def write(self, run: Location, run_id: str, folder: Location) -> None:
        """Write the files of this worker; each gets its name when it is whole.

        Raises
        ------
        CheckpointError
            They cannot be written; none is left.
        """
        from safetensors.torch import save

        written: list[Location] = []
        try:
            # Looked at when training began; what was mounted there may have gone since, or another process may have the run.
            if problem := problem_with(run, run_id):
                raise CheckpointError(problem)
            if self.weights is not None:
                # Whole in memory first: the libraries' own ways to a file lose what the operating system says when a disk is full.
                _write(folder / WEIGHTS_FILE, save(self.weights), written)
                _write(folder / STATE_FILE, _serialised(self.state), written)
            _write(folder / rank_file(self.rank), _serialised(self.random), written)
            if self.about is not None:
                _write(folder / ABOUT_FILE, json.dumps(self.about, indent=2, allow_nan=False).encode(), written)
            # Writing takes its time. What a process has written that lost the run meanwhile must not make Ray, or `tidy`, remove the others.
            if problem := problem_with(run, run_id):
                raise CheckpointError(problem)
        except (OSError, StorageError, CheckpointError) as error:
            for path in reversed(written):
                with suppress(OSError, StorageError):
                    path.remove()
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(_why_not(run, error)) from error


def _why_not(run: Location, error: Exception) -> str:
    if isinstance(error, StorageError):
        return str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = getattr(error, "strerror", None) or one_line(error)
    return f"{run}: a checkpoint cannot be written ({reason})" + ("; make room there and repeat the command" if full else "")


def _write(path: Location, data: bytes, written: list[Location]) -> None:
    written.append(path)
    path.write_bytes(data)


def _registered(folder: Location, run: Location, run_id: str) -> Any:
    """Return a folder as Ray Train takes it."""
    import ray.train

    files, path = storage_of(folder, run, run_id)
    return ray.train.Checkpoint.from_directory(path) if files is None else ray.train.Checkpoint(path, files)


def _serialised(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _copied(state: Any) -> Any:
    """Copy a tree of plain values and tensors to memory of its own; tensors keep their strides, which optimisers rely on."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state
