"""Decoding one block of inputs: what a Ray Data task of prepare does. Pixels go to disk, only figures about them are kept."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.anchors import Anchors
from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import ENTRY_SCHEMA, Reader, Unread
from data_prep.spool import Spool, anchors_path, checksums, metadata_path, pixels_path, save_array, write_whole
from sentinode.errors import PatchError, PatchErrorCode
from sentinode.images import UInt8Array, decode_patch
from sentinode.tissue import is_black_or_white, is_tissue

_TRIPLE = pa.list_(pa.int64(), 3)
DECODED_SCHEMA = pa.schema(
    [
        *ENTRY_SCHEMA,
        pa.field("pixel_sha1", pa.string()),
        pa.field("checksum", pa.uint64()),
        pa.field("tissue_fraction", pa.float32()),
        pa.field("pale", pa.bool_()),
        pa.field("sums", _TRIPLE),
        pa.field("sums_of_squares", _TRIPLE),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
"""One row per input of a block, in order. `reason` is null for decoded patches, which lie in the pixel file in this order; for refused ones the rest
is. `sums`, `sums_of_squares`: of all 8-bit values, per channel; exact integers, so that no figure depends on the order of addition."""

# 32 patches of 96 px are 0.9 MB: from reading to writing they stay in a core's cache, which makes the passes over them several times as fast.
_CHUNK_PATCHES = 32
MAY_PASS = (str(RejectReason.MISSING), str(RejectReason.UNREADABLE))
"""Reasons that may be gone when it is tried again."""


def decode_block(block: int, entries: pa.Table, reader: Reader, work: Path, size_px: int, *, with_anchors: bool) -> None:
    """Decode one block and write its spool files; nothing to do where they are there already.

    Parameters
    ----------
    block : int
        Number of the block, which names its files.
    entries : pyarrow.Table
        ENTRY_SCHEMA: what to read.
    reader : Reader
    work : Path
        Folder of the spool files.
    size_px : int
        Side that every patch must have.
    with_anchors : bool
        Also compute the anchors of the overlap search.

    Raises
    ------
    StorageError
        The storage does not answer; nothing of the block is kept.
    """
    if is_block_complete(work, block, size_px, len(entries), with_anchors=with_anchors):
        return
    figures: list[Figures] = []
    reasons: list[str | None] = []
    details: list[str | None] = []
    collected = Anchors(size_px) if with_anchors else None

    def decode_into(path: Path) -> None:
        with path.open("wb") as file:
            for images, chunk_reasons, chunk_details in read_patches(reader, entries, size_px):
                found = describe(images)
                if found.blank.any():
                    images, found = _without_blank(images, found, chunk_reasons, chunk_details)
                file.write(images.data)
                figures.append(found)
                reasons.extend(chunk_reasons)
                details.extend(chunk_details)
                if collected is not None:
                    collected.add(images)

    write_whole(pixels_path(work, block), decode_into)
    if collected is not None:
        save_array(anchors_path(work, block), collected.result())
    table = _table(entries, figures, reasons, details)
    write_whole(metadata_path(work, block), lambda temporary: pq.write_table(table, temporary))


def _without_blank(images: UInt8Array, figures: "Figures", reasons: list[str | None], details: list[str | None]) -> tuple[UInt8Array, "Figures"]:
    """Leave out blank patches, and write down why."""
    rows = [row for row, reason in enumerate(reasons) if reason is None]
    for patch in np.flatnonzero(figures.blank).tolist():
        reasons[rows[patch]], details[rows[patch]] = str(RejectReason.BLANK), f"values {images[patch].min()} to {images[patch].max()}"
    return images[~figures.blank], figures.take(~figures.blank)


def is_block_complete(work: Path, block: int, size_px: int, entries: int, *, with_anchors: bool) -> bool:
    """Tell whether the spool files of a block are all there and fit each other. With inputs that could not be read it is not: now they may be."""
    try:
        reasons = pq.read_table(metadata_path(work, block), columns=["reason"])["reason"]
        size = pixels_path(work, block).stat().st_size
        if with_anchors:
            np.load(anchors_path(work, block), mmap_mode="r")
    except (OSError, ValueError, pa.ArrowException):
        return False
    fits = len(reasons) == entries and size == reasons.null_count * size_px * size_px * 3
    return fits and not any(reason in MAY_PASS for reason in reasons.drop_null().to_pylist())


def read_blocks(work: Path, blocks: int, size_px: int) -> tuple[Spool, pa.Table, list[Reject]]:
    """Read back what `decode_block` wrote for blocks 0..blocks-1.

    Returns
    -------
    spool : Spool
        The pixels.
    patches : pyarrow.Table
        DECODED_SCHEMA without reason and detail, plus `position` (int64, place in the spool), in the order of the spool.
    rejects : list of Reject
    """
    tables = [pq.read_table(metadata_path(work, block), schema=DECODED_SCHEMA) for block in range(blocks)]
    spool = Spool(tuple(pixels_path(work, block) for block in range(blocks)), tuple(table["reason"].null_count for table in tables), size_px)
    rows = pa.concat_tables([DECODED_SCHEMA.empty_table(), *tables])
    refused = rows.filter(rows["reason"].is_valid()).select(["reason", "id", "path", "detail"]).to_pylist()
    patches = rows.filter(rows["reason"].is_null()).drop_columns(["reason", "detail"])
    return spool, patches.append_column("position", pa.array(np.arange(len(patches)))), [Reject(**row) for row in refused]


def read_patches(reader: Reader, entries: pa.Table, size_px: int) -> Iterator[tuple[UInt8Array, list[str | None], list[str | None]]]:
    """Read and decode inputs, some at a time.

    Yields
    ------
    images : ndarray of uint8, shape (n, size_px, size_px, 3), RGB
        Of the inputs that are patches, in order; valid until the next ones are asked for.
    reasons, details : list of str or None
        Of every input; None for those in `images`.
    """
    buffer = np.empty((_CHUNK_PATCHES, size_px, size_px, 3), np.uint8)
    found = reader.read(entries)
    for start in range(0, len(entries), _CHUNK_PATCHES):
        rows = min(_CHUNK_PATCHES, len(entries) - start)
        reasons: list[str | None] = [None] * rows
        details: list[str | None] = [None] * rows
        count = 0
        for row in range(rows):
            one = next(found)
            if isinstance(one, Unread):
                reasons[row], details[row] = str(one.reason), one.detail
                continue
            try:
                pixels = decode_patch(one, size_px=size_px) if isinstance(one, bytes) else one
                if pixels.shape != buffer.shape[1:]:
                    size = "x".join(map(str, pixels.shape[1::-1]))
                    raise PatchError(PatchErrorCode.WRONG_SIZE, f"the patch is {size} pixels; expected {size_px}x{size_px}")
                buffer[count] = pixels
                count += 1
            except PatchError as error:
                reasons[row], details[row] = str(error.code), str(error)
        yield buffer[:count], reasons, details


@dataclass(frozen=True)
class Figures:
    """What is known of each of n patches without its pixels."""

    pixel_sha1: list[str]
    checksum: npt.NDArray[np.uint64]
    tissue_fraction: npt.NDArray[np.float32]
    blank: npt.NDArray[np.bool_]
    pale: npt.NDArray[np.bool_]
    sums: npt.NDArray[np.int64]
    sums_of_squares: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.bool_]) -> "Figures":
        """Return those of the chosen patches."""
        return Figures(
            pixel_sha1=[value for value, chosen in zip(self.pixel_sha1, rows.tolist(), strict=True) if chosen],
            checksum=self.checksum[rows],
            tissue_fraction=self.tissue_fraction[rows],
            blank=self.blank[rows],
            pale=self.pale[rows],
            sums=self.sums[rows],
            sums_of_squares=self.sums_of_squares[rows],
        )


def describe(images: UInt8Array) -> Figures:
    """Work out what is kept of patches, uint8 (n, side, side, 3), RGB, a few at a time. Rules: `sentinode.tissue`."""
    side = images.shape[1]
    planes = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
    high = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    low = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    stained = is_tissue(high, low).reshape(len(images), side * side)
    # Down the columns first, in the narrowest type that holds the sum of a column: five times as fast as one wide sum.
    squares = planes.astype(np.uint16)
    squares *= squares  # 255 * 255 fits 16 bits
    return Figures(
        pixel_sha1=[hashlib.sha1(image.data, usedforsecurity=False).hexdigest() for image in images],
        checksum=checksums(images),
        tissue_fraction=stained.mean(axis=1, dtype=np.float32),
        blank=is_black_or_white(high, low),
        pale=np.logical_not(stained.any(axis=1)),
        sums=planes.sum(axis=2, dtype=np.uint32).sum(axis=2, dtype=np.int64).T,
        sums_of_squares=squares.sum(axis=2, dtype=np.uint32).sum(axis=2, dtype=np.int64).T,
    )


def _table(entries: pa.Table, parts: list[Figures], reasons: list[str | None], details: list[str | None]) -> pa.Table:
    # Row of the figures for each input, null for the refused ones: taking with nulls spreads the columns.
    accepted = np.asarray([reason is None for reason in reasons], np.bool_)
    rows = pa.array(np.where(accepted, np.cumsum(accepted) - 1, 0), pa.int64(), mask=~accepted)
    columns = {
        "pixel_sha1": pa.array([sha1 for part in parts for sha1 in part.pixel_sha1], pa.string()),
        "checksum": _joined([part.checksum for part in parts], pa.uint64()),
        "tissue_fraction": _joined([part.tissue_fraction for part in parts], pa.float32()),
        "pale": _joined([part.pale for part in parts], pa.bool_()),
        "sums": pa.FixedSizeListArray.from_arrays(_joined([part.sums for part in parts], pa.int64()), type=_TRIPLE),
        "sums_of_squares": pa.FixedSizeListArray.from_arrays(_joined([part.sums_of_squares for part in parts], pa.int64()), type=_TRIPLE),
    }
    spread = {name: column.take(rows) for name, column in columns.items()}
    own = {"reason": pa.array(reasons, pa.string()), "detail": pa.array(details, pa.string())}
    return pa.table({**{name: entries[name] for name in ENTRY_SCHEMA.names}, **spread, **own}, schema=DECODED_SCHEMA)


def _joined(parts: Sequence[npt.NDArray[Any]], kind: pa.DataType) -> pa.Array:
    return pa.array(np.concatenate(parts).ravel() if parts else [], kind)
