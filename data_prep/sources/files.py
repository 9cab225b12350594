"""Reading image files, each one patch: the Reader of every layout that has a file per patch."""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import pyarrow as pa

from data_prep.rejects import RejectReason
from data_prep.sources.base import MAX_FILE_BYTES, Unread, too_many_bytes
from sentinode.errors import StorageError, UsageError
from sentinode.locations import Location
from sentinode.retries import try_local

PLACES = ("file", "s3", "gs", "az", "abfs")
"""Schemes of places that the user's own credentials open. A table from elsewhere must not make a cluster fetch addresses of its author's choice."""

_OBJECTS_PER_BATCH = 256
"""Enough that the slow ones among the objects that are read together do not hold up the rest; 7 MB of usual patches."""

_LOCAL_ROOT = Location("")


def files_spec(base: Location, *, from_table: bool = False) -> dict[str, Any]:
    """Return the arguments of `FilesReader.of`.

    Parameters
    ----------
    base : Location
        What paths are relative to.
    from_table : bool
        A person wrote the paths: they may also be absolute, or URIs. Otherwise they come from a listing of `base` and lie in it, whatever they look
        like: an object may be called `http://host/x.tif`.
    """
    return {"kind": "files", "base": str(base), "from_table": from_table}


def files_of(**files: Location | None) -> dict[str, str]:
    """Return what `Source.files` says of the files that were given."""
    return {name: str(location) for name, location in files.items() if location is not None}


class FilesReader:
    """Reads files whole, from any mixture of places; what has no content is refused with its reason."""

    def __init__(self, base: Location, *, from_table: bool) -> None:
        self._base, self._from_table = base, from_table

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "FilesReader":
        """Make it from what `files_spec` returned."""
        return cls(Location(spec["base"]), from_table=spec["from_table"])

    def read(self, entries: pa.Table) -> Iterator[bytes | Unread]:
        """Yield the content of each file, in order; raises StorageError where the storage does not answer."""
        for root, placed in groupby(map(self._place, entries["path"].to_pylist()), key=lambda place: place[0]):
            names = [name for _, name in placed]
            if root.is_local:
                for name in names:
                    yield _read_local(f"{root}/{name}")
                continue
            for start in range(0, len(names), _OBJECTS_PER_BATCH):
                for content in _read_objects(root, names[start : start + _OBJECTS_PER_BATCH]):
                    yield _unread(content) if isinstance(content, OSError) else content

    def _place(self, path: str) -> tuple[Location, str]:
        return place_of(self._base, path) if self._from_table else (self._base, path)


def place_of(base: Location, path: str) -> tuple[Location, str]:
    """Return a root and the name below it for what a table calls a path: relative to `base`, absolute, or a URI.

    Raises
    ------
    UsageError
        The URI is of no place that may be read.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return (_LOCAL_ROOT, path[1:]) if path.startswith("/") else (base, path)
    if scheme == "file":
        return _LOCAL_ROOT, rest.lstrip("/")
    if scheme not in PLACES:
        allowed = ", ".join(f"{known}://" for known in PLACES)
        raise UsageError(f"a path that begins with {scheme[:20]}://; expected a plain path or one of {allowed}")
    bucket, _, key = rest.partition("/")
    return Location(f"{scheme}://{bucket}"), key


def read_described(location: Location, what: str, expected: str) -> bytes:
    """Read a file that describes the inputs (labels, slides, a table); UsageError naming it and what was expected where that fails."""
    try:
        return location.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {location}: {error.strerror or error}; expected {expected}") from error


def _read_objects(root: Location, names: list[str]) -> list[bytes | OSError]:
    try:
        return root.read_many(names)
    except OSError as error:
        # Refused access, mostly. It says nothing of the patches, so the run stops.
        raise StorageError(f"{error.filename or root}: cannot be read ({error.strerror or error})") from error


def _read_local(path: str) -> bytes | Unread:
    try:
        return try_local(path, lambda: _read_once(path))
    except StorageError as error:
        # A bad block is the fault of one file; a server that is gone is not.
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO:
            return _unread(error.__cause__)
        raise
    except FileNotFoundError as error:
        return Unread(RejectReason.UNREADABLE, "a link to nothing") if os.path.islink(path) else _unread(error)
    except OSError as error:
        return _unread(error)
    except ValueError as error:  # a path with a NUL
        return Unread(RejectReason.UNREADABLE, str(error))


def _read_once(path: str) -> bytes | Unread:
    # os.open and os.read instead of open(): half the time for a file of 28 KB. O_NONBLOCK: opening a pipe must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Unread(RejectReason.UNREADABLE, "not a file")
        if status.st_size > MAX_FILE_BYTES:
            return Unread(RejectReason.UNREADABLE, too_many_bytes(status.st_size))
        data = os.read(descriptor, status.st_size)
        # A read may be short; past the end it is empty.
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def _unread(error: OSError) -> Unread:
    reason = RejectReason.MISSING if isinstance(error, FileNotFoundError) else RejectReason.UNREADABLE
    return Unread(reason, error.strerror or type(error).__name__)
