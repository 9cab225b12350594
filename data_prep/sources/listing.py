"""Which image files lie in a folder, and the ids that their names give them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_prep.rejects import Reject, RejectReason
from sentinode.errors import UsageError
from sentinode.images import IMAGE_SUFFIXES
from sentinode.locations import Location


@dataclass(frozen=True)
class Listing:
    """Image files of a folder.

    Attributes
    ----------
    names : list of str
        Paths relative to the folder, separated by slashes, sorted. Hidden files are left out.
    digest : bytes
        SHA-256 over name, size and modification time (or the object store's tag) of each.
    """

    names: list[str]
    digest: bytes


def list_images(folder: Location, *, recursive: bool) -> Listing:
    """List the image files of a folder, told by their suffix; none is opened.

    Raises
    ------
    UsageError
        There are none, or the folder, or with `recursive` one inside it, cannot be listed.
    """
    try:
        found = folder.entries(recursive=recursive)
    except OSError as error:
        raise UsageError(f"source {error.filename or folder}: cannot be listed ({error.strerror or error})") from error
    images = [
        entry
        for entry in found
        if entry.name[-5:].lower().endswith(IMAGE_SUFFIXES) and not (entry.is_dir or entry.name[0] == "." or "/." in entry.name)
    ]
    if not images:
        raise UsageError(f"source {folder}: no images ({', '.join(IMAGE_SUFFIXES)}) there")
    lines = "".join([f"{entry.name}\0{entry.size}\0{entry.stamp}\n" for entry in images])
    return Listing([entry.name for entry in images], hashlib.sha256(lines.encode("utf-8", "surrogateescape")).digest())


def stem_of(name: str) -> str:
    """Return the path of an image file without its suffix."""
    return name[: name.rindex(".")]


def split_off_unwritable(names: Iterable[str]) -> tuple[list[str], list[Reject]]:
    """Part the names into those that a table can hold and refusals: names on disk may be any bytes, those in Parquet are UTF-8."""
    kept: list[str] = []
    rejects: list[Reject] = []
    for name in names:
        if name.isascii() or _is_utf8(name):
            kept.append(name)
        else:
            rejects.append(Reject(RejectReason.UNREADABLE, None, name, "the file name is not UTF-8"))
    return kept, rejects


def repeated(ids: Sequence[str]) -> set[str]:
    """Return the ids that stand there more than once."""
    return {id_ for id_, count in Counter(ids).items() if count > 1} if len(set(ids)) < len(ids) else set()


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
