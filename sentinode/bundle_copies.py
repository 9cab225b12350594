"""Bundles in an object store are used from copies on the disk of the machine that uses them: one copy for all its processes.

    <temporary files>/sentinode-<user id>/bundles/<address>-<content>/    both as parts of SHA-256 digests

A copy is named by what the store listed, so another bundle at the same address, or one more engine in it, is another copy. Whoever opens a copy
checks it against its manifest: what is in the temporary folder need not be believed.
"""

import errno
import fcntl
import hashlib
import secrets
from pathlib import Path

from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.locations import Entry, Location
from sentinode.manifests import is_inside, read_bundle_manifest
from sentinode.storage import canonical_json, remove_any, temporary_folder


def local_copy(bundle: Location, *, anew: bool = False) -> Path:
    """Return a folder of this machine with what a bundle in an object store holds now.

    Parameters
    ----------
    bundle : Location
    anew : bool
        Do not use a copy that is there already.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        There is no bundle.
    StorageError
        The storage does not answer, or there is no room for the copy.
    UsageError
        The storage refuses access, or the temporary folder cannot be used.
    """
    try:
        return _local_copy(bundle, anew=anew)
    except _ChangedError:
        # An engine that is exported again goes before it comes: it was listed, and was not there when its turn came.
        return _local_copy(bundle, anew=anew)


class _ChangedError(StorageError):
    """What was listed was not there when its turn came."""


def _local_copy(bundle: Location, *, anew: bool) -> Path:
    entries = _entries(bundle)
    content = canonical_json([(entry.name, entry.size, entry.stamp) for entry in entries])
    copies = temporary_folder() / "bundles"
    copy = copies / "-".join(hashlib.sha256(part).hexdigest()[:12] for part in (bundle.uri.encode(), content))
    try:
        copies.mkdir(exist_ok=True)
        # Of several replicas that start at the same time one fetches, the others wait for it.
        with (copies / f".{copy.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if anew or not _holds(copy, entries):
                _replace(bundle, entries, copy)
    except OSError as error:
        raise _not_copied(bundle, error) from error
    return copy


def _entries(bundle: Location) -> list[Entry]:
    """List what belongs to a bundle, and nothing else that may lie below its prefix."""
    try:
        known = {"bundle.json", *read_bundle_manifest(bundle).files}
        entries = bundle.entries(recursive=True)
    except OSError as error:
        raise UsageError(f"{bundle}: cannot be read ({error.strerror or error})") from error
    names = {entry.name for entry in entries}
    return [entry for entry in entries if is_inside(entry.name) and (entry.name in known or _is_inner(entry.name, names))]


def _is_inner(name: str, names: set[str]) -> bool:
    """Tell whether a file is a member's, or an engine's that is whole: the manifest of an engine is uploaded last."""
    parts = name.split("/")
    if "engines" in parts[:-2]:
        return "/".join([*parts[: parts.index("engines") + 2], "engine.json"]) in names
    return parts[0] == "members"


def _holds(copy: Path, entries: list[Entry]) -> bool:
    """Tell whether all files are there. Temporary files get cleared away one by one, and an engine that is gone would be done without."""
    return all((copy / entry.name).is_file() and (copy / entry.name).stat().st_size == entry.size for entry in entries)


def fetch(bundle: Location, folder: Path) -> None:
    """Copy what a bundle in an object store holds into a folder of the caller's; raises like `local_copy`."""
    try:
        _fetch(bundle, _entries(bundle), folder)
    except OSError as error:
        raise _not_copied(bundle, error) from error


def _not_copied(bundle: Location, error: OSError) -> SentinodeError:
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith(bundle.uri):
        return _ChangedError(f"{bundle}: changed while it was copied; repeat the command")
    what = f"{bundle}: cannot be copied to {temporary_folder()} ({error.strerror})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{what}: {error.filename}" if error.filename else what)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StorageError(f"{what}; make room there, or set TMPDIR to another folder" if full else f"{what}; repeat the command")


def _fetch(bundle: Location, entries: list[Entry], folder: Path) -> None:
    for entry in entries:
        target = folder / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        (bundle / entry.name).get_file(target)


def _replace(bundle: Location, entries: list[Entry], copy: Path) -> None:
    incoming, outgoing = (copy.with_name(f".{copy.name}.{secrets.token_hex(4)}.{what}") for what in ("new", "old"))
    try:
        _fetch(bundle, entries, incoming)
        if copy.exists():
            copy.rename(outgoing)
        incoming.rename(copy)
    finally:
        remove_any(incoming)
        remove_any(outgoing)
