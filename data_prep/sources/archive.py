"""Image files inside one zip or tar file, read where they are: nothing is unpacked, so a name such as `../x.tif` leads nowhere."""

import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa

from data_prep.rejects import RejectReason
from data_prep.sources.base import Unread
from data_prep.sources.listing import Listing, listing_of
from sentinode.errors import StorageError, UsageError
from sentinode.locations import Entry, Location

ARCHIVE_SUFFIXES = (".zip", ".tar")
PACKED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""Endings of archives that are compressed as a whole: a file in the middle cannot be reached without all that lies before it."""

_TAR_BLOCK = 512
# What zipfile raises on damaged, encrypted or unknown members.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


def list_archive(where: Location) -> tuple[Listing, dict[str, int]]:
    """List the image files of an archive by their names; none is read. Of a name that stands there twice the last counts, as when unpacking.

    Returns
    -------
    listing : Listing
        Names relative to the archive; its digest tells a changed archive by names, sizes, places and (zip) checksums.
    rows : dict of str to int
        Name -> where the reader finds it: the place in a zip's directory, the byte in a tar. In the order of the file.

    Raises
    ------
    UsageError
        The archive cannot be opened, or is damaged.
    """
    try:
        found = _list_zip(where) if where.name.lower().endswith(".zip") else _list_tar(where)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError, NotImplementedError) as error:
        raise UsageError(f"source {where}: damaged, or no {'/'.join(ARCHIVE_SUFFIXES)} archive ({error})") from error
    except OSError as error:
        raise UsageError(f"source {where}: {error.strerror or error}") from error
    return listing_of([entry for entry, _ in found.values()]), {name: row for name, (_, row) in found.items()}


def archive_spec(where: Location) -> dict[str, Any]:
    """Return the arguments of `ArchiveReader.of`."""
    return {"kind": "archive", "archive": str(where)}


class ArchiveReader:
    """Reads files by their place in the archive."""

    def __init__(self, where: Location) -> None:
        self._where = where

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "ArchiveReader":
        """Make it from what `archive_spec` returned."""
        return cls(Location(spec["archive"]))

    def read(self, entries: pa.Table) -> Iterator[bytes | Unread]:
        """Yield the content of each file, `row` saying where it is, in order; raises StorageError where the archive itself cannot be opened."""
        rows = entries["row"].to_pylist()
        try:
            yield from self._read_zip(rows) if self._where.name.lower().endswith(".zip") else self._read_tar(rows)
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise StorageError(f"{self._where}: cannot be read; every node must see it as it was at the beginning ({error})") from error

    def _read_zip(self, rows: list[int]) -> Iterator[bytes | Unread]:
        archive = _opened_zip(self._where)
        members = archive.infolist()
        for row in rows:
            try:
                # Never more than the directory says, whatever the data would unpack to.
                with archive.open(members[row]) as file:
                    yield file.read()
            except _DAMAGE as error:
                yield Unread(RejectReason.UNREADABLE, str(error) or type(error).__name__)

    def _read_tar(self, rows: list[int]) -> Iterator[bytes | Unread]:
        with self._where.open_input() as file:
            for row in rows:
                file.seek(row - _TAR_BLOCK)
                size = tarfile.TarInfo.frombuf(file.read(_TAR_BLOCK), tarfile.ENCODING, "surrogateescape").size
                content = file.read(size)
                yield content if len(content) == size else Unread(RejectReason.UNREADABLE, "the archive ends within this file")


# Its directory, of a quarter of a million files perhaps, is read once in a process. Threads may read at the same time: zipfile has a lock.
@lru_cache(maxsize=1)
def _opened_zip(where: Location) -> zipfile.ZipFile:
    return zipfile.ZipFile(where.open_input())


def _list_zip(where: Location) -> dict[str, tuple[Entry, int]]:
    with where.open_input() as file, zipfile.ZipFile(file) as archive:
        members = [(row, member) for row, member in enumerate(archive.infolist()) if not member.is_dir()]
    last = {member.filename: (row, member) for row, member in members}
    in_order = sorted(last.values(), key=lambda found: found[1].header_offset)
    return {member.filename: (Entry(member.filename, member.file_size, f"{member.CRC:08x}-{member.header_offset}"), row) for row, member in in_order}


def _list_tar(where: Location) -> dict[str, tuple[Entry, int]]:
    with where.open_input() as file, tarfile.open(fileobj=file, mode="r:") as archive:
        members = [member for member in archive if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)]
    last = {member.name: member for member in members}
    in_order = sorted(last.values(), key=lambda member: member.offset_data)
    # A leading "./", as `tar cf x.tar .` writes it, would make every name a hidden one.
    return {
        (name := member.name.removeprefix("./")): (Entry(name, member.size, f"{member.mtime}-{member.offset_data}"), member.offset_data)
        for member in in_order
    }
