"""How fsspec is asked for what lies in an object store: one client per process and scheme, no cached listings, no retries below ours."""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

import fsspec

PACKAGES = {
    "s3": ("s3fs", "pip install 'sentinode[s3]'"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "az": ("adlfs", "pip install adlfs"),
    "abfs": ("adlfs", "pip install adlfs"),
}
"""Scheme -> the package that fsspec needs for it, and how to get that."""

_CONCURRENT_READS = 64
_READ_AHEAD_BYTES = 4 << 20


def file_system(scheme: str) -> Any:
    """Return the fsspec file system, made anew only in a new process."""
    if scheme != "s3":
        return fsspec.filesystem(scheme, use_listings_cache=False)
    # Both botocore and s3fs would retry, the attempts of the one times those of the other; one patience, ours, ends when it says.
    client = {"retries": {"mode": "standard", "total_max_attempts": 1}, "max_pool_connections": _CONCURRENT_READS}
    files = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=client)
    files.retries = 1
    return files


def path_in(files: Any, uri: str) -> str:
    """Return what the file system calls a URI."""
    return str(files._strip_protocol(uri))


def read_objects(scheme: str, uris: Sequence[str]) -> list[bytes | Exception]:
    """Read many small objects, 64 at a time; returns the content of each in order, or the client's error."""
    files = file_system(scheme)
    nothing = [None] * len(uris)
    # Without it s3fs asks for the size of each object first, which doubles the requests.
    options = {"max_concurrency": 1} if scheme == "s3" else {}
    contents = files.cat_ranges([path_in(files, uri) for uri in uris], nothing, nothing, on_error="return", batch_size=_CONCURRENT_READS, **options)
    return cast(list[bytes | Exception], contents)


def stamp_of(info: dict[str, Any]) -> str:
    """Return what changes with the content of an object, from its entry in a listing."""
    for name in ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime"):
        if info.get(name):
            return str(info[name]).strip('"')
    return ""


class ObjectFile(io.RawIOBase):
    """An object as a seekable file.

    Parameters
    ----------
    size : int
        Bytes.
    read_range : callable
        Called as read_range(start, end); one request.
    """

    def __init__(self, size: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size, self._read_range, self._position = size, read_range, 0

    def buffered(self) -> BinaryIO:
        """Return this file with read-ahead: small reads in order are one request per 4 MiB."""
        return cast(BinaryIO, io.BufferedReader(self, _READ_AHEAD_BYTES))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        data = self._read_range(start, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
