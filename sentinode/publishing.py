"""From a finished staging folder to its place, which may lie in an object store. There nothing can be renamed, so the manifest decides.

All files go below a prefix of their own, the `root` that the manifest names; then the manifest is put, once, only if there is none. Of two runs
one wins, and whoever reads sees the old data set, none or the new. docs/storage.md tells it to users.
"""

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from sentinode import storage
from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.locations import Location
from sentinode.storage import exclusive, file_record, staging_path, write_bytes_atomic, write_json

log = logging.getLogger(__name__)

_JOURNAL = ".uploaded"
_REPLACED = "replaced.manifest"
_CONCURRENT_UPLOADS = 4


def new_root() -> str:
    """Return a name for the prefix of one run. It goes into the manifest before anything is uploaded and stays the same when the run is continued."""
    return f"parts-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def staging_of(out: Location, work: Path) -> Path:
    """Return where the work for `out` lies until it is published: beside a local `out`, else below the local folder `work`, named by the URI."""
    if out.is_local:
        return staging_path(out.local)
    return work / f"{out.name}-{hashlib.sha256(out.uri.encode()).hexdigest()[:12]}.staging"


@contextmanager
def writing(out: Location, staging: Path) -> Iterator[None]:
    """Hold the right to write `out`: against everybody for a local folder, against this machine for an object store, where the manifest decides.

    Raises
    ------
    UsageError
        Another process has it, or `out` is a whole bucket.
    """
    if not out.is_local and not out.name:
        raise UsageError(f"{out}: name a folder in the bucket")
    with exclusive(out.local if out.is_local else staging):
        yield


def upload_part(staging: Path, name: str, target: Location) -> None:
    """Upload one finished file before the rest is ready; one that is up is not sent again. Tasks may do this for different files at once.

    Parameters
    ----------
    staging : Path
        On a file system that whoever publishes sees too: the note of what is up lies in it.
    name : str
        Path relative to `staging`, and to `target`.
    target : Location
        The output followed by its `root`.

    Raises
    ------
    StorageError
        The storage does not answer; the call can be repeated.
    OSError
        It refuses the file.
    """
    note = _note(staging, name)
    record = {"target": target.uri, **file_record(staging, name)}
    try:
        if json.loads(note.read_bytes()) == record:
            return
    except (FileNotFoundError, ValueError):
        pass  # not sent yet, or not noted whole
    (target / name).put_file(staging / name)
    note.parent.mkdir(exist_ok=True)
    write_json(note, record)


def publish(staging: Path, out: Location, manifest_name: str, *, replace: bool = False) -> None:
    """Move a finished staging folder to `out`; afterwards there is no staging folder. Interrupted, it continues where it was when it is called again.

    Parameters
    ----------
    staging : Path
        Holds the manifest. Hidden files in it are not published.
    out : Location
    manifest_name : str
        For an object store the manifest has a `root` (`new_root`), relative to which it lists its files.
    replace : bool
        An object store's manifest that is there already is replaced: it is deleted before the new one is put, the files it lists afterwards. A local
        folder is always replaced.

    Raises
    ------
    UsageError
        Another run has published there. What this one uploaded is removed again.
    StorageError
        The storage does not answer; the call can be repeated.
    """
    if out.is_local:
        storage.publish(staging, out.local)
        return
    data = (staging / manifest_name).read_bytes()
    root, _ = _listed(data)
    if not root:
        raise SentinodeError(f"{staging / manifest_name}: no root in it, which an object store needs")
    target, manifest = out / root, out / manifest_name
    names = sorted(name for name in _names(staging) if name != manifest_name)
    there = _content(manifest)
    if there != data:
        if there is not None and not replace:
            raise _lost(out, manifest_name, there, target, names, staging)
        _upload(staging, names, target)
        there = _content(manifest) if replace else None
        if there is not None:
            (staging / _JOURNAL).mkdir(exist_ok=True)
            write_bytes_atomic(staging / _JOURNAL / _REPLACED, there)
            manifest.remove()
        try:
            manifest.write_bytes(data, create_only=True)
        except FileExistsError as error:
            raise _lost(out, manifest_name, _content(manifest) or b"", target, names, staging) from error
    _remove_replaced(staging, out, {f"{root}/{name}" for name in names} | {manifest_name})
    shutil.rmtree(staging)


def _upload(staging: Path, names: list[str], target: Location) -> None:
    expected = {name: (staging / name).stat().st_size for name in names}
    # A second round for what was noted as sent but has been removed since, by a clean-up of the bucket for example.
    for _ in range(2):
        with ThreadPoolExecutor(_CONCURRENT_UPLOADS) as pool:
            for _done in pool.map(lambda name: upload_part(staging, name, target), names):
                pass
        found = {entry.name: entry.size for entry in target.entries(recursive=True)} if target.exists() else {}
        absent = [name for name in names if found.get(name) != expected[name]]
        if not absent:
            return
        for name in absent:
            _note(staging, name).unlink(missing_ok=True)
    raise StorageError(f"{target}: {len(absent)} of {len(names)} files are not there after they were uploaded, {absent[0]} for one")


def _lost(out: Location, manifest_name: str, theirs: bytes, target: Location, names: list[str], staging: Path) -> UsageError:
    if _listed(theirs)[0] != target.name:
        target.remove_many(names)
    shutil.rmtree(staging / _JOURNAL, ignore_errors=True)
    return UsageError(f"{out}: another run has published {manifest_name} there; what this one uploaded was removed again; choose another --out")


def _remove_replaced(staging: Path, out: Location, kept: set[str]) -> None:
    """Remove the files that the replaced manifest lists, and nothing else; the data set is published already, so failures are only logged."""
    try:
        root, names = _listed((staging / _JOURNAL / _REPLACED).read_bytes())
        out.remove_many([name for name in (f"{root}/{name}" if root else name for name in names) if name not in kept])
    except FileNotFoundError:
        return  # nothing was replaced
    except (OSError, StorageError) as error:
        log.warning("files of the replaced data set are left: %s", error)


def _listed(manifest: bytes) -> tuple[str, list[str]]:
    """Return the root of a manifest and the files it lists below that; nothing of one that cannot be read or points outside its folder."""
    try:
        content = json.loads(manifest)
        root = content.get("root", "")
        names = [record["path"] for key in ("shards", "files") for record in content.get(key, [])]
        inside = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in (root, *names))
    except (ValueError, AttributeError, KeyError, TypeError):
        return "", []
    return (root, names) if inside else ("", [])


def _names(staging: Path) -> Iterator[str]:
    for path in staging.rglob("*"):
        relative = path.relative_to(staging)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def _note(staging: Path, name: str) -> Path:
    return staging / _JOURNAL / f"{quote(name, safe='')}.json"


def _content(file: Location) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
