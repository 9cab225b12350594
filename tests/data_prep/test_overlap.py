import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data_prep import overlap
from data_prep.anchors import MIN_SHARED_FRACTION
from data_prep.overlap import Packing, connected_groups, is_overlap
from data_prep.spool import IntArray
from sentinode.errors import SentinodeError
from sentinode.images import UInt8Array, decode_patch
from tests.data_prep.brute_force import Row, brute_force, counting_offsets, rows_of, search
from tests.data_prep.helpers import noise


def rows(folder: Path, images: list[UInt8Array], part_bits: int = 0) -> list[Row]:
    return rows_of(search(folder, np.stack(images), part_bits))


def cut(field: UInt8Array, y: int, x: int, side: int = 96) -> UInt8Array:
    return field[y : y + side, x : x + side]


def tissue(rng: np.random.Generator, side: int) -> UInt8Array:
    """Soft blobs in few colours, like stained tissue: neighbouring pixels differ little."""
    blobs = gaussian_filter(rng.normal(size=(side, side, 3)), (2.5, 2.5, 0))
    return np.clip(180 + blobs / blobs.std() * 30, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("dy", "dx"), [(-30, -40), (-30, 0), (-30, 40), (0, -40), (0, 40), (30, -40), (30, 0), (30, 40)], ids=lambda value: f"{value:+d}"
)
def test_an_overlap_is_found_in_every_direction_with_its_offset(tmp_path: Path, dy: int, dx: int) -> None:
    field = noise(np.random.default_rng(1), 240)
    assert rows(tmp_path, [cut(field, 70, 70), cut(field, 70 + dy, 70 + dx)]) == [(0, 1, dy, dx)]


