"""Which patches share pixels: pairs of equal anchors become candidates, and every candidate is compared pixel by pixel.

Two patches overlap when, at some integer offset, all pixels they have in common are equal, the common part covers at least 5 % of the patch and the
standard deviation of its 8-bit values is above 6. Candidates and overlaps travel as one 64-bit number each (`Packing`), in ascending order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from data_prep.anchors import MIN_SHARED_FRACTION, MIN_TEXTURE_STD, UInt32Array, UInt64Array, agree
from data_prep.fingerprints import sift
from data_prep.spool import IntArray, Spool
from sentinode.errors import SentinodeError
from sentinode.images import UInt8Array

MOST_MEMBERS = 1 << 10
"""Anchors of one hash whose pairs are looked at without asking whether an overlap can depend on them."""
_PIECE = 1 << 16  # matches looked at together: 0.5 MB an array, so that a handful stays in a core's cache
_SEEN_BITS = 20  # 8 MB for the candidates met last
_SEEN_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlaps:
    """Verified overlaps: pixel (y, x) of patch `second` is pixel (y + dy, x + dx) of patch `first`, wherever both exist.

    Attributes
    ----------
    first, second : ndarray of int64, shape (n,)
        Positions of the two patches, first < second; a pair may appear with several offsets. Sorted by first, second, dy, dx; no row twice.
    dy, dx : ndarray of int64, shape (n,)
        Where the origin of `second` lies in `first`, pixels down and to the right.
    """

    first: IntArray
    second: IntArray
    dy: IntArray
    dx: IntArray

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class Packing:
    """How (first, second, dy, dx) become one 64-bit number whose order is theirs: 2.2 million patches of 96 px take 60 bits.

    Attributes
    ----------
    count : int
        Number of patches.
    side : int
        Their side in pixels.
    """

    count: int
    side: int

    def __post_init__(self) -> None:
        if 2 * (self.patch_bits + self.offset_bits) > 64:
            raise SentinodeError(
                f"{self.count} patches of {self.side} px are too many for one overlap search, which numbers {1 << (32 - self.offset_bits)} at most"
            )

    @property
    def patch_bits(self) -> int:
        """Bits of a patch's position."""
        return max(1, (self.count - 1).bit_length())

    @property
    def offset_bits(self) -> int:
        """Bits of dy + side, and of dx + side."""
        return (2 * self.side - 1).bit_length()

    @property
    def shifts(self) -> tuple[np.uint64, np.uint64, np.uint64]:
        """Where first, second and dy + side begin; dx + side begins at bit 0."""
        return np.uint64(self.patch_bits + 2 * self.offset_bits), np.uint64(2 * self.offset_bits), np.uint64(self.offset_bits)

    def unpack(self, packed: UInt64Array) -> Overlaps:
        """Return the overlaps that numbers stand for, uint64 (n,)."""
        above, between, below = self.shifts
        patch, offset = np.uint64((1 << self.patch_bits) - 1), np.uint64((1 << self.offset_bits) - 1)
        dy, dx = ((packed >> below) & offset).astype(np.int64) - self.side, (packed & offset).astype(np.int64) - self.side
        return Overlaps((packed >> above).astype(np.int64), ((packed >> between) & patch).astype(np.int64), dy, dx)

    @cached_property
    def counting_offsets(self) -> npt.NDArray[np.bool_]:
        """Tell for every value of the lower bits (dy + side, dx + side) whether the common part is large enough, bool (4^offset_bits,)."""
        offsets = np.abs(np.arange(1 << self.offset_bits) - self.side)
        extent = np.maximum(self.side - offsets, 0)
        result: npt.NDArray[np.bool_] = np.multiply.outer(extent, extent) >= MIN_SHARED_FRACTION * self.side * self.side
        return result.reshape(-1)


def is_overlap(first: UInt8Array, second: UInt8Array, dy: int, dx: int) -> bool:
    """Apply the definition to two patches, uint8 (side, side, 3), RGB, at one offset of `second`'s origin in `first`."""
    side = first.shape[0]
    height, width = side - abs(dy), side - abs(dx)
    if height <= 0 or width <= 0 or height * width < MIN_SHARED_FRACTION * side * side:
        return False
    a = first[max(dy, 0) : max(dy, 0) + height, max(dx, 0) : max(dx, 0) + width]
    b = second[max(-dy, 0) : max(-dy, 0) + height, max(-dx, 0) : max(-dx, 0) + width]
    common = a.tobytes()  # and then one memcmp: a third of what comparing element by element costs
    return common == b.tobytes() and _is_textured(common)


