"""Which patches share pixels, found without comparing all pairs.

Two patches overlap when, at some integer offset, all pixels they have in common are equal, the common part covers at least 5 % of the patch and the
standard deviation of its 8-bit values is above 6. Candidates come from content-defined anchors: hashes of 16-pixel windows, kept where the hash falls
in one residue class, so that both patches keep the same windows without knowing of each other. Every candidate is then compared pixel by pixel.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.spool import IntArray, Spool
from sentinode.images import UInt8Array

MIN_SHARED_FRACTION = 0.05
"""Share of the patch that two patches must have in common."""
MIN_TEXTURE_STD = 6.0
"""The common part's 8-bit values must have a standard deviation above this: glass is equal everywhere and says nothing."""
WINDOW_PX = 16
"""Length of the hashed windows, along rows and along columns (a shared strip can be thinner than this in one direction)."""
KEEP_ONE_IN = 16
"""One window in so many is an anchor. The smallest shared part that counts (5 % of 96x96) has about 250 windows at least, so about 16 anchors."""

UInt64Array = npt.NDArray[np.uint64]

# Fixed for ever: spooled anchors of one run are joined with those of its restart.
_STEP_CONSTANTS = tuple(np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93))
_COLUMN_SALT = np.uint64(0xA0761D6478BD642F)
_CHUNK_PATCHES = 32  # 32 x 96 x 81 x 8 bytes = 2 MB a temporary: stays in cache
_MAX_CANDIDATES = 1 << 22  # about 100 MB of temporaries in one piece of a join
_VERIFY_PAIRS = 512  # 2 x 14 MB of pixels at 96 px


@dataclass(frozen=True)
class Overlaps:
    """Verified overlaps: pixel (y, x) of patch `second` is pixel (y + dy, x + dx) of patch `first`, wherever both exist.

    Attributes
    ----------
    first, second : ndarray of int64, shape (n,)
        Positions of the two patches, first < second; a pair may appear with several offsets.
    dy, dx : ndarray of int64, shape (n,)
        Where the origin of `second` lies in `first`, pixels down and to the right.
    """

    first: IntArray
    second: IntArray
    dy: IntArray
    dx: IntArray

    def __len__(self) -> int:
        return len(self.first)

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """The distinct pairs."""
        return set(zip(self.first.tolist(), self.second.tolist(), strict=True))

    def rows(self) -> list[tuple[int, int, int, int]]:
        """The overlaps as (first, second, dy, dx), sorted."""
        return sorted(zip(self.first.tolist(), self.second.tolist(), self.dy.tolist(), self.dx.tolist(), strict=True))


def anchors(images: UInt8Array) -> UInt64Array:
    """Return the anchors of some patches, sorted by hash.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, side, side, 3), RGB

    Returns
    -------
    ndarray of uint64, shape (2, k)
        Row 0 holds hashes, row 1 places: (patch * side + y) * side + x of the window's first pixel, patch counted within `images`.
        Windows of one single colour are left out: they tell nothing about position, and glass is full of them.
    """
    side = images.shape[1]
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for start in range(0, len(images) if side >= WINDOW_PX else 0, _CHUNK_PATCHES):
        chunk = images[start : start + _CHUNK_PATCHES].astype(np.uint64)
        packed = (chunk[..., 0] << np.uint64(16)) | (chunk[..., 1] << np.uint64(8)) | chunk[..., 2]
        for transposed in (False, True):
            lines = np.ascontiguousarray(packed.transpose(0, 2, 1)) if transposed else packed
            window = _window_hashes(lines)
            if transposed:
                window = _mix(window ^ _COLUMN_SALT)
            patch, line, column = np.nonzero((window % np.uint64(KEEP_ONE_IN) == 0) & ~_constant(lines))
            hashes.append(window[patch, line, column])
            y, x = (column, line) if transposed else (line, column)
            places.append((((patch + start) * side + y) * side + x).astype(np.uint64))
    joined = np.stack([np.concatenate(hashes), np.concatenate(places)])
    return np.ascontiguousarray(joined[:, np.lexsort((joined[1], joined[0]))])


def _window_hashes(lines: UInt64Array) -> UInt64Array:
    """Hash every window of 16 along the last axis, (n, side, side) -> (n, side, side - 15).

    Doubling (1, 2, 4, 8, 16 pixels) costs four multiply-adds instead of sixteen; overflow modulo 2^64 is wanted. A collision costs one comparison
    of pixels, never a wrong pair.
    """
    value, width = lines, 1
    for constant in _STEP_CONSTANTS:
        value = value[..., :-width] + constant * _mix(value[..., width:])
        width *= 2
    return _mix(value)


