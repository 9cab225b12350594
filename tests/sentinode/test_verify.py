"""`sentinode verify` tells what a folder is and everything that is wrong with it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sentinode.errors import ManifestError, ManifestNotFoundError
from sentinode.manifests import PredictionPart, PredictionsManifest
from sentinode.storage import file_record, write_json
from sentinode.verify import verify_folder
from tests.factories import make_bundle, make_dataset


def make_predictions(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    parts = []
    for number, rows in enumerate((3, 2)):
        name = f"part-{number:05d}.parquet"
        pq.write_table(pa.table({"id": [f"{number}-{row}" for row in range(rows)]}), folder / name)
        parts.append(PredictionPart(rows=rows, **file_record(folder, name)))
    fields: dict[str, Any] = {
        "format_version": 1,
        "created_at": "2026-01-01T00:00:00+00:00",
        "source": "/source",
        "rows": 5,
        "errors": 0,
        "model": {},
        "parts": parts,
        "notice": "",
        "config": {},
        "library_versions": {},
        "git_commit": None,
    }
    write_json(folder / "_manifest.json", PredictionsManifest(**fields | changes).model_dump(mode="json"))
    return folder


def test_whole_folders_of_each_kind_are_recognised(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", train=10, val=5, test=5)
    make_bundle(tmp_path / "bundle")
    make_predictions(tmp_path / "predictions")
    assert verify_folder(tmp_path / "data") == ("prepared data set", [])
    assert verify_folder(str(tmp_path / "bundle")) == ("model bundle", [])
    assert verify_folder((tmp_path / "predictions").as_uri()) == ("folder of predictions", [])


def test_a_folder_of_anything_else_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ManifestNotFoundError, match="nothing to verify"):
            verify_folder(path)


def test_a_damaged_data_set_is_reported_and_not_raised(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", train=10, val=5, test=5)
    (tmp_path / "data" / "val" / "part-00000.parquet").unlink()
    assert verify_folder(tmp_path / "data") == ("prepared data set", ["val/part-00000.parquet: missing"])


def test_a_damaged_bundle_is_reported_and_not_raised(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "model_card.md").write_text("other")
    assert verify_folder(tmp_path / "bundle") == ("model bundle", ["model_card.md: sha256 differs from bundle.json"])


def test_damaged_predictions_are_reported_and_not_raised(tmp_path: Path) -> None:
    folder = make_predictions(tmp_path / "predictions")
    (folder / "part-00000.parquet").unlink()
    pq.write_table(pa.table({"id": ["other"]}), folder / "part-00001.parquet")
    assert verify_folder(folder) == ("folder of predictions", ["part-00000.parquet: missing", "part-00001.parquet: sha256 differs"])


def test_predictions_that_contradict_their_manifest_are_found(tmp_path: Path) -> None:
    folder = make_predictions(tmp_path / "total", rows=6)
    assert verify_folder(folder)[1] == ["the parts hold 5 rows, the manifest says 6"]
    folder = make_predictions(tmp_path / "part")
    parts = [PredictionPart(rows=rows, **file_record(folder, f"part-{number:05d}.parquet")) for number, rows in enumerate((2, 3))]
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert verify_folder(make_predictions(folder, parts=parts))[1] == [
        "part-00000.parquet: 3 rows, expected 2",
        "part-00001.parquet: 2 rows, expected 3",
    ]


def test_a_malformed_manifest_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(ManifestError, match="cannot be read as JSON"):
        verify_folder(tmp_path)
