"""How the rows to train on reach the network: all of them in memory, or streamed from the data set in a random order with bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sentinode.dataset import Patches, PreparedDataset
from sentinode.epoch_plan import dealt_in_steps
from sentinode.errors import ManifestError
from sentinode.images import UInt8Array
from sentinode.read_ahead import ReadAhead, plan_loads
from sentinode.row_groups import RowGroups

IntArray = npt.NDArray[np.int64]

# Share of the free GPU memory that resident rows may take; activations need the rest.
_GPU_SHARE = 0.5
# Share of a node's shared memory that resident rows may take. Ray begins to move objects to disk at 0.8, and Tune's trials hold more than rows.
_SHARED_MEMORY_SHARE = 0.7
# Rows copied to the GPU at a time.
_COPY_ROWS = 4096
# Row groups read at the same time. A disk or a mounted file system is kept busy by two; a store answers after tens of milliseconds.
_LOCAL_READERS = 2
_STORE_READERS = 8


class RowSource(Protocol):
    """Where training rows come from. A row is a number from 0 to n-1, the same in every source of one data set and on every worker.

    Attributes
    ----------
    labels : ndarray of int64, shape (n,)
        Of all rows, 0 or 1.
    """

    labels: IntArray

    def order(self, seed: int, epoch: int, world_size: int, batch_size: int) -> IntArray:
        """Return every row exactly once, shape (n,); a function of its arguments. Worker r trains on the r-th piece of `numpy.array_split`."""

    def batches(self, rows: Sequence[IntArray]) -> Iterator[torch.Tensor]:
        """Return an iterator over the pixels of each entry of `rows`, uint8 (k, side, side, 3), RGB, on the device, in order.

        The entries may be any rows, in any order and several times; they come fastest as one worker's piece of `order`, from anywhere in it to its
        end. A batch is valid until the next one is asked for: its memory is used again. One iterator at a time: a new one ends the one before.
        Reading begins with the call, so that a caller with other things to do finds the first batch ready. IndexError for rows that are not there.
        """

    def close(self) -> None:
        """Give back memory and end threads; may be called more than once."""


def resolve_ingest(ingest: Literal["auto", "resident", "stream"], needed_bytes: int, shared_memory_bytes: int) -> Literal["resident", "stream"]:
    """Return how rows are read: as asked for, and with `auto` resident where they take at most 0.7 of a node's shared memory.

    Parameters
    ----------
    ingest : str
        As in TrainConfig.
    needed_bytes : int
        What would lie in shared memory: the pixels of all rows that train or validate (`pixel_bytes`).
    shared_memory_bytes : int
        Of the node with the least (Ray's object store capacity).
    """
    if ingest != "auto":
        return ingest
    return "resident" if needed_bytes <= _SHARED_MEMORY_SHARE * shared_memory_bytes else "stream"


def pixel_bytes(dataset: PreparedDataset) -> int:
    """Return the bytes of all pixels of the splits train and val, which are also those of any fold with its complement."""
    rows = sum(shard.rows for shard in dataset.manifest.shards if shard.split in ("train", "val"))
    return rows * dataset.manifest.patch_size_px**2 * 3


class ResidentRows:
    """Rows in memory; a RowSource. The order is a permutation of all of them.

    The pixels are copied to a GPU once where they take less than half of its free memory; else they stay where they are (in memory that workers
    share, say) and each batch is copied.

    Parameters
    ----------
    patches : Patches
    device : torch.device or str
    chosen : ndarray of int64, shape (n,), or None
        Which of the patches are the rows of this source, in this order, without a copy of them; None for all.
    """

    def __init__(self, patches: Patches, device: torch.device | str, chosen: IntArray | None = None) -> None:
        self.labels = patches.labels if chosen is None else patches.labels[chosen]
        self._chosen = chosen
        self._images = patches.images
        self._device = torch.device(device)
        self._on_gpu = _copied(patches.images, self._device) if _fits(patches.images.nbytes, self._device) else None
        self._handover = _Handover(patches.images.shape[1], self._device)

    def order(self, seed: int, epoch: int, world_size: int, batch_size: int) -> IntArray:
        """Return a permutation by seed and epoch, dealt so that the rows of a step do not depend on the number of workers that share them."""
        return dealt_in_steps(np.random.default_rng([seed, epoch, 1]).permutation(len(self.labels)), world_size, batch_size)

    def batches(self, rows: Sequence[IntArray]) -> Iterator[torch.Tensor]:
        """Return batches, as in RowSource."""
        flat = _checked(rows, len(self.labels))
        if self._chosen is not None:
            flat, rows = self._chosen[flat], [self._chosen[batch] for batch in rows]
        if self._on_gpu is None:
            return (self._handover.give(len(batch), _taker(self._images, batch)) for batch in rows)
        on_gpu = self._on_gpu
        # All indices in one copy: one a batch would make the host wait for the device each time.
        indices = torch.from_numpy(flat).to(self._device)
        return (on_gpu.index_select(0, part) for part in torch.split(indices, [len(batch) for batch in rows]))

    def close(self) -> None:
        """Let go of the memory of batches, and of the rows' on a GPU."""
        self._handover.close()
        self._on_gpu = None


class StreamedRows:
    """Rows read from the data set anew each epoch; a RowSource for what does not fit into memory.

    The order: row groups of the Parquet files in a random permutation, one after the other, cut into one piece for each worker; within a piece each
    `window_rows` consecutive rows are shuffled. The shards hold their rows in random order already, so that a window is a random sample of the data.

    A worker reads only the row groups of its piece, in the order in which they are needed, in background threads. At most two windows of rows (two
    batches, where those are larger) are in memory, and beside them up to eight row groups on their way from an object store. A row group whose rows
    are needed further apart than two windows is read again.

    Parameters
    ----------
    dataset : PreparedDataset
    fold : int or None
        None: the split train; else the rows of train and val that are not in this fold.
    device : torch.device or str
    window_rows : int

    Raises
    ------
    UsageError
        There is no such split or fold, or rows without a label.
    ManifestError
        A shard or the index is missing, damaged, or not what the manifest says. `batches` raises it too, for the batch that it concerns.
    StorageError
        The storage does not answer. `batches` raises it too.
    """

    def __init__(self, dataset: PreparedDataset, fold: int | None, device: torch.device | str, window_rows: int) -> None:
        if fold is None:
            shards = dataset.shards("train")
            rows = np.arange(sum(shard.rows for shard in shards))
        else:
            shards, validates = dataset.train_and_val_rows(fold)
            rows = np.flatnonzero(~validates)
        self.labels = dataset.labels_in(shards)[rows]
        self._groups = RowGroups(dataset, shards)
        self._group_of = np.searchsorted(self._groups.starts, rows, side="right") - 1
        self._row_in_group = rows - self._groups.starts[self._group_of]
        self._window_rows = window_rows
        self._readers = _LOCAL_READERS if dataset.root.is_local else _STORE_READERS
        self._side_px = dataset.manifest.patch_size_px
        self._handover = _Handover(self._side_px, torch.device(device))
        self._pool = np.empty((0, self._side_px, self._side_px, 3), np.uint8)
        self._reading: ReadAhead | None = None

    def order(self, seed: int, epoch: int, world_size: int, batch_size: int) -> IntArray:
        """Return row groups in random order, their rows shuffled within windows of each worker's piece; the batch size does not matter."""
        generator = np.random.default_rng([seed, epoch, 2])
        # Rows of one group follow each other in row number, so a stable sort by the group's place keeps them together.
        place = generator.permutation(len(self._groups))
        order = np.argsort(place[self._group_of], kind="stable")
        for piece in np.array_split(order, world_size):  # views: shuffling them shuffles `order`
            for start in range(0, len(piece), self._window_rows):
                generator.shuffle(piece[start : start + self._window_rows])
        return order

    def batches(self, rows: Sequence[IntArray]) -> Iterator[torch.Tensor]:
        """Return batches, as in RowSource; what the iterator raises: see the class."""
        flat = _checked(rows, len(self.labels))
        largest = max((len(batch) for batch in rows), default=0)
        slots = min(max(2 * self._window_rows, 2 * largest), len(self.labels) + 2 * largest)
        self._stop()
        if len(self._pool) < slots:
            # Kept from epoch to epoch: fresh memory is dearer than what is read into it.
            self._pool = np.empty((slots, *self._pool.shape[1:]), np.uint8)
        loads = plan_loads(self._group_of[flat], slots - largest)
        self._reading = ReadAhead(lambda uses, into: self._fill(flat[uses], into), loads, slots, self._readers)
        self._reading.start()
        return self._taken(rows, self._reading)

    def _taken(self, rows: Sequence[IntArray], reading: ReadAhead) -> Iterator[torch.Tensor]:
        try:
            first = 0
            for batch in rows:
                last = first + len(batch)
                yield self._handover.give(len(batch), _taker(self._pool, reading.wait_for(first, last)))
                first = last
        finally:
            reading.stop()

    def _fill(self, rows: IntArray, slots: IntArray) -> None:
        """Read rows, all of one row group, into slots of the pool."""
        group = int(self._group_of[rows[0]])
        by_row = np.argsort(self._row_in_group[rows], kind="stable")
        rows, slots = rows[by_row], slots[by_row]
        labels = self._groups.read(group, self._row_in_group[rows], self._pool, slots)
        if not np.array_equal(labels, self.labels[rows]):
            file = self._groups.file_of(group)
            raise ManifestError(f"{file}: labels differ from those in index.parquet; `sentinode verify` checks the whole data set")

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.stop()
            self._reading = None

    def close(self) -> None:
        """End reading, and let go of the memory."""
        self._stop()
        self._handover.close()
        self._pool = self._pool[:0].copy()


class _Handover:
    """Brings batches from host memory to the device, through buffers that are used again: on a GPU's host two pinned ones, in turns.

    Parameters
    ----------
    side_px : int
    device : torch.device
    """

    def __init__(self, side_px: int, device: torch.device) -> None:
        self._shape, self._device = (side_px, side_px, 3), device
        self._buffers: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event] = []
        self._turn = 0

    def give(self, rows: int, fill: Callable[[UInt8Array], None]) -> torch.Tensor:
        """Return `rows` rows, uint8 (rows, side, side, 3), on the device, that `fill` wrote into host memory."""
        is_cuda = self._device.type == "cuda"
        if not self._buffers or len(self._buffers[0]) < rows:
            self.close()
            self._buffers = [torch.empty((rows, *self._shape), dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2 if is_cuda else 1)]
            self._copied = [torch.cuda.Event() for _ in self._buffers] if is_cuda else []  # type: ignore[no-untyped-call]
        self._turn = (self._turn + 1) % len(self._buffers)
        batch = self._buffers[self._turn][:rows]
        if is_cuda:
            self._copied[self._turn].synchronize()  # the copy before the last one out of this buffer
        fill(batch.numpy())
        if not is_cuda:
            return batch
        on_device = batch.to(self._device, non_blocking=True)
        self._copied[self._turn].record(torch.cuda.current_stream(self._device))
        return on_device

    def close(self) -> None:
        """Let go of the buffers, when the device has read them."""
        for event in self._copied:
            event.synchronize()
        self._buffers, self._copied = [], []


def _taker(images: UInt8Array, rows: IntArray) -> Callable[[UInt8Array], None]:
    def fill(batch: UInt8Array) -> None:
        # Rows were checked; "raise" would check them again and take a copy of `batch` for it.
        np.take(images, rows, axis=0, out=batch, mode="clip")

    return fill


def _checked(rows: Sequence[IntArray], count: int) -> IntArray:
    """Join the rows of batches; IndexError where one is not among `count`."""
    flat = np.concatenate([np.empty(0, np.int64), *rows])
    if len(flat) and not (flat.min() >= 0 and flat.max() < count):
        raise IndexError(f"rows from {flat.min()} to {flat.max()} asked of a source of {count}")
    return flat


def _fits(needed_bytes: int, device: torch.device) -> bool:
    return device.type == "cuda" and needed_bytes < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]


def _copied(images: UInt8Array, device: torch.device) -> torch.Tensor:
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), _COPY_ROWS):
        copy[start : start + _COPY_ROWS] = torch.tensor(images[start : start + _COPY_ROWS])
    return copy
