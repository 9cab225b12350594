"""Blank and pale by PatchCamelyon's own rule: maximum HSV saturation below 0.07."""

import colorsys

import numpy as np
import pytest

from sentinode.images import UInt8Array
from sentinode.tissue import TISSUE_SATURATION, is_black_or_white, is_pale, saturation, tissue_fraction
from tests.factories import random_patches


def is_blank(patches: UInt8Array) -> np.ndarray:
    return is_black_or_white(patches.max(axis=-1), patches.min(axis=-1))


def flat(*colour: int) -> UInt8Array:
    return np.broadcast_to(np.array(colour, np.uint8), (1, 96, 96, 3)).copy()


def test_saturation_is_that_of_hsv() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    expected = [colorsys.rgb_to_hsv(*(pixel / 255.0))[1] for pixel in pixels]
    np.testing.assert_allclose(saturation(pixels), expected, atol=1e-6)
    assert saturation(np.zeros((1, 3), np.uint8)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("colour", "blank", "pale"),
    [
        ((0, 0, 0), True, True),
        ((10, 10, 10), True, True),
        ((11, 10, 10), False, False),
        ((255, 255, 255), True, True),
        ((245, 245, 245), True, True),
        ((244, 245, 245), False, True),
        ((128, 128, 128), False, True),
        ((200, 187, 187), False, True),  # saturation 0.065
        ((200, 186, 186), False, False),  # saturation 0.07, which is enough
        ((224, 160, 196), False, False),
    ],
)
def test_a_patch_without_image_or_stain_is_told_from_tissue(colour: tuple[int, int, int], blank: bool, pale: bool) -> None:
    assert is_blank(flat(*colour)).tolist() == [blank]
    assert is_pale(flat(*colour)).tolist() == [pale]


def test_a_patch_is_pale_by_its_saturation_whatever_the_colour() -> None:
    high, low = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    patches = np.stack([np.minimum(high, low), np.maximum(high, low), np.minimum(high, low)], axis=-1).reshape(-1, 1, 1, 3)
    assert np.array_equal(is_pale(patches), saturation(patches).max(axis=(1, 2)) < TISSUE_SATURATION)


def test_one_stained_pixel_makes_a_patch_not_pale() -> None:
    patch = flat(230, 230, 230)
    patch[0, 95, 0] = (200, 100, 150)
    assert is_pale(patch).tolist() == [False]
    assert is_pale(np.concatenate([patch, flat(230, 230, 230)])).tolist() == [False, True]


def test_the_tissue_fraction_counts_stained_pixels() -> None:
    patch = flat(230, 230, 230)
    patch[0, :24] = (200, 100, 150)
    np.testing.assert_allclose(tissue_fraction(np.concatenate([patch, flat(230, 230, 230), flat(200, 100, 150)])), [0.25, 0, 1])


def test_each_patch_is_judged_alone() -> None:
    patches = np.concatenate([random_patches(3), flat(255, 255, 255), flat(0, 0, 0)])
    for judge in (is_pale, is_blank, tissue_fraction):
        np.testing.assert_array_equal(judge(patches), np.concatenate([judge(patches[row : row + 1]) for row in range(len(patches))]))
    assert is_pale(patches[:0]).shape == (0,)
