"""Jobs read a data set that lies in an object store as they read one on disk."""

import shutil
from pathlib import Path

import pytest

from ray_jobs.evaluate import evaluate
from ray_jobs.predict import predict
from ray_jobs.train import train
from sentinode.config import EvaluateConfig, PredictConfig, TrainConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import ConfigError
from sentinode.locations import locate
from sentinode.publishing import publish
from sentinode.storage import write_json
from tests.factories import make_bundle

pytestmark = pytest.mark.ray


@pytest.fixture
def in_store(dataset: PreparedDataset, s3_folder: str, tmp_path: Path) -> str:
    staging = Path(shutil.copytree(dataset.path, tmp_path / "staging"))
    write_json(staging / "dataset.json", dataset.manifest.model_copy(update={"root": "parts-1", "format_version": 2}).model_dump(mode="json"))
    publish(staging, locate(s3_folder), "dataset.json")
    return s3_folder


@pytest.mark.slow
def test_a_model_is_evaluated_on_a_data_set_in_an_object_store(ray_session: None, dataset: PreparedDataset, in_store: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    report = evaluate(EvaluateConfig(), bundle, in_store, tmp_path / "report").report
    assert report.data["path"] == in_store
    assert report.roc_auc == evaluate(EvaluateConfig(), bundle, dataset.location.local, tmp_path / "same").report.roc_auc


def test_a_model_is_trained_on_a_data_set_in_an_object_store(ray_session: None, free_cpus: None, in_store: str, tmp_path: Path) -> None:
    config = TrainConfig(arch="resnet18", weights="none", input_size_px=32, epochs=0)
    assert not train(config, in_store, tmp_path / "run").already_complete


def test_outputs_of_jobs_stay_on_disk(ray_session: None, dataset: PreparedDataset, s3_folder: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    with pytest.raises(ConfigError, match="s3:// is not supported yet for this; use a local path or a mounted shared folder"):
        evaluate(EvaluateConfig(), bundle, dataset.location.local, f"{s3_folder}/report")


@pytest.mark.slow
def test_patches_of_a_data_set_in_an_object_store_are_predicted(ray_session: None, dataset: PreparedDataset, in_store: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    predicted, same = (
        predict(PredictConfig(), bundle, source, tmp_path / name) for source, name in ((in_store, "stored"), (dataset.location.local, "same"))
    )
    assert predicted.manifest.source == in_store
    assert [part.sha256 for part in predicted.manifest.parts] == [part.sha256 for part in same.manifest.parts]
