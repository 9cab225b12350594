"""Reading image files, each one patch: the Reader of every layout that has a file per patch."""

import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from data_prep.rejects import RejectReason
from data_prep.sources.base import Unread
from sentinode.errors import UsageError

_MAX_BYTES = 64 << 20
"""No patch needs more: 512 px a side are 0.8 MB. A whole slide that lies among them must not fill the memory."""


def files_spec(base: str) -> dict[str, Any]:
    """Return the arguments of `FilesReader.of` for paths relative to `base`."""
    return {"kind": "files", "base": base}


class FilesReader:
    """Reads files whole; what the operating system cannot give is refused with its reason."""

    def __init__(self, base: str) -> None:
        self._base = base

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "FilesReader":
        """Make it from what `files_spec` returned."""
        return cls(spec["base"])

    def read(self, entries: pa.Table) -> Iterator[bytes | Unread]:
        """Yield the content of each file, in order."""
        for path in entries["path"].to_pylist():
            yield _read_local(os.path.join(self._base, path))


def read_described(path: str, what: str, expected: str) -> bytes:
    """Read a file that describes the inputs (labels, slides, a table); UsageError naming it and what was expected where that fails."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}; expected {expected}") from error


def _read_local(path: str) -> bytes | Unread:
    # os.open and os.read instead of open(): a fifth of the time for a file of 28 KB. O_NONBLOCK: opening a pipe must not wait for a writer.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return Unread(RejectReason.UNREADABLE, "not a file")
            if status.st_size > _MAX_BYTES:
                return Unread(RejectReason.UNREADABLE, f"{status.st_size} bytes; a patch has fewer than {_MAX_BYTES}")
            return _read_whole(descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        if os.path.islink(path):
            return Unread(RejectReason.UNREADABLE, "a link to nothing")
        return Unread(RejectReason.MISSING, "no such file")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        return Unread(RejectReason.UNREADABLE, getattr(error, "strerror", None) or str(error))


def _read_whole(descriptor: int, size: int) -> bytes:
    """Read `size` bytes; fewer where the file ends earlier."""
    data = os.read(descriptor, size)
    if len(data) == size:
        return data
    parts = [data]
    while data and (size := size - len(data)):
        data = os.read(descriptor, size)
        parts.append(data)
    return b"".join(parts)
