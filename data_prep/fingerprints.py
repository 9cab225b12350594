"""Sorting out candidates in bulk, by sums over their common parts instead of comparing their pixels.

A polynomial fingerprint of a patch, sum of colour(y, x) * a^y * b^x modulo 2^32 with odd a and b, turns into that of the patch elsewhere by one
multiplication. From the sums over all upper left rectangles, that of any common part takes four look-ups: 0.3 us a candidate, whatever its size, and
what is left is equal but for one chance in billions. Worth it where patches have many candidates each.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from data_prep.anchors import MIN_TEXTURE_STD, UInt32Array
from data_prep.spool import IntArray, Spool
from sentinode.images import UInt8Array

_TILE_PX = 1 << 22  # pixels whose sums are held at a time: 16 bytes each
_WORTH_IT = 32  # candidates per patch: its sums cost as much as comparing so many

_PIECE = 1 << 16
_DOWN, _ACROSS = 0x9E3779B1, 0x85EBCA77


def sift(spool: Spool, first: IntArray, second: IntArray, dy: IntArray, dx: IntArray) -> npt.NDArray[np.bool_]:
    """Tell which candidates may be overlaps, bool (n,): all where a patch has few of them, else those whose common part is textured and surely equal.

    Parameters
    ----------
    spool : Spool
    first, second, dy, dx : ndarray of int64, shape (n,)
        As in `overlap.Overlaps`; offsets that leave nothing in common are not allowed.
    """
    keep = np.ones(len(first), np.bool_)
    step = max(1, _TILE_PX // (spool.size_px + 1) ** 2)
    tiles = (first // step) * (len(spool) // step + 1) + second // step
    order = np.argsort(tiles, kind="stable")
    bounds = np.append(np.flatnonzero(np.diff(tiles[order], prepend=-1)), len(order))
    for begin, end in pairwise(bounds.tolist()):
        chosen = order[begin:end]
        patches = [np.unique(column[chosen], return_inverse=True) for column in (first, second)]
        if len(chosen) < _WORTH_IT * sum(len(positions) for positions, _ in patches):
            continue
        sums = [_Sums(spool.take(positions)) for positions, _ in patches]
        for start in range(0, len(chosen), _PIECE):
            piece = slice(start, start + _PIECE)
            keep[chosen[piece]] = _may_overlap(sums, [rows[piece] for _, rows in patches], dy[chosen[piece]], dx[chosen[piece]], spool.size_px)
    return keep


def _may_overlap(sums: Sequence["_Sums"], rows: Sequence[IntArray], dy: IntArray, dx: IntArray, side: int) -> npt.NDArray[np.bool_]:
    """Apply the definition to the sums of the first and of the second patches."""
    height, width = side - np.abs(dy), side - np.abs(dx)
    in_first = sums[0].corners(rows[0], np.maximum(dy, 0), np.maximum(dx, 0), height, width)
    in_second = sums[1].corners(rows[1], np.maximum(-dy, 0), np.maximum(-dx, 0), height, width)
    moved = _powers(_DOWN, -side, 2 * side)[dy + side] * _powers(_ACROSS, -side, 2 * side)[dx + side]
    equal: npt.NDArray[np.bool_] = sums[0].fingerprints(in_first) == sums[1].fingerprints(in_second) * moved
    equal[equal] = sums[0].textured([corner[equal] for corner in in_first], (height * width)[equal])
    return equal


class _Sums:
    """Sums over the upper left rectangles of patches."""

    def __init__(self, images: UInt8Array) -> None:
        self._width = images.shape[1] + 1
        red, green, blue = (images[..., channel].astype(np.uint32) for channel in range(3))
        colours = ((red << np.uint32(16)) | (green << np.uint32(8)) | blue) * np.uint32(0xC2B2AE3D)
        colours ^= colours >> np.uint32(15)
        colours *= np.multiply.outer(_powers(_DOWN, 0, self._width - 1), _powers(_ACROSS, 0, self._width - 1))
        self._fingerprints = self._accumulated(colours)
        self._values = self._accumulated(red + green + blue)
        self._squares = self._accumulated((red * red + green * green + blue * blue).astype(np.uint64))

    def _accumulated(self, values: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        """Return the sums, flat, with a row and a column of zeros before each patch."""
        sums = np.zeros((len(values), self._width, self._width), values.dtype)
        np.cumsum(values, axis=1, dtype=values.dtype, out=sums[:, 1:, 1:])
        np.cumsum(sums, axis=2, dtype=values.dtype, out=sums)
        return sums.reshape(-1)

    def corners(self, patches: IntArray, y: IntArray, x: IntArray, height: IntArray, width: IntArray) -> list[IntArray]:
        """Return where the sums of rectangles stand: lower right, upper right, lower left, upper left."""
        start = (patches * self._width + y) * self._width + x
        down = height * self._width
        return [start + down + width, start + width, start + down, start]

    def fingerprints(self, corners: list[IntArray]) -> UInt32Array:
        """Return the fingerprints of rectangles."""
        return _between(self._fingerprints, corners)

    def textured(self, corners: list[IntArray], pixels: IntArray) -> npt.NDArray[np.bool_]:
        """Tell which rectangles of `pixels` pixels have values with a standard deviation above the limit."""
        count = 3 * pixels.astype(np.uint64)
        total, squares = _between(self._values, corners).astype(np.uint64), _between(self._squares, corners)
        result: npt.NDArray[np.bool_] = count * squares - total * total > np.uint64(MIN_TEXTURE_STD**2) * count * count
        return result


def _between(sums: npt.NDArray[np.unsignedinteger], corners: list[IntArray]) -> npt.NDArray[np.unsignedinteger]:
    lower_right, upper_right, lower_left, upper_left = (sums[corner] for corner in corners)
    between: npt.NDArray[np.unsignedinteger] = lower_right - upper_right - lower_left + upper_left
    return between


@cache
def _powers(base: int, first: int, count: int) -> UInt32Array:
    """Return base^first, base^(first + 1), ... modulo 2^32; an odd base has negative powers too."""
    return np.asarray([pow(base, exponent, 1 << 32) for exponent in range(first, first + count)], np.uint32)
