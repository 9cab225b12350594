import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ray_jobs.evaluate import evaluate, make_report, with_comparison
from ray_jobs.evaluation_report import METRICS, Example, Pictures, render
from ray_jobs.train import TrainResult
from sentinode.config import EvaluateConfig, ReviewRule
from sentinode.dataset import PreparedDataset
from sentinode.errors import ManifestError, SentinodeError, UsageError
from sentinode.evaluation import EvaluatedRows, review
from sentinode.manifests import read_report
from sentinode.predictor import Predictor
from sentinode.probability import calibrated_probability
from sentinode.tissue import is_pale, tissue_fraction
from tests.factories import make_bundle, make_dataset


def _rows(dataset: PreparedDataset) -> EvaluatedRows:
    patches = dataset.read_split("test")
    order = np.argsort(patches.ids)
    patches = patches.take(order)
    generator = np.random.default_rng(0)
    unknown = np.full(len(patches), None, object)
    return EvaluatedRows(
        ids=patches.ids,
        labels=patches.labels,
        groups=patches.groups,
        logits=generator.normal(patches.labels, 1.0),
        pale=is_pale(patches.images),
        unusual=np.zeros(len(patches), bool),
        tissue_fraction=tissue_fraction(patches.images),
        slides=unknown,
        centres=np.array([f"centre {number % 2}" for number in range(len(patches))], object),
        perturbed=generator.normal(patches.labels[:, None], 1.0, (len(patches), 18)),
    )


