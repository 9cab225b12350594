"""Decoding one block of entries: what a Ray Data task of prepare does. Pixels go to disk, only counts go back."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.labels import Entry
from data_prep.overlap import anchors
from data_prep.rejects import DecodedPatch, Reject, RejectReason
from data_prep.spool import Spool, anchors_path, metadata_path, pixels_path
from sentinode.errors import PatchError
from sentinode.images import UInt8Array, decode_patch
from sentinode.tissue import is_black_or_white, is_pale, tissue_fraction

_TRIPLE = pa.list_(pa.int64(), 3)
METADATA_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("slide", pa.string()),
        pa.field("pixel_sha1", pa.string()),
        pa.field("tissue_fraction", pa.float32()),
        pa.field("flags", pa.list_(pa.string())),
        pa.field("sums", _TRIPLE),
        pa.field("sums_of_squares", _TRIPLE),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
"""One row per entry of a block, in entry order. `reason` is null for decoded patches, which lie in the pixel file in this order."""


def decode_block(block: int, entries: Sequence[Entry], source: Path, work: Path, size_px: int, *, with_anchors: bool) -> bool:
    """Decode one block and write its three spool files; nothing to do where they are there already.

    Parameters
    ----------
    block : int
        Number of the block, which names its files.
    entries : sequence of Entry
        What to read.
    source : Path
        Folder that the entries' paths are relative to.
    work : Path
        Folder of the spool files.
    size_px : int
        Side that every patch must have.
    with_anchors : bool
        Also compute the anchors of the overlap search.

    Returns
    -------
    bool
        Whether there was work to do.
    """
    if is_block_complete(work, block, size_px, len(entries), with_anchors=with_anchors):
        return False
    images, rows = [], []
    for entry in entries:
        pixels, row = _decode_entry(entry, source, size_px)
        rows.append(row)
        if pixels is not None:
            images.append(pixels)
    stacked = np.stack(images) if images else np.empty((0, size_px, size_px, 3), np.uint8)
    _describe(stacked, [row for row in rows if row["reason"] is None])
    _write(pixels_path(work, block), lambda temporary: stacked.tofile(temporary))
    if with_anchors:
        found = anchors(stacked)
        _write(anchors_path(work, block), lambda temporary: _save_npy(temporary, found))
    table = pa.Table.from_pylist(rows, schema=METADATA_SCHEMA)
    _write(metadata_path(work, block), lambda temporary: pq.write_table(table, temporary))
    return True


def is_block_complete(work: Path, block: int, size_px: int, entries: int, *, with_anchors: bool) -> bool:
    """Tell whether the spool files of a block are all there and fit each other."""
    try:
        reasons = pq.read_table(metadata_path(work, block), columns=["reason"])["reason"]
        size = pixels_path(work, block).stat().st_size
        if with_anchors:
            np.load(anchors_path(work, block), mmap_mode="r")
    except (OSError, ValueError, pa.ArrowException):
        return False
    return len(reasons) == entries and size == reasons.null_count * size_px * size_px * 3


def read_blocks(work: Path, blocks: int, size_px: int) -> tuple[Spool, list[DecodedPatch], list[Reject]]:
    """Read back what `decode_block` wrote for blocks 0..blocks-1: the pixels as a spool, what is known of them, and the refused inputs."""
    patches: list[DecodedPatch] = []
    rejects: list[Reject] = []
    counts = []
    for block in range(blocks):
        before = len(patches)
        for row in pq.read_table(metadata_path(work, block), schema=METADATA_SCHEMA).to_pylist():
            reason, detail = row.pop("reason"), row.pop("detail")
            if reason is None:
                lists: dict[str, Any] = {key: tuple(row.pop(key)) for key in ("flags", "sums", "sums_of_squares")}
                patches.append(DecodedPatch(position=len(patches), **row, **lists))
            else:
                rejects.append(Reject(reason, row["id"], row["path"], detail))
        counts.append(len(patches) - before)
    spool = Spool(tuple(pixels_path(work, block) for block in range(blocks)), tuple(counts), size_px)
    return spool, patches, rejects


def _decode_entry(entry: Entry, source: Path, size_px: int) -> tuple[UInt8Array | None, dict[str, Any]]:
    row: dict[str, Any] = asdict(entry) | {"reason": None, "detail": None}
    try:
        pixels = decode_patch((source / entry.path).read_bytes(), size_px=size_px)
    except OSError as error:
        return None, row | {"reason": str(RejectReason.UNREADABLE), "detail": error.strerror or type(error).__name__}
    except PatchError as error:
        return None, row | {"reason": str(error.code), "detail": str(error)}
    if is_black_or_white(pixels[None])[0]:
        return None, row | {"reason": str(RejectReason.BLANK), "detail": f"values {pixels.min()} to {pixels.max()}"}
    return pixels, row


def _describe(images: UInt8Array, rows: list[dict[str, Any]]) -> None:
    """Add to each decoded row what its pixels tell. Sums are exact integers, so that they do not depend on the order of addition."""
    if not rows:
        return
    fractions, pale = tissue_fraction(images), is_pale(images)
    for image, row, fraction, is_unstained in zip(images, rows, fractions, pale, strict=True):
        values = image.reshape(-1, 3).astype(np.int64)
        row["pixel_sha1"] = hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()
        row["tissue_fraction"] = float(fraction)
        row["flags"] = ["pale"] if is_unstained else []
        row["sums"] = values.sum(axis=0).tolist()
        row["sums_of_squares"] = (values * values).sum(axis=0).tolist()


def _save_npy(path: Path, array: Any) -> None:
    with path.open("wb") as file:  # np.save given a name would append .npy to it
        np.save(file, array)


def _write(path: Path, write: Any) -> None:
    """Let `write` fill a temporary file, then rename it: a file under its own name is whole. The process id keeps retried tasks apart."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
