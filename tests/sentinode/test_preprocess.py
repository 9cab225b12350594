"""One road from pixels to network input, equal to torchvision's."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from sentinode.config import IMAGENET_MEAN, IMAGENET_STD
from sentinode.preprocess import network_input, normalise, resize, to_unit_nchw
from tests.factories import random_patches


def test_pixels_become_the_unit_scale_with_channels_first() -> None:
    patches = random_patches(2)
    batch = to_unit_nchw(torch.from_numpy(patches))
    assert batch.dtype == torch.float32
    assert batch.shape == (2, 3, 96, 96)
    np.testing.assert_allclose(batch.permute(0, 2, 3, 1).numpy(), patches / 255.0, atol=1e-7)


def test_the_right_size_is_left_alone() -> None:
    batch = torch.rand(2, 3, 96, 96)
    assert resize(batch, 96) is batch


@pytest.mark.parametrize("size_px", [32, 64, 224])
def test_resizing_is_torchvisions_bilinear_with_antialias(size_px: int) -> None:
    batch = to_unit_nchw(torch.from_numpy(random_patches(2)))
    expected = functional.resize(batch, [size_px, size_px], interpolation=functional.InterpolationMode.BILINEAR, antialias=True)
    torch.testing.assert_close(resize(batch, size_px), expected, atol=1e-6, rtol=0)


def test_shrinking_smooths_instead_of_skipping_pixels() -> None:
    checkers = torch.zeros(1, 3, 96, 96)
    checkers[..., ::2] = 1
    assert resize(checkers, 32)[..., 2:-2].sub(0.5).abs().max() < 0.2


def test_normalising_is_torchvisions() -> None:
    batch = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(normalise(batch, IMAGENET_MEAN, IMAGENET_STD), functional.normalize(batch, list(IMAGENET_MEAN), list(IMAGENET_STD)))


def test_the_whole_road_is_the_sum_of_its_parts_and_leaves_the_pixels_alone() -> None:
    patches = torch.from_numpy(random_patches(2))
    before = patches.clone()
    result = network_input(patches, 64, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(result, normalise(resize(to_unit_nchw(patches), 64), IMAGENET_MEAN, IMAGENET_STD))
    assert result.shape == (2, 3, 64, 64)
    assert torch.equal(patches, before)