def test_a_leaky_split_is_said_in_the_headline(dataset: PreparedDataset, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    leaky = PreparedDataset(dataset.location, dataset.manifest.model_copy(update={"leak_level": "none"}))
    report = make_report(_rows(dataset), "torch", bundle, leaky, EvaluateConfig())
    assert report.headline.startswith("LEAKY SPLIT")
    assert f'<p class="alarm"><strong>{report.headline}' in render(report)
    assert not make_report(_rows(dataset), "torch", bundle, dataset, EvaluateConfig()).headline.startswith("LEAKY")


def test_every_part_of_the_report_is_about_the_same_rows(dataset: PreparedDataset, tmp_path: Path) -> None:
    rows, bundle = _rows(dataset), make_bundle(tmp_path / "bundle")
    report = make_report(rows, "torch", bundle, dataset, EvaluateConfig())
    probabilities = calibrated_probability(rows.logits, bundle.manifest.temperature, bundle.manifest.bias)
    assert sum(bin_.rows for bin_ in report.calibration.after.bins) == len(rows)
    assert report.brier.value == report.calibration.after.brier
    assert report.nll.value == report.calibration.after.nll
    assert report.review.risk_coverage[-1].error == pytest.approx(1 - (report.at_threshold.accuracy.value or 0))
    assert sum(group.rows for group in report.subgroups if group.by == "centre") == len(rows)
    assert sum(group.rows for group in report.subgroups if group.by == "tissue fraction") == len(rows)
    assert report.robustness is not None
    assert report.robustness.rows == len(rows)
    assert report.robustness.unchanged.recall == report.at_threshold.recall.value
    assert report.robustness.unchanged.roc_auc == pytest.approx(report.roc_auc)
    recall = report.at_threshold.recall.value or 0
    reached = {target.metric: target.reached for target in report.targets}
    assert reached == {"accuracy": False, "recall": recall >= 0.95, "precision": False, "f1": False, "roc_auc": False}
    last = report.curve[-1]
    assert (last.recall, last.specificity, last.threshold) == (1, 0, pytest.approx(probabilities.min()))
    assert last.precision == pytest.approx(rows.labels.mean())
    for point in report.curve[1:]:
        assert point.threshold is not None
        assert point.recall == pytest.approx(((probabilities >= point.threshold) & (rows.labels == 1)).sum() / (rows.labels == 1).sum())


def test_what_the_rule_leaves_is_judged_without_what_it_flags(dataset: PreparedDataset, tmp_path: Path) -> None:
    rows, bundle = _rows(dataset), make_bundle(tmp_path / "bundle")
    manifest = bundle.manifest.model_copy(update={"review": ReviewRule(below=0.7, band=0.0)})
    found = review(rows, manifest, 100, 0)
    probabilities = calibrated_probability(rows.logits, manifest.temperature, manifest.bias)
    sure = (np.maximum(probabilities, 1 - probabilities) >= 0.7) & ~rows.pale
    assert found.flagged == pytest.approx(1 - sure.mean())
    assert found.rest is not None
    assert sum(found.rest.confusion.model_dump().values()) == sure.sum()
    everything = bundle.manifest.model_copy(update={"review": ReviewRule(below=1.0, band=0.0)})
    assert review(rows, everything, 100, 0).rest is None


def test_the_page_shows_every_figure_and_loads_nothing(dataset: PreparedDataset, tmp_path: Path) -> None:
    rows, bundle = _rows(dataset), make_bundle(tmp_path / "bundle")
    report = make_report(rows, "torch", bundle, dataset, EvaluateConfig())
    report = with_comparison(report, rows, bundle, dataclasses.replace(rows, logits=rows.logits[::-1]), "torch", bundle, EvaluateConfig())
    pictures = Pictures(rows.labels, calibrated_probability(rows.logits, 1, 0), [Example("a<b", 0.01, "data:image/png;base64,", None)], [], "stage 3")
    page = render(report, pictures)
    for point in (report.at_threshold, report.at_half):
        for name in METRICS:
            value = getattr(point, name).value
            assert (f"{value:.4f}" if value is not None else "not defined") in page, name
    assert page.count("<svg") == 6
    assert "a&lt;b" in page
    assert report.comparison is not None
    assert report.comparison.headline in page
    assert not re.search(r"https?://|<script|<link|url\(", page)


def test_a_report_does_not_depend_on_the_order_in_which_shards_came(dataset: PreparedDataset, tmp_path: Path) -> None:
    bundle, rows = make_bundle(tmp_path / "bundle"), _rows(dataset)
    reports = [make_report(rows, "torch", bundle, dataset, EvaluateConfig()).model_dump(exclude={"created_at"}) for _ in range(2)]
    assert reports[0] == reports[1]


def test_one_class_makes_a_report_that_says_so(dataset: PreparedDataset, tmp_path: Path) -> None:
    rows = dataclasses.replace(_rows(dataset), labels=np.zeros(len(_rows(dataset)), np.int64))
    report = make_report(rows, "torch", make_bundle(tmp_path / "bundle"), dataset, EvaluateConfig())
    assert "one class only" in report.headline
    assert report.curve == []
    assert "not defined" in render(report)


def test_official_patch_camelyon_stands_beside_what_others_published(dataset: PreparedDataset, tmp_path: Path) -> None:
    bundle, rows = make_bundle(tmp_path / "bundle"), _rows(dataset)
    official = dataset.manifest.model_copy(
        update={"source": {"kind": "pcam"}, "split": dataset.manifest.split.model_copy(update={"method": "predefined"})}
    )
    report = make_report(rows, "torch", bundle, PreparedDataset(dataset.location, official), EvaluateConfig())
    assert len(report.published) == 2
    assert "0.889" in report.published[0]
    assert "0.963" in render(report)
    assert make_report(rows, "torch", bundle, PreparedDataset(dataset.location, official), EvaluateConfig(split="val")).published == []
    assert make_report(rows, "torch", bundle, dataset, EvaluateConfig()).published == []


@pytest.mark.ray
def test_the_report_counts_every_row_once_and_agrees_with_the_predictor(
    ray_session: None, trained: TrainResult, dataset: PreparedDataset, tmp_path: Path
) -> None:
    result = evaluate(EvaluateConfig(workers=2), trained.bundle.path, dataset.path, tmp_path / "report")
    rows = dataset.read_split("test")
    decisions = Predictor(trained.bundle).decide(rows.images)
    report = read_report(result.path)
    assert report.roc_auc == pytest.approx(roc_auc_score(rows.labels, [decision.logit for decision in decisions]), abs=1e-12)
    said = np.array([decision.prediction == "Metastatic" for decision in decisions])
    assert report.confusion.tp == int((said & (rows.labels == 1)).sum())
    assert sum(report.confusion.model_dump().values()) == len(rows)
    interval = report.roc_auc_intervals.group_interval
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low <= report.roc_auc <= interval.high
    assert report.headline in (result.path / "report.html").read_bytes().decode()
    assert report.robustness is not None
    assert report.robustness.rows == len(rows)
    # A repeat, here with a comparison, replaces the report.
    other = make_bundle(tmp_path / "other", input_size_px=trained.bundle.manifest.input_size_px)
    config = EvaluateConfig(robustness_rows=0, error_examples=0)
    again = evaluate(config, trained.bundle.path, dataset.path, tmp_path / "report", against=other.path).report
    assert again.roc_auc == report.roc_auc
    assert again.robustness is None
    assert again.comparison is not None
    theirs = roc_auc_score(rows.labels, [decision.logit for decision in Predictor(other).decide(rows.images)])
    assert again.comparison.differences["roc_auc"].value == pytest.approx(report.roc_auc - theirs, abs=1e-12)
    assert again.comparison.headline in again.headline


@pytest.mark.ray
def test_a_damaged_shard_makes_no_report_and_frees_its_actors(ray_session: None, tmp_path: Path, free_cpus: None) -> None:
    dataset = make_dataset(tmp_path / "data")
    shard = tmp_path / "data" / "test" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"test/part-00000.parquet: cannot be read"):
        evaluate(EvaluateConfig(), make_bundle(tmp_path / "bundle").path, dataset.path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_folder_of_something_else_is_not_replaced(dataset: PreparedDataset, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="is not a report"):
        evaluate(EvaluateConfig(), make_bundle(tmp_path / "bundle").path, dataset.path, tmp_path / "thesis")


def test_patches_of_another_size_are_refused(dataset: PreparedDataset, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", patch_size_px=64)
    with pytest.raises(UsageError, match="holds patches of 96 px; the bundle accepts 64 px"):
        evaluate(EvaluateConfig(), bundle.path, dataset.path, tmp_path / "report")


def test_outputs_that_are_no_numbers_make_no_report(
    units_in_process: None, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "logits", lambda self, patches, batch_size: np.full(len(patches), np.nan, np.float32))
    with pytest.raises(SentinodeError, match=r"bundle: its outputs are not finite for 43 of 43 patches; no report was written"):
        evaluate(EvaluateConfig(robustness_rows=0), make_bundle(tmp_path / "bundle").path, dataset.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_split_and_another_format_are_one_line(dataset: PreparedDataset, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    without_test = make_dataset(tmp_path / "data", train=10, val=5, test=0)
    with pytest.raises(UsageError, match="no rows in split 'test'"):
        evaluate(EvaluateConfig(), bundle, without_test.path, tmp_path / "out")
    file = without_test.path / "dataset.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ManifestError, match="format version 9 is newer than"):
        evaluate(EvaluateConfig(), bundle, without_test.path, tmp_path / "out")
