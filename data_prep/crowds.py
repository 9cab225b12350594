"""Windows that very many patches share, such as a speck on glass: which of their anchors an overlap can depend on.

All pairs of n equal windows are n^2 pairs. Most of them need not be looked at, and none is left out that matters:

The common part of two patches is a rectangle in a corner of each. It only counts if it is textured. If it holds an anchor whose hash few have, the
pair is found by that one. So an anchor with a crowded hash matters only where it lies in a corner rectangle that is large enough, textured, and holds
no anchor of another hash: in such a rectangle all anchors are kept. Both patches of a pair see the same rectangle, and decide alike.

That glass with specks too sparse to be texture has any such rectangle is rare. Where specks are texture by the definition, patches that have them in
common overlap, and looking at all pairs is what was asked for.
"""

from itertools import product

import numpy as np
import numpy.typing as npt

from data_prep.anchors import MIN_SHARED_FRACTION, MIN_TEXTURE_STD, Anchors, UInt64Array, ordered, places_of, window_px
from data_prep.spool import IntArray
from sentinode.images import UInt8Array

_CHUNK_PX = 9 << 15  # 32 patches of 96 px: 2.4 MB an array of 64-bit sums

BoolArray = npt.NDArray[np.bool_]


def needed(images: UInt8Array, crowded: UInt64Array) -> UInt64Array:
    """Return the anchors with crowded hashes that an overlap can depend on.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, side, side, 3), RGB
    crowded : ndarray of uint64, shape (m,)
        All hashes that are crowded in the whole data set, ascending.

    Returns
    -------
    ndarray of uint64, shape (2, k)
        As `Anchors.result`, a part of that.
    """
    area = images.shape[1] * images.shape[1]
    found = [np.empty((2, 0), np.uint64)]
    step = max(1, _CHUNK_PX // area)
    for start in range(0, len(images), step):
        chosen = _needed(images[start : start + step], crowded)
        chosen[1] += np.uint64(start * area)
        found.append(chosen)
    return ordered(*np.concatenate(found, axis=1))


def is_crowded(hashes: UInt64Array, crowded: UInt64Array) -> BoolArray:
    """Tell which hashes are crowded, uint64 (k,) -> bool (k,); `crowded` ascending, not empty."""
    found: BoolArray = crowded[np.minimum(np.searchsorted(crowded, hashes), len(crowded) - 1)] == hashes
    return found


def _needed(images: UInt8Array, crowded: UInt64Array) -> UInt64Array:
    side, length = images.shape[1], window_px(images.shape[1])
    collected = Anchors(side)
    collected.add(images)
    colours = (images.astype(np.uint32) @ np.asarray([1, 1 << 8, 1 << 16], np.uint32)).reshape(-1)
    few: list[IntArray] = []
    many: list[IntArray] = []
    anchors: list[UInt64Array] = []
    for (hashes, rows), (down, across) in zip(collected.by_direction(), ((0, 1), (1, 0)), strict=True):
        places = places_of(rows)
        patch, within = np.divmod(places, side * side)
        y, x = np.divmod(within, side)
        # Each as patch, and first and last row and column.
        boxes = np.stack([patch, y, y + down * (length - 1), x, x + across * (length - 1)])
        common = is_crowded(hashes, crowded)
        few.append(_decisive(boxes[:, ~common], places[~common], colours, side, length, down, across))
        many.append(boxes[:, common])
        anchors.append(np.stack([hashes, rows])[:, common])
    return np.concatenate(anchors, axis=1)[:, _matter(images, np.concatenate(few, axis=1), np.concatenate(many, axis=1))]


def _decisive(boxes: IntArray, places: IntArray, colours: npt.NDArray[np.uint32], side: int, length: int, down: int, across: int) -> IntArray:
    """Widen the boxes of windows by what decides whether they are anchors, and leave out those that then reach beyond the patch.

    A window may be one for standing beside a window of a single colour (`anchors._choose_edges`): then all its pixels but the last equal the one
    before it, or all but the first the one behind it. What lies beyond the common part must not decide.
    """
    windows = colours[places + np.arange(length)[:, np.newaxis] * (down * side + across)]
    equal = windows[1:] == windows[:-1]
    before, behind = equal[:-1].all(axis=0), equal[1:].all(axis=0)
    wider = boxes + np.stack([0 * before, -down * before, down * behind, -across * before, across * behind])
    inside: IntArray = wider[:, (wider[1:].min(axis=0) >= 0) & (wider[1:].max(axis=0) < side)]
    return inside


def _matter(images: UInt8Array, few: IntArray, many: IntArray) -> BoolArray:
    """Tell which boxes of `many` lie in a corner rectangle that counts as a common part and holds no box of `few`; int64 (5, k) each."""
    side = images.shape[1]
    extent = np.arange(1, side + 1)
    areas = np.multiply.outer(extent, extent)
    counts, large = 3 * areas, areas >= MIN_SHARED_FRACTION * side * side
    wide = images.astype(np.int64)
    sums, squares = wide.sum(axis=3), (wide * wide).sum(axis=3)
    result = np.zeros(many.shape[1], np.bool_)
    for flip_y, flip_x in product((False, True), repeat=2):

        def turned(planes: npt.NDArray[np.int64], flip_y: bool = flip_y, flip_x: bool = flip_x) -> npt.NDArray[np.int64]:
            """Sums over the rectangles of one corner: [.., h - 1, w - 1] is that of h rows and w columns."""
            return planes[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1].cumsum(axis=1).cumsum(axis=2)

        def far(boxes: IntArray, flip_y: bool = flip_y, flip_x: bool = flip_x) -> tuple[IntArray, IntArray, IntArray]:
            """Patch, row and column of the boxes' corner that lies farthest from the rectangles' corner."""
            patch, top, bottom, left, right = boxes
            return patch, side - 1 - top if flip_y else bottom, side - 1 - left if flip_x else right

        total, deviating = turned(sums), turned(squares)
        alone = counts * deviating - total * total > MIN_TEXTURE_STD**2 * counts * counts
        alone &= large
        holding = np.zeros(alone.shape, np.bool_)
        holding[far(few)] = True
        alone &= ~np.logical_or.accumulate(np.logical_or.accumulate(holding, axis=1), axis=2)
        within = np.logical_or.accumulate(np.logical_or.accumulate(alone[:, ::-1, ::-1], axis=1), axis=2)[:, ::-1, ::-1]
        result |= within[far(many)]
    return result