def _is_textured(values: bytes) -> bool:
    """Tell whether the standard deviation of 8-bit values is above the limit, without rounding."""
    numbers, count = np.frombuffer(values, np.uint8), len(values)
    # Squared deviations only add up: where every seventh value already has more of them than all may have, the rest need not be read.
    for step in (7, 1):
        sample = numbers[::step].astype(np.float64)  # sums of squares of bytes are exact in 53 bits, and BLAS is fast
        total, squares = int(sample.sum()), int(sample @ sample)
        if len(sample) * squares - total * total > MIN_TEXTURE_STD**2 * count * len(sample):
            return True
    return False


def empty_memory() -> UInt64Array:
    """Return an empty memory for `join`."""
    return np.zeros(1 << _SEEN_BITS, np.uint64)


def join(
    hashes: UInt64Array,
    places: IntArray,
    guards: UInt32Array,
    packing: Packing,
    range_bits: int,
    seen: UInt64Array,
    crowded: list[UInt64Array] | None = None,
) -> Iterator[UInt64Array]:
    """Yield the candidates that some anchors speak for, packed, some at a time, in no order; most of them once.

    Parameters
    ----------
    hashes : ndarray of uint64, shape (k,)
        Their upper `range_bits` bits are all the same.
    places : ndarray of int64, shape (k,)
        (patch * side + y) * side + x, ascending among equal hashes.
    guards : ndarray of uint32, shape (k,)
        See `anchors.agree`.
    packing : Packing
    range_bits : int
    seen : ndarray of uint64, shape (2^n,)
        Candidates that were returned a short while ago, and are not returned again; `empty_memory()` before the first join. A true pair has some 270
        anchors in common, so this saves most of the sorting. Candidates that push each other out of it come again.
    crowded : list, optional
        Receives the hashes that more than MOST_MEMBERS anchors have, whose pairs are left out then: `crowds.needed` says which of them matter.
    """
    members, ends = _shared(hashes, range_bits)
    if crowded is not None:
        members, ends = _without_crowds(hashes, members, ends, crowded)
    guards = guards[members]
    patches, within = np.divmod(places[members], packing.side * packing.side)
    # The packed candidate of two anchors is a sum: (second, dy, dx) of an anchor enter with opposite signs when it comes second.
    above, between, below = packing.shifts
    y, x = (part.astype(np.uint64) for part in np.divmod(within, packing.side))
    offset = (y << below) + x
    numbers = patches.astype(np.uint64)
    origin = np.uint64((packing.side << packing.offset_bits) + packing.side)
    as_first, as_second = (numbers << above) + offset + origin, (numbers << between) - offset
    offset_mask, slot_shift = np.uint64((1 << 2 * packing.offset_bits) - 1), np.uint64(64 - (len(seen) - 1).bit_length())
    for left, right in _pairs(ends):
        keep = agree(guards[left], guards[right])
        keep &= patches[left] != patches[right]
        packed = as_first[left[keep]] + as_second[right[keep]]
        packed = packed[packing.counting_offsets[packed & offset_mask]]
        slot = (packed * _SEEN_FACTOR) >> slot_shift
        new = seen[slot] != packed
        packed = packed[new]
        seen[slot[new]] = packed
        yield packed


def unique(packed: UInt64Array) -> UInt64Array:
    """Return the distinct values in ascending order; sorts in place."""
    packed.sort(kind="stable")  # merges what is in order already
    return packed[np.concatenate([[True], packed[1:] != packed[:-1]])] if len(packed) else packed


