from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from ray_jobs.evaluate import evaluate, make_report, render
from ray_jobs.train import TrainResult
from sentinode.config import EvaluateConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import UsageError
from sentinode.manifests import read_report
from sentinode.predictor import Predictor
from tests.factories import make_bundle, make_dataset


def _logits(dataset: PreparedDataset) -> pa.Table:
    rows = dataset.read_split("test")
    logits = np.random.default_rng(0).normal(rows.labels, 1.0)
    return pa.table({"id": rows.ids.tolist(), "label": rows.labels, "group": rows.groups.tolist(), "logit": logits, "engine": ["torch"] * len(rows)})


def test_a_leaky_split_is_said_in_the_headline(dataset: PreparedDataset, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    leaky = PreparedDataset(dataset.location, dataset.manifest.model_copy(update={"leak_level": "none"}))
    report = make_report(_logits(dataset), bundle, leaky, EvaluateConfig())
    assert report.headline.startswith("LEAKY SPLIT")
    assert report.headline in render(report)
    assert not make_report(_logits(dataset), bundle, dataset, EvaluateConfig()).headline.startswith("LEAKY")


def test_a_report_does_not_depend_on_the_order_in_which_rows_came(dataset: PreparedDataset, tmp_path: Path) -> None:
    bundle, table = make_bundle(tmp_path / "bundle"), _logits(dataset)
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    reports = [make_report(rows, bundle, dataset, EvaluateConfig()).model_dump(exclude={"created_at"}) for rows in (table, shuffled)]
    assert reports[0] == reports[1]


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
    assert report.headline in (result.path / "report.html").read_text()
    # A repeat replaces the report.
    assert evaluate(EvaluateConfig(), trained.bundle.path, dataset.path, tmp_path / "report").report.roc_auc == report.roc_auc


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
