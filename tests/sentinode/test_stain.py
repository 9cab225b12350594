"""Stain augmentation: exact on pure stains, nothing at zero strength, glass stays glass."""

import numpy as np
import pytest
import torch

from sentinode.augment import augment, draw
from sentinode.config import AugmentConfig
from sentinode.preprocess import to_unit_nchw
from sentinode.stain import RGB_OF_STAINS, jitter_stains
from tests.factories import random_patches

ONLY_STAIN = AugmentConfig(dihedral=False, colour_jitter=0, hue_jitter=0, stain_jitter=0.2)


def plain(colour: object, side_px: int = 4) -> torch.Tensor:
    """One patch of one colour, (1, 3, side, side)."""
    return torch.as_tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(-1, -1, side_px, side_px).clone()


def amounts(haematoxylin: float, eosin: float, residual: float = 0.0) -> torch.Tensor:
    """A patch of so much of each stain."""
    return plain(np.exp(-np.array([haematoxylin, eosin, residual]) @ np.array(RGB_OF_STAINS)))


def changes(scale: tuple[float, float, float] = (1, 1, 1), shift: tuple[float, float, float] = (0, 0, 0)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([scale], dtype=torch.float32), torch.tensor([shift], dtype=torch.float32)


def optical_density(batch: torch.Tensor) -> torch.Tensor:
    return -batch.log()


def test_absorbances_have_length_one() -> None:
    np.testing.assert_allclose(np.linalg.norm(RGB_OF_STAINS, axis=1), 1, atol=0.01)


@pytest.mark.parametrize("stain", [0, 1, 2])
def test_each_stain_is_scaled_and_shifted_alone(stain: int) -> None:
    scale, shift, before = [1.0] * 3, [0.0] * 3, [0.5, 0.3, 0.1]
    scale[stain], shift[stain] = 1.25, 0.04
    after = list(before)
    after[stain] = before[stain] * 1.25 + 0.04
    torch.testing.assert_close(jitter_stains(amounts(*before), *changes(tuple(scale), tuple(shift))), amounts(*after), atol=1e-6, rtol=0)


def test_more_haematoxylin_is_bluer_and_darker_more_eosin_pinker() -> None:
    tissue = amounts(0.6, 0.4)
    red, green, blue = (jitter_stains(tissue, *changes((1.5, 1, 1))) - tissue)[0, :, 0, 0]
    assert max(red, green) < blue < 0  # red and green are absorbed, blue less
    red, green, blue = (jitter_stains(tissue, *changes((1, 1.5, 1))) - tissue)[0, :, 0, 0]
    assert green < blue < red < 0


def test_zero_strength_changes_no_bit() -> None:
    batch = torch.cat([to_unit_nchw(torch.from_numpy(random_patches(4))), torch.zeros(1, 3, 96, 96), torch.ones(1, 3, 96, 96)])
    assert torch.equal(jitter_stains(batch, torch.ones(6, 3), torch.zeros(6, 3)), batch)
    assert torch.equal(augment(batch, draw(0, 0, 6), ONLY_STAIN.model_copy(update={"stain_jitter": 0.0})), batch)


def test_black_stays_black_and_white_glass_white() -> None:
    draws = draw(0, 0, 200)
    strong = ONLY_STAIN.model_copy(update={"stain_jitter": 1.0})
    assert torch.equal(augment(plain((0, 0, 0)).expand(200, -1, -1, -1), draws, strong), torch.zeros(200, 3, 4, 4))
    assert torch.equal(augment(plain((1, 1, 1)).expand(200, -1, -1, -1), draws, strong), torch.ones(200, 3, 4, 4))
    # Glass as scanned is not quite white.
    scanned = plain((245 / 255, 243 / 255, 246 / 255)).expand(200, -1, -1, -1)
    moved = (augment(scanned, draws, ONLY_STAIN) - scanned).abs() * 255
    assert 0 < moved.max() < 9
    assert moved.mean() < 3


def test_the_shift_is_whole_on_tissue_and_fades_on_glass() -> None:
    shift = (0.0, 0.04, 0.0)
    pink, pale, glass = amounts(0.2, 0.2), amounts(0.0, 0.02), amounts(0, 0)
    moved = [
        float((optical_density(jitter_stains(patch, *changes(shift=shift))) - optical_density(patch))[0, 1, 0, 0]) for patch in (pink, pale, glass)
    ]
    assert moved[0] == pytest.approx(0.04 * 0.99, abs=1e-5)
    assert moved[1] == pytest.approx(0.04 * 0.99 * 0.02 * (0.07 + 0.99 + 0.11) / 3 / 0.15, abs=1e-5)
    assert moved[2] == 0


def test_factors_are_drawn_evenly_in_one_plus_minus_the_strength_and_shifts_in_a_fifth_of_it() -> None:
    patch = amounts(0.5, 0.5, 0.5)
    seen = optical_density(augment(patch.expand(2000, -1, -1, -1), draw(0, 0, 2000), ONLY_STAIN))[:, :, 0, 0].double()
    stains = seen.numpy() @ np.linalg.inv(RGB_OF_STAINS)
    assert abs(stains - 0.5).max() <= 0.5 * 0.2 + 0.2 * 0.2 + 1e-5
    np.testing.assert_allclose(stains.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(stains.std(0), np.hypot(0.1, 0.04) / np.sqrt(3), rtol=0.05)
    assert abs(np.corrcoef(stains.T) - np.eye(3)).max() < 0.08


def test_real_colours_move_visibly_but_not_far() -> None:
    tissue = amounts(0.5, 0.3, 0.05)
    moved = (augment(tissue.expand(500, -1, -1, -1), draw(1, 0, 500), ONLY_STAIN) - tissue).abs()
    assert 0.01 < moved.mean() < 0.06
    assert moved.max() < 0.25
