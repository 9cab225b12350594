"""Augmentation keeps the label: the centre stays in the centre, and a row looks the same in whatever batch it is."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from sentinode.augment import augment, blur, dihedral, draw, jitter_colours, warp
from sentinode.config import AugmentConfig
from sentinode.jpeg import compress
from sentinode.preprocess import to_unit_nchw
from tests.factories import random_patches

SEED_PRESET = AugmentConfig(dihedral=False, flip=True, rotation_deg=15, colour_jitter=0.3, hue_jitter=0)
NO_JPEG = AugmentConfig(rotation_deg=15, colour_jitter=0.3, hue_jitter=0.1, stain_jitter=0.2, blur_sigma_px=1.5)
EVERYTHING = NO_JPEG.model_copy(update={"jpeg_quality": 40})
NOTHING = AugmentConfig(dihedral=False, colour_jitter=0, hue_jitter=0)


def only(**changes: object) -> AugmentConfig:
    return NOTHING.model_copy(update=changes)


# One of each kind that training may ask for, at a strength that is easily seen.
SINGLE = {
    "dihedral": only(dihedral=True),
    "flip": only(flip=True),
    "rotation": only(rotation_deg=15),
    "scale": only(scale_jitter=0.1),
    "colours": only(colour_jitter=0.3, hue_jitter=0.1),
    "stains": only(stain_jitter=0.3),
    "blur": only(blur_sigma_px=2),
    "jpeg": only(jpeg_quality=40),
}


def patches(count: int, side_px: int = 96) -> torch.Tensor:
    return to_unit_nchw(torch.from_numpy(random_patches(count, side_px=side_px)))


def centre(batch: torch.Tensor) -> torch.Tensor:
    return batch[..., 32:64, 32:64]


def factors(count: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((count,), value)


def test_the_eight_elements_are_the_eight_symmetries_of_the_square() -> None:
    patch = patches(1)
    eight = dihedral(patch.expand(8, -1, -1, -1), torch.arange(8))
    expected = [torch.rot90(image, turns, (2, 3))[0] for image in (patch, patch.flip(3)) for turns in range(4)]
    assert all(any(torch.equal(one, other) for other in expected) for one in eight)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(eight, 2))
    assert torch.equal(eight[0], patch[0])


def test_every_symmetry_maps_the_centre_square_onto_itself() -> None:
    mask = torch.zeros(1, 3, 96, 96)
    mask[..., 32:64, 32:64] = 1
    assert torch.equal(dihedral(mask.expand(8, -1, -1, -1), torch.arange(8)), mask.expand(8, -1, -1, -1))
    patch = patches(1)
    for image in dihedral(patch.expand(8, -1, -1, -1), torch.arange(8)):
        assert torch.equal(centre(image).flatten().sort().values, centre(patch).flatten().sort().values)


def test_each_patch_gets_its_own_symmetry() -> None:
    batch = patches(8)
    elements = torch.tensor([3, 0, 7, 1, 4, 2, 6, 5])
    together = dihedral(batch, elements)
    for row in range(8):
        assert torch.equal(together[row], dihedral(batch[row : row + 1], elements[row : row + 1])[0])


def test_all_eight_symmetries_come_up_equally_often() -> None:
    elements = (draw(0, 0, 80_000)[:, 0] * 8).long()
    shares = torch.bincount(elements, minlength=8) / 80_000
    assert len(shares) == 8
    assert (shares - 1 / 8).abs().max() < 0.005


def test_draws_depend_on_seed_epoch_and_row_only() -> None:
    draws = draw(7, 3, 100)
    assert draws.shape == (100, 18)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert torch.equal(draws, draw(7, 3, 100))
    assert torch.equal(draws[:40], draw(7, 3, 40))
    assert not torch.equal(draws, draw(7, 4, 100))
    assert not torch.equal(draws, draw(8, 3, 100))
    assert len(torch.unique(draws, dim=0)) == 100


@pytest.mark.parametrize("config", [*SINGLE.values(), SEED_PRESET, NO_JPEG], ids=[*SINGLE, "seed", "all but jpeg"])
def test_a_row_looks_the_same_whatever_batch_it_falls_into(config: AugmentConfig) -> None:
    batch, draws = patches(37, 64), draw(1, 2, 37)
    together = augment(batch, draws, config)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    shuffled = augment(batch[order], draws[order], config)
    alone = torch.cat([augment(batch[row : row + 1], draws[row : row + 1], config) for row in range(37)])
    if config in [SINGLE[name] for name in ("dihedral", "flip", "blur")]:
        assert torch.equal(shuffled, together[order])
        assert torch.equal(alone, together)
    else:
        torch.testing.assert_close(shuffled, together[order], atol=1e-6, rtol=0)
        torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_row_looks_the_same_on_whatever_rank_it_falls(ranks: int) -> None:
    images = torch.from_numpy(random_patches(41, side_px=64))
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    whole = augment(to_unit_nchw(images), draw(5, 4, 41), EVERYTHING)
    for piece in order.tensor_split(ranks):
        for rows in piece.split(5):
            mine = augment(to_unit_nchw(images[rows]), draw(5, 4, 41)[rows], EVERYTHING)
            # A rounding of JPEG may fall the other way if a bit before it differs.
            assert (mine - whole[rows]).abs().mean() < 1e-4


@pytest.mark.parametrize("config", [AugmentConfig(), SEED_PRESET, EVERYTHING, NOTHING], ids=["default", "seed", "everything", "nothing"])
def test_pixels_as_they_are_stored_become_the_same(config: AugmentConfig) -> None:
    images, draws = torch.from_numpy(random_patches(37)), draw(0, 3, 37)
    before = images.clone()
    result = augment(images, draws, config)
    assert torch.equal(result, augment(to_unit_nchw(images), draws, config))
    assert result.is_contiguous()
    assert torch.equal(images, before)


@pytest.mark.parametrize("config", SINGLE.values(), ids=SINGLE)
def test_nothing_moves_the_centre(config: AugmentConfig) -> None:
    batch = torch.tensor([0.85, 0.7, 0.8]).view(1, 3, 1, 1).repeat(64, 1, 96, 96)
    batch[..., 32:64, 32:64] *= torch.tensor([0.5, 0.3, 0.6]).view(3, 1, 1)
    mark = augment(batch, draw(2, 0, 64), config).mean(1)
    # Darkness against the border of the same patch, whatever its colour has become.
    border = mark[:, :8].mean((1, 2), keepdim=True)
    darkness = border - mark
    darkness = darkness / darkness[:, 44:52, 44:52].mean((1, 2), keepdim=True)
    total = darkness.sum((1, 2))
    # Magnified by up to a tenth, the square takes up to a fifth more or less room.
    torch.testing.assert_close(total, torch.full((64,), 1024.0), rtol=0.22 if config.scale_jitter else 0.02, atol=0)
    place = torch.arange(96) - 47.5
    for axis in (1, 2):
        assert ((darkness.sum(3 - axis) * place).sum(1) / total).abs().max() < 0.1
    inside = darkness[:, 32:64, 32:64].mean((1, 2))
    assert inside.min() > (
        0.7 if config.scale_jitter else 0.999 if config in [SINGLE[name] for name in ("dihedral", "flip", "colours", "stains")] else 0.85
    )


@pytest.mark.parametrize("config", SINGLE.values(), ids=SINGLE)
def test_each_augmentation_does_something_in_each_epoch_something_else(config: AugmentConfig) -> None:
    batch = patches(32)
    first, second = (augment(batch, draw(0, epoch, 32), config) for epoch in (0, 1))
    assert not torch.equal(first, batch)
    assert not torch.equal(first, second)


def test_no_step_needs_values_back_from_the_device() -> None:
    # Tensors without values: whatever would wait for a GPU raises.
    draws = draw(0, 0, 20).to("meta")
    for batch in (patches(20), torch.from_numpy(random_patches(20))):
        assert augment(batch.to("meta"), draws, EVERYTHING).shape == (20, 3, 96, 96)


@pytest.mark.gpu
def test_a_gpu_augments_like_a_cpu() -> None:
    batch, draws = patches(40), draw(0, 0, 40)
    for config in (AugmentConfig(), SEED_PRESET, NO_JPEG):
        torch.testing.assert_close(augment(batch.cuda(), draws.cuda(), config).cpu(), augment(batch, draws, config), atol=1e-4, rtol=0)
    jpeg = augment(batch.cuda(), draws.cuda(), SINGLE["jpeg"]).cpu()
    assert (jpeg - augment(batch, draws, SINGLE["jpeg"])).abs().mean() < 1e-3


@pytest.mark.parametrize("config", [AugmentConfig(), SEED_PRESET, EVERYTHING, NOTHING], ids=["default", "seed", "everything", "nothing"])
def test_the_result_stays_within_the_unit_range_and_the_input_is_left_alone(config: AugmentConfig) -> None:
    batch = torch.cat([patches(20), torch.zeros(1, 3, 96, 96), torch.ones(1, 3, 96, 96)])
    before = batch.clone()
    result = augment(batch, draw(3, 0, 22), config)
    assert result.shape == batch.shape
    assert result.dtype == batch.dtype
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(batch, before)
    assert torch.equal(result, batch) == (config == NOTHING)


def test_the_default_only_turns_mirrors_and_recolours() -> None:
    batch, draws = patches(10), draw(5, 1, 10)
    moved = augment(batch, draws, AugmentConfig(colour_jitter=0, hue_jitter=0))
    assert torch.equal(moved, dihedral(batch, (draws[:, 0] * 8).long()))
    coloured = augment(batch, draws, AugmentConfig(dihedral=False))
    assert 0 < (coloured - batch).abs().mean() < 0.1


def test_flips_go_left_right_and_top_down() -> None:
    batch, draws = patches(40), draw(4, 0, 40)
    flipped = augment(batch, draws, SINGLE["flip"])
    for row in range(40):
        sides = [dim for dim, number in ((2, draws[row, 0]), (1, draws[row, 1])) if number < 0.5]
        assert torch.equal(flipped[row], batch[row].flip(sides))


def test_flips_are_independent_and_even() -> None:
    corner = torch.zeros(1, 3, 96, 96)
    corner[..., 0, 0] = 1
    flipped = augment(corner.expand(400, -1, -1, -1), draw(0, 0, 400), AugmentConfig(dihedral=False, flip=True, colour_jitter=0, hue_jitter=0))
    corners = flipped[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.sum(1).tolist() == [1.0] * 400
    assert corners.mean(0).min() > 0.18


def test_factors_of_one_change_no_colour() -> None:
    batch = patches(4)
    one = factors(4)
    torch.testing.assert_close(jitter_colours(batch, one, one, one, factors(4, 0.0)), batch, atol=2e-6, rtol=0)


def test_brightness_scales_contrast_spreads_around_the_grey_and_saturation_fades_to_it() -> None:
    batch = patches(2) * 0.5 + 0.2
    one, zero = factors(2), factors(2, 0.0)
    grey = (batch * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(jitter_colours(batch, factors(2, 0.7), one, one, zero), batch * 0.7, atol=1e-5, rtol=0)
    mean = grey.mean((2, 3), keepdim=True)
    torch.testing.assert_close(jitter_colours(batch, one, factors(2, 0.7), one, zero), mean + (batch - mean) * 0.7, atol=1e-5, rtol=0)
    torch.testing.assert_close(jitter_colours(batch, one, one, factors(2, 0.5), zero), (batch + grey) / 2, atol=2e-3, rtol=0)


def test_a_third_of_a_turn_makes_red_greenish_or_bluish_and_keeps_grey() -> None:
    one = factors(1)
    red = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1).expand(1, 3, 96, 96)
    turned = jitter_colours(red, one, one, one, factors(1, 1 / 3))[0, :, 0, 0].tolist()
    hue = colorsys.rgb_to_hsv(*turned)[0]
    assert min(abs(hue - 1 / 3), abs(hue - 2 / 3)) < 0.12
    grey = torch.full((1, 3, 96, 96), 0.4)
    torch.testing.assert_close(jitter_colours(grey, one, one, one, factors(1, 0.3)), grey, atol=2e-3, rtol=0)


@pytest.mark.parametrize("degrees", [-15.0, 5.0, 15.0])
def test_rotation_turns_around_the_centre_and_keeps_it(degrees: float) -> None:
    rows, columns = np.mgrid[:96, :96] - 47.5
    blob = np.exp(-(rows**2 + columns**2) / 200) + 0.5 * np.exp(-(rows**2 + (columns - 25) ** 2) / 30)
    image = torch.tensor(np.broadcast_to(blob, (1, 3, 96, 96)).copy(), dtype=torch.float32)
    angle = math.radians(degrees)
    turned = warp(image, torch.tensor([angle]), factors(1), torch.zeros(1, 2))
    assert abs(float(turned[0, 0, 47:49, 47:49].mean() - image[0, 0, 47:49, 47:49].mean())) < 0.01
    # The side blob, 25 px from the centre, moves along its circle, and the whole keeps its mass.
    side = turned[0, 0].clone()
    side[28:68, 28:64] = 0
    y, x = divmod(int(side.argmax()), 96)
    assert math.hypot(y - 47.5, x - 47.5) == pytest.approx(25, abs=1.5)
    assert abs(math.degrees(math.atan2(y - 47.5, x - 47.5))) == pytest.approx(abs(degrees), abs=3)
    assert float(turned.sum() / image.sum()) == pytest.approx(1, abs=0.01)


def test_no_rotation_changes_nothing_and_rotations_stay_within_their_bound() -> None:
    batch = patches(3)
    torch.testing.assert_close(warp(batch, torch.zeros(3), factors(3), torch.zeros(3, 2)), batch, atol=1e-5, rtol=0)
    config = AugmentConfig(dihedral=False, rotation_deg=15, colour_jitter=0, hue_jitter=0)
    extremes = torch.zeros(2, 18)
    extremes[1, 2] = 1
    bound = torch.tensor([-math.radians(15), math.radians(15)])
    torch.testing.assert_close(augment(batch[:2], extremes, config), warp(batch[:2], bound, factors(2), torch.zeros(2, 2)))


def test_a_patch_is_magnified_around_its_centre() -> None:
    rows, columns = np.mgrid[:96, :96] - 47.5
    image = torch.tensor(np.hypot(rows, columns)[None, None] / 96, dtype=torch.float32).expand(1, 3, 96, 96)
    for scale in (0.9, 1.2):
        scaled = warp(image, torch.zeros(1), factors(1, scale), torch.zeros(1, 2))
        torch.testing.assert_close(scaled[..., 10:86, 10:86], image[..., 10:86, 10:86] / scale, atol=2e-3, rtol=0)


@pytest.mark.parametrize("turned_deg", [0, 90])
def test_a_patch_is_moved_by_whole_pixels_to_the_right_and_down(turned_deg: int) -> None:
    batch = patches(1)
    turned = torch.rot90(batch, -1 if turned_deg else 0, (2, 3))
    moved = warp(batch, torch.tensor([-math.radians(turned_deg)]), factors(1), torch.tensor([[3.0, -2.0]]))
    torch.testing.assert_close(moved[..., 10:80, 10:80], turned[..., 12:82, 7:77], atol=1e-4, rtol=0)


def test_scales_and_shifts_stay_within_their_bounds() -> None:
    batch = patches(2)
    config = only(scale_jitter=0.1, shift_px=3)
    extremes = torch.zeros(2, 18)
    extremes[1] = 1
    expected = warp(batch, torch.zeros(2), torch.tensor([0.9, 1.1]), torch.tensor([[-3.0, -3.0], [3.0, 3.0]]))
    torch.testing.assert_close(augment(batch, extremes, config), expected)


def test_contrast_comes_after_the_others() -> None:
    batch = patches(3) * 0.4 + 0.3
    one, brightness, contrast, saturation, hue = factors(3), factors(3, 0.9), factors(3, 1.2), factors(3, 0.7), factors(3, 0.1)
    before = jitter_colours(batch, brightness, one, saturation, hue)
    after = jitter_colours(before, one, contrast, one, factors(3, 0.0))
    torch.testing.assert_close(jitter_colours(batch, brightness, contrast, saturation, hue), after, atol=1e-5, rtol=0)


def test_symmetries_take_pixels_as_they_are_stored_too() -> None:
    images = torch.from_numpy(random_patches(8)).permute(0, 3, 1, 2)
    elements = torch.arange(8)
    assert torch.equal(dihedral(images, elements), (dihedral(images.float(), elements)).to(torch.uint8))


def test_blur_is_torchvisions_gaussian_with_each_patch_its_own() -> None:
    batch, sigma_px = patches(3), torch.tensor([0.4, 1.0, 2.0])
    blurred = blur(batch, sigma_px, radius_px=6)
    for row in range(3):
        expected = gaussian_blur(batch[row], kernel_size=[13, 13], sigma=[float(sigma_px[row])])
        torch.testing.assert_close(blurred[row], expected, atol=1e-5, rtol=0)


def test_no_blur_changes_no_bit() -> None:
    batch = patches(3)
    assert torch.equal(blur(batch, torch.zeros(3), radius_px=6), batch)


@pytest.mark.parametrize("name", ["blur", "jpeg"])
def test_half_of_the_patches_are_blurred_and_compressed(name: str) -> None:
    batch = patches(400, 32)
    changed = (augment(batch, draw(0, 0, 400), SINGLE[name]) != batch).any(3).any(2).any(1)
    assert 160 < changed.sum() < 240


def test_blurring_and_compressing_are_independent() -> None:
    draws = draw(0, 0, 10_000)
    assert abs(np.corrcoef(draws.T.numpy()) - np.eye(18)).max() < 0.05
    batch = patches(200, 32)
    blurred, compressed = ((augment(batch, draws[:200], SINGLE[name]) != batch).any(3).any(2).any(1) for name in ("blur", "jpeg"))
    for one in (blurred, ~blurred):
        for other in (compressed, ~compressed):
            assert (one & other).sum() > 30


def test_no_two_augmentations_share_a_number() -> None:
    batch, draws = patches(8, 32), draw(0, 0, 8)
    users = []
    for column in range(18):
        other = draws.clone()
        other[:, column] = 1 - other[:, column]
        users.append({name for name, config in SINGLE.items() if not torch.equal(augment(batch, other, config), augment(batch, draws, config))})
    assert set.union(*users) == set(SINGLE)
    assert all(len(names - {"flip"}) <= 1 for names in users)  # flip is never used together with dihedral


def test_the_largest_blur_and_the_lowest_quality_are_the_configured_ones() -> None:
    batch = patches(2)
    draws = torch.full((2, 18), 1 - 2**-24)
    torch.testing.assert_close(augment(batch, draws, SINGLE["blur"]), blur(batch, torch.full((2,), 2.0), radius_px=6), atol=1e-5, rtol=0)
    torch.testing.assert_close(augment(batch, draws, SINGLE["jpeg"]), compress(batch, torch.full((2,), 100.0)), atol=1e-3, rtol=0)
    draws = torch.full((2, 18), 0.5)
    assert torch.equal(augment(batch, draws, SINGLE["blur"]), batch)
    torch.testing.assert_close(augment(batch, draws, SINGLE["jpeg"]), compress(batch, torch.full((2,), 40.0)), atol=1e-3, rtol=0)
