"""A slow but obvious overlap search, and one over all blocks without Ray and files of candidates."""

from pathlib import Path

import numpy as np

from data_prep.anchors import MIN_SHARED_FRACTION, UInt64Array, anchors
from data_prep.overlap import Overlaps, Packing, is_overlap
from data_prep.overlap_search import candidates, needed_of_block, overlaps
from data_prep.spool import IntArray
from sentinode.images import UInt8Array
from tests.data_prep.helpers import make_spool

Row = tuple[int, int, int, int]


def rows_of(found: Overlaps) -> list[Row]:
    """Overlaps as (first, second, dy, dx), in their order."""
    return list(zip(found.first.tolist(), found.second.tolist(), found.dy.tolist(), found.dx.tolist(), strict=True))


def search(folder: Path, images: UInt8Array, part_bits: int = 0, block_rows: int = 7) -> Overlaps:
    """What `search_overlaps` does, in this process."""
    folder.mkdir(exist_ok=True)
    spool, blocks = make_spool(folder, images, block_rows)
    files = [folder / f"{number}.npy" for number in range(len(blocks))]
    for file, block in zip(files, blocks, strict=True):
        np.save(file, anchors(block))
    parts = [folder / f"{part}-of-{1 << part_bits}.npy" for part in range(1 << part_bits)]
    crowded: list[UInt64Array] = []
    for part, file in enumerate(parts):
        np.save(file, candidates(spool, files, part, part_bits, crowded))
    if crowded:
        needed_files = [folder / f"{number}-needed.npy" for number in range(len(blocks))]
        for number, file in enumerate(needed_files):
            np.save(file, needed_of_block(spool, number, files[number], np.unique(np.concatenate(crowded))))
        parts.append(folder / "further.npy")
        np.save(parts[-1], candidates(spool, needed_files))
    return Packing(len(images), images.shape[1]).unpack(overlaps(spool, parts, 0, 2**64 - 1))


def counting_offsets(side: int) -> tuple[IntArray, IntArray]:
    """All (dy, dx) that leave enough in common."""
    dy, dx = (grid.ravel() for grid in np.mgrid[-side + 1 : side, -side + 1 : side])
    counts = (side - np.abs(dy)) * (side - np.abs(dx)) >= MIN_SHARED_FRACTION * side * side
    return dy[counts], dx[counts]


def brute_force(images: UInt8Array) -> list[Row]:
    """All overlaps by the definition: every pair at every offset. Single pixels of the common part are compared first, or it would take hours."""
    side = images.shape[1]
    colours = images.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    dy, dx = counting_offsets(side)
    probes = []
    for down, across in ((0.5, 0.5), (0.1, 0.9), (0.9, 0.1), (0.0, 0.3), (0.99, 0.7), (0.3, 0.99)):
        y = np.maximum(dy, 0) + (down * (side - np.abs(dy))).astype(np.int64)
        x = np.maximum(dx, 0) + (across * (side - np.abs(dx))).astype(np.int64)
        probes.append((y * side + x, (y - dy) * side + x - dx))
    found = []
    for first in range(len(images)):
        for second in range(first + 1, len(images)):
            a, b = colours[first].ravel(), colours[second].ravel()
            left = np.arange(len(dy))
            for in_first, in_second in probes:
                left = left[a[in_first[left]] == b[in_second[left]]]
            offsets = zip(dy[left].tolist(), dx[left].tolist(), strict=True)
            found += [(first, second, *offset) for offset in offsets if is_overlap(images[first], images[second], *offset)]
    return found
