"""JPEG on the device is Pillow's (libjpeg's) JPEG, to a fraction of a grey level on average."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sentinode.images import UInt8Array, decode_patch
from sentinode.jpeg import compress, quantisation_tables
from sentinode.preprocess import to_unit_nchw
from tests.factories import random_patches

HCD = os.environ.get("SENTINODE_HCD")


def smooth_patches(count: int, height: int = 96, width: int = 96) -> UInt8Array:
    """Soft coloured blobs with a little grain: frequencies like those of tissue."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    images = np.full((count, height, width, 3), [225.0, 190.0, 215.0])
    for image in images:
        for _ in range(25):
            centre_y, centre_x, radius = generator.uniform(0, height), generator.uniform(0, width), generator.uniform(3, 12)
            blob = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * radius**2))
            image -= blob[..., None] * generator.uniform([20, 40, 10], [90, 120, 60])
    return np.clip(images + generator.normal(0, 5, images.shape), 0, 255).astype(np.uint8)


def by_pillow(image: UInt8Array, quality: int) -> UInt8Array:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file))


def by_us(images: UInt8Array, quality: int) -> np.ndarray:
    levels = compress(to_unit_nchw(torch.from_numpy(images)), torch.full((len(images),), float(quality))) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    return levels.round().permute(0, 2, 3, 1).numpy()


def differences(images: UInt8Array, quality: int) -> tuple[float, float]:
    """Mean absolute difference in grey levels: from Pillow's, and of Pillow's from the image."""
    theirs = np.stack([by_pillow(image, quality) for image in images]).astype(float)
    return abs(by_us(images, quality) - theirs).mean(), abs(theirs - images).mean()


def test_the_tables_are_libjpegs_at_every_quality() -> None:
    qualities = range(1, 101)
    ours = quantisation_tables(torch.tensor(qualities, dtype=torch.float32))
    for quality, tables in zip(qualities, ours, strict=True):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
        theirs = Image.open(file).quantization
        assert tables.tolist() == [theirs[0], theirs[1]]


@pytest.mark.parametrize("quality", [50, 75, 90])
def test_what_is_left_is_what_pillow_leaves(quality: int) -> None:
    # Measured: 0.3 to 0.4 grey levels on real and on such patches, where the loss itself is 2 to 12.
    difference, loss = differences(smooth_patches(6), quality)
    assert difference < 0.6
    assert difference < loss / 4
    # Noise, the worst case: 0.4 to 0.8.
    assert differences(random_patches(4), quality)[0] < 1.2


@pytest.mark.parametrize(("height", "width"), [(40, 57), (33, 96), (16, 17), (5, 7)])
def test_sides_that_are_no_multiple_of_16_are_cropped_again(height: int, width: int) -> None:
    images = smooth_patches(4, height, width)
    assert by_us(images, 75).shape == images.shape
    assert differences(images, 75)[0] < 0.8


def test_each_patch_has_its_own_quality() -> None:
    batch = to_unit_nchw(torch.from_numpy(smooth_patches(1))).expand(4, -1, -1, -1)
    losses = (compress(batch, torch.tensor([10.0, 40.0, 75.0, 100.0])) - batch).abs().mean((1, 2, 3)) * 255
    assert losses.diff().max() < 0
    assert losses[3] < 4
    for row, quality in enumerate((10.0, 40.0, 75.0, 100.0)):
        alone = compress(batch[:1], torch.tensor([quality]))[0]
        assert ((alone - batch[0]).abs().mean() * 255).item() == pytest.approx(losses[row].item(), rel=1e-3)


def test_plain_colours_stay_and_the_input_is_left_alone() -> None:
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [200, 200, 200], [255, 0, 0], [0, 255, 0], [0, 0, 255], [180, 120, 200]]) / 255
    batch = colours.view(7, 3, 1, 1).repeat(1, 1, 32, 32)
    before = batch.clone()
    result = compress(batch, torch.full((7,), 90.0))
    assert torch.equal(batch, before)
    assert ((result - batch).abs() * 255).max() < 4
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(result[:3], batch[:3])  # black, white, grey


@pytest.mark.real_data
@pytest.mark.skipif(not HCD, reason="SENTINODE_HCD names no folder of real patches")
@pytest.mark.parametrize("quality", [50, 75, 90])
def test_real_patches_look_as_pillow_leaves_them(quality: int) -> None:
    files = sorted((Path(HCD or "") / "train").glob("*.tif"))[:60]
    difference, loss = differences(np.stack([decode_patch(file.read_bytes(), size_px=96) for file in files]), quality)
    assert difference < 0.6
    assert difference < loss / 4
