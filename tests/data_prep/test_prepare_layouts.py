"""Prepare from and to everything that is not a folder in the Kaggle layout, and splits that are not dealt."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from data_prep.output import request_of
from data_prep.prepare import PrepareResult
from data_prep.synth import synthesize
from sentinode.config import PrepareConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import UsageError
from sentinode.locations import locate
from tests.data_prep import preparing
from tests.data_prep.helpers import noise, write_table
from tests.data_prep.preparing import killed_at

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

CONFIG = {"decode_block_rows": 64, "rows_per_shard": 50, "row_group_rows": 16}


def prepare(source: Any, out: Any, *, settings: dict[str, Any] | None = None, **options: Any) -> PrepareResult:
    result = preparing.prepare(PrepareConfig(**CONFIG | (settings or {})), source, out, **options)
    assert PreparedDataset.open(out).verify() == []
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("source") / "synth", 150, seed=5)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> PrepareResult:
    return prepare(source, tmp_path_factory.mktemp("prepared") / "out")


SPLITS = ["train"] * 10 + ["val"] * 5 + ["test"] * 5


def test_splits_of_the_source_are_kept_and_disjoint_slides_are_found_to_be_disjoint(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"split": split, "slide": f"{split}-{number % 2}"} for number, split in enumerate(SPLITS)]
    table = write_table(tmp_path / "source", rows, [noise(rng) for _ in rows])
    manifest = prepare(table, tmp_path / "out", settings={"split": "predefined", "folds": 2}).manifest
    assert {split: counts.rows for split, counts in manifest.counts.items()} == {"train": 10, "val": 5, "test": 5}
    assert (manifest.leak_level, manifest.split.method) == ("slide", "predefined")
    index = PreparedDataset.open(tmp_path / "out").index
    assert {(row["source_path"], row["split"]) for row in index.to_pylist()} == {(f"{n:03d}.png", split) for n, split in enumerate(SPLITS)}
    assert set(index.filter(pc.equal(index["split"], "test"))["fold"].to_pylist()) == {None}


@pytest.mark.parametrize(("leaks", "level"), [(False, "pixels"), (True, "none")])
def test_what_the_sources_own_splits_keep_apart_is_measured(tmp_path: Path, leaks: bool, level: str) -> None:
    rng = np.random.default_rng(1)
    images = [noise(rng) for _ in SPLITS]
    field = noise(rng, 130)
    images[0], images[19 if leaks else 1] = field[:96, :96], field[20:116, 30:126]
    table = write_table(tmp_path / "source", [{"split": split} for split in SPLITS], images)
    manifest = prepare(table, tmp_path / "out", settings={"split": "predefined"}).manifest
    assert manifest.leak_level == level
    assert manifest.split.overlap_pairs == 1
    assert [note for note in manifest.split.notes if "own splits leak" in note] == (
        ["the source's own splits leak: 1 groups of patches that share pixels stand in more than one of them (000)"] if leaks else []
    )


def test_a_source_without_splits_of_its_own_is_told_so(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="split predefined"):
        prepare(source, tmp_path / "out", settings={"split": "predefined"})


def test_unlabelled_patches_go_into_one_split_without_labels(source: Path, tmp_path: Path) -> None:
    manifest = prepare(source / "train", tmp_path / "out", settings={"source": "unlabelled"}).manifest
    assert list(manifest.counts) == ["all"]
    assert manifest.counts["all"].unlabelled == 150
    assert (manifest.class_weights, manifest.leak_level) == (None, "unsplit")
    assert PreparedDataset.open(tmp_path / "out").index["label"].null_count == 150
    assert "unlabelled" in (tmp_path / "out" / "report.html").read_text()


def test_labelled_patches_may_stay_in_one_split(source: Path, prepared: PrepareResult, tmp_path: Path) -> None:
    manifest = prepare(source, tmp_path / "out", settings={"split": "all"}).manifest
    counts = manifest.counts["all"]
    assert (counts.rows, counts.metastatic) == (150, sum(one.metastatic for one in prepared.manifest.counts.values()))
    assert manifest.split.overlap_pairs is None


def test_class_folders_give_the_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for name in ("benign", "tumour"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(noise(rng)).save(tmp_path / "source" / name / f"{name}{number}.tif")
    prepare(tmp_path / "source", tmp_path / "out", settings={"class_folders": ("benign", "tumour"), "source": "class_folders"})
    rows = PreparedDataset.open(tmp_path / "out").index.to_pylist()
    assert {(row["id"].startswith("tumour"), row["label"]) for row in rows} == {(True, 1), (False, 0)}


def test_identical_patches_that_are_kept_share_a_group_even_if_they_are_too_plain_to_overlap(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    plain = rng.integers(120, 124, (96, 96, 3), dtype=np.uint8)
    images = [noise(rng) for _ in range(20)]
    images[4] = images[8] = images[12] = plain
    table = write_table(tmp_path / "source", [{"centre": "a"} for _ in images], images)
    dropped = prepare(table, tmp_path / "dropped").manifest
    assert dropped.rejected == {"duplicate_pixels": 2}
    assert sum(counts.rows for counts in dropped.counts.values()) == 18
    kept = prepare(table, tmp_path / "kept", settings={"duplicates": "keep"}).manifest
    assert kept.rejected == {}
    rows = {row["id"]: row for row in PreparedDataset.open(tmp_path / "kept").index.to_pylist()}
    assert {rows[id_]["group"] for id_ in ("004", "008", "012")} == {"004"}
    assert [id_ for id_, row in rows.items() if "duplicate" in row["flags"]] == ["004", "008", "012"]
    assert kept.split.overlap_pairs == 0


def test_splitting_anew_gives_what_the_source_would_have_given_without_searching_again(
    source: Path, prepared: PrepareResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"seed": 7, "folds": 3}
    expected = prepare(source, tmp_path / "expected", settings=settings).manifest

    def searched(*arguments: object, **named: object) -> None:
        raise AssertionError("overlaps were searched for again")

    monkeypatch.setattr("data_prep.prepare.search_overlaps", searched)
    anew = prepare(None, tmp_path / "anew", settings=settings, from_dataset=prepared.path).manifest
    assert anew.fingerprint == expected.fingerprint
    assert anew.counts == expected.counts
    assert anew.split == expected.split
    folds = [PreparedDataset.open(tmp_path / name).index["fold"].to_pylist() for name in ("anew", "expected")]
    assert folds[0] == folds[1]
    with pytest.raises(UsageError, match=r"patch_size_px 64 was set, but .* was prepared with 96"):
        request_of(PrepareConfig(patch_size_px=64), None, tmp_path / "other", from_dataset=prepared.path)


def test_s3_in_and_out_gives_the_same_data_set(source: Path, prepared: PrepareResult, tmp_path: Path, s3_folder: str) -> None:
    bucket = locate(s3_folder)
    for entry in locate(source).entries(recursive=True):
        (bucket / "kaggle" / entry.name).put_file(source / entry.name)
    out = f"{s3_folder}/data"
    first = prepare(f"{s3_folder}/kaggle", out, work=tmp_path / "work")
    assert first.manifest.fingerprint == prepared.manifest.fingerprint
    assert first.manifest.root
    assert list((tmp_path / "work").iterdir()) == []
    again = prepare(f"{s3_folder}/kaggle", out, work=tmp_path / "work")
    assert again.already_complete
    with pytest.raises(UsageError, match=r"another config \(seed\)"):
        prepare(f"{s3_folder}/kaggle", out, work=tmp_path / "work", settings={"seed": 1})
    replaced = prepare(f"{s3_folder}/kaggle", out, work=tmp_path / "work", settings={"seed": 1}, overwrite=True)
    assert replaced.manifest.root != first.manifest.root
    assert {entry.name.partition("/")[0] for entry in locate(out).entries(recursive=True)} == {"dataset.json", replaced.manifest.root}
    local = prepare(None, tmp_path / "local", settings={"seed": 1}, from_dataset=out)
    assert local.manifest.fingerprint == replaced.manifest.fingerprint


def test_an_interrupted_upload_continues_below_the_same_root(source: Path, prepared: PrepareResult, tmp_path: Path, s3_folder: str) -> None:
    out = f"{s3_folder}/data"
    killed_at("publish", PrepareConfig(**CONFIG), source, out, work=tmp_path / "work")
    assert not (locate(out) / "dataset.json").exists()
    sent = {entry.name: entry.stamp for entry in locate(out).entries(recursive=True)}
    result = prepare(source, out, work=tmp_path / "work")
    assert result.manifest.fingerprint == prepared.manifest.fingerprint
    after = {entry.name: entry.stamp for entry in locate(out).entries(recursive=True)}
    assert after.keys() - sent.keys() == {"dataset.json"}
    assert {name.partition("/")[0] for name in sent} == {result.manifest.root}


def test_identical_patches_of_two_slides_never_straddle_a_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    images = [noise(rng) for _ in range(20)]
    images = [image for image in images for _ in range(2)]
    rows = [{"slide": f"s{number % 2}-{number // 4}"} for number in range(40)]
    table = write_table(tmp_path / "source", rows, images)
    text = table.read_text().splitlines()
    table.write_text("\n".join([text[0], *(line.replace(",0,", ",1,", 1) for line in text[1:])]))  # one label, or they would contradict each other
    manifest = prepare(table, tmp_path / "out", settings={"split": "slide", "duplicates": "keep"}).manifest
    assert manifest.leak_level == "slide"
    index = PreparedDataset.open(tmp_path / "out").index.to_pylist()
    assert len({(row["pixel_sha1"], row["split"]) for row in index}) == 20
    assert {row["group"] for row in index} == {f"s0-{number}" for number in range(10)}
