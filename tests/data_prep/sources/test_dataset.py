import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.rejects import Reject
from data_prep.sources.base import ENTRY_SCHEMA
from data_prep.sources.dataset import from_dataset
from data_prep.sources.detect import reader_of
from sentinode.dataset import INDEX_SCHEMA, OVERLAP_SCHEMA, REJECTED_SCHEMA, images_to_column, row_schema
from sentinode.errors import ManifestError, ManifestNotFoundError, StorageError
from sentinode.images import UInt8Array
from sentinode.manifests import DatasetManifest, FileRecord, ShardRecord
from sentinode.storage import file_record, write_json
from tests.data_prep.helpers import sha1
from tests.data_prep.sources.helpers import column, rows
from tests.factories import dataset_manifest

SIDE = 32
OVERLAPS = pa.table({"first_id": ["p001"], "second_id": ["p003"], "dy_px": [1], "dx_px": [-2]}).cast(OVERLAP_SCHEMA)


def write_dataset(
    out: Path, *, labelled: bool = True, with_overlaps: bool = True, root: str = "", seed: int = 0, split: str | None = None
) -> dict[str, UInt8Array]:
    """A data set of shards of 5, 3 and 2 rows in row groups of 2; returns the pixels by id. The index is in another order than the shards."""
    images = np.random.default_rng(seed).integers(0, 256, (10, SIDE, SIDE, 3), dtype=np.uint8)
    (out / root).mkdir(parents=True)
    index, shards, number = [], [], 0
    for name, count in (("train/part-00000.parquet", 5), ("train/part-00001.parquet", 3), ("val/part-00000.parquet", 2)):
        path = out / root / name
        path.parent.mkdir(exist_ok=True)
        ids = [f"p{9 - row:03d}" for row in range(number, number + count)]
        labels = [row % 2 if labelled else None for row in range(count)]
        columns = {"id": ids, "label": labels, "group": ids, "slide": [None] * count, "image": images_to_column(images[number : number + count])}
        pq.write_table(pa.table(columns, schema=row_schema(SIDE)), path, row_group_size=2)
        shards.append(ShardRecord(**file_record(out / root, name), split=name.partition("/")[0], rows=count))
        for row, id_ in enumerate(ids):
            place = {"slide": f"s{row}", "centre": "c", "x_px": row, "y_px": -row, "source_path": f"train/{id_}.tif" if row else None}
            fixed = {"split": split or name.partition("/")[0], "group": id_, "pixel_sha1": sha1(images[number + row])}
            index.append({"id": id_, "label": labels[row], "shard": name, "row": row} | place | fixed)
        number += count
    index.sort(key=lambda entry: entry["id"])
    pq.write_table(pa.Table.from_pylist(index, schema=INDEX_SCHEMA), out / root / "index.parquet")
    rejected = [
        {"path": "train/x.tif", "id": "x", "reason": "blank", "detail": "all black"},
        {"path": None, "id": "y", "reason": "missing", "detail": None},
    ]
    pq.write_table(pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA), out / root / "rejected.parquet")
    files = ["index.parquet", "rejected.parquet"]
    if with_overlaps:
        pq.write_table(OVERLAPS, out / root / "overlaps.parquet")
        files.append("overlaps.parquet")
    manifest = dataset_manifest(
        format_version=2, root=root, patch_size_px=SIDE, shards=shards, files=[FileRecord(**file_record(out / root, name)) for name in files]
    )
    (out / "dataset.json").write_text(json.dumps(manifest.model_dump(mode="json")))
    return {f"p{9 - row:03d}": image for row, image in enumerate(images)}


def read_all(path: Path | str) -> dict[str, UInt8Array]:
    source = from_dataset(str(path))
    return dict(zip(source.entries["id"].to_pylist(), reader_of(source.reader).read(source.entries), strict=True))


@pytest.mark.parametrize("root", ["", "runs/1"])
def test_every_patch_is_an_input_with_what_is_known_of_it(tmp_path: Path, root: str) -> None:
    expected = write_dataset(tmp_path / "old", root=root)
    source = from_dataset(str(tmp_path / "old"))
    assert source.kind == "dataset"
    assert source.entries.schema.equals(ENTRY_SCHEMA)
    assert source.is_labelled
    assert column(source, "row") == list(range(10))
    assert rows(source, "id", "label", "path", "slide", "centre", "x_px", "y_px", "split")[5:7] == [
        ("p004", 0, "train/part-00001.parquet", "s0", "c", 0, 0, "train"),
        ("p003", 1, "train/p003.tif", "s1", "c", 1, -1, "train"),
    ]
    found = read_all(tmp_path / "old")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[id_], expected[id_]) for id_ in expected)


