"""From a trained network to a bundle: the rows that calibrate, and what is written about them."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sentinode.bundle import Bundle
from sentinode.colour import channel_statistics
from sentinode.dataset import Patches
from sentinode.errors import TrainingError, UsageError
from sentinode.finishing import Looks, finish_bundle, split_calibration
from sentinode.metrics import roc_auc
from sentinode.model import state_for_storage
from sentinode.predictor import Predictor
from tests.factories import dataset_manifest, learnable_patches
from tests.sentinode.training_helpers import config, network, patches


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Patches]:
    val = learnable_patches(80, 1)
    weights = state_for_storage(network(5, seed=4))
    settings = config(target_recall=0.8, bootstrap_samples=100, fold=1)
    out = tmp_path_factory.mktemp("run") / "bundle"
    return finish_bundle(weights, val, settings, dataset_manifest(), out, name="tiny"), val


def test_the_bundle_says_what_it_does_to_the_rows_it_was_calibrated_on(finished: tuple[Bundle, Patches]) -> None:
    bundle, val = finished
    manifest = bundle.manifest
    decisions = Predictor.load(bundle.path).decide(val.images)
    probabilities = np.array([decision.probability for decision in decisions])
    positive = np.array([decision.prediction == "Metastatic" for decision in decisions])
    counts = manifest.metrics["confusion"]
    assert counts == {
        "tn": int((~positive & (val.labels == 0)).sum()),
        "fp": int((positive & (val.labels == 0)).sum()),
        "fn": int((~positive & (val.labels == 1)).sum()),
        "tp": int((positive & (val.labels == 1)).sum()),
    }
    assert manifest.metrics["recall"] == counts["tp"] / (counts["tp"] + counts["fn"]) >= 0.8
    assert manifest.metrics["roc_auc"] == pytest.approx(roc_auc(val.labels, probabilities))
    assert manifest.metrics["rows"] == 80
    assert manifest.reference.positive_rate == pytest.approx(positive.mean())
    assert manifest.reference.review_rate == pytest.approx(np.mean([decision.needs_review for decision in decisions]))
    np.testing.assert_allclose(manifest.reference.probability_deciles, np.quantile(probabilities, np.linspace(0.1, 0.9, 9)), atol=1e-6)
    np.testing.assert_allclose(manifest.reference.channel_mean, val.images.mean((0, 1, 2)) / 255, rtol=1e-6)
    np.testing.assert_allclose(manifest.reference.channel_std, val.images.std((0, 1, 2)) / 255, rtol=1e-6)


def test_the_bundle_is_calibrated_on_average(finished: tuple[Bundle, Patches]) -> None:
    bundle, val = finished
    probabilities = [decision.probability for decision in Predictor(bundle).decide(val.images)]
    assert np.mean(probabilities) == pytest.approx(val.labels.mean(), abs=1e-3)


def test_the_whole_configuration_and_the_data_are_recorded(finished: tuple[Bundle, Patches]) -> None:
    manifest = finished[0].manifest
    assert manifest.training_config == config(target_recall=0.8, bootstrap_samples=100, fold=1).model_dump(mode="json")
    assert manifest.threshold_rule.target_recall == 0.8
    assert (manifest.data.fingerprint, manifest.data.fold, manifest.data.leak_level) == ("0" * 64, 1, "pixels")
    assert manifest.name == "tiny"


def test_the_same_run_gives_the_same_digest(finished: tuple[Bundle, Patches], tmp_path: Path) -> None:
    bundle, val = finished
    settings = config(target_recall=0.8, bootstrap_samples=100, fold=1)
    again = finish_bundle(bundle.read_weights(), val, settings, dataset_manifest(), tmp_path / "b", name="other")
    assert again.manifest.digest == bundle.manifest.digest


def test_a_network_whose_outputs_are_not_numbers_becomes_no_bundle(tmp_path: Path) -> None:
    weights = state_for_storage(network(5))
    weights["fc.bias"] = torch.tensor([0.0, float("nan")])
    with pytest.raises(TrainingError, match="outputs are not finite"):
        finish_bundle(weights, learnable_patches(20, 1), config(), dataset_manifest(), tmp_path / "b", name="broken")
    assert list(tmp_path.iterdir()) == []


def test_channel_statistics_are_exact_and_take_little_memory() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1300, 32, 32, 3), np.uint8) // np.array([1, 2, 3], np.uint8)
    tracemalloc.start()
    looks = Looks.of(images)
    mean, std = channel_statistics(looks.sums, looks.sums_of_squares, looks.pixels_per_patch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, images.reshape(-1, 3).std(axis=0) / 255, rtol=1e-12)
    assert peak < 512 * 32 * 32 * 12, "more than some planes of some hundred patches were held at a time"


def test_without_a_fraction_all_rows_choose_and_calibrate() -> None:
    val = patches(20)
    choosing, calibrating = split_calibration(val, 0.0, 42)
    assert choosing is val
    assert calibrating is val


def test_calibration_rows_are_whole_groups_and_a_partition() -> None:
    val = patches(400)
    choosing, calibrating = split_calibration(val, 0.3, 42)
    assert set(choosing.ids) | set(calibrating.ids) == set(val.ids)
    assert len(choosing) + len(calibrating) == 400
    assert not set(choosing.groups) & set(calibrating.groups)
    assert 0.2 < len(calibrating) / 400 < 0.4
    by_id = dict(zip(val.ids.tolist(), val.labels.tolist(), strict=True))
    assert [by_id[id_] for id_ in calibrating.ids.tolist()] == calibrating.labels.tolist()


def test_the_calibration_rows_follow_the_seed_and_not_the_order_or_the_other_groups() -> None:
    val = patches(200)
    _, calibrating = split_calibration(val, 0.3, 42)
    _, again = split_calibration(val.take(np.arange(199, -1, -1)), 0.3, 42)
    _, of_half = split_calibration(val.take(np.arange(100)), 0.3, 42)
    _, other = split_calibration(val, 0.3, 43)
    assert set(again.ids) == set(calibrating.ids)
    assert set(of_half.ids) == set(calibrating.ids) & set(val.ids[:100])
    assert set(other.ids) != set(calibrating.ids)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_rows_that_cannot_calibrate_are_refused_before_training(fraction: float) -> None:
    val = patches(40)
    with pytest.raises(UsageError, match=r"needs? both classes in validation; it has \d+ normal and 0 metastatic"):
        split_calibration(replace(val, labels=np.zeros(40, np.int64)), fraction, 42)


def test_a_fraction_that_leaves_one_side_empty_is_refused_before_training() -> None:
    one_group = replace(patches(10), groups=np.full(10, "same"))
    with pytest.raises(UsageError, match="both classes in validation; it has 0 normal and 0 metastatic"):
        split_calibration(one_group, 0.5, 42)
