"""Unpacking a source's compressed files once, since rows in the middle of them cannot be reached otherwise."""

import errno
import gzip
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_prep.sources.base import Source
from data_prep.sources.hdf5 import PATCH_BYTES, check_pixels, hdf5_spec, open_hdf5
from sentinode.errors import SentinodeError, UsageError
from sentinode.locations import Location
from sentinode.storage import temporary_name

_BLOCK_BYTES = 8 << 20


def unpack(source: Source, work: Path, progress: Callable[[str, int, int], None]) -> Source:
    """Unpack what of a source must be unpacked before it can be read; what an interrupted run had finished is kept.

    Parameters
    ----------
    source : Source
    work : Path
        Folder for the unpacked files; every node must see it, and nothing but this source may use it.
    progress : callable
        Called as progress("unpack", bytes read, bytes in all).

    Returns
    -------
    Source
        The same, readable; the very same where nothing is compressed.

    Raises
    ------
    UsageError
        A file is damaged or does not fit its labels.
    SentinodeError
        There is not enough space, or the system cannot read or write.
    """
    packed: dict[str, int] = dict(source.reader.get("packed") or {})
    if not packed:
        return source
    folder = Location(source.where)
    work.mkdir(parents=True, exist_ok=True)
    waiting = {name: rows for name, rows in packed.items() if not (work / name.removesuffix(".gz")).exists()}
    needed, free = sum(waiting.values()) * PATCH_BYTES, shutil.disk_usage(work).free
    if needed > free:
        raise SentinodeError(
            f"{work}: {needed / 1e9:.1f} GB are needed to unpack {', '.join(waiting)}, {free / 1e9:.1f} GB are free; make room, "
            f"or put the files unpacked (gunzip) into {folder}"
        )
    total = sum((folder / name).size() for name in waiting)
    done = 0
    if waiting:
        progress("unpack", 0, total)
    for name, rows in waiting.items():
        packed_at = folder / name
        _unpack_one(packed_at, rows, work / name.removesuffix(".gz"), partial(_report, progress, done, total))
        done += packed_at.size()
    return replace(source, reader=hdf5_spec(folder, packed, work))


def _report(progress: Callable[[str, int, int], None], before: int, total: int, done: int) -> None:
    progress("unpack", before + done, total)


def _unpack_one(packed: Location, rows: int, target: Path, report: Callable[[int], None]) -> None:
    temporary = temporary_name(target)
    try:
        with packed.open_input() as raw, gzip.GzipFile(fileobj=raw) as content, temporary.open("wb") as file:
            while block := content.read(_BLOCK_BYTES):
                file.write(block)
                report(raw.tell())
            file.flush()
            os.fsync(file.fileno())
        with open_hdf5(Location(str(temporary)), called=packed) as unpacked:
            check_pixels(unpacked, packed, rows, "its file of labels")
        temporary.replace(target)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{packed}: damaged gzip file ({error}); download it again") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SentinodeError(f"{target.parent}: no space left for unpacking {packed.name}; make room and run the same command again") from error
        raise SentinodeError(f"{packed}: cannot be unpacked to {target.parent} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
