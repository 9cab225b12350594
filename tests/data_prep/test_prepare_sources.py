"""Prepare from PCam, from prepared data sets of every kind, and from an object store that fails."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3fs import S3FileSystem

import data_prep.prepare
from data_prep.overlap_search import search_overlaps
from data_prep.prepare import PrepareResult
from data_prep.synth import synthesize
from sentinode.config import PrepareConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import SentinodeError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import locate
from sentinode.manifests import DatasetManifest
from sentinode.retries import PATIENCE_VARIABLE
from tests.data_prep.helpers import noise, sha1, write_source, write_table
from tests.data_prep.preparing import killed_at
from tests.data_prep.sources.test_pcam import noise_images, write_part
from tests.data_prep.test_prepare_layouts import CONFIG, SPLITS, prepare
from tests.s3 import FlakyServer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SIZES = {"train": 20, "valid": 8, "test": 8}


def write_pcam(folder: Path, *, twins_across: bool = True, meta: bool = True, packed: bool = False) -> dict[str, UInt8Array]:
    """The three official splits, each from slides of its own, with identical patches inside a split and, if asked for, across splits."""
    images = {name: noise_images(count, seed) for seed, (name, count) in enumerate(SIZES.items())}
    images["train"][4] = images["train"][2]
    if twins_across:
        images["train"][0] = images["test"][0]
        images["valid"][1] = images["test"][3]
    for name, count in SIZES.items():
        write_part(folder, name, count, images=images[name], slide=f"camelyon16_{name}", meta=meta, packed=packed)
    return images


def rows_of(manifest: DatasetManifest) -> dict[str, int]:
    return {split: counts.rows for split, counts in manifest.counts.items()}


@pytest.mark.parametrize(
    ("meta", "twins_across", "duplicates", "level"),
    [
        (True, True, "drop", "slide"),
        (True, True, "keep", "none"),
        (True, False, "keep", "slide"),
        (False, True, "drop", "pixels"),
        (False, True, "keep", "none"),
    ],
)
def test_pcams_official_splits_are_kept_and_what_they_keep_apart_is_measured(
    tmp_path: Path, meta: bool, twins_across: bool, duplicates: str, level: str
) -> None:
    images = write_pcam(tmp_path / "pcam", meta=meta, twins_across=twins_across)
    manifest = prepare(tmp_path / "pcam", tmp_path / "out", settings={"split": "predefined", "duplicates": duplicates}).manifest
    if duplicates == "keep":
        assert (rows_of(manifest), manifest.rejected) == ({"train": 20, "val": 8, "test": 8}, {})
    else:
        # Of the same pixels under several ids the smallest stays: test-… comes before train-… and valid-….
        assert (rows_of(manifest), manifest.rejected) == ({"train": 18, "val": 7, "test": 8}, {"duplicate_pixels": 3})
    assert manifest.leak_level == level
    assert any("own splits leak" in note for note in manifest.split.notes) == (level == "none")
    assert (manifest.split.overlap_pairs is None) == meta
    index = {row["id"]: row for row in PreparedDataset.open(tmp_path / "out").index.to_pylist()}
    assert all(index[f"test-{row:06d}"]["pixel_sha1"] == sha1(images["test"][row]) for row in range(8))
    row = index["valid-000003"]
    assert (row["label"], row["split"], row["source_path"]) == (1, "val", "camelyonpatch_level_2_split_valid_x.h5")
    assert (row["slide"], row["x_px"], row["y_px"]) == (("camelyon16_valid_000", 203, 103) if meta else (None, None, None))


def test_packed_pcam_is_unpacked_once_however_often_the_run_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"split": "predefined"}
    write_pcam(tmp_path / "plain")
    write_pcam(tmp_path / "packed", packed=True)
    killed_at("_deal", PrepareConfig(**CONFIG | settings), tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    seen: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.sources.unpack._unpack_one", lambda *arguments: seen.append("unpacked again"))
        patched.setattr("data_prep.prepare._decode_task", lambda **arguments: seen.append("decoded again"))
        packed = prepare(tmp_path / "packed", tmp_path / "out", settings=settings)
    assert seen == []
    assert packed.manifest.fingerprint == prepare(tmp_path / "plain", tmp_path / "expected", settings=settings).manifest.fingerprint
    assert [path.name for path in tmp_path.iterdir() if "staging" in path.name] == []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("source") / "synth", 150, seed=5)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> PrepareResult:
    return prepare(source, tmp_path_factory.mktemp("prepared") / "out")


def again(old: Path, new: Path, **settings: Any) -> PrepareResult:
    return prepare(None, new, settings=settings, from_dataset=old)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / name).to_pylist()
    return rows


def test_what_was_refused_stays_refused_when_splitting_anew(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    patches = {f"p{number:02d}": noise(rng) for number in range(20)}
    patches["p03"] = np.full((96, 96, 3), 255, np.uint8)
    patches["p07"] = patches["p05"]
    folder = write_source(tmp_path / "source", patches)
    (folder / "train" / "p09.tif").unlink()
    (folder / "train" / "slide.svs").write_bytes(b"")
    old = prepare(folder, tmp_path / "old", settings={"max_rejected_fraction": 0.2}).manifest
    assert old.rejected == {"blank": 1, "duplicate_pixels": 1, "format_not_allowed": 1, "missing": 1}
    new = again(tmp_path / "old", tmp_path / "new", max_rejected_fraction=0.2).manifest
    assert (new.rejected, new.fingerprint) == (old.rejected, old.fingerprint)
    assert table(tmp_path / "new", "rejected.parquet") == table(tmp_path / "old", "rejected.parquet")


def test_identical_patches_that_were_kept_are_kept_when_splitting_anew(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = [noise(rng) for _ in range(20)]
    images[4] = images[8]
    where = write_table(tmp_path / "source", [{"centre": "a"} for _ in images], images)
    old = prepare(where, tmp_path / "old", settings={"duplicates": "keep"}).manifest
    kept = again(tmp_path / "old", tmp_path / "kept", duplicates="keep").manifest
    assert (kept.fingerprint, kept.rejected) == (old.fingerprint, {})
    assert table(tmp_path / "kept", "index.parquet") == table(tmp_path / "old", "index.parquet")
    dropped = again(tmp_path / "old", tmp_path / "dropped").manifest
    assert (sum(rows_of(dropped).values()), dropped.rejected) == (19, {"duplicate_pixels": 1})


def test_an_unlabelled_set_may_be_written_anew(source: Path, tmp_path: Path) -> None:
    old = prepare(source / "train", tmp_path / "old", settings={"source": "unlabelled"}).manifest
    new = again(tmp_path / "old", tmp_path / "new", rows_per_shard=30).manifest
    assert (new.fingerprint, new.leak_level, rows_of(new)) == (old.fingerprint, "unsplit", {"all": 150})
    assert len(new.shards) == 5


def test_the_sources_own_splits_survive_splitting_anew_and_one_split_for_all_is_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    where = write_table(tmp_path / "source", [{"split": split, "slide": f"{split}-1"} for split in SPLITS], [noise(rng) for _ in SPLITS])
    old = prepare(where, tmp_path / "old", settings={"split": "predefined"}).manifest
    new = again(tmp_path / "old", tmp_path / "new", split="predefined", folds=2).manifest
    assert (new.fingerprint, new.leak_level, rows_of(new)) == (old.fingerprint, "slide", {"train": 10, "val": 5, "test": 5})
    again(tmp_path / "old", tmp_path / "all", split="all")
    with pytest.raises(UsageError, match=r"split predefined: this source \(dataset\) has no splits of its own"):
        again(tmp_path / "all", tmp_path / "never", split="predefined")
    assert not (tmp_path / "never").exists()


def test_a_data_set_of_the_format_before_is_searched_for_overlaps_anew(
    source: Path, prepared: PrepareResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared.path.local, tmp_path / "old")
    (tmp_path / "old" / "overlaps.parquet").unlink()
    manifest = json.loads((tmp_path / "old" / "dataset.json").read_text())
    del manifest["root"]
    manifest["files"] = [file for file in manifest["files"] if file["path"] != "overlaps.parquet"]
    (tmp_path / "old" / "dataset.json").write_text(json.dumps(manifest | {"format_version": 1}))
    searches: list[object] = []

    def searched(*arguments: Any, **named: Any) -> Any:
        searches.append(arguments)
        return search_overlaps(*arguments, **named)

    expected = prepare(source, tmp_path / "expected", settings={"seed": 7}).manifest
    monkeypatch.setattr("data_prep.prepare.search_overlaps", searched)
    new = again(tmp_path / "old", tmp_path / "new", seed=7).manifest
    assert len(searches) == 1
    assert (new.fingerprint, new.split) == (expected.fingerprint, expected.split)
    assert table(tmp_path / "new", "overlaps.parquet") == table(tmp_path / "expected", "overlaps.parquet")


def test_damaged_pixels_stop_the_run_instead_of_getting_a_new_checksum(prepared: PrepareResult, tmp_path: Path) -> None:
    shutil.copytree(prepared.path.local, tmp_path / "old")
    shard = tmp_path / "old" / "train" / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SentinodeError, match=r"train/part-00001.parquet: .*; `sentinode verify` checks the whole data set"):
        again(tmp_path / "old", tmp_path / "new", seed=7)
    assert not (tmp_path / "new").exists()


def test_equal_names_in_both_class_folders_are_different_patches(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name in ("normal", "metastatic"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(noise(rng)).save(tmp_path / "source" / name / f"{number}.png")
    manifest = prepare(tmp_path / "source", tmp_path / "out").manifest
    assert (sum(rows_of(manifest).values()), manifest.rejected) == (20, {})
    index = PreparedDataset.open(tmp_path / "out").index.to_pylist()
    assert {(row["id"].partition("/")[0], row["label"]) for row in index} == {("normal", 0), ("metastatic", 1)}


def through(url: str, patience_s: float) -> Callable[..., None]:
    """The task that decodes a block, speaking to another server: Ray's workers were started with the environment of an earlier time."""
    decode = data_prep.prepare._decode_task

    def task(**arguments: Any) -> None:
        names = {"AWS_ENDPOINT_URL": url, PATIENCE_VARIABLE: str(patience_s)}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        S3FileSystem.clear_instance_cache()
        try:
            decode(**arguments)
        finally:
            S3FileSystem.clear_instance_cache()
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    return task