@pytest.mark.parametrize("kind", [noise, tissue])
def test_an_overlap_is_found_at_every_offset_that_counts(tmp_path: Path, kind: object) -> None:
    """One half of the offsets; every other pair is turned around, which gives the signs of the other half."""
    rng = np.random.default_rng(2)
    field = (noise if kind is noise else tissue)(rng, 3 * 96)
    dy, dx = counting_offsets(96)
    half = (dy > 0) | ((dy == 0) & (dx > 0))
    if kind is noise:  # the larger ones are covered by the other kind
        half &= (96 - np.abs(dy)) * (96 - np.abs(dx)) < 0.07 * 96 * 96
    dy, dx = dy[half], dx[half]
    for start in range(0, len(dy), 1000):
        images, expected = [], []
        for number, offset in enumerate(zip(dy[start : start + 1000].tolist(), dx[start : start + 1000].tolist(), strict=True)):
            # Another colour for each pair, so that no pair overlaps with another.
            shift = np.array([number % 10, number // 10 % 10, number // 100], np.uint8) * np.uint8(5)
            pair = [cut(field, 96, 96) + shift, cut(field, 96 + offset[0], 96 + offset[1]) + shift]
            sign = 1 if number % 2 else -1
            images += pair[::sign]
            expected.append((2 * number, 2 * number + 1, sign * offset[0], sign * offset[1]))
        assert rows_of(search(tmp_path, np.stack(images), block_rows=500)) == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dy", "dx"), [(91, 0), (-91, 0), (0, 91), (0, -91), (90, 9), (9, -90), (74, 74), (-74, 74), (80, 66)])
def test_the_thinnest_overlap_that_counts_is_found_along_every_side(tmp_path: Path, dy: int, dx: int, seed: int) -> None:
    field = noise(np.random.default_rng(seed), 300)
    assert rows(tmp_path, [cut(field, 100, 100), cut(field, 100 + dy, 100 + dx)]) == [(0, 1, dy, dx)]


@pytest.mark.parametrize("side", [32, 50, 64, 128, 224, 512])
def test_overlaps_of_patches_of_other_sides_are_found(tmp_path: Path, side: int) -> None:
    rng = np.random.default_rng(side)
    field = noise(rng, 2 * side)
    thin, edge = side - int(np.ceil(MIN_SHARED_FRACTION * side)), side - int(np.ceil(np.sqrt(MIN_SHARED_FRACTION) * side))
    for dy, dx in ((0, thin), (thin, 0), (edge, edge), (side // 3, side // 2), (0, 0)):
        images = [noise(rng, side), cut(field, 0, 0, side), cut(field, dy, dx, side)]
        assert rows(tmp_path, images) == [(1, 2, dy, dx)]


def test_an_overlap_below_five_percent_does_not_count(tmp_path: Path) -> None:
    field = noise(np.random.default_rng(2), 240)
    assert rows(tmp_path, [cut(field, 0, 0), cut(field, 92, 0)]) == []  # 4 x 96 = 4.2 %


def test_one_different_pixel_in_the_common_part_is_no_overlap(tmp_path: Path) -> None:
    field = noise(np.random.default_rng(3), 240)
    second = cut(field, 40, 40).copy()
    second[5, 5] ^= 1
    assert rows(tmp_path, [cut(field, 0, 0), second]) == []


def test_a_chain_is_one_group_under_its_smallest_member(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    field = noise(rng, 500)
    images = [noise(rng), *(cut(field, 60 * k, 60 * k) for k in range(6)), noise(rng)]
    found = search(tmp_path, np.stack(images))
    assert [row[:2] for row in rows_of(found)] == [(k, k + 1) for k in range(1, 6)]
    assert connected_groups(len(images), found.first, found.second).tolist() == [0, 1, 1, 1, 1, 1, 1, 7]


def test_groups_do_not_depend_on_the_order_of_the_pairs() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 300, (2, 200))
    expected = connected_groups(300, first, second)
    order = rng.permutation(200)
    assert connected_groups(300, second[order], first[order]).tolist() == expected.tolist()
    assert np.all(expected[expected] == expected)
    assert np.all(expected <= np.arange(300))
    assert np.all(expected[first] == expected[second])
    nothing = np.empty(0, np.int64)
    assert connected_groups(3, nothing, nothing).tolist() == [0, 1, 2]
    assert connected_groups(0, nothing, nothing).tolist() == []


@pytest.mark.parametrize("glass", ["constant", "noisy"])
def test_blank_glass_does_not_glue(tmp_path: Path, glass: str) -> None:
    rng = np.random.default_rng(6)
    # The noise is the same on all of them: equal pixels, but no contrast.
    ground = np.full((96, 96, 3), 245, np.uint8) + (rng.integers(0, 8, (96, 96, 3), dtype=np.uint8) if glass == "noisy" else np.uint8(0))
    images = []
    for number in range(20):  # most of each patch is glass, the rest is its own
        image = ground.copy()
        image[:20] = noise(rng)[:20]
        images.append(np.rot90(image, number % 4 if glass == "constant" else 0).copy())
    assert rows(tmp_path, images) == []


def near_glass(count: int, rng: np.random.Generator, depth: int = 1) -> UInt8Array:
    """Glass clipped at white, one pixel in a hundred a little darker, and on each a square of tissue of its own."""
    images = np.full((count, 96, 96, 3), 255, np.uint8)
    images[rng.random((count, 96, 96)) < 0.01] -= np.uint8(depth)
    for image in images:
        y, x = rng.integers(0, 77, 2)
        image[y : y + 20, x : x + 20] = noise(rng, 20)
    return images


def count_compared(folder: Path, images: UInt8Array, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], int, int]:
    """Overlaps, pairs of anchors that were looked at, and pairs of patches that were compared pixel by pixel."""
    matches, compared = 0, 0
    pairs_of, compare = overlap._pairs, overlap.is_overlap

    def pairs(ends: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
        nonlocal matches
        for left, right in pairs_of(ends):
            matches += len(left)
            yield left, right

    def counted(first: UInt8Array, second: UInt8Array, dy: int, dx: int) -> bool:
        nonlocal compared
        compared += 1
        return compare(first, second, dy, dx)

    with monkeypatch.context() as patched:
        patched.setattr(overlap, "_pairs", pairs)
        patched.setattr(overlap, "is_overlap", counted)
        return rows_of(search(folder, images, block_rows=500)), matches, compared


def test_the_work_on_near_glass_grows_with_the_patches_not_with_their_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    images = near_glass(2000, rng)
    images[1] = np.roll(images[0], (5, -7), (0, 1))  # one true pair, wherever the square is
    work = {count: count_compared(tmp_path / str(count), images[:count], monkeypatch) for count in (1000, 2000)}
    for count, (found, matches, compared) in work.items():
        assert (0, 1) in {row[:2] for row in found}
        assert matches < 10 * count
        assert compared < count / 10


def test_candidates_of_deep_grain_are_sorted_out_without_comparing_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dots too deep for grain, too few for texture: many candidates, in bounded memory."""
    monkeypatch.setattr("data_prep.overlap_search._CANDIDATES_GATHERED", 50_000)
    monkeypatch.setattr("data_prep.overlap.MOST_MEMBERS", 1 << 20)
    images = near_glass(12, np.random.default_rng(12), depth=20)
    images[1, :70, :60] = images[0, 26:, 36:]
    found, matches, compared = count_compared(tmp_path, images, monkeypatch)
    assert found == brute_force(images) == [(0, 1, 26, 36)]
    assert matches > 200_000
    assert compared < 1000


def test_the_work_on_specks_too_sparse_to_be_texture_grows_with_the_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of them would cost some milliseconds: these few patches took four minutes, twice as many a quarter of an hour."""
    rng = np.random.default_rng(13)
    images = near_glass(400, rng, depth=20)
    images[1] = np.roll(images[0], (5, -7), (0, 1))  # one true pair, wherever the square is
    work = {count: count_compared(tmp_path / str(count), images[:count], monkeypatch) for count in (200, 400)}
    for count, (found, matches, compared) in work.items():
        assert (0, 1) in {row[:2] for row in found}
        assert matches < 1000 * count
        assert compared < 100 * count


@pytest.mark.parametrize("seed", range(8))
def test_a_few_dots_on_glass_are_an_overlap_where_they_are_texture(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    field = np.full((156, 156, 3), 255, np.uint8)
    field[tuple(rng.integers(0, 156, (2, 60)))] = rng.integers(0, 80, 3)
    origins = rng.integers(0, 61, (5, 2))
    images = np.stack([cut(field, *origin) for origin in origins])
    expected = brute_force(images)
    # In a part of 36 x 36 px, a dot has 16 px of glass on at least one side along its row and along its column.
    wide = [row for row in expected if max(map(abs, row[2:])) <= 60]
    found = rows_of(search(tmp_path, images))
    assert len(wide) >= 10
    assert set(wide) <= set(found) <= set(expected)


@pytest.mark.parametrize("step", [14, 30, 90])
@pytest.mark.parametrize("turns", range(4))
def test_an_edge_between_two_flat_areas_is_an_overlap(tmp_path: Path, step: int, turns: int) -> None:
    field = np.full((170, 170, 3), 250, np.uint8)
    y, x = np.mgrid[:170, :170]
    field[(x > 85) & (y > 60)] -= np.uint8(step)
    field = np.rot90(field, turns)
    first, second = cut(field, 20, 25), cut(field, 50, 40)
    found = rows(tmp_path, [first, second])
    assert (0, 1, 30, 15) in found
    assert set(found) <= set(brute_force(np.stack([first, second])))


def test_equal_texture_without_contrast_does_not_count(tmp_path: Path) -> None:
    field = np.random.default_rng(6).integers(200, 204, (200, 200, 3), dtype=np.uint8)
    assert not is_overlap(cut(field, 0, 0), cut(field, 30, 30), 30, 30)
    assert rows(tmp_path, [cut(field, 0, 0), cut(field, 30, 30)]) == []


def test_the_contrast_must_be_above_the_limit_not_at_it() -> None:
    at_limit = np.full((96, 96, 3), 100, np.uint8)
    at_limit[:, ::2] = 112  # standard deviation 6
    assert not is_overlap(at_limit, at_limit, 0, 0)
    above = at_limit.copy()
    above[0, 0] = 99
    assert is_overlap(above, above, 0, 0)


def test_contrast_in_a_corner_of_the_common_part_is_seen() -> None:
    image = np.full((96, 96, 3), 255, np.uint8)
    image[90:, 90:] = 0
    assert image.std() > 6
    assert is_overlap(image, image, 0, 0)


def test_a_bucket_of_many_equal_windows_loses_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.overlap._PIECE", 10)
    monkeypatch.setattr("data_prep.overlap._SEEN_BITS", 4)
    field = noise(np.random.default_rng(7), 130)
    origins = [(y, x) for y in range(0, 30, 6) for x in range(0, 30, 6)]
    expected = [(i, j, b[0] - a[0], b[1] - a[1]) for i, a in enumerate(origins) for j, b in enumerate(origins) if i < j]
    assert rows(tmp_path, [cut(field, *origin) for origin in origins]) == sorted(expected)


def test_the_pieces_of_a_join_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field = noise(np.random.default_rng(8), 150)
    images = [cut(field, y, x) for y in range(0, 50, 10) for x in range(0, 50, 10)]
    expected = rows(tmp_path / "large", images)
    monkeypatch.setattr("data_prep.overlap._PIECE", 1000)
    monkeypatch.setattr("data_prep.overlap._SEEN_BITS", 8)
    assert len(expected) == 25 * 24 // 2
    assert rows(tmp_path / "small", images) == expected


def test_search_agrees_with_brute_force_whatever_the_number_of_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    field = rng.integers(0, 3, (170, 170, 3), dtype=np.uint8) * 40  # few colours: many chance equalities
    images = [cut(field, *rng.integers(0, 74, 2)) for _ in range(6)] + [rng.integers(0, 3, (96, 96, 3), dtype=np.uint8) * 40 for _ in range(2)]
    images[5] = np.rot90(images[5]).copy()
    expected = brute_force(np.stack(images))
    assert len(expected) >= 5
    assert rows(tmp_path, images) == expected
    assert rows(tmp_path, images, part_bits=3) == expected


def test_a_periodic_pattern_overlaps_with_itself_at_every_period(tmp_path: Path) -> None:
    tile = np.random.default_rng(9).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = np.tile(tile, (4, 4, 1))
    assert rows(tmp_path, [image, image]) == brute_force(np.stack([image, image]))


def test_packed_overlaps_have_the_order_of_their_rows() -> None:
    rng = np.random.default_rng(10)
    count, side = 2_200_000, 96
    table = sorted(zip(*rng.integers(0, count, (2, 1000)).tolist(), *rng.integers(-95, 96, (2, 1000)).tolist(), strict=True))
    packing = Packing(count, side)
    above, between, below = (int(shift) for shift in packing.shifts)
    packed = np.array([(a << above) + (b << between) + (dy + side << below) + dx + side for a, b, dy, dx in table], np.uint64)
    assert np.all(np.diff(packed.astype(object)) >= 0)
    assert rows_of(packing.unpack(packed)) == table


def test_more_patches_than_can_be_packed_are_refused() -> None:
    Packing(1 << 24, 96)
    with pytest.raises(SentinodeError, match=r"16777217 patches of 96 px are too many.*16777216"):
        Packing((1 << 24) + 1, 96)


def real_patches() -> UInt8Array:
    files = sorted((Path(os.environ["SENTINODE_HCD"]) / "train").iterdir())
    return np.stack([decode_patch(path.read_bytes(), size_px=96) for path in files])


@pytest.mark.real_data
@pytest.mark.skipif("SENTINODE_HCD" not in os.environ, reason="SENTINODE_HCD names no folder of real patches")
def test_real_patches_hold_the_overlaps_that_other_methods_found(tmp_path: Path) -> None:
    images = real_patches()
    found = search(tmp_path, images, part_bits=1, block_rows=512)
    groups = connected_groups(len(images), found.first, found.second)
    sizes = Counter(groups.tolist())
    assert len(set(zip(found.first.tolist(), found.second.tolist(), strict=True))) == 1343
    assert sum(size > 1 for size in sizes.values()) == 285
    assert max(sizes.values()) == 51
    # Members of the largest groups, and as many patches that overlap with nothing, by brute force.
    together = np.concatenate([np.flatnonzero(groups == group) for group, _ in sizes.most_common(4)])
    sample = np.sort(np.concatenate([together, np.flatnonzero(np.bincount(groups)[groups] == 1)[: len(together)]]))
    place = {position: number for number, position in enumerate(sample.tolist())}
    expected = brute_force(images[sample])
    assert [(place[a], place[b], dy, dx) for a, b, dy, dx in rows_of(found) if a in place and b in place] == expected
    assert len(expected) > 300
