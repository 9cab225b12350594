"""Which image files lie in a folder."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from sentinode.errors import UsageError
from sentinode.images import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Listing:
    """Image files of a folder.

    Attributes
    ----------
    names : list of str
        Paths relative to the folder, separated by slashes, sorted. Hidden files are left out.
    digest : bytes
        SHA-256 over name, size and modification time of each.
    """

    names: list[str]
    digest: bytes


def list_images(folder: str, *, recursive: bool) -> Listing:
    """List the image files of a folder, told by their suffix; none is opened.

    Raises
    ------
    UsageError
        The folder, or with `recursive` one inside it, cannot be listed.
    """
    lines = []
    names = []
    for name, item in _walk(folder, recursive):
        try:
            status = item.stat()
            lines.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n")
        except OSError:  # a dangling link: reading will refuse it
            lines.append(f"{name}\0unreadable\n")
        names.append(name)
    names.sort()
    lines.sort()
    return Listing(names, hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).digest())


def stem_of(name: str) -> str:
    """Return a path without the suffix of its last part."""
    return os.path.splitext(name)[0]


def is_utf8(name: str) -> bool:
    """Tell whether a file name can be written into a table; names on disk may be any bytes."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: str, recursive: bool) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (relative path, item) of each image; a folder that links lead to twice is entered once."""
    waiting = [""]
    seen: set[tuple[int, int]] = set()
    while waiting:
        prefix = waiting.pop()
        path = os.path.join(folder, prefix)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            folders = []
            with os.scandir(path) as items:
                for item in items:
                    if item.name.startswith("."):
                        continue
                    if item.is_dir():
                        folders.append(f"{prefix}{item.name}/")
                    elif os.path.splitext(item.name)[1].lower() in IMAGE_SUFFIXES:
                        yield prefix + item.name, item
        except OSError as error:
            raise UsageError(f"{path}: cannot be listed ({error.strerror or error})") from error
        if recursive:
            waiting += sorted(folders, reverse=True)
