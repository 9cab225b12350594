"""The manifests on disk, their committed schemas and what of them is refused."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

import sentinode
from sentinode.errors import ManifestError, ManifestNotFoundError
from sentinode.manifests import (
    SCHEMAS,
    FileRecord,
    read_bundle_manifest,
    read_dataset_manifest,
    read_predictions_manifest,
    read_report,
    schema_text,
)
from sentinode.storage import write_json
from tests.factories import dataset_manifest, make_bundle

SCHEMA_FOLDER = Path(sentinode.__file__).parent / "schemas"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_committed_schema_is_what_the_model_says(name: str) -> None:
    committed = (SCHEMA_FOLDER / f"{name}.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(name), "run python -m sentinode.manifests"


def test_every_committed_schema_has_a_model() -> None:
    assert {path.name.removesuffix(".schema.json") for path in SCHEMA_FOLDER.iterdir()} == set(SCHEMAS)


def test_a_written_bundle_passes_the_committed_schema(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    schema = json.loads((SCHEMA_FOLDER / "bundle.schema.json").read_text())
    jsonschema.validate(json.loads((tmp_path / "bundle" / "bundle.json").read_text()), schema)


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "dataset.json", dataset_manifest().model_dump(mode="json") | changes)
    return folder


def test_a_manifest_survives_the_disk(tmp_path: Path) -> None:
    assert read_dataset_manifest(written(tmp_path / "d")) == dataset_manifest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format version 3 is newer than 2"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"fingerprint": "0" * 63}, "fingerprint: String should match pattern"),
        ({"leak_level": "hardly"}, "leak_level: Input should be"),
        ({"channel_order": "BGR"}, "channel_order: Input should be"),
        ({"shards": [{"path": "a", "rows": 1}]}, "shards.0.bytes: Field required"),
    ],
)
def test_a_malformed_manifest_is_one_line_naming_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_dataset_manifest(written(tmp_path / "d", **changes))
    assert message in str(caught.value)
    assert str(tmp_path / "d" / "dataset.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    content = dataset_manifest().model_dump(mode="json")
    del content["leak_level"]
    write_json(tmp_path / "dataset.json", content)
    with pytest.raises(ManifestError, match="leak_level: Field required"):
        read_dataset_manifest(tmp_path)


def test_nan_in_a_manifest_is_refused(tmp_path: Path) -> None:
    content = dataset_manifest().model_dump(mode="json")
    text = json.dumps(content | {"spacing_um_px": float("nan")})
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ManifestError, match="spacing_um_px: Input should be a finite number"):
        read_dataset_manifest(tmp_path)


OUTSIDE = ["/etc/passwd", "../other/part.parquet", "train/../../x", "..", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_files_outside_the_folder_cannot_be_listed(path: str) -> None:
    with pytest.raises(ValidationError, match="must lie inside the folder"):
        FileRecord(path=path, bytes=1, sha256="0" * 64)


@pytest.mark.parametrize("path", ["", "."])
def test_the_folder_itself_cannot_be_listed_as_a_file(path: str) -> None:
    with pytest.raises(ValidationError, match="must name a file"):
        FileRecord(path=path, bytes=1, sha256="0" * 64)


@pytest.mark.parametrize("root", OUTSIDE)
def test_a_root_outside_the_folder_is_refused(tmp_path: Path, root: str) -> None:
    with pytest.raises(ManifestError, match="root: Value error, must lie inside the folder"):
        read_dataset_manifest(written(tmp_path / "d", root=root))


@pytest.mark.parametrize("root", ["", "parts-20260101T000000Z-00000000", "a/b"])
def test_a_root_inside_the_folder_is_read(tmp_path: Path, root: str) -> None:
    assert read_dataset_manifest(written(tmp_path / "d", root=root)).root == root


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "train\n"])
def test_a_split_has_a_plain_name(tmp_path: Path, name: str) -> None:
    counts = {name: {"rows": 0, "normal": 0, "metastatic": 0, "groups": 0}}
    shard = {"path": "a.parquet", "bytes": 0, "sha256": "0" * 64, "rows": 0, "split": name}
    for changes in ({"counts": counts}, {"shards": [shard]}):
        with pytest.raises(ManifestError, match="must be a name of letters, digits"):
            read_dataset_manifest(written(tmp_path / "d", **changes))


@pytest.mark.parametrize(
    ("read", "what", "name", "advice"),
    [
        (read_dataset_manifest, "prepared data set", "dataset.json", "; `sentinode prepare` makes one from a folder of patches"),
        (read_bundle_manifest, "model bundle", "bundle.json", ""),
        (read_report, "evaluation report", "report.json", ""),
        (read_predictions_manifest, "folder of predictions", "_manifest.json", ""),
    ],
)
def test_a_folder_that_is_something_else_is_named(tmp_path: Path, read: Any, what: str, name: str, advice: str) -> None:
    with pytest.raises(ManifestNotFoundError) as caught:
        read(tmp_path)
    assert str(caught.value) == f"not a {what}: {tmp_path} (no {name} there){advice}"


def test_a_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        dataset_manifest().leak_level = "none"  # type: ignore[misc]
