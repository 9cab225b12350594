"""Local folders that are complete or do not exist: work goes to a staging folder, the manifest is written last, then one rename.

What may lie in an object store as well passes `sentinode.locations.locate` and `sentinode.publishing`; what must be local passes `local_path`.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentinode.errors import ConfigError, ManifestError, ManifestNotFoundError, StorageError, UsageError

if TYPE_CHECKING:
    from sentinode.locations import Location


def local_path(uri: str | os.PathLike[str]) -> Path:
    """Return the absolute path that a plain path or `file://` URI names.

    Raises
    ------
    ConfigError
        For any other scheme, and for an empty path, which would mean the current folder.
    """
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not text:
        raise ConfigError("a path is empty; expected a folder or a file")
    if not separator:
        return Path(os.path.expanduser(text)).absolute()
    if scheme == "file" and rest.startswith("/"):
        return Path(rest)
    if scheme == "file":
        raise ConfigError(f"{text}: expected file:///, then the rest of an absolute path")
    raise ConfigError(f"{text}: {scheme}:// is not supported yet for this; use a local path or a mounted shared folder")


def temporary_folder() -> Path:
    """Return, and make, the folder `sentinode-<user id>` among the temporary files, open to this user only.

    Raises
    ------
    UsageError
        It belongs to somebody else or is open to others.
    """
    # Everybody may write to /tmp, so whoever knows the name could put finished work of their own there, to be published as ours, or read pixels.
    user = os.geteuid()
    folder = Path(tempfile.gettempdir()) / f"sentinode-{user}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        status = folder.lstat()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be used ({error.strerror}); name another one with --work or TMPDIR") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user:
        raise UsageError(f"{folder}: expected a folder of user {user}, but it is somebody else's or a link; name another one with --work or TMPDIR")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise UsageError(f"{folder}: others may use it; look at what is in it, then chmod 700, or name another one with --work or TMPDIR")
    return folder


def staging_path(out: Path) -> Path:
    """Where the work for `out` lies until it is complete: a sibling, so that publishing is one rename on one file system."""
    return out.with_name(out.name + ".staging")


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold the right to write `out`; the lock goes with the process, however it ends.

    Raises
    ------
    UsageError
        Another process is writing the same output, or this one may not.
    StorageError
        Its disk is full.
    """
    if out.name in ("", ".."):
        raise UsageError(f"{out}: name the folder to make")
    path = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{out}: cannot be written ({error.strerror}); make room there and run the same command again") from error
        raise UsageError(f"{out}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have removed the file since it was opened here; a lock on a removed file keeps nobody out.
            if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError) as error:
            raise UsageError(f"{out}: another process is writing it") from error
        except OSError as error:
            raise UsageError(f"{out}: cannot be locked ({error.strerror})") from error
        try:
            yield
        finally:
            # Removed while still held: a process that opened the same file meanwhile fails on the lock, not on half a result.
            path.unlink(missing_ok=True)


def publish(staging: Path, out: Path) -> None:
    """Move a finished staging folder to `out`. What was at `out` is moved aside first, so a reader sees the old, none or the new.

    Everything in the folder is on the disk before it gets its name: after a power cut the folder is whole or still called staging. Killed between
    the two renames, the old folder waits as `replaced_path(out)` until the next call has put the new one in its place.
    """
    for path in (staging, *sorted(staging.rglob("*"))):
        # A network file system's stand-in for a file that was removed while open; it goes when its reader does, which may be now.
        if not path.name.startswith(".nfs"):
            _fsync(path)
    old = replaced_path(out)
    if os.path.lexists(out):
        remove_any(old)
        out.rename(old)
    staging.rename(out)
    _fsync(out.parent)
    remove_any(old)


def replaced_path(out: Path) -> Path:
    """Where what was at `out` lies while it is being replaced: a name that nobody gives to a backup, since whatever is there gets deleted."""
    return out.with_name(f".{out.name}.replaced")


def remove_any(path: Path) -> None:
    """Remove a file, a link or a folder with all in it as far as that can be removed; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path` that nobody else writes, on whatever machine; what a killed process leaves matches `.*.tmp`."""
    # The process id alone coincides on shared storage: in containers it is often 1. Threads of one process are told apart by the random digits.
    host = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes, *, create_only: bool = False) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part.

    Raises
    ------
    FileExistsError
        With `create_only`: it exists. Of several writers at the same time one wins.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if create_only:
            os.link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `json_bytes` to a file, whole or not at all."""
    write_bytes_atomic(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """Return strict JSON (no NaN), indented, keys as given: what our JSON files hold."""
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def canonical_json(content: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, no NaN. What digests are computed over."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def read_manifest_json(folder: "Path | Location", name: str, what: str, newest: int) -> dict[str, Any]:
    """Read `folder/name` and check its format version.

    Parameters
    ----------
    folder : Path or Location
        The folder that `name` makes a `what`.
    name : str
        File name of the manifest.
    what : str
        For the error line, e.g. "prepared data set".
    newest : int
        Newest format version this program writes; it and the one before are read.

    Raises
    ------
    ManifestNotFoundError
        The file does not exist.
    ManifestError
        It is not a JSON object, or of a format version this program does not read.
    StorageError
        The storage does not answer.
    """
    path = folder / name
    try:
        content = json.loads(path.read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestNotFoundError(f"not a {what}: {folder} (no {name} there)") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or type(version := content.get("format_version")) is not int:
        raise ManifestError(f"{path}: no format_version in it")
    if version > newest:
        raise ManifestError(f"{path}: format version {version} is newer than {newest}, the newest this program reads; upgrade sentinode")
    if version < (oldest := max(1, newest - 1)):
        raise ManifestError(f"{path}: format version {version} is older than {oldest}, the oldest this program reads; make it again")
    return content


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(folder: Path, name: str) -> dict[str, Any]:
    """Return `{"path", "bytes", "sha256"}` of a file as manifests list it."""
    path = folder / name
    return {"path": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
