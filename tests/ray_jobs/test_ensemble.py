"""Bundles combined by the command, and used by evaluate like any other."""

import json
from pathlib import Path

import numpy as np
import pytest

from ray_jobs.ensemble import ensemble, main
from ray_jobs.evaluate import evaluate
from sentinode.bundle import Bundle
from sentinode.config import EnsembleConfig, EvaluateConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import SentinodeError
from sentinode.predictor import Predictor
from sentinode.probability import calibrated_logit
from tests.factories import make_bundle, make_dataset


def trained_on(dataset: PreparedDataset, fold: int | None, folder: Path, **fields: float) -> Bundle:
    """A bundle that says it was trained on a fold of a data set, which its digest does not cover."""
    make_bundle(folder, seed=fold or 0, **fields)
    content = json.loads((folder / "bundle.json").read_text())
    content["data"] |= {"fingerprint": dataset.manifest.fingerprint, "fold": fold}
    (folder / "bundle.json").write_text(json.dumps(content))
    return Bundle.open(folder)


def test_folds_become_one_bundle_that_evaluate_uses_like_any_other(
    units_in_process: None, dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [trained_on(dataset, fold, tmp_path / f"fold{fold}", bias=0.1 * fold) for fold in (0, 1)]
    argv = ["--bundles", *(str(member.path) for member in members), "--data", str(dataset.path), "--out", str(tmp_path / "ensemble"), "--json"]
    assert main([*argv, "--set", "bootstrap_samples=100", "batch_size=16"]) == 0
    said = capsys.readouterr().out
    assert "judged only by the members not trained on them" in said
    bundle = Bundle.open(tmp_path / "ensemble")
    manifest = bundle.manifest
    assert json.loads(said.splitlines()[-1])["digest"] == manifest.digest
    patches = [dataset.read_val(fold) for fold in (0, 1)]
    assert manifest.calibration_rows == "out_of_fold"
    assert manifest.metrics["rows"] == sum(map(len, patches))
    assert sum(manifest.metrics["confusion"].values()) == manifest.metrics["rows"]
    # The same figures by hand: each fold judged by the member that was not trained on it.
    logits = np.concatenate(
        [
            calibrated_logit(Predictor(member).logits(rows.images), member.manifest.temperature, member.manifest.bias)
            for member, rows in zip(members, patches, strict=True)
        ]
    )
    probabilities = 1 / (1 + np.exp(-(logits / manifest.temperature + manifest.bias)))
    labels = np.concatenate([rows.labels for rows in patches])
    assert manifest.metrics["confusion"]["tp"] == ((probabilities >= manifest.threshold - 1e-6) & (labels == 1)).sum()
    images = np.concatenate([rows.images for rows in patches])
    np.testing.assert_allclose(manifest.reference.channel_mean, images.mean(axis=(0, 1, 2)) / 255, rtol=1e-9)
    report = evaluate(EvaluateConfig(robustness_rows=0, bootstrap_samples=100), bundle.path, dataset.path, tmp_path / "report").report
    assert report.bundle["digest"] == manifest.digest
    assert any("judged only by the members not trained on them" in warning for warning in report.warnings)
    test = dataset.read_split("test")
    predicted = np.array([decision.probability for decision in Predictor(bundle).decide(test.images)]) >= manifest.threshold
    assert report.confusion.tp == (predicted & (test.labels == 1)).sum()


def test_outputs_that_are_no_numbers_stop_it(
    units_in_process: None, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [trained_on(dataset, fold, tmp_path / f"fold{fold}") for fold in (0, 1)]
    monkeypatch.setattr(Predictor, "logits", lambda self, patches, batch_size: np.full(len(patches), np.nan, np.float32))
    with pytest.raises(SentinodeError, match="fold0: its outputs are not finite for some patches; nothing was written"):
        ensemble(EnsembleConfig(), [member.path for member in members], dataset.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bundles", "data", "line"),
    [
        (["a"], "data", "two bundles or more"),
        (["a", "a"], "data", "is the same model as"),
        (["a", "missing"], "data", "missing"),
        (["a", "b"], "missing", "missing"),
        (["a", "b"], "other", "of 32 px; the bundles accept 96 px"),
    ],
)
def test_wrong_use_is_one_line_before_ray_starts(
    bundles: list[str], data: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_jobs.ensemble.connected", lambda *_, **__: pytest.fail("Ray was started"))
    make_dataset(tmp_path / "data", train=10, val=10, test=2)
    make_dataset(tmp_path / "other", train=10, val=10, test=2)
    content = json.loads((tmp_path / "other" / "dataset.json").read_text())
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(content | {"patch_size_px": 32}))
    make_bundle(tmp_path / "a", seed=0)
    make_bundle(tmp_path / "b", seed=1)
    argv = ["--bundles", *(str(tmp_path / name) for name in bundles), "--data", str(tmp_path / data), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_something_else_at_out_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "data", train=10, val=10, test=2)
    members = [make_bundle(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    argv = ["--bundles", *(str(member.path) for member in members), "--data", str(data.path), "--out", str(tmp_path)]
    assert main(argv) == 2
    assert "exists and is not a model bundle" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["a", "a/inside"])
def test_a_member_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    data = make_dataset(tmp_path / "data", train=10, val=10, test=2)
    members = [make_bundle(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    assert main(["--bundles", *(str(member.path) for member in members), "--data", str(data.path), "--out", str(tmp_path / out)]) == 2
    assert "the ensemble would replace its member" in capsys.readouterr().err
    assert Bundle.open(tmp_path / "a").manifest == members[0].manifest
