"""Content-defined anchors of patches: which windows of pixels are kept, and what is kept of them.

Both patches of an overlapping pair see the same pixels in their common part, so a choice that depends on a window's pixels alone makes both keep the
same windows without knowing of each other. A cheap 32-bit hash, computed for every window at once, chooses; only the chosen windows get a long hash.

Windows that are equal on thousands of patches would make the search quadratic. Those of one colour are never chosen, and neither is the grain of
near-white glass (`_is_grain`). An isolated edge or dot leaves so few different windows that chance could choose none of them: where a run of one
colour begins or ends, the window is always chosen.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from data_prep.spool import IntArray
from sentinode.errors import SentinodeError
from sentinode.images import UInt8Array

MIN_SHARED_FRACTION = 0.05
"""Share of the patch that two patches must have in common."""
MIN_TEXTURE_STD = 6
"""The common part's 8-bit values must have a standard deviation above this: glass is equal everywhere and says nothing."""
EXPECTED_ANCHORS = 12
"""Anchors to expect in the smallest common part that counts, if its windows are all different; none at all then has a probability of e^-12."""
MAX_WINDOW_PX = 16
"""Length of the windows, along rows and along columns (a common strip can be thinner than this in one direction)."""

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]

# Fixed for ever: spooled anchors of one run are joined with those of its restart.
_PIXEL_FACTOR = np.uint32(0x9E3779B1)
_STEP_FACTORS = tuple(np.uint32(factor) for factor in (0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x2545F491))
_SALTS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xA0761D6478BD642F))
_CHUNK_PX = 9 << 15  # 32 patches of 96 px, as many as decode reads at a time: 1.2 MB an array of 32-bit pixels, in a core's cache
_PLACE_BITS = np.uint64(32)
_PLACE_MASK = np.uint64(0xFFFFFFFF)
_KNOWN_BITS = np.uint32(0x01010101)
# Values within 12 of each other have a standard deviation of 6 at most: too little for a common part of nothing else.
_GRAIN_RANGE = 2 * MIN_TEXTURE_STD
_GRAIN_CHANGES = 6
_SLOPE = 2


class _Buffers:
    """Memory for the arrays of one chunk, used again and again: fresh pages from the system would cost twice the computation."""

    def __init__(self, pixels: int) -> None:
        self.bytes = np.zeros(3 * pixels + 1, np.uint8)
        self.pixels, self.mixed, self.half, self.whole, self.other = (np.empty(pixels, np.uint32) for _ in range(5))
        self.chosen, self.flat, self.border = (np.empty(pixels, np.bool_) for _ in range(3))