def test_refused_inputs_stay_refused_and_known_overlaps_known(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old")
    source = from_dataset(str(tmp_path / "old"))
    assert source.rejects == (Reject("blank", "x", "train/x.tif", "all black"), Reject("missing", "y", None, ""))
    assert source.inputs == 12
    assert source.overlaps is not None
    assert source.overlaps.equals(OVERLAPS)
    write_dataset(tmp_path / "unsearched", with_overlaps=False)
    assert from_dataset(str(tmp_path / "unsearched")).overlaps is None


def test_an_unlabelled_data_set_stays_unlabelled(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old", labelled=False)
    assert not from_dataset(str(tmp_path / "old")).is_labelled


def test_entries_may_be_read_in_any_order(tmp_path: Path) -> None:
    expected = write_dataset(tmp_path / "old")
    source = from_dataset(str(tmp_path / "old"))
    shuffled = source.entries.take(pa.array(np.random.default_rng(0).permutation(10)))
    for id_, image in zip(shuffled["id"].to_pylist(), reader_of(source.reader).read(shuffled), strict=True):
        assert np.array_equal(image, expected[id_])
    assert list(reader_of(source.reader).read(source.entries.slice(0, 0))) == []


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old")
    write_dataset(tmp_path / "same")
    write_dataset(tmp_path / "other", with_overlaps=False)
    digests = [from_dataset(str(tmp_path / name)).inputs_sha256 for name in ("old", "same", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestNotFoundError, match="not a prepared data set"):
        from_dataset(str(tmp_path))


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old")
    index = pq.read_table(tmp_path / "old" / "index.parquet")
    broken = {
        "fewer": (index.slice(1), "does not fit the shards"),
        "elsewhere": (index.set_column(13, INDEX_SCHEMA.field("shard"), pa.array(["gone.parquet"] * 10)), "does not fit the shards"),
        "twice": (index.set_column(14, INDEX_SCHEMA.field("row"), pa.array([0] * 10)), "two patches in one place"),
        "columns": (index.drop_columns(["shard"]), "cannot be read"),
    }
    for table, message in broken.values():
        pq.write_table(table, tmp_path / "old" / "index.parquet")
        record_again(tmp_path / "old", "index.parquet")
        with pytest.raises(ManifestError, match=f"index.parquet: {message}.*sentinode verify"):
            from_dataset(str(tmp_path / "old"))


def record_again(folder: Path, name: str) -> None:
    """Let dataset.json list a file as it is now."""
    rewrite_manifest(folder, lambda files: [file_record(folder, name) if file["path"] == name else file for file in files])


def rewrite_manifest(folder: Path, change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    manifest = DatasetManifest.model_validate_json((folder / "dataset.json").read_text()).model_dump(mode="json")
    write_json(folder / "dataset.json", manifest | {"files": change(manifest["files"])})


@pytest.mark.parametrize("name", ["index.parquet", "rejected.parquet", "overlaps.parquet"])
def test_a_table_that_is_not_the_one_listed_is_never_taken_over(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path / "old")
    table = pq.read_table(tmp_path / "old" / name)
    pq.write_table(table.slice(0, 1) if name == "rejected.parquet" else table, tmp_path / "old" / name, compression="none")
    with pytest.raises(ManifestError, match=rf"{name}: is not the file that dataset.json lists .*; `sentinode verify`"):
        from_dataset(str(tmp_path / "old"))


def test_a_manifest_without_an_index_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old")
    rewrite_manifest(tmp_path / "old", lambda files: files[1:])
    with pytest.raises(ManifestError, match=r"dataset.json: lists no index.parquet"):
        from_dataset(str(tmp_path / "old"))


def test_damaged_pixels_are_never_taken_over(tmp_path: Path) -> None:
    expected = write_dataset(tmp_path / "old")
    shard = tmp_path / "old" / "train" / "part-00001.parquet"
    image = expected["p003"].tobytes()  # its second row
    content = bytearray(shard.read_bytes())
    content[content.index(image) + 5] ^= 1
    shard.write_bytes(content)
    source = from_dataset(str(tmp_path / "old"))
    reader = reader_of(source.reader)
    assert len(list(reader.read(source.entries.slice(0, 6)))) == 6
    with pytest.raises(ManifestError, match=r"part-00001.parquet: the pixels of row 1 are not those that were prepared; `sentinode verify` checks"):
        list(reader.read(source.entries))


def test_a_data_set_replaced_at_the_same_place_is_compared_with_its_own_index(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old")
    assert len(read_all(tmp_path / "old")) == 10
    shutil.rmtree(tmp_path / "old")
    replaced = write_dataset(tmp_path / "old", seed=1)
    found = read_all(tmp_path / "old")
    assert all(np.array_equal(found[id_], replaced[id_]) for id_ in replaced)


def test_one_split_for_all_is_no_split_of_its_own(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old", split="all")
    assert set(column(from_dataset(str(tmp_path / "old")), "split")) == {None}


def test_a_damaged_or_missing_shard_stops_the_run(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old")
    shard = tmp_path / "old" / "train" / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ManifestError, match=r"part-00001.parquet: cannot be read"):
        read_all(tmp_path / "old")
    shard.unlink()
    with pytest.raises(StorageError, match=r"part-00001.parquet: has gone"):
        read_all(tmp_path / "old")
