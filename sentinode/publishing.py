"""From a finished staging folder to its place, which may lie in an object store. There nothing can be renamed, so the manifest decides.

All files go below a prefix of their own, the `root` that the manifest names; then the manifest is put, once, only if there is none. Of two runs
one wins, and whoever reads sees the old data set, none or the new. Only what the manifest lists is published. docs/storage.md tells it to users.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from sentinode import storage
from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.locations import Location
from sentinode.manifests import is_inside
from sentinode.storage import (
    exclusive,
    file_record,
    remove_any,
    replaced_path,
    staging_path,
    temporary_folder,
    write_bytes_atomic,
    write_json,
    write_text_atomic,
)

log = logging.getLogger(__name__)

_JOURNAL = ".uploaded"
_FOUND = "found.sha256"
_REPLACED = "replaced.manifest"
_CONCURRENT_UPLOADS = 4


def new_root() -> str:
    """Return a name for the prefix of one run. It goes into the manifest before anything is uploaded and stays the same when the run is continued."""
    return f"parts-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def staging_of(out: Location, work: Path | None = None) -> Path:
    """Return where the work for `out` lies until it is published: beside a local `out`, else below the local folder `work`, named by the URI.

    Without `work` that is the folder `sentinode-<user id>` among the temporary files, which is made here, for this user only.

    Raises
    ------
    UsageError
        The folder among the temporary files belongs to somebody else or is open to others.
    """
    if out.is_local:
        return staging_path(out.local)
    name = f"{out.name}-{hashlib.sha256(out.uri.encode()).hexdigest()[:12]}.staging"
    return (temporary_folder() if work is None else work) / name


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


def note_found(staging: Path, out: Location, manifest_name: str) -> None:
    """Note in a staging folder which manifest stands at `out` now: the only one that `publish(replace=True)` will replace.

    Call it when the work begins, as soon as there is a folder. A note that an interrupted run has made stays: it began earlier. For a local `out`
    nothing is noted: while `writing` holds it nobody else publishes.

    Raises
    ------
    StorageError
        The storage does not answer.
    """
    note = staging / _JOURNAL / _FOUND
    if out.is_local or note.exists():
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(note, _digest(_content(out / manifest_name)))


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
        Holds the manifest and the files that this lists. Hidden files are notes of the work and are not published.
    out : Location
    manifest_name : str
        For an object store the manifest has a `root` (`new_root`), below which its files go; for a local folder none.
    replace : bool
        An object store's manifest that stood there when the run began (`note_found`; without that note, when this was called) is replaced: it is
        deleted before the new one is put, the files it lists afterwards. A local folder is always replaced.

    Raises
    ------
    UsageError
        Another run has published there. What this one uploaded is removed again, the staging folder stays.
    SentinodeError
        The staging folder lacks what the manifest lists; or, for a local `out`, holds what it does not list. Nothing was published.
    StorageError
        The storage does not answer; the call can be repeated.
    """
    data = (staging / manifest_name).read_bytes()
    root, names = _listed(data)
    if bool(root) == out.is_local:
        raise SentinodeError(f"{staging / manifest_name}: " + ("a root in it" if root else "no root in it, which an object store needs"))
    if out.is_local:
        _check_listed(staging, names, manifest_name)
        _clear(staging, {manifest_name, *names}, manifest_name)
        storage.publish(staging, out.local)
        return
    manifest = out / manifest_name
    there = _content(manifest)
    if there != data:
        may_go = _replaceable(staging, there) if replace else None
        if there is not None and _digest(there) != may_go:
            raise _lost(out, manifest_name, there, out / root, names, staging)
        _check_listed(staging, names, manifest_name)
        _upload(staging, names, out / root)
        # Asked again: the upload took its time, and whatever another run has published meanwhile is not ours to remove.
        there = _content(manifest)
        if there is not None and _digest(there) != may_go:
            raise _lost(out, manifest_name, there, out / root, names, staging)
        if there is not None:
            (staging / _JOURNAL).mkdir(exist_ok=True)
            write_bytes_atomic(staging / _JOURNAL / _REPLACED, there)
            manifest.remove()
        try:
            manifest.write_bytes(data, create_only=True)
        except FileExistsError as error:
            raise _lost(out, manifest_name, _content(manifest) or b"", out / root, names, staging) from error
    _remove_replaced(staging, out, {manifest_name, *_placed(data)})
    _discard(staging)


