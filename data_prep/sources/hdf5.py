"""Patches in an HDF5 file: one dataset, uint8, patch x height x width x channel, as PatchCamelyon is published."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import h5py  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa

from data_prep.rejects import RejectReason
from data_prep.sources.base import Unread
from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import Location

PIXELS = "x"
"""Name of the dataset in a file of patches."""
LABELS = "y"
"""Name of the dataset in a file of labels."""
SIDE_PX = 96

PATCH_BYTES = SIDE_PX * SIDE_PX * 3
_ROWS_PER_READ = 256  # 7 MB


def hdf5_spec(folder: Location, packed: Mapping[str, int], unpacked: Path | None) -> dict[str, Any]:
    """Return the arguments of `Hdf5Reader.of`.

    Parameters
    ----------
    folder : Location
        Where the files are.
    packed : mapping of str to int
        Names in it that end in .gz -> number of patches.
    unpacked : Path or None
        Folder, visible to every node, that holds those without .gz.
    """
    return {"kind": "hdf5", "folder": str(folder), "packed": dict(packed), "unpacked": None if unpacked is None else str(unpacked)}


class Hdf5Reader:
    """Reads patches by file and row, rows that follow each other in one go."""

    def __init__(self, files: Mapping[str, Location], folder: Location) -> None:
        self._files, self._folder = files, folder

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "Hdf5Reader":
        """Make it from what `hdf5_spec` returned."""
        if spec["packed"] and spec["unpacked"] is None:
            raise SentinodeError(f"{spec['folder']}: {', '.join(spec['packed'])} must be unpacked before reading")
        files = {name: Location(spec["unpacked"]) / name.removesuffix(".gz") for name in spec["packed"]}
        return cls(files, Location(spec["folder"]))

    def read(self, entries: pa.Table) -> Iterator[UInt8Array | Unread]:
        """Yield the pixels of each entry, uint8 (96, 96, 3), RGB, in order; raises StorageError where a whole file cannot be opened."""
        paths, rows = entries["path"].to_pylist(), entries["row"].to_pylist()
        breaks = [at for at in range(1, len(rows)) if rows[at] != rows[at - 1] + 1 or paths[at] != paths[at - 1]]
        for begin, end in pairwise([0, *breaks, len(rows)] if rows else []):
            location = self._files.get(paths[begin], self._folder / paths[begin])
            try:
                with open_hdf5(location) as file:
                    for first in range(rows[begin], rows[end - 1] + 1, _ROWS_PER_READ):
                        yield from _read_rows(file, first, min(first + _ROWS_PER_READ, rows[end - 1] + 1))
            except (FileNotFoundError, PermissionError, UsageError) as error:
                raise StorageError(f"{location}: cannot be opened; every node must see it as it was when prepare began ({error})") from error


def _read_rows(file: h5py.File, first: int, end: int) -> Iterator[UInt8Array | Unread]:
    try:
        yield from file[PIXELS][first:end]
    except OSError as error:
        if end - first == 1:
            yield Unread(RejectReason.UNREADABLE, f"row {first}: {_reason(error)}")
            return
        # One damaged chunk must not take its neighbours along.
        for row in range(first, end):
            yield from _read_rows(file, row, row + 1)


@contextmanager
def open_hdf5(location: Location, content: bytes | None = None, *, called: Location | None = None) -> Iterator[h5py.File]:
    """Open a file for reading; `content` is used instead of what lies there, and errors name `called`.

    Raises
    ------
    UsageError
        It is damaged or no HDF5 file.
    FileNotFoundError, PermissionError
        As the storage says.
    """
    stream: BinaryIO | None = io.BytesIO(content) if content is not None else None if location.is_local else location.open_input()
    try:
        # No locking: nobody writes, and some network file systems refuse locks.
        file = h5py.File(stream or str(location), "r", locking=False)
    except (FileNotFoundError, PermissionError, StorageError):
        raise
    except OSError as error:
        raise UsageError(f"{called or location}: damaged or no HDF5 file ({_reason(error)}); download it again") from error
    with file:
        yield file


def count_patches(file: h5py.File, where: Location) -> int:
    """Return how many patches a file holds; raises UsageError unless they have PatchCamelyon's size and type."""
    found = _dataset(file, PIXELS, where)
    if found.dtype != np.uint8 or found.shape[1:] != (SIDE_PX, SIDE_PX, 3) or len(found.shape) != 4:
        raise UsageError(f"{where}: dataset {PIXELS} is {found.dtype} {found.shape}; expected uint8 (n, {SIDE_PX}, {SIDE_PX}, 3)")
    return int(found.shape[0])


def check_pixels(file: h5py.File, where: Location, rows: int, labels: str) -> None:
    """Raise UsageError unless the file holds `rows` patches of PatchCamelyon's size and type; `labels` names where the number comes from."""
    if (patches := count_patches(file, where)) != rows:
        raise UsageError(f"{where}: {patches} patches, but {labels} has {rows} labels")


def read_labels(file: h5py.File, where: Location) -> list[int]:
    """Return the labels of a file of labels; raises UsageError where there is no dataset of one whole number per patch."""
    found = _dataset(file, LABELS, where)
    if found.dtype.kind not in "iu" or not found.shape or found.size != found.shape[0]:
        raise UsageError(f"{where}: dataset {LABELS} is {found.dtype} {found.shape}; expected whole numbers (n, 1, 1, 1)")
    try:
        values: list[int] = found[...].reshape(-1).tolist()
    except OSError as error:
        raise UsageError(f"{where}: damaged ({_reason(error)}); download it again") from error
    return values


def _dataset(file: h5py.File, name: str, where: Location) -> h5py.Dataset:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise UsageError(f"{where}: no dataset {name!r} in it; found {', '.join(map(repr, file)) or 'nothing'}")
    return found


def _reason(error: OSError) -> str:
    text = str(error).splitlines()[0]
    return text[text.find("(") + 1 : text.rfind(")")] if "(" in text and ")" in text else text
