"""A folder or file anywhere: on this machine, on a mounted shared file system, or in an object store (s3://, gs://, az://) through fsspec."""

import errno
import importlib.util
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from sentinode.errors import ConfigError, MissingPackageError, StorageError
from sentinode.object_store import PACKAGES, ObjectFile, file_system, path_in, read_objects, stamp_of
from sentinode.retries import store_meaning, store_waits, try_local, try_store
from sentinode.storage import local_path, remove_any, write_bytes_atomic

_T = TypeVar("_T")

_CONCURRENT_REMOVALS = 16


@dataclass(frozen=True)
class Entry:
    """One name in a listing.

    Attributes
    ----------
    name : str
        Relative to the folder listed, with "/".
    size : int
        Bytes; 0 for folders.
    stamp : str
        Changes when the content does: modification time in ns locally, the store's tag elsewhere. "" for folders, "unreadable" for dangling links.
    is_dir : bool
    """

    name: str
    size: int
    stamp: str
    is_dir: bool = False


@dataclass(frozen=True)
class Location:
    """A folder or file anywhere. Made by `locate`; travels between processes; `str()` gives the path or URI.

    What every method may raise, besides what it says: FileNotFoundError, PermissionError or another OSError for what will not pass, and StorageError
    for what may pass (time-outs, 5xx, refused connections) after retries.
    """

    uri: str
    """An absolute path, or scheme://bucket/key without a slash at its end."""

    def __str__(self) -> str:
        return self.uri

    def __fspath__(self) -> str:
        """Return the path for functions that take one; raises ConfigError where it is not on this machine."""
        return os.fspath(self.local)

    def __truediv__(self, name: str) -> "Location":
        """Return what has this name, relative with "/", below this folder; the folder itself for ""."""
        return Location(f"{self.uri.rstrip('/')}/{name.strip('/')}") if name else self

    @property
    def name(self) -> str:
        """The last part of the path; "" for a whole bucket."""
        return Path(self.uri).name if self.is_local else self.uri.partition("://")[2].partition("/")[2].rpartition("/")[2]

    @property
    def parent(self) -> "Location":
        """The folder that it lies in; of a whole bucket itself."""
        if self.is_local:
            return Location(os.fspath(Path(self.uri).parent))
        return Location(self.uri[: -len(self.name)].rstrip("/")) if self.name else self

    def with_name(self, name: str) -> "Location":
        """Return a sibling; raises ConfigError for a whole bucket, which has none."""
        if not self.name:
            raise ConfigError(f"{self}: name a folder or a file in it")
        return Location(self.uri[: -len(self.name)] + name)

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return "://" not in self.uri

    @property
    def local(self) -> Path:
        """The path; raises ConfigError like `local_path` where it is not one."""
        return local_path(self.uri)

    def exists(self) -> bool:
        """Tell whether there is a file, a folder, or in an object store anything below."""
        return self._info() is not None

    def is_dir(self) -> bool:
        """Tell whether it is a folder; in an object store, whether anything lies below."""
        info = self._info()
        return info is not None and info[1]

    def bucket_may_exist(self) -> bool:
        """Tell whether the bucket is there; True where this user may not ask, and on disk, where there is none."""
        if self.is_local:
            return True
        bucket = self.uri.partition("://")[2].partition("/")[0]
        try:
            return Location(f"{self._scheme}://{bucket}").exists()
        except PermissionError:
            return True

    def why_nothing(self, otherwise: str) -> str:
        """Return why nothing was found here, in the words of an error: that the bucket is missing, else `otherwise`."""
        return otherwise if self.bucket_may_exist() else "there is no such bucket"

    def size(self) -> int:
        """Return the bytes of a file; raises FileNotFoundError also for a folder."""
        info = self._info()
        if info is None or info[1]:
            raise FileNotFoundError(errno.ENOENT, "No such file", self.uri)
        return info[0]

    def _info(self) -> tuple[int, bool] | None:
        """Return (bytes, whether it is a folder), None if there is nothing."""
        try:
            if self.is_local:
                status = try_local(self.uri, lambda: os.stat(self.uri))
                return status.st_size, stat.S_ISDIR(status.st_mode)
            info = self._ask(lambda files, path: files.info(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(info["size"] or 0), info["type"] == "directory"

    def read_bytes(self) -> bytes:
        """Return the whole content of a file."""
        if self.is_local:
            return try_local(self.uri, Path(self.uri).read_bytes)
        return cast(bytes, self._ask(lambda files, path: files.cat_file(path)))

    def read_range(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to before `end` of an object in a store; one request."""
        return cast(bytes, self._ask(lambda files, path: files.cat_file(path, start=start, end=end)))

    def read_many(self, names: Sequence[str]) -> list[bytes | OSError]:
        """Return the whole content of many small objects below this folder of an object store, in order, or why one of them has none.

        64 are read at a time. What concerns more than one file (refused access there, a storage that does not answer) is raised.
        """
        results: list[bytes | OSError | None] = [None] * len(names)
        waits, wanted = store_waits(), list(range(len(names)))
        while True:
            failure = None
            for position, result in zip(wanted, read_objects(self._scheme, [(self / names[position]).uri for position in wanted]), strict=True):
                meaning = store_meaning(result, (self / names[position]).uri) if isinstance(result, Exception) else result
                if isinstance(meaning, (bytes, FileNotFoundError)):
                    results[position] = meaning
                elif isinstance(meaning, StorageError):
                    failure = meaning
                else:
                    raise meaning
            wanted = [position for position in wanted if results[position] is None]
            if failure is None:
                return cast(list[bytes | OSError], results)
            wait = next(waits, None)
            if wait is None:
                raise failure
            time.sleep(wait)

    def open_input(self) -> BinaryIO:
        """Open a file for reading, seekable; pyarrow.parquet and h5py take it. What is read whole is read faster with `read_bytes`."""
        if self.is_local:
            return try_local(self.uri, lambda: open(self.uri, "rb"))
        return ObjectFile(self.size(), self.read_range).buffered()

    def entries(self, *, recursive: bool = False) -> list[Entry]:
        """List a folder, sorted by name: its files and folders, or with `recursive` all files below it. One request lists a thousand objects.

        Raises
        ------
        FileNotFoundError
            There is no such folder; in an object store, nothing below it.
        NotADirectoryError
            It is a file.
        """
        if self.is_local:
            return sorted(_local_entries(self.uri, recursive), key=lambda entry: entry.name)
        path, infos = self._ask(lambda files, path: (path, files.find(path, detail=True).values() if recursive else files.ls(path, detail=True)))
        entries = [
            Entry(info["name"][len(path) + 1 :], 0 if is_dir else int(info["size"]), "" if is_dir else stamp_of(info), is_dir)
            for info in infos
            # Keys that end in "/" are markers that some tools write for folders.
            if (is_dir := info["type"] == "directory") or not info["name"].endswith("/")
        ]
        if any(not entry.name for entry in entries) and len(entries) == 1:
            raise NotADirectoryError(errno.ENOTDIR, "Not a folder", self.uri)
        if not infos:
            raise FileNotFoundError(errno.ENOENT, "No such folder, or nothing in it", self.uri)
        return sorted((entry for entry in entries if entry.name), key=lambda entry: entry.name)

    def write_bytes(self, data: bytes, *, create_only: bool = False) -> None:
        """Write a whole file; a reader sees the old content or the new.

        Raises
        ------
        FileExistsError
            With `create_only`: it exists with other content. Of several writers at the same time one wins.
        """
        try:
            if self.is_local:
                Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
                try_local(self.uri, lambda: write_bytes_atomic(Path(self.uri), data, create_only=create_only))
            else:
                self._ask(lambda files, path: files.pipe_file(path, data, mode="create" if create_only else "overwrite"))
        except FileExistsError:
            # A put whose answer was lost is repeated and meets its own first attempt.
            if self.read_bytes() != data:
                raise

    def get_file(self, target: Path) -> None:
        """Copy a file from here, in an object store, to a local file."""
        self._ask(lambda files, path: files.get_file(path, os.fspath(target)))

    def put_file(self, source: Path) -> None:
        """Upload a local file to here, in an object store."""
        self._ask(lambda files, path: files.put_file(os.fspath(source), path))

    def remove(self) -> None:
        """Remove a file; nothing happens if there is none."""
        try:
            if self.is_local:
                try_local(self.uri, lambda: os.unlink(self.uri))
            else:
                self._ask(lambda files, path: files.rm_file(path))
        except FileNotFoundError:
            pass

    def remove_many(self, names: Sequence[str]) -> None:
        """Remove files below this folder, several at a time; those that do not exist are no error."""
        with ThreadPoolExecutor(_CONCURRENT_REMOVALS) as pool:
            for _ in pool.map(lambda name: (self / name).remove(), names):
                pass

    def remove_tree(self) -> None:
        """Remove a folder with all in it, as far as that can be removed; nothing happens if there is none."""
        if self.is_local:
            remove_any(self.local)
            return
        with suppress(FileNotFoundError):
            self.remove_many([entry.name for entry in self.entries(recursive=True)])

    @property
    def _scheme(self) -> str:
        return self.uri.partition("://")[0]

    def _ask(self, action: Callable[[Any, str], _T]) -> _T:
        """Run an action with the file system and the path in it, with retries."""

        def run() -> _T:
            files = file_system(self._scheme)
            return action(files, path_in(files, self.uri))

        return try_store(self.uri, run)


def locate(uri: str | os.PathLike[str] | Location) -> Location:
    """Return where a path or URI points; nothing is asked of any storage.

    Raises
    ------
    ConfigError
        For a scheme that is not supported, an empty path, a URI without a bucket or with credentials in it.
    MissingPackageError
        The scheme's package is not installed.
    """
    if isinstance(uri, Location):
        return uri
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "file":
        return Location(os.fspath(local_path(text)))
    if scheme not in PACKAGES:
        raise ConfigError(f"{text}: {scheme}:// is not supported; use a local path or one of {', '.join(f'{known}://' for known in PACKAGES)}")
    bucket, _, key = rest.partition("/")
    user, at, _ = bucket.partition("@")
    if at and ":" in user:
        raise ConfigError(f"{scheme}://…: credentials do not belong in a URI; docs/storage.md says where they do")
    if not bucket:
        raise ConfigError(f"{text}: expected {scheme}://BUCKET/FOLDER")
    package, command = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(f"{scheme}:// needs {package}: {command}")
    parts = [part for part in key.split("/") if part]
    return Location("/".join([f"{scheme}://{bucket}", *parts]))


def _local_entries(folder: str, recursive: bool, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Entry]:
    status = try_local(folder, lambda: os.stat(folder))
    if (identity := (status.st_dev, status.st_ino)) in above:
        return  # a link to a folder that it lies in
    with try_local(folder, lambda: os.scandir(folder)) as items:
        for item in items:
            name = prefix + item.name
            if item.is_dir():
                if recursive:
                    yield from _local_entries(item.path, True, f"{name}/", above | {identity})
                else:
                    yield Entry(name, 0, "", is_dir=True)
                continue
            try:
                found = item.stat()
                yield Entry(name, found.st_size, str(found.st_mtime_ns))
            except OSError:  # a dangling link: who reads it will say so
                yield Entry(name, 0, "unreadable")
