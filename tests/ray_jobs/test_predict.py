from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.predict import PREDICTION_SCHEMA, predict
from sentinode.config import PredictConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import UsageError
from sentinode.predictor import Predictor
from sentinode.verify import verify_folder
from tests.factories import make_bundle, random_patches


def _folder(path: Path, count: int) -> Path:
    (path / "deep").mkdir(parents=True)
    for number, patch in enumerate(random_patches(count)):
        Image.fromarray(patch).save(path / ("deep" if number % 2 else ".") / f"p{number:03d}.{'png' if number % 3 else 'tif'}")
    return path


@pytest.mark.ray
def test_every_file_is_a_row_and_unreadable_ones_say_why(ray_session: None, tmp_path: Path) -> None:
    source, bundle = _folder(tmp_path / "source", 20), make_bundle(tmp_path / "bundle")
    (source / "truncated.tif").write_bytes((source / "p000.tif").read_bytes()[:9000])
    (source / "text.png").write_text("not an image")
    (source / "notes.txt").write_text("ignored")
    result = predict(PredictConfig(workers=2, batch_size=7), bundle.path, source, tmp_path / "out.parquet")
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out.parquet" / "part-00000.parquet", schema=PREDICTION_SCHEMA).to_pylist()}
    assert (result.manifest.rows, result.manifest.errors, len(rows)) == (22, 2, 22)
    assert rows["truncated"]["error"].startswith("truncated:")
    assert rows["text"]["error"].startswith("not_an_image:")
    assert rows["text"]["probability"] is None
    for number, decision in enumerate(Predictor(bundle).decide(random_patches(20))):
        row = rows[f"p{number:03d}"]
        assert row["probability"] == pytest.approx(decision.probability, abs=1e-5)
        assert (row["prediction"], row["needs_review"]) == (decision.prediction, decision.needs_review)
        assert row["model_digest"] == bundle.manifest.digest
    assert verify_folder(tmp_path / "out.parquet") == ("folder of predictions", [])
    (tmp_path / "out.parquet" / "part-00000.parquet").write_bytes(b"")
    assert verify_folder(tmp_path / "out.parquet")[1] == ["part-00000.parquet: sha256 differs"]


@pytest.mark.ray
def test_a_prepared_data_set_is_predicted_whole(ray_session: None, dataset: PreparedDataset, tmp_path: Path) -> None:
    result = predict(PredictConfig(), make_bundle(tmp_path / "bundle").path, dataset.path, tmp_path / "out.parquet")
    ids = pq.read_table(tmp_path / "out.parquet")["id"].to_pylist()
    assert sorted(ids) == sorted(dataset.index["id"].to_pylist())
    assert result.manifest.errors == 0


def test_a_folder_without_images_and_an_output_that_exists_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images in it"):
        predict(PredictConfig(), bundle.path, tmp_path / "empty", tmp_path / "out.parquet")
    with pytest.raises(UsageError, match="exists; remove it"):
        predict(PredictConfig(), bundle.path, tmp_path / "empty", tmp_path / "bundle")