def _mix(value: UInt64Array) -> UInt64Array:
    """Spread every input bit over all output bits, so that residue class and sort order are independent of the colours."""
    value = (value ^ (value >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return value ^ (value >> np.uint64(29))


def _constant(lines: UInt64Array) -> npt.NDArray[np.bool_]:
    """Tell which windows of 16 along the last axis hold one single colour, (n, side, side) -> (n, side, side - 15)."""
    changed = lines != np.roll(lines, 1, axis=-1)
    changes = changed.cumsum(axis=-1, dtype=np.int32)  # what the first column holds cancels out below
    constant: npt.NDArray[np.bool_] = changes[..., WINDOW_PX - 1 :] == changes[..., : changes.shape[-1] - WINDOW_PX + 1]
    return constant


def find_overlaps(spool: Spool, anchor_files: Iterable[Path | UInt64Array], part: int = 0, parts: int = 1) -> Overlaps:
    """Find the overlapping pairs that have an anchor in one part of the hash range; the union over all parts is the whole answer.

    Parameters
    ----------
    spool : Spool
        The pixels.
    anchor_files : iterable of Path or ndarray
        What `anchors` returned for each block of the spool, in order, as .npy files or arrays.
    part, parts : int
        The hash range is cut into `parts` equal pieces, of which `part` is joined; memory is bounded by the anchors of one piece.
    """
    hashes, places = _read_range(spool, anchor_files, part, parts)
    area = spool.size_px * spool.size_px
    order = np.argsort(hashes)
    hashes, places = hashes[order], places[order]
    patches, within = places // area, places % area
    found = [np.empty(0, np.uint64)]
    for left, right in _bucket_pairs(hashes):
        candidates = _candidates(spool, patches, within, left, right)
        found.append(_verified(spool, candidates))
    return _unpack(np.unique(np.concatenate(found)), len(spool), spool.size_px)


def union(parts: Iterable[Overlaps]) -> Overlaps:
    """Join the overlaps of several parts, each once, sorted."""
    rows = sorted({row for part in parts for row in part.rows()})
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 4)
    return Overlaps(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3])


def connected_groups(count: int, pairs: Iterable[tuple[int, int]]) -> IntArray:
    """Return the smallest member of each patch's connected component, int64 (count,); a patch without overlap is its own."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in pairs:
        a, b = root(first), root(second)
        parent[max(a, b)] = min(a, b)
    return np.asarray([root(item) for item in range(count)], dtype=np.int64)


def is_overlap(first: UInt8Array, second: UInt8Array, dy: int, dx: int) -> bool:
    """Apply the definition to two patches, uint8 (side, side, 3), RGB, at one offset of `second`'s origin in `first`."""
    side = first.shape[0]
    height, width = side - abs(dy), side - abs(dx)
    if height <= 0 or width <= 0 or height * width < MIN_SHARED_FRACTION * side * side:
        return False
    a = first[max(dy, 0) : max(dy, 0) + height, max(dx, 0) : max(dx, 0) + width]
    b = second[max(-dy, 0) : max(-dy, 0) + height, max(-dx, 0) : max(-dx, 0) + width]
    return bool(np.array_equal(a, b) and a.std() > MIN_TEXTURE_STD)


def _read_range(spool: Spool, anchor_files: Iterable[Path | UInt64Array], part: int, parts: int) -> tuple[UInt64Array, IntArray]:
    """Gather the anchors of one piece of the hash range; places become global."""
    low, high = part * 2**64 // parts, (part + 1) * 2**64 // parts
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    area = spool.size_px * spool.size_px
    for start, source in zip(spool.starts[:-1], anchor_files, strict=True):
        block = np.load(source, mmap_mode="r") if isinstance(source, Path) else source
        begin = np.searchsorted(block[0], np.uint64(low))
        end = np.searchsorted(block[0], np.uint64(high)) if high < 2**64 else block.shape[1]
        hashes.append(np.asarray(block[0, begin:end]))
        places.append(block[1, begin:end].astype(np.int64) + start * area)
    return np.concatenate(hashes), np.concatenate(places)