def upload_folder(folder: Path, out: Location, manifest_name: str) -> None:
    """Upload all files of a folder to an object store, where nothing is yet, the manifest last: until then nobody takes it for whole.

    Raises
    ------
    UsageError
        Another manifest stands there, or the store refuses a file.
    StorageError
        The storage does not answer; the call can be repeated.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    try:
        _upload(folder, [name for name in names if name != manifest_name], out)
        (out / manifest_name).write_bytes((folder / manifest_name).read_bytes(), create_only=True)
    except FileExistsError as error:
        raise UsageError(f"{out}: another process has published there; use another --out") from error
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror or error})") from error


def clean_up(out: Location, staging: Path, manifest_name: str) -> None:
    """Remove what a run left that was killed between publishing `out` and clearing up; call it outside `writing` where `out` is found complete.

    Removed are the folder that a local `out` replaced; for an object store the staging folder that `out` was published from, told by its manifest,
    and the files that were replaced. Nothing else: a staging folder of other work may be continued. Cheap where there is nothing, and never fails:
    while another process writes `out`, or where nothing can be removed, nothing happens.
    """
    left = [replaced_path(out.local)] if out.is_local else [staging, _done_path(staging)]
    if not any(os.path.lexists(path) for path in left):
        return
    try:
        with writing(out, staging):
            published = _content(out / manifest_name)
            if published is None:
                return  # not complete any more
            if out.is_local:
                remove_any(replaced_path(out.local))
                return
            remove_any(_done_path(staging))
            with suppress(FileNotFoundError):
                if (staging / manifest_name).read_bytes() == published:
                    _remove_replaced(staging, out, {manifest_name, *_placed(published)})
                    _discard(staging)
    except UsageError:
        return  # another process is writing, or this one may not
    except (OSError, StorageError) as error:
        log.warning("what an interrupted run has left is still there: %s", error)


def _check_listed(staging: Path, names: list[str], manifest_name: str) -> None:
    if absent := [name for name in names if not (staging / name).is_file()]:
        raise SentinodeError(f"{staging}: {absent[0]} is listed in {manifest_name}, but not there ({len(absent)} of {len(names)} files)")


def _clear(staging: Path, kept: set[str], manifest_name: str) -> None:
    """Remove hidden files and empty folders; SentinodeError for any other file that is not to be kept."""
    files = [path for path in staging.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(staging).as_posix(): path for path in files}
    hidden = {name for name in names if any(part.startswith(".") for part in name.split("/"))}
    if surplus := sorted(names.keys() - hidden - kept):
        raise SentinodeError(
            f"{staging}: {surplus[0]} is not listed in {manifest_name}, so nothing was published ({len(surplus)} such files); "
            "remove what is left over there and repeat the command"
        )
    # What cannot be removed goes out with the folder and is read by nobody: NFS keeps `.nfs…` in place of a file until its last reader closes it.
    for name in hidden - kept:
        with suppress(OSError):
            names[name].unlink()
    for folder in sorted((path for path in staging.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        with suppress(OSError):  # not empty
            folder.rmdir()


def _discard(staging: Path) -> None:
    """Remove a staging folder; killed on the way, it is not taken for work that can be continued."""
    done = _done_path(staging)
    remove_any(done)
    staging.rename(done)
    remove_any(done)


def _done_path(staging: Path) -> Path:
    return staging.with_name(f".{staging.name}.done")


def _replaceable(staging: Path, there: bytes | None) -> str:
    """Return the digest of the manifest that this run may replace."""
    try:
        return (staging / _JOURNAL / _FOUND).read_text(encoding="utf-8")
    except FileNotFoundError:
        return _digest(there)


def _digest(manifest: bytes | None) -> str:
    return "" if manifest is None else hashlib.sha256(manifest).hexdigest()


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
    # Where this run has deleted a manifest already, it alone knows the files of that.
    _remove_replaced(staging, out, {manifest_name, *_placed(theirs)})
    # With the notes of what was found goes the claim on it: repeated, the command replaces what it has just told of.
    shutil.rmtree(staging / _JOURNAL, ignore_errors=True)
    return UsageError(
        f"{out}: another run has published {manifest_name} there; what this one uploaded was removed again; "
        "choose another --out, or repeat the command with --overwrite to replace it"
    )


def _remove_replaced(staging: Path, out: Location, kept: set[str]) -> None:
    """Remove the files that the replaced manifest lists, and nothing else; the data set is published already, so failures are only logged."""
    try:
        replaced = (staging / _JOURNAL / _REPLACED).read_bytes()
        out.remove_many([name for name in _placed(replaced) if name not in kept])
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
        inside = all(is_inside(name) for name in (root, *names))
    except (ValueError, AttributeError, KeyError, TypeError):
        return "", []
    return (root, names) if inside else ("", [])


def _placed(manifest: bytes) -> list[str]:
    """Return the files that a manifest lists, relative to the manifest."""
    root, names = _listed(manifest)
    return [f"{root}/{name}" if root else name for name in names]


def _note(staging: Path, name: str) -> Path:
    return staging / _JOURNAL / f"{quote(name, safe='')}.json"


def _content(file: Location) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