@cache
def window_px(side: int) -> int:
    """Return the length of the windows for patches of `side` pixels: 16, less for patches so small that a common part could be shorter than that."""
    return min(MAX_WINDOW_PX, max(2, side // 6))


@cache
def fewest_windows(side: int) -> int:
    """Return how many windows the common part holds at least, over all offsets that leave MIN_SHARED_FRACTION of the patch in common."""
    length = window_px(side)
    height, width = np.mgrid[1 : side + 1, 1 : side + 1]
    windows = height * np.maximum(width - length + 1, 0) + width * np.maximum(height - length + 1, 0)
    return int(windows[height * width >= MIN_SHARED_FRACTION * side * side].min())


@cache
def density(side: int) -> float:
    """Return the share of windows that become anchors, (0, 1]; 1/20 at 96 px."""
    return min(1.0, EXPECTED_ANCHORS / max(1, fewest_windows(side)))


def anchors(images: UInt8Array) -> UInt64Array:
    """Return the anchors of patches, uint8 (n, side, side, 3), RGB; see `Anchors`."""
    collected = Anchors(images.shape[1])
    collected.add(images)
    return collected.result()


class Anchors:
    """Collects the anchors of one block of patches, some patches at a time: as many as fit a core's cache, while they are there.

    Parameters
    ----------
    side : int
        Of the patches, pixels.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._step = max(1, _CHUNK_PX // (side * side))
        self._buffers = _Buffers(self._step * side * side)
        self._count = 0
        self._found: list[tuple[UInt64Array, UInt64Array]] = [(np.empty(0, np.uint64), np.empty(0, np.uint64))]

    def add(self, images: UInt8Array) -> None:
        """Add the next patches, uint8 (n, side, side, 3), RGB.

        Raises
        ------
        SentinodeError
            There are more patches than 32 bits can number the pixels of.
        """
        side, area = self._side, self._side * self._side
        if (self._count + len(images)) * area > 1 << int(_PLACE_BITS):
            raise SentinodeError(f"{self._count + len(images)} patches of {side} px are too many for one block; use a smaller decode_block_rows")
        for start in range(0, len(images), self._step):
            pixels = _packed(images[start : start + self._step], self._buffers)
            mixed = _mixed(pixels, self._buffers)
            for along, across, salt in ((1, side, _SALTS[0]), (side, 1, _SALTS[1])):
                hashes, places = _chosen(pixels, mixed, side, along, across, salt, self._buffers)
                self._found.append((hashes, places + np.uint64((self._count + start) * area)))
        self._count += len(images)

    def result(self) -> UInt64Array:
        """Return the anchors of all patches.

        Returns
        -------
        ndarray of uint64, shape (2, k)
            Row 0 holds the hashes, ordered by their upper 16 bits (and then as they were found): enough to cut the hash range into parts, and several
            times cheaper than a full sort. Row 1 holds the place (patch * side + y) * side + x of the window's first pixel in its lower half, patches
            counted in the order they were added, and the guards (see `agree`) in its upper half.
            Windows of one single colour and grain (`_is_grain`) are left out: they tell nothing about position, and glass is full of them.
        """
        return ordered(*(np.concatenate(column) for column in zip(*self._found, strict=True)))

    def by_direction(self) -> list[tuple[UInt64Array, UInt64Array]]:
        """Return the same of the windows along rows, then of those along columns: two rows each, in the order in which they were found."""
        nothing, found = self._found[0], self._found[1:]
        parts = [[nothing, *found[direction::2]] for direction in (0, 1)]
        return [(np.concatenate([hashes for hashes, _ in part]), np.concatenate([rows for _, rows in part])) for part in parts]


def ordered(hashes: UInt64Array, rows: UInt64Array) -> UInt64Array:
    """Return anchors as `Anchors.result` does, from its two rows in any order."""
    order = np.argsort((hashes >> np.uint64(48)).astype(np.uint16), kind="stable")  # a radix sort, for 16 bits
    result = np.empty((2, len(order)), np.uint64)
    np.take(hashes, order, out=result[0], mode="clip")  # "raise" would make a copy first
    np.take(rows, order, out=result[1], mode="clip")
    return result


def places_of(row: UInt64Array) -> IntArray:
    """Return the places of row 1 of `anchors`, int64 (k,)."""
    return (row & _PLACE_MASK).astype(np.int64)


def guards_of(row: UInt64Array) -> UInt32Array:
    """Return the guards of row 1 of `anchors`, uint32 (k,)."""
    return (row >> _PLACE_BITS).astype(np.uint32)


def agree(left: UInt32Array, right: UInt32Array) -> npt.NDArray[np.bool_]:
    """Tell which pairs of guards do not exclude each other, uint32 (k,) and (k,) -> bool (k,).

    A guard holds one byte for each of four neighbouring windows: 0 where that window leaves the patch, else seven bits of its hash and a one. If two
    anchors belong to a true overlap, then neighbours that both patches have are equal. This tells most chance equalities of near-glass windows from
    overlaps without reading a pixel.
    """
    both_known = (left & right & _KNOWN_BITS) * np.uint32(0xFF)
    result: npt.NDArray[np.bool_] = ((left ^ right) & both_known) == 0
    return result


def _packed(images: UInt8Array, buffers: _Buffers) -> UInt32Array:
    """Return the pixels as 24-bit numbers, (n, side, side, 3) -> flat uint32 (n * side * side,)."""
    # Unaligned words that start at every third byte, cut to 24 bits: four times faster than putting channels together.
    buffers.bytes[: images.size] = images.reshape(-1)
    words: UInt32Array = np.ndarray((images.size // 3,), "<u4", buffers.bytes, strides=(3,))
    return np.bitwise_and(words, np.uint32(0xFFFFFF), out=buffers.pixels[: len(words)])


def _mixed(pixels: UInt32Array, buffers: _Buffers) -> UInt32Array:
    """Return other numbers for the pixels, one for each colour, whose differences depend on more than the difference of the colours."""
    mixed = np.multiply(pixels, _PIXEL_FACTOR, out=buffers.mixed[: len(pixels)])
    mixed ^= np.right_shift(mixed, np.uint32(15), out=buffers.other[: len(pixels)])
    return mixed


def _chosen(
    pixels: UInt32Array, mixed: UInt32Array, side: int, along: int, across: int, salt: np.uint64, buffers: _Buffers
) -> tuple[UInt64Array, UInt64Array]:
    """Return hashes and (guards, places) of the anchors in one direction; `along` and `across` are the steps in the flat pixels."""
    length = window_px(side)
    half, whole, reach = _window_hashes(mixed, length, along, buffers)
    # Equal neighbours hash to 0, so a window of one colour does too, and 0 is never chosen.
    limit = np.uint32(2**32 - 1 - round(density(side) * (2**32 - 1)))
    chosen = np.greater(whole, limit, out=buffers.chosen[: len(whole)])
    _choose_edges(chosen, np.equal(whole, np.uint32(0), out=buffers.flat[: len(whole)]), along, buffers)
    # The flat pixels know no borders: windows that begin in a line and end in the next are none.
    lines = buffers.chosen[: len(pixels)].reshape(-1, side, side)
    (lines[:, :, side - length + 1 :] if along == 1 else lines[:, side - length + 1 :])[...] = False
    index = np.flatnonzero(chosen)
    first = pixels[index]
    grain = _is_grain(pixels, first, index, length, along)
    if len(grain):
        index, first = np.delete(index, grain), np.delete(first, grain)
    line = index // side
    column = index - line * side
    row = line - line // side * side  # an eighth of what % costs
    position, lane = (column, row) if along == 1 else (row, column)
    hashes = (half[index].astype(np.uint64) << np.uint64(32)) | half[index + reach]
    hashes = (hashes ^ salt) * np.uint64(0xBF58476D1CE4E5B9) + first * np.uint64(0xD6E8FEB86659FD93)
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(32)
    aside = length // 2
    neighbours = (
        (position >= length, -length * along),
        (position <= side - 2 * length, length * along),
        (lane >= aside, -aside * across),
        (lane < side - aside, aside * across),
    )
    guards = np.empty((len(index), len(neighbours)), np.uint8)
    for number, (known, step) in enumerate(neighbours):
        beside = whole.take(index + step, mode="clip").view(np.uint8)[3::4]  # the upper byte; of no matter where there is no such window
        np.multiply(beside | np.uint8(1), known, out=guards[:, number])
    return hashes, (guards.view("<u4").reshape(-1).astype(np.uint64) << _PLACE_BITS) | index.astype(np.uint64)


def _choose_edges(chosen: npt.NDArray[np.bool_], flat: npt.NDArray[np.bool_], along: int, buffers: _Buffers) -> None:
    """Also choose the windows beside those of one colour: their first or last pixel alone differs from the rest.

    An edge between two flat areas has 15 different windows, of which the hash chooses none in half of all cases; a dot on a flat area has few more.
    So an isolated edge or dot has an anchor for certain where the common part holds 16 px of one colour on one side of it.
    """
    if not flat.any():
        return
    border, size = buffers.border, len(flat) - along
    chosen[:size] |= np.greater(flat[along:], flat[:size], out=border[:size])
    chosen[along:] |= np.less(flat[along:], flat[:size], out=border[:size])


def _is_grain(pixels: UInt32Array, first: UInt32Array, index: IntArray, length: int, along: int) -> IntArray:
    """Return the places in `index` of the grain of glass: few changes (not more than 6) between grey values within 12 of each other, and no slope.

    Scanners that clip at white make patches of 255 with scattered 254, in which the same few windows repeat by the hundred; a search through them is
    quadratic and finds nothing, as what counts as an overlap has values more than 12 apart in its common part. They can still be apart there if no
    window holds as much: on a slow slope. A slope's windows stay: from one end to the other they rise or fall by two, not only at a single pixel.
    Where every line rises or falls and even this is missed, a common part of 96 px spans at most 9 values along a line: again too little.
    """
    # Hardly any tissue is that grey: red and green alone tell most of it.
    near = np.flatnonzero((first & np.uint32(255)) - ((first >> np.uint32(8)) & np.uint32(255)) + np.uint32(_GRAIN_RANGE) <= 2 * _GRAIN_RANGE)
    low, high = _extremes(first[near])
    last_low, last_high = _extremes(pixels[index[near] + (length - 1) * along])
    near = near[np.maximum(last_high, high) - np.minimum(last_low, low) <= _GRAIN_RANGE]
    windows = pixels[index[near] + np.arange(length)[:, np.newaxis] * along]  # (length, n): the fast direction to reduce
    values = windows.view(np.uint8)  # (length, 4 * n)
    lowest, highest = _extremes(values.min(axis=0).view(np.uint32))[0], _extremes(values.max(axis=0).view(np.uint32))[1]
    changes = (windows[1:] != windows[:-1]).view(np.uint8).sum(axis=0, dtype=np.uint8)
    few = np.flatnonzero((highest - lowest <= _GRAIN_RANGE) & (changes <= _GRAIN_CHANGES))
    depth = max(1, length // 5)
    begin, end = (np.ascontiguousarray(part[:, few]).view(np.uint8).astype(np.int16) for part in (windows[:depth], windows[: -depth - 1 : -1]))
    slope = ((end - begin >= _SLOPE).all(axis=0) | (begin - end >= _SLOPE).all(axis=0)).view(np.uint32) != 0  # in any channel
    grain: IntArray = near[few[~slope]]
    return grain


def _extremes(pixels: UInt32Array) -> tuple[UInt32Array, UInt32Array]:
    """Return the smallest and the largest channel of 24-bit pixels."""
    red, green, blue = pixels & np.uint32(255), (pixels >> np.uint32(8)) & np.uint32(255), pixels >> np.uint32(16)
    return np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)


def _window_hashes(mixed: UInt32Array, length: int, along: int, buffers: _Buffers) -> tuple[UInt32Array, UInt32Array, int]:
    """Hash all windows of the flat pixels, from the differences of neighbours.

    Returns the hashes of the windows' first halves, those of whole windows, and where the second half of a window starts behind the first (the halves
    may have pixels in common). Doubling (1, 2, 4, 8 differences, then all 15 from two eights) costs five multiply-adds instead of fifteen; overflow
    modulo 2^32 is wanted.
    """
    size = max(0, len(mixed) - along)
    half, other = buffers.half[:size], buffers.other[:size]
    np.subtract(mixed[along:], mixed[:size], out=half)
    width = 1
    for factor in _STEP_FACTORS[:-1]:
        if 2 * width >= length:
            break
        half = _joined(half, width * along, factor, half, other)
        width *= 2
    reach = (length - 1 - width) * along
    whole = _joined(half, reach, _STEP_FACTORS[-1], buffers.whole, other)
    return half, whole, reach


def _joined(hashes: UInt32Array, step: int, factor: np.uint32, out: UInt32Array, other: UInt32Array) -> UInt32Array:
    """Join each hash with that `step` further, into the start of `out`."""
    size = len(hashes) - step
    second = np.multiply(hashes[step:], factor, out=other[:size])
    return np.add(hashes[:size], second, out=out[:size])
