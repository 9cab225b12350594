"""Changes of a patch that should not change the answer."""

import io

import numpy as np
import pytest
from PIL import Image

from sentinode.inference import VIEWS
from sentinode.robustness import CHANGES, PERTURBATIONS, answers, is_chosen

PATCHES = np.random.default_rng(0).integers(60, 220, (3, 96, 96, 3), np.uint8)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_change_keeps_shape_and_type_and_changes_a_little(name: str) -> None:
    before = PATCHES.copy()
    changed = PERTURBATIONS[name](PATCHES)
    assert changed.shape == PATCHES.shape
    assert changed.dtype == np.uint8
    assert (before == PATCHES).all()
    assert 0 < np.abs(changed.astype(int) - PATCHES).mean() < 60


def test_brightness_is_a_factor_and_saturates() -> None:
    assert (PERTURBATIONS["brightness +10 %"](np.full((1, 8, 8, 3), 100, np.uint8)) == 110).all()
    assert (PERTURBATIONS["brightness +10 %"](np.full((1, 8, 8, 3), 250, np.uint8)) == 255).all()


def test_jpeg_is_that_of_pillow() -> None:
    file = io.BytesIO()
    Image.fromarray(PATCHES[1]).save(file, "JPEG", quality=75)
    assert (PERTURBATIONS["JPEG, quality 75"](PATCHES)[1] == np.asarray(Image.open(file))).all()


def test_more_eosin_leaves_glass_and_darkens_green_most() -> None:
    glass = np.full((1, 8, 8, 3), 255, np.uint8)
    assert (PERTURBATIONS["eosin +15 %"](glass) == 255).all()
    pink = np.broadcast_to(np.array([230, 130, 190], np.uint8), (1, 8, 8, 3)).copy()
    change = PERTURBATIONS["eosin +15 %"](pink)[0, 0, 0].astype(int) - pink[0, 0, 0]
    assert change[1] < change[0] <= 0
    assert change[1] < change[2] <= 0


def test_the_views_are_the_eight_symmetries() -> None:
    seen: list[np.ndarray] = []

    def logits(patches: np.ndarray) -> np.ndarray:
        seen.append(patches)
        return np.zeros(len(patches), np.float32)

    assert answers(PATCHES, logits).shape == (3, CHANGES)
    views = [PATCHES, *seen[len(PERTURBATIONS) :]]
    assert len({one[:1].tobytes() for one in views}) == len(views) == VIEWS
    assert all((np.sort(one, axis=None) == np.sort(PATCHES, axis=None)).all() for one in views)


def test_answers_stand_in_the_order_of_the_changes() -> None:
    found = answers(PATCHES, lambda patches: patches.mean(axis=(1, 2, 3)).astype(np.float32))
    assert found.shape == (3, len(PERTURBATIONS) + VIEWS - 1)
    for number, change in enumerate(PERTURBATIONS.values()):
        assert found[:, number] == pytest.approx(change(PATCHES).mean(axis=(1, 2, 3)))
    assert found[:, len(PERTURBATIONS) :] == pytest.approx(np.repeat(PATCHES.mean(axis=(1, 2, 3))[:, None], VIEWS - 1, axis=1))


def test_a_model_that_averages_over_the_views_is_not_asked_for_them() -> None:
    asked = 0

    def logits(patches: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += 1
        result: np.ndarray = patches.mean(axis=(1, 2, 3)).astype(np.float32)
        return result

    found = answers(PATCHES, logits, views=False)
    assert asked == len(PERTURBATIONS) + 1
    assert (found[:, len(PERTURBATIONS) :] == logits(PATCHES)[:, None]).all()


def test_a_sample_depends_on_ids_alone() -> None:
    ids = [f"patch {number}" for number in range(4000)]
    chosen = is_chosen(ids, 0.25)
    assert 850 < chosen.sum() < 1150
    assert (is_chosen(ids[::-1], 0.25) == chosen[::-1]).all()
    assert is_chosen(ids, 1.0).all()
    assert not is_chosen(ids, 0.0).any()