def _shared(hashes: UInt64Array, range_bits: int) -> tuple[IntArray, IntArray]:
    """Return the anchors whose hash occurs more than once, bucket by bucket, and for each the end of its bucket among them, int64 (m,) both."""
    # One sort of hash and position in one number costs half of an argsort, and keeps equal hashes in order. 40 bits of hash and more stay: chance
    # adds a few pairs.
    index_bits = max(1, (len(hashes) - 1).bit_length())
    mask = np.uint64((1 << index_bits) - 1)
    keys = ((hashes << np.uint64(range_bits)) & ~mask) | np.arange(len(hashes), dtype=np.uint64)
    keys.sort(kind="stable")  # the anchors of each block are in order but for the lower bits: twice as fast as the default
    as_before = np.zeros(len(keys) + 1, np.bool_)
    np.equal(keys[1:] >> np.uint64(index_bits), keys[:-1] >> np.uint64(index_bits), out=as_before[1 : max(1, len(keys))])
    shared = as_before[:-1] | as_before[1:]
    members = (keys[shared] & mask).astype(np.int64)
    starts = np.flatnonzero(~as_before[:-1][shared])
    bounds = np.append(starts[1:], len(members)) if len(starts) else starts
    return members, np.repeat(bounds, bounds - starts)


def _without_crowds(hashes: UInt64Array, members: IntArray, ends: IntArray, crowded: list[UInt64Array]) -> tuple[IntArray, IntArray]:
    """Return what `_shared` returned without the buckets of more than MOST_MEMBERS, whose hashes go to `crowded`."""
    starts = np.flatnonzero(np.diff(ends, prepend=-1))
    sizes = ends[starts] - starts
    keep = np.repeat(sizes <= MOST_MEMBERS, sizes)
    if keep.all():
        return members, ends
    crowded.append(np.unique(hashes[members[~keep]]))
    place = np.append(0, np.cumsum(keep))
    return members[keep], place[ends[keep]]


def _pairs(ends: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield all pairs (left, right), left < right, within the buckets, in pieces of about _PIECE pairs or the partners of one member."""
    partners = ends - np.arange(1, len(ends) + 1)
    behind = np.concatenate([[0], np.cumsum(partners)])
    begin = 0
    while begin < len(ends):
        end = max(begin + 1, int(np.searchsorted(behind, behind[begin] + _PIECE, side="right")) - 1)
        counts = partners[begin:end]
        left = np.repeat(np.arange(begin, end), counts)
        # The first partner of a member is the next one.
        right = np.arange(behind[begin], behind[end]) + np.repeat(np.arange(begin, end) + 1 - behind[begin:end], counts)
        yield left, right
        begin = end


def sifted(spool: Spool, packed: UInt64Array, packing: Packing) -> UInt64Array:
    """Drop candidates that are no overlaps, where there are so many that this pays (`fingerprints.sift`)."""
    candidates = packing.unpack(packed)
    return packed[sift(spool, candidates.first, candidates.second, candidates.dy, candidates.dx)]


def verify(spool: Spool, packed: UInt64Array, packing: Packing) -> UInt64Array:
    """Keep the candidates that meet the definition; ascending input keeps the reading of first patches local."""
    packed = sifted(spool, packed, packing)
    starts = spool.starts
    pixels = [np.asarray(spool.block(number)) for number in range(len(spool.rows))]  # a memmap's own indexing costs 1 us
    candidates = packing.unpack(packed)
    keep = np.zeros(len(packed), np.bool_)
    blocks = [np.searchsorted(starts, patches, side="right") - 1 for patches in (candidates.first, candidates.second)]
    rows = [patches - starts[block] for patches, block in zip((candidates.first, candidates.second), blocks, strict=True)]
    columns = [column.tolist() for column in (blocks[0], rows[0], blocks[1], rows[1], candidates.dy, candidates.dx)]
    for number, (first_block, first_row, second_block, second_row, dy, dx) in enumerate(zip(*columns, strict=True)):
        keep[number] = is_overlap(pixels[first_block][first_row], pixels[second_block][second_row], dy, dx)
    return packed[keep]


def connected_groups(count: int, first: IntArray, second: IntArray) -> IntArray:
    """Return the smallest member of each patch's connected component, int64 (count,); a patch without overlap is its own.

    Parameters
    ----------
    count : int
        Number of patches.
    first, second : ndarray of int64, shape (n,)
        The pairs, in any order.
    """
    # Slow to import, and the tasks, which import this module too, do not need it.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first), np.bool_), (first, second)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, smallest, member_of = np.unique(component, return_index=True, return_inverse=True)
    groups: IntArray = smallest[member_of].astype(np.int64)
    return groups