@pytest.fixture
def in_s3(source: Path, s3_folder: str) -> str:
    for entry in locate(source).entries(recursive=True):
        (locate(s3_folder) / entry.name).put_file(source / entry.name)
    return s3_folder


def is_image(method: str, path: str) -> bool:
    return method == "GET" and path.endswith(".tif")


def test_a_store_whose_failures_pass_gives_the_same_data_set(
    in_s3: str, prepared: PrepareResult, tmp_path: Path, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.prepare._decode_task", through(flaky_s3.url, 30))
    flaky_s3.only = is_image
    flaky_s3.failures = ["503", "drop", "slow down", "cut"]
    result = prepare(in_s3, tmp_path / "out")
    assert flaky_s3.failures == []
    assert (result.manifest.fingerprint, result.manifest.rejected) == (prepared.manifest.fingerprint, prepared.manifest.rejected)


def test_a_store_that_stays_down_ends_in_one_line_and_the_same_command_continues(
    in_s3: str, prepared: PrepareResult, source: Path, tmp_path: Path, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.prepare._decode_task", through(flaky_s3.url, 0.5))
    last_block = {path.name for path in sorted((source / "train").iterdir())[2 * CONFIG["decode_block_rows"] :]}
    assert last_block

    def is_of_last_block(method: str, path: str) -> bool:
        return is_image(method, path) and path.rpartition("/")[2] in last_block

    flaky_s3.only, flaky_s3.forever = is_of_last_block, "503"
    with pytest.raises(SentinodeError, match=rf"^decode failed: {in_s3}/train/.*: the storage does not answer \(.*\); repeat the command") as caught:
        prepare(in_s3, tmp_path / "out", settings={"workers": 1})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    flaky_s3.forever = None
    flaky_s3.requests.clear()
    result = prepare(in_s3, tmp_path / "out", settings={"workers": 1})
    fetched = {request.rpartition("/")[2] for request in flaky_s3.requests if request.startswith("GET") and request.endswith(".tif")}
    assert fetched == last_block
    assert result.manifest.fingerprint == prepared.manifest.fingerprint
