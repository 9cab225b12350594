import numpy as np
import pytest

from data_prep.anchors import agree, anchors, density, fewest_windows, guards_of, places_of, window_px
from sentinode.errors import SentinodeError
from tests.data_prep.brute_force import counting_offsets
from tests.data_prep.helpers import noise


@pytest.mark.parametrize("side", [32, 33, 48, 64, 67, 96, 100, 128, 224, 512])
def test_the_smallest_common_part_that_counts_expects_a_dozen_anchors(side: int) -> None:
    dy, dx = counting_offsets(side)
    height, width = side - np.abs(dy), side - np.abs(dx)
    length = window_px(side)
    windows = height * np.maximum(width - length + 1, 0) + width * np.maximum(height - length + 1, 0)
    assert windows.min() == fewest_windows(side)
    assert windows.min() * density(side) >= 12


def test_one_window_in_twenty_is_an_anchor_at_96_px() -> None:
    assert (window_px(96), fewest_windows(96)) == (16, 240)
    rng = np.random.default_rng(1)
    found = anchors(np.stack([noise(rng) for _ in range(100)]))
    assert found.shape[1] / 100 == pytest.approx(2 * 96 * 81 / 20, rel=0.02)


@pytest.mark.parametrize("side", [32, 45, 96, 224])
def test_anchors_do_not_depend_on_how_patches_are_batched(side: int) -> None:
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (40, side, side, 3), dtype=np.uint8)
    whole = anchors(images)
    single = [anchors(image[None]) for image in images]
    area = np.uint64(side * side)
    expected = np.concatenate([found + np.array([[0], [number]], np.uint64) * area for number, found in enumerate(single)], axis=1)
    assert sorted(whole.T.tolist()) == sorted(expected.T.tolist())
    assert np.all(np.diff((whole[0] >> np.uint64(48)).astype(np.int64)) >= 0)


def test_equal_hashes_stand_in_the_order_of_their_places() -> None:
    rng = np.random.default_rng(3)
    hashes, rows = anchors(np.concatenate([[noise(rng)] * 5, [noise(rng)], [noise(rng)] * 30]))
    order = np.argsort(hashes, kind="stable")
    hashes, places = hashes[order], places_of(rows)[order]
    equal = hashes[1:] == hashes[:-1]
    assert equal.sum() > 10_000
    assert np.all(np.diff(places)[equal] > 0)


def test_both_patches_choose_the_same_windows_of_their_common_part() -> None:
    field = noise(np.random.default_rng(4), 160)
    dy, dx = 40, 23
    found = []
    for y0, x0 in ((0, 0), (dy, dx)):
        hashes, rows = anchors(field[None, y0 : y0 + 96, x0 : x0 + 96])
        y, x = np.divmod(places_of(rows), 96)
        common = (y + y0 >= dy) & (x + x0 >= dx) & (y + y0 <= 80) & (x + x0 <= 80)  # windows in either direction end inside
        found.append(sorted(zip(hashes[common].tolist(), (y + y0)[common].tolist(), (x + x0)[common].tolist(), strict=True)))
    assert found[0] == found[1]
    assert len(found[0]) > 100


def test_windows_of_one_colour_are_no_anchors() -> None:
    images = np.full((3, 96, 96, 3), 240, np.uint8)
    assert anchors(images).shape == (2, 0)
    images[1, 50, 50] = 220
    y, x = np.divmod(places_of(anchors(images)[1]) - 96 * 96, 96)
    # What is left are windows that hold the one different pixel.
    assert np.all(((y == 50) & (x > 34) & (x <= 50)) | ((x == 50) & (y > 34) & (y <= 50)))
    # Those in which it is the first or the last are always among them.
    assert {(50, 35), (50, 50), (35, 50), (50, 50)} <= set(zip(y.tolist(), x.tolist(), strict=True))


@pytest.mark.parametrize(("base", "depth"), [(255, 1), (255, 12), (248, 3), (128, 12)])
def test_the_grain_of_glass_has_no_anchors(base: int, depth: int) -> None:
    rng = np.random.default_rng(5)
    images = np.full((20, 96, 96, 3), base, np.uint8)
    images[rng.random((20, 96, 96)) < 0.01] -= np.uint8(depth)
    assert anchors(images).shape[1] < 20


@pytest.mark.parametrize("colour", [(255, 255, 255), (240, 200, 220)])
def test_grain_deep_enough_to_be_texture_or_on_a_coloured_ground_has_anchors(colour: tuple[int, int, int]) -> None:
    images = np.full((1, 96, 96, 3), colour, np.uint8)
    images[0, ::25, ::25] -= np.uint8(13)
    assert anchors(images).shape[1] >= 16


@pytest.mark.parametrize(("down", "across"), [(0, 0.22), (0.16, 0.16), (0.5, 0), (0.3, -0.4)])
def test_a_slow_slope_has_anchors(down: float, across: float) -> None:
    """The slowest slopes whose values are far enough apart over a patch to count as texture."""
    y, x = np.mgrid[:96, :96]
    image = np.repeat((150 + down * y + across * x)[..., np.newaxis], 3, axis=2).astype(np.uint8)
    assert image.std() > 6 - 0.7
    assert anchors(image[None]).shape[1] > 50


def test_patches_smaller_than_any_window_have_no_anchors() -> None:
    assert anchors(np.empty((0, 96, 96, 3), np.uint8)).shape == (2, 0)
    assert anchors(np.zeros((2, 1, 1, 3), np.uint8)).shape == (2, 0)


def test_guards_of_a_true_overlap_agree_and_others_mostly_do_not() -> None:
    field = noise(np.random.default_rng(5), 160)
    first, second, other = (anchors(field[None, y : y + 96, x : x + 96]) for y, x in ((0, 0), (30, 10), (60, 60)))
    _, in_first, in_second = np.intersect1d(first[0], second[0], return_indices=True)
    left, right = guards_of(first[1])[in_first], guards_of(second[1])[in_second]
    assert len(left) > 300
    assert agree(left, right).all()
    full = [guards[(guards & np.uint32(0x01010101)) == 0x01010101] for guards in (guards_of(first[1]), guards_of(other[1]))]
    count = min(map(len, full))
    assert count > 200
    assert agree(full[0][:count], full[1][:count]).sum() <= 2


def test_a_block_with_more_pixels_than_places_is_refused() -> None:
    images = np.lib.stride_tricks.as_strided(np.zeros(3, np.uint8), (20_000, 512, 512, 3), (0, 0, 0, 1))
    with pytest.raises(SentinodeError, match=r"20000 patches of 512 px.*decode_block_rows"):
        anchors(images)
