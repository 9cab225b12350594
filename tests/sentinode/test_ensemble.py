"""Several bundles as one: the mean of calibrated logits, calibrated on rows that no member was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sentinode.bundle import Bundle, digest_of, write_ensemble
from sentinode.config import EnsembleConfig
from sentinode.dataset import PreparedDataset
from sentinode.ensemble import calibration_plan, check_members, mean_logits
from sentinode.errors import ManifestError, UsageError
from sentinode.explain import EnsembleExplainer
from sentinode.manifests import DataReference, ReferenceStatistics, ThresholdRule
from sentinode.model import initial_state
from sentinode.predictor import Predictor
from sentinode.probability import calibrated_logit, calibrated_probability
from sentinode.verify import verify_folder
from tests.factories import dataset_manifest, make_bundle, make_dataset, random_patches


def combine(out: Path, members: list[Bundle], **changes: Any) -> Bundle:
    fields: dict[str, Any] = {
        "config": EnsembleConfig(),
        "dataset": dataset_manifest(),
        "temperature": 0.8,
        "bias": 0.2,
        "threshold": 0.45,
        "threshold_rule": ThresholdRule(target_recall=0.95, bound=0.96, reached=True),
        "metrics": {"rows": 3, "roc_auc": 0.5},
        "reference": ReferenceStatistics(
            channel_mean=(0.7, 0.5, 0.7), channel_std=(0.2, 0.3, 0.2), positive_rate=0.4, review_rate=0.9, probability_deciles=[0.5] * 9
        ),
        "calibration_rows": "held_out",
        "notes": [],
    }
    return write_ensemble(out, members, **fields | changes)


def with_data(bundle: Bundle, dataset: PreparedDataset, fold: int | None, **config: Any) -> Bundle:
    """The bundle as if it had been trained on a fold of a data set."""
    data = DataReference(fingerprint=dataset.manifest.fingerprint, split_method="overlap", leak_level="pixels", fold=fold, notes=[])
    changes = {"data": data, "training_config": bundle.manifest.training_config | {"fold": fold} | config}
    return Bundle(bundle.path, bundle.manifest.model_copy(update=changes), bundle.where)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("members")
    return [make_bundle(folder / "a", seed=1), make_bundle(folder / "b", seed=2, input_size_px=48, temperature=2.0, bias=0.3)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "data", train=30, val=20, test=10)


@pytest.fixture
def folder(members: list[Bundle], tmp_path: Path) -> Path:
    return combine(tmp_path / "ensemble", members).path


def test_the_logit_is_the_mean_of_the_members_calibrated_ones(folder: Path, members: list[Bundle]) -> None:
    patches = random_patches(5)
    predictor = Predictor.load(folder)
    single = [calibrated_logit(Predictor(member).logits(patches), member.manifest.temperature, member.manifest.bias) for member in members]
    np.testing.assert_allclose(predictor.logits(patches, batch_size=2), np.mean(single, axis=0), rtol=1e-5)
    assert not np.allclose(single[0], single[1], atol=1e-3)
    probabilities = [decision.probability for decision in predictor.decide(patches)]
    np.testing.assert_allclose(probabilities, calibrated_probability(np.mean(single, axis=0), 0.8, 0.2), rtol=1e-5)


def test_an_ensemble_stands_alone_and_verifies_itself(folder: Path, members: list[Bundle], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    folder.rename(moved)
    bundle = Bundle.open(moved)
    assert bundle.manifest.members == [member.manifest.digest for member in members]
    assert [network.path for network in bundle.networks()] == [moved / "members" / "00", moved / "members" / "01"]
    assert verify_folder(moved) == ("ensemble", [])
    card = (moved / "model_card.md").read_text()
    assert "An ensemble of 2 networks" in card
    assert members[1].manifest.digest[:12] in card


def test_an_ensemble_has_no_weights_to_begin_from(folder: Path) -> None:
    with pytest.raises(UsageError, match="an ensemble, without weights of its own; name one of its members"):
        Bundle.open(folder).read_weights()
    with pytest.raises(UsageError, match="a bundle"):
        initial_state("resnet18", str(folder), input_size_px=32)


def test_its_digest_follows_its_members_their_order_and_its_calibration(members: list[Bundle], tmp_path: Path) -> None:
    digests = {
        combine(tmp_path / name, chosen, **changes).manifest.digest
        for name, chosen, changes in (
            ("a", members, {}),
            ("b", members[::-1], {}),
            ("c", members, {"temperature": 0.9}),
            ("d", [*members, make_bundle(tmp_path / "m", seed=3)], {}),
        )
    }
    assert len(digests) == 4
    assert combine(tmp_path / "again", members).manifest.digest in digests


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: (folder / "members" / "01" / "model.safetensors").write_bytes(b"x"), "members/01: model.safetensors: sha256 differs"),
        (lambda folder: shutil.rmtree(folder / "members" / "00"), "members/00: "),
        (lambda folder: shutil.copytree(folder / "members" / "00", folder / "members" / "01", dirs_exist_ok=True), "members/01: another bundle than"),
        (lambda folder: (folder / "model_card.md").unlink(), "model_card.md: missing"),
    ],
)
def test_a_damaged_member_is_one_line(folder: Path, damage: Any, line: str) -> None:
    damage(folder)
    with pytest.raises(ManifestError, match=line):
        Bundle.open(folder)
    assert any(line in problem for problem in verify_folder(folder)[1])


def test_an_ensemble_in_an_ensemble_is_refused_even_when_signed(folder: Path, members: list[Bundle], tmp_path: Path) -> None:
    outer = combine(tmp_path / "outer", members).path
    shutil.rmtree(outer / "members" / "00")
    shutil.copytree(folder, outer / "members" / "00")
    content = json.loads((outer / "bundle.json").read_text())
    content["members"][0] = Bundle.open(folder).manifest.digest
    content["digest"] = digest_of(content)
    (outer / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="members/00: an ensemble in an ensemble"):
        Bundle.open(outer)


def test_a_member_that_is_replaced_while_it_is_copied_leaves_nothing(members: list[Bundle], tmp_path: Path) -> None:
    stale = make_bundle(tmp_path / "m", seed=5)
    make_bundle(tmp_path / "m", seed=6)
    with pytest.raises(ManifestError, match="was replaced by another bundle meanwhile"):
        combine(tmp_path / "out", [members[0], stale])
    assert not (tmp_path / "out").exists()


def test_its_explanation_is_the_mean_of_the_members_maps(folder: Path) -> None:
    explainer = Predictor.load(folder).explainer()
    assert isinstance(explainer, EnsembleExplainer)
    maps = explainer.maps(random_patches(3))
    assert maps.shape == (3, 96, 96)
    largest = maps.max(axis=(1, 2))
    assert maps.min() >= 0
    assert set(largest.round(5).tolist()) <= {0.0, 1.0}
    assert largest.any()


def test_what_cannot_be_one_ensemble_is_refused(members: list[Bundle], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two bundles or more"):
        check_members(members[:1])
    with pytest.raises(UsageError, match=r"a: is the same model as .*a"):
        check_members([*members, members[0]])
    with pytest.raises(UsageError, match="is an ensemble itself; name its members"):
        check_members([members[0], Bundle.open(folder)])
    with pytest.raises(UsageError, match=r"accepts patches of 64 px, .* of 96 px"):
        check_members([members[0], make_bundle(tmp_path / "small", patch_size_px=64)])
    check_members(members)


def test_members_without_folds_are_calibrated_on_validation_by_all(members: list[Bundle], dataset: PreparedDataset) -> None:
    plan = calibration_plan([with_data(member, dataset, None) for member in members], dataset)
    assert plan.kind == "held_out"
    assert plan.rows.tolist() == [False] * 30 + [True] * 20
    assert plan.judges.all(axis=0).sum() == 20


def test_members_of_one_fold_are_calibrated_on_it_by_all(members: list[Bundle], dataset: PreparedDataset) -> None:
    plan = calibration_plan([with_data(member, dataset, 1) for member in members], dataset)
    folds = np.asarray(dataset.index_of(plan.shards, ["fold"])["fold"].to_pylist())
    assert plan.kind == "held_out"
    np.testing.assert_array_equal(plan.judges, [folds == 1, folds == 1])


def test_members_of_several_folds_judge_only_what_they_were_not_trained_on(members: list[Bundle], dataset: PreparedDataset) -> None:
    plan = calibration_plan([with_data(member, dataset, fold) for member, fold in zip(members, (0, 2), strict=True)], dataset)
    folds = np.asarray(dataset.index_of(plan.shards, ["fold"])["fold"].to_pylist())
    assert plan.kind == "out_of_fold"
    np.testing.assert_array_equal(plan.judges, [folds == 0, folds == 2])


def test_what_members_began_from_or_were_trained_on_elsewhere_is_said(members: list[Bundle], dataset: PreparedDataset) -> None:
    ours = with_data(members[0], dataset, 0)
    plan = calibration_plan([ours, members[1]], dataset)
    assert plan.kind == "unknown"
    np.testing.assert_array_equal(plan.judges[0], plan.judges[1])
    assert plan.notes == ["Member 01 was trained on another data set than the ensemble was calibrated on."]
    plan = calibration_plan([ours, with_data(members[1], dataset, 0, weights="/base.pt")], dataset)
    assert plan.kind == "unknown"
    assert plan.notes == ["Member 01 began from weights of its own (/base.pt); what they were trained on is not known here."]
    plan = calibration_plan(members, dataset)
    assert (plan.kind, len(plan.notes), plan.rows.sum()) == ("unknown", 2, 20)


def test_the_mean_counts_only_who_judged(members: list[Bundle]) -> None:
    logits = mean_logits(members, [np.array([0, 2]), np.array([2])], [np.array([1.0, 2.0]), np.array([4.0])], 4)
    a, b = members[0].manifest, members[1].manifest
    assert logits[0] == pytest.approx(1 / a.temperature + a.bias)
    assert logits[2] == pytest.approx((2 / a.temperature + a.bias + 4 / b.temperature + b.bias) / 2)
    assert np.isnan(logits[[1, 3]]).all()
