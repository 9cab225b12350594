"""Outputs of frozen stages, kept in files: epochs and trials that see the same patches in the same way through the same stages compute them once.

It takes a finite set of looks (`augment.views`): with new random numbers in every epoch no output would ever be needed again. What a kept output
holds is a function of its key alone: it is computed in batches of a fixed size in the order of the rows, whatever batches are trained on.
"""

import fcntl
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sentinode.config import TrainConfig
from sentinode.learner import Learner
from sentinode.storage import canonical_json, temporary_name

BATCH_ROWS = 64
"""Rows that are computed at a time."""

# numpy has no bfloat16: its bits are stored.
_STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
}


def features_key(learner: Learner, config: TrainConfig, rows: int, *, look: int | None) -> str:
    """Return a name for all that decides the outputs of frozen stages: of a look of all `rows` trained on, or, None, of those validated on."""
    seen: dict[str, object] = {"batch": config.eval_batch_size}
    if look is not None:
        seen = {"augment": config.augment.model_dump(), "seed": config.seed, "look": look}
    calibration = [config.calibration_fraction, config.seed] if config.calibration_fraction else None
    decides = {
        "fold": config.fold,
        "calibration": calibration,
        "rows": rows,
        "arch": config.arch,
        "size": config.input_size_px,
        "mean": config.mean,
        "std": config.std,
        "depth": learner.depth,
        "trunk": learner.trunk_digest(),
        "device": learner.device.type,
        "precision": learner.precision,
        "format": str(learner.memory_format),
        "compile": config.compile,
    }
    return hashlib.sha256(canonical_json(seen | decides)).hexdigest()[:32]


class Features:
    """Outputs of all rows of one look, of which batches are read.

    Parameters
    ----------
    stored : ndarray, shape (n, …)
    dtype : torch.dtype
    """

    def __init__(self, stored: npt.NDArray[np.generic], dtype: torch.dtype) -> None:
        self._stored, self._dtype = stored, dtype

    def rows(self, rows: npt.NDArray[np.int64] | slice, device: torch.device) -> torch.Tensor:
        """Return some rows, as copies, on `device`."""
        return torch.from_numpy(np.array(self._stored[rows])).view(self._dtype).to(device, non_blocking=True)


class FeatureStore:
    """Kept outputs in a folder that processes may share.

    Parameters
    ----------
    folder : Path
        Made with the first output; of one data set, and removed with all in it when nobody trains any more.
    limit_bytes : float
        What would make the folder larger is not kept.
    """

    def __init__(self, folder: Path, limit_bytes: float) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def get(self, key: str, rows: int, compute: Callable[[], Iterator[torch.Tensor]]) -> Features | None:
        """Return what is kept under a key, computed if it is not there; None where there is no room for it.

        Parameters
        ----------
        key : str
            A file name. Of everything that decides the values.
        rows : int
        compute : callable
            Returns an iterator over the outputs, (BATCH_ROWS or fewer at the end, …), on any device, in the order of the rows.
        """
        found = self._open(key)
        if found is not None:
            return found
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"{key}.lock").open("w") as lock:
                # Of several processes that need it one computes; the lock goes with its process.
                fcntl.flock(lock, fcntl.LOCK_EX)
                return self._open(key) or self._make(key, rows, compute())
        except OSError:
            # A full disk, for instance: training goes on without.
            return None

    def _open(self, key: str) -> Features | None:
        for dtype, stored in _STORED.items():
            path = self._path(key, dtype)
            if path.exists():
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                return Features(array, dtype) if array.dtype == stored else None
        return None

    def _path(self, key: str, dtype: torch.dtype) -> Path:
        return self._folder / f"{key}.{str(dtype).removeprefix('torch.')}.npy"

    def _taken_bytes(self) -> int:
        """Return the size of all files, also of those that others are computing."""
        taken = 0
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # done, or given up, since it was listed
                taken += path.stat().st_size
        return taken

    def _make(self, key: str, rows: int, outputs: Iterator[torch.Tensor]) -> Features | None:
        first = next(outputs)
        stored = _STORED[first.dtype]
        needed = rows * first[0].numel() * stored.itemsize
        if needed + self._taken_bytes() > self._limit_bytes:
            return None
        path = self._path(key, first.dtype)
        temporary = temporary_name(path)
        try:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=stored, shape=(rows, *first.shape[1:]))
            _allocate(temporary)
            start = 0
            for output in itertools.chain([first], outputs):
                view = output.detach().cpu().contiguous()
                array[start : start + len(output)] = (view.view(torch.uint16) if first.dtype == torch.bfloat16 else view).numpy()
                start += len(output)
            array.flush()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return self._open(key)


def _allocate(path: Path) -> None:
    """Take the room of a file on the disk; OSError where there is none. Writing into the map of a file without room would end the process."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