def _bucket_pairs(hashes: UInt64Array) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield all pairs (left, right) of positions with equal hash in the sorted array, in pieces of bounded size.

    Lag by lag: position k with k + 1, then with k + 2, … as long as some bucket is that long. A large bucket only means more lags.
    """
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.empty(0, np.int64)
    ends = np.concatenate([starts[1:], [len(hashes)]])
    end_of = np.repeat(ends, ends - starts)
    alive = np.flatnonzero(end_of - np.arange(len(hashes)) > 1)
    lefts: list[IntArray] = []
    rights: list[IntArray] = []
    waiting, lag = 0, 1
    while len(alive):
        for begin in range(0, len(alive), _MAX_CANDIDATES):
            piece = alive[begin : begin + _MAX_CANDIDATES]
            lefts.append(piece)
            rights.append(piece + lag)
            waiting += len(piece)
            if waiting >= _MAX_CANDIDATES:
                yield np.concatenate(lefts), np.concatenate(rights)
                lefts, rights, waiting = [], [], 0
        lag += 1
        alive = alive[alive + lag < end_of[alive]]
    if waiting:
        yield np.concatenate(lefts), np.concatenate(rights)


def _candidates(spool: Spool, patches: IntArray, within: IntArray, left: IntArray, right: IntArray) -> UInt64Array:
    """Turn pairs of anchors into distinct packed (first, second, dy, dx) whose common part is large enough."""
    side = spool.size_px
    # Ordered by patch, so that one pair of patches has one sign of offset.
    swap = patches[left] > patches[right]
    left, right = np.where(swap, right, left), np.where(swap, left, right)
    keep = patches[left] != patches[right]
    left, right = left[keep], right[keep]
    dy = within[left] // side - within[right] // side
    dx = within[left] % side - within[right] % side
    keep = (side - np.abs(dy)) * (side - np.abs(dx)) >= MIN_SHARED_FRACTION * side * side
    first, second = patches[left[keep]], patches[right[keep]]
    return np.unique(_pack(first, second, dy[keep], dx[keep], len(spool), side))


def _pack(first: IntArray, second: IntArray, dy: IntArray, dx: IntArray, count: int, side: int) -> UInt64Array:
    span = 2 * side
    if count * count * span * span >= 2**64:
        raise ValueError(f"{count} patches of {side} px are more than one join can number")
    pair = first.astype(np.uint64) * np.uint64(count) + second.astype(np.uint64)
    return (pair * np.uint64(span) + (dy + side).astype(np.uint64)) * np.uint64(span) + (dx + side).astype(np.uint64)


def _unpack(packed: UInt64Array, count: int, side: int) -> Overlaps:
    span = np.uint64(2 * side)
    rest, dx = packed // span, (packed % span).astype(np.int64) - side
    pair, dy = rest // span, (rest % span).astype(np.int64) - side
    first, second = pair // np.uint64(count), pair % np.uint64(count)
    return Overlaps(first.astype(np.int64), second.astype(np.int64), dy, dx)


def _verified(spool: Spool, packed: UInt64Array) -> UInt64Array:
    """Keep the candidates that meet the definition: a few single pixels first, all pixels for what is left."""
    side = spool.size_px
    for down, across in ((0.5, 0.5), (0.1, 0.1), (0.9, 0.9), (0.1, 0.9), (0.9, 0.1), (0.3, 0.6), (0.7, 0.4)):
        candidates = _unpack(packed, len(spool), side)
        y = np.maximum(candidates.dy, 0) + (down * (side - np.abs(candidates.dy))).astype(np.int64)
        x = np.maximum(candidates.dx, 0) + (across * (side - np.abs(candidates.dx))).astype(np.int64)
        a = spool.pixels(candidates.first, y, x)
        b = spool.pixels(candidates.second, y - candidates.dy, x - candidates.dx)
        packed = packed[(a == b).all(axis=1)]
    keep = np.zeros(len(packed), np.bool_)
    candidates = _unpack(packed, len(spool), side)
    for start in range(0, len(packed), _VERIFY_PAIRS):
        piece = slice(start, start + _VERIFY_PAIRS)
        first, second = spool.take(candidates.first[piece]), spool.take(candidates.second[piece])
        offsets = zip(candidates.dy[piece].tolist(), candidates.dx[piece].tolist(), strict=True)
        keep[piece] = [is_overlap(a, b, dy, dx) for a, b, (dy, dx) in zip(first, second, offsets, strict=True)]
    return packed[keep]
