import csv
import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.overlap import is_overlap
from data_prep.sources.detect import open_source
from data_prep.synth import synthesize
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError

COUNT = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("synth") / "out", COUNT, seed=3)


def truth(folder: Path) -> list[dict[str, str]]:
    with (folder / "truth.csv").open() as file:
        return list(csv.DictReader(file))


def pixels(folder: Path, id_: str) -> np.ndarray:
    with Image.open(folder / "train" / f"{id_}.tif") as image:
        assert image.format == "TIFF"
        assert image.info.get("compression") == "raw"
        return np.asarray(image)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_layout_is_kaggles_and_ids_are_the_sha1_of_the_pixels(folder: Path) -> None:
    source = open_source(PrepareConfig(), str(folder), slides=str(folder / "slides.csv"))
    assert source.kind == "kaggle"
    assert source.entries.num_rows == COUNT
    assert source.entries["slide"].null_count == 0
    assert not source.rejects
    for id_ in source.entries["id"].to_pylist():
        image = pixels(folder, id_)
        assert image.shape == (96, 96, 3)
        assert hashlib.sha1(image.tobytes()).hexdigest() == id_


def test_the_label_is_one_exactly_where_the_centre_holds_tumour(folder: Path) -> None:
    rows = truth(folder)
    assert all((row["label"] == "1") == (int(row["centre_tumour_px"]) > 0) for row in rows)
    assert 0.3 < sum(row["label"] == "1" for row in rows) / COUNT < 0.5
    assert sum(row["label"] == "0" and int(row["tumour_px"]) > 0 for row in rows) >= COUNT / 20  # hard negatives


def test_some_patches_share_pixels_at_the_stated_places(folder: Path) -> None:
    fields = defaultdict(list)
    for row in truth(folder):
        fields[row["field"]].append(row)
    grouped = [rows for rows in fields.values() if len(rows) > 1]
    assert 0.15 < sum(map(len, grouped)) / COUNT <= 0.2
    for rows in grouped:
        first = rows[0]
        for second in rows[1:]:
            dy, dx = (int(second[axis]) - int(first[axis]) for axis in "yx")
            if (96 - abs(dy)) * (96 - abs(dx)) > 0.05 * 96**2 and max(abs(dy), abs(dx)) < 96:
                assert is_overlap(pixels(folder, first["id"]), pixels(folder, second["id"]), dy, dx)


def test_the_same_request_gives_the_same_bytes_however_many_processes_draw(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.synth._INLINE_PATCHES", 0)
    monkeypatch.setattr("data_prep.synth._UNITS_PER_TASK", 50)
    assert files(synthesize(tmp_path / "again", COUNT, seed=3, processes=2)) == files(folder)
    assert files(synthesize(tmp_path / "other", 5, seed=4)) != files(synthesize(tmp_path / "another", 5, seed=5))


def test_a_finished_folder_is_returned_and_anything_else_is_refused(folder: Path, tmp_path: Path) -> None:
    before = (folder / "synth.json").stat().st_mtime_ns
    assert synthesize(folder, COUNT, seed=3) == folder
    assert (folder / "synth.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=rf"another request \(version \d+, count {COUNT}, seed 3; not version \d+, count {COUNT + 1}, seed 3\)"):
        synthesize(folder, COUNT + 1, seed=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    with pytest.raises(UsageError, match="not a folder of synthetic patches"):
        synthesize(tmp_path / "mine", 3)
    assert (tmp_path / "mine" / "file").read_text() == "keep"
    with pytest.raises(UsageError, match="at least 1"):
        synthesize(tmp_path / "none", 0)
    assert len(truth(synthesize(tmp_path / "one", 1))) == 1
