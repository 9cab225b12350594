import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.overlap import anchors, connected_groups, find_overlaps, is_overlap, union
from sentinode.images import UInt8Array, decode_patch
from tests.data_prep.helpers import brute_force, make_spool, noise


def search(folder: Path, images: list[UInt8Array], parts: int = 1) -> list[tuple[int, int, int, int]]:
    spool, blocks = make_spool(folder, np.stack(images))
    found = [anchors(block) for block in blocks]
    return union(find_overlaps(spool, found, part, parts) for part in range(parts)).rows()


def cut(field: UInt8Array, y: int, x: int) -> UInt8Array:
    return field[y : y + 96, x : x + 96]


@pytest.mark.parametrize(
    ("dy", "dx"), [(-30, -40), (-30, 0), (-30, 40), (0, -40), (0, 40), (30, -40), (30, 0), (30, 40)], ids=lambda value: f"{value:+d}"
)
def test_an_overlap_is_found_in_every_direction_with_its_offset(tmp_path: Path, dy: int, dx: int) -> None:
    field = noise(np.random.default_rng(1), 240)
    assert search(tmp_path, [cut(field, 70, 70), cut(field, 70 + dy, 70 + dx)]) == [(0, 1, dy, dx)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dy", "dx"), [(91, 0), (-91, 0), (0, 91), (0, -91), (90, 9), (9, -90), (74, 74), (-74, 74), (80, 66)])
def test_the_thinnest_overlap_that_counts_is_found_along_every_side(tmp_path: Path, dy: int, dx: int, seed: int) -> None:
    field = noise(np.random.default_rng(seed), 300)
    assert search(tmp_path, [cut(field, 100, 100), cut(field, 100 + dy, 100 + dx)]) == [(0, 1, dy, dx)]


def test_an_overlap_below_five_percent_does_not_count(tmp_path: Path) -> None:
    field = noise(np.random.default_rng(2), 240)
    assert search(tmp_path, [cut(field, 0, 0), cut(field, 92, 0)]) == []  # 4 x 96 = 4.2 %


def test_one_different_pixel_in_the_common_part_is_no_overlap(tmp_path: Path) -> None:
    field = noise(np.random.default_rng(3), 240)
    second = cut(field, 40, 40).copy()
    second[5, 5] ^= 1
    assert search(tmp_path, [cut(field, 0, 0), second]) == []


def test_a_chain_is_one_group_under_its_smallest_member(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    field = noise(rng, 500)
    images = [noise(rng), *(cut(field, 60 * k, 60 * k) for k in range(6)), noise(rng)]
    rows = search(tmp_path, images)
    assert [row[:2] for row in rows] == [(k, k + 1) for k in range(1, 6)]
    assert connected_groups(len(images), [row[:2] for row in rows]).tolist() == [0, 1, 1, 1, 1, 1, 1, 7]


def test_blank_glass_does_not_glue(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    images = []
    for side in range(20):  # most of each patch is the same white, the rest is its own
        image = np.full((96, 96, 3), 255, np.uint8)
        image[:20] = noise(rng)[:20]
        images.append(np.rot90(image, side % 4).copy())
    assert search(tmp_path, images) == []


def test_equal_texture_without_contrast_does_not_count(tmp_path: Path) -> None:
    field = np.random.default_rng(6).integers(200, 204, (200, 200, 3), dtype=np.uint8)
    assert not is_overlap(cut(field, 0, 0), cut(field, 30, 30), 30, 30)
    assert search(tmp_path, [cut(field, 0, 0), cut(field, 30, 30)]) == []


def test_a_bucket_of_many_equal_windows_loses_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.overlap._MAX_CANDIDATES", 10_000)
    field = noise(np.random.default_rng(7), 130)
    origins = [(y, x) for y in range(0, 30, 6) for x in range(0, 30, 6)]
    rows = search(tmp_path, [cut(field, *origin) for origin in origins])
    expected = [(i, j, b[0] - a[0], b[1] - a[1]) for i, a in enumerate(origins) for j, b in enumerate(origins) if i < j]
    assert rows == sorted(expected)


def test_search_agrees_with_brute_force_whatever_the_number_of_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    field = rng.integers(0, 3, (170, 170, 3), dtype=np.uint8) * 40  # few colours: many chance equalities
    images = [cut(field, *rng.integers(0, 74, 2)) for _ in range(6)] + [rng.integers(0, 3, (96, 96, 3), dtype=np.uint8) * 40 for _ in range(2)]
    images[5] = np.rot90(images[5]).copy()
    expected = brute_force(np.stack(images))
    assert len(expected) >= 5
    assert search(tmp_path, images) == expected
    assert search(tmp_path, images, parts=5) == expected


def test_anchors_do_not_depend_on_how_patches_are_batched() -> None:
    rng = np.random.default_rng(9)
    images = np.stack([noise(rng) for _ in range(40)])
    whole = anchors(images)
    assert np.all(np.diff(whole[0].astype(np.float64)) >= 0)
    assert sorted(whole[0].tolist()) == sorted(h for image in images for h in anchors(image[None])[0].tolist())
    assert 800 < whole.shape[1] / 40 < 1150


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.skipif("SENTINODE_HCD" not in os.environ, reason="SENTINODE_HCD names no folder of real patches")
def test_real_patches_hold_the_overlaps_that_another_method_found(tmp_path: Path) -> None:
    files = sorted((Path(os.environ["SENTINODE_HCD"]) / "train").iterdir())
    images = np.stack([decode_patch(path.read_bytes(), size_px=96) for path in files])
    spool, blocks = make_spool(tmp_path, images, block_rows=512)
    overlaps = find_overlaps(spool, [anchors(block) for block in blocks])
    sizes = Counter(connected_groups(len(images), overlaps.pairs).tolist()).values()
    assert len(overlaps.pairs) == 1343
    assert sum(size > 1 for size in sizes) == 285
    assert max(sizes) == 51
