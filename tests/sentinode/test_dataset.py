"""Reading a prepared data set, and finding every kind of damage to one."""

import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sentinode import dataset_checks
from sentinode.dataset import INDEX_SCHEMA, PreparedDataset, column_to_images, concatenate, fingerprint, images_to_column, row_schema
from sentinode.dataset_checks import check_records
from sentinode.errors import ManifestError, ManifestNotFoundError, StorageError, UsageError
from sentinode.locations import locate
from sentinode.publishing import publish
from sentinode.storage import file_record, write_json
from sentinode.verify import verify_folder
from tests.factories import learnable_patches, make_dataset, random_patches
from tests.s3 import FlakyServer
from tests.sentinode.stored_rows import store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("original") / "data", train=40, val=20, test=10)


@pytest.fixture
def in_store(original: PreparedDataset, s3_folder: str, tmp_path: Path) -> PreparedDataset:
    """The same, published to an object store."""
    staging = Path(shutil.copytree(original.path, tmp_path / "staging"))
    edit_manifest(staging, lambda content: content.update(root="parts-1", format_version=2))
    publish(staging, locate(s3_folder), "dataset.json")
    return PreparedDataset.open(s3_folder)


@pytest.fixture
def folder(original: PreparedDataset, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(original.path, tmp_path / "data")


def rewrite(folder: Path, name: str, edit: Callable[[pa.Table], pa.Table], *, sign: bool = True, **changes: Any) -> None:
    """Edit a Parquet file; with `sign` also record its new size and checksum, and `changes`, in its record."""
    pq.write_table(edit(pq.read_table(folder / name, partitioning=None)), folder / name)
    if sign:
        edit_manifest(folder, lambda content: [r.update(file_record(folder, name), **changes) for r in records(content) if r["path"] == name])


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = PreparedDataset.open(folder).manifest.model_dump(mode="json")
    edit(content)
    write_json(folder / "dataset.json", content)


def records(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [*content["shards"], *content["files"]]


def refusal(read: Callable[[], object], kind: type[UsageError] = ManifestError) -> str:
    with pytest.raises(kind) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_no_data_set_is_named(tmp_path: Path) -> None:
    assert refusal(lambda: PreparedDataset.open(tmp_path), ManifestNotFoundError).startswith("not a prepared data set: ")


def test_a_split_is_read_row_for_row(original: PreparedDataset) -> None:
    for seed, (split, rows) in enumerate({"train": 40, "val": 20, "test": 10}.items()):
        read, expected = original.read_split(split), learnable_patches(rows, seed)
        assert len(read) == rows
        for name in ("ids", "labels", "groups", "images"):
            np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
        assert (read.labels.dtype, read.images.dtype) == (np.int64, np.uint8)


def test_several_shards_are_read_in_order(folder: Path) -> None:
    first, second = learnable_patches(40, 0), learnable_patches(6, 7)
    table = {"id": second.ids.tolist(), "label": second.labels.tolist(), "group": second.groups.tolist(), "slide": [None] * 6}
    pq.write_table(pa.table(table | {"image": images_to_column(second.images)}, schema=row_schema(96)), folder / "train" / "part-00001.parquet")
    shard = {"split": "train", "rows": 6} | file_record(folder, "train/part-00001.parquet")
    edit_manifest(folder, lambda content: content["shards"].append(shard))
    read = PreparedDataset.open(folder).read_split("train")
    np.testing.assert_array_equal(read.ids, np.concatenate([first.ids, second.ids]))
    np.testing.assert_array_equal(read.images, np.concatenate([first.images, second.images]))


def test_a_file_that_the_manifest_does_not_list_is_not_read(folder: Path) -> None:
    shutil.copy(folder / "val" / "part-00000.parquet", folder / "train" / "part-00001.parquet")
    assert len(PreparedDataset.open(folder).read_split("train")) == 40


def test_pixels_can_be_read_without_labels(folder: Path) -> None:
    name = "test/part-00000.parquet"
    rewrite(folder, name, lambda table: table.set_column(1, table.schema.field("label"), pa.nulls(10, pa.int8())))
    dataset = PreparedDataset.open(folder)
    (shard,) = dataset.shards("test")
    ids, images = dataset.read_pixels(shard)
    expected = learnable_patches(10, 2)
    assert ids == expected.ids.tolist()
    np.testing.assert_array_equal(images, expected.images)
    assert "unlabelled rows; training and evaluation need labels" in refusal(lambda: dataset.read_shard(shard), UsageError)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(original: PreparedDataset) -> None:
    assert refusal(lambda: original.shards("all"), UsageError) == f"{original.path}: no rows in split 'all'; it has train, val, test"


def test_the_image_column_round_trips_sliced_chunked_and_empty() -> None:
    images = random_patches(7, side_px=8)
    column = images_to_column(images)
    np.testing.assert_array_equal(column_to_images(column, 8), images)
    np.testing.assert_array_equal(column_to_images(column.slice(2, 3), 8), images[2:5])
    np.testing.assert_array_equal(column_to_images(pa.chunked_array([column.slice(0, 2), column.slice(5)]), 8), images[[0, 1, 5, 6]])
    assert column_to_images(column.slice(0, 0), 8).shape == (0, 8, 8, 3)
    assert column_to_images(pa.chunked_array([], column.type), 8).shape == (0, 8, 8, 3)
    np.testing.assert_array_equal(column_to_images(images_to_column(images[:, :, ::-1]), 8), images[:, :, ::-1])


def test_a_shard_is_plain_parquet_with_its_shape_in_the_metadata(original: PreparedDataset) -> None:
    table = pq.read_table(original.path / "train" / "part-00000.parquet", partitioning=None)
    assert table.schema.field("image").type == pa.binary(27_648)
    metadata = table.schema.field("image").metadata
    assert (metadata[b"shape"], metadata[b"dtype"], metadata[b"channel_order"]) == (b"[96, 96, 3]", b"uint8", b"RGB")
    first = np.frombuffer(table["image"][0].as_py(), np.uint8).reshape(96, 96, 3)
    np.testing.assert_array_equal(first, learnable_patches(40, 0).images[0])


def shard_of(folder: Path, split: str = "val") -> Callable[[], object]:
    dataset = PreparedDataset.open(folder)
    return lambda: dataset.read_shard(dataset.shards(split)[0])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_shard_that_cannot_be_read_is_one_line_that_names_verify(folder: Path, damage: str) -> None:
    path = folder / "val" / "part-00000.parquet"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-100], "text": b"hello"}[damage])
    message = refusal(shard_of(folder))
    assert message.startswith(f"{path}: cannot be read (")
    assert message.endswith("`sentinode verify` checks the whole data set")


def test_a_shard_with_another_number_of_rows_is_refused(folder: Path) -> None:
    rewrite(folder, "val/part-00000.parquet", lambda table: table.slice(0, 19))
    assert refusal(shard_of(folder)).endswith("part-00000.parquet: 19 rows, but dataset.json says 20")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table.drop_columns("group"), "cannot be read (No match for FieldRef.Name(group)"),
        (lambda table: table.set_column(4, "image", [[b"123"] * 20]), "column image is of type binary, not fixed_size_binary[27648]"),
        (lambda table: table.set_column(1, "label", [pa.array([2] * 20, pa.int8())]), "labels other than 0 and 1"),
        (lambda table: table.set_column(1, "label", [["0"] * 20]), "column label is of type string, not int8"),
        (lambda table: table.set_column(2, pa.field("group", pa.string()), pa.nulls(20, pa.string())), "nulls in column group"),
        (lambda table: table.set_column(4, pa.field("image", pa.binary(27_648)), pa.nulls(20, pa.binary(27_648))), "nulls in column image"),
    ],
)
def test_a_shard_of_another_shape_is_refused(folder: Path, edit: Callable[[pa.Table], pa.Table], message: str) -> None:
    rewrite(folder, "val/part-00000.parquet", edit)
    assert message in refusal(shard_of(folder))


def test_without_a_fold_the_splits_train_and_validate(original: PreparedDataset) -> None:
    train, val = original.read_train_and_val(None)
    assert (len(train), len(val)) == (40, 20)


def test_a_fold_validates_on_its_rows_and_trains_on_the_other_folds(original: PreparedDataset) -> None:
    fold_of = dict(zip(original.index["id"].to_pylist(), original.index["fold"].to_pylist(), strict=True))
    everyone: list[str] = []
    for fold in range(3):
        train, val = original.read_train_and_val(fold)
        assert {fold_of[id_] for id_ in val.ids.tolist()} == {fold}
        assert {fold_of[id_] for id_ in train.ids.tolist()} == {0, 1, 2} - {fold}
        assert not set(train.groups) & set(val.groups)
        assert len(train) + len(val) == 60, "train and val rows, and none of test"
        everyone.extend(val.ids.tolist())
    assert len(everyone) == len(set(everyone)) == 60


@pytest.mark.parametrize("fold", [None, 0, 2])
def test_rows_of_several_shards_are_told_apart_without_pixels_and_read_in_order(tmp_path: Path, fold: int | None) -> None:
    dataset = store(tmp_path / "data", (17, 1, 30))
    whole = concatenate([dataset.read_shard(shard) for shard in dataset.manifest.shards])
    shards, validates = dataset.train_and_val_rows(fold)
    assert shards == dataset.manifest.shards
    fold_of = dict(zip(dataset.index["id"].to_pylist(), dataset.index["fold"].to_pylist(), strict=True))
    assert validates.tolist() == [row >= 48 if fold is None else fold_of[id_] == fold for row, id_ in enumerate(whole.ids.tolist())]
    train, val = dataset.read_train_and_val(fold)
    for found, mask in ((train, ~validates), (val, validates), (dataset.read_val(fold), validates)):
        for name in ("ids", "labels", "groups", "images"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[mask])


def test_the_index_is_arranged_like_the_shards(tmp_path: Path) -> None:
    dataset = store(tmp_path / "data", (17, 5))
    shards = dataset.shards("train")[::-1]
    index = dataset.index_of(shards, ["label", "id"])
    assert index.column_names == ["label", "id"]
    expected = [dataset.read_shard(shard) for shard in shards]
    assert index["id"].to_pylist() == [id_ for part in expected for id_ in part.ids.tolist()]
    assert index["label"].to_pylist() == [label for part in expected for label in part.labels.tolist()]


@pytest.mark.parametrize("fold", [None, 1])
def test_reading_holds_the_rows_once(tmp_path: Path, fold: int | None) -> None:
    """And one shard; twice, where it has several row groups."""
    dataset = store(tmp_path / "data", (100,) * 10, row_group_rows=50, side_px=32, val_rows=100)
    dataset.read_val(fold)
    tracemalloc.start()
    train, val = dataset.read_train_and_val(fold)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pixels = train.images.nbytes + val.images.nbytes
    assert pixels == 1100 * 32 * 32 * 3
    # Lists of ids and Parquet's own memory aside, which tracemalloc does not see.
    assert peak < pixels * 1.25 + 400_000


def test_a_fold_that_does_not_exist_is_refused(original: PreparedDataset, folder: Path) -> None:
    assert refusal(lambda: original.read_train_and_val(3), UsageError) == f"{original.path}: no fold 3; it has folds 0 to 2"
    edit_manifest(folder, lambda content: content["split"].update(folds=None))
    message = refusal(lambda: PreparedDataset.open(folder).read_train_and_val(0), UsageError)
    assert message == f"{folder}: no fold 0; it was prepared without folds"


def test_a_fold_without_rows_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda content: content["split"].update(folds=4))
    message = refusal(lambda: PreparedDataset.open(folder).read_train_and_val(3), UsageError)
    assert message == f"{folder}: fold 3 leaves 60 rows to train on and 0 to validate on"


def test_an_index_that_lacks_rows_is_refused(folder: Path) -> None:
    rewrite(folder, "index.parquet", lambda table: table.slice(5))
    assert "index.parquet: rows of the shards are missing" in refusal(lambda: PreparedDataset.open(folder).read_train_and_val(0))


@pytest.mark.parametrize("damage", ["missing", "text"])
def test_an_index_that_cannot_be_read_is_one_line(folder: Path, damage: str) -> None:
    (folder / "index.parquet").unlink()
    if damage == "text":
        (folder / "index.parquet").write_bytes(b"hello")
    assert refusal(lambda: PreparedDataset.open(folder).read_train_and_val(0)).startswith(f"{folder / 'index.parquet'}: cannot be read (")


def test_taking_rows_and_joining_them_keeps_rows_together() -> None:
    rows = learnable_patches(9, side_px=8)
    chosen = rows.take(np.array([8, 0, 3]))
    assert chosen.ids.tolist() == [rows.ids[8], rows.ids[0], rows.ids[3]]
    np.testing.assert_array_equal(chosen.images[0], rows.images[8])
    mask = rows.labels == 1
    joined = concatenate([rows.take(mask), rows.take(~mask)])
    assert sorted(joined.ids) == sorted(rows.ids)
    assert joined.labels.tolist() == [1] * int(mask.sum()) + [0] * int((~mask).sum())
    chosen.images[:] = 0
    assert rows.images.any(), "taking made no copy"


def test_a_whole_data_set_has_no_problems(original: PreparedDataset) -> None:
    assert original.verify() == []


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train/part-00000.parquet", "test/part-00000.parquet", "index.parquet"])
def test_a_missing_a_cut_and_a_flipped_file_are_found(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    flip_a_bit(folder / name)
    assert PreparedDataset.open(folder).verify() == [f"{name}: sha256 differs"]
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert PreparedDataset.open(folder).verify() == [f"{name}: {size - 1} bytes, expected {size}"]
    (folder / name).unlink()
    assert PreparedDataset.open(folder).verify() == [f"{name}: missing"]


def test_every_damaged_file_is_listed(folder: Path) -> None:
    flip_a_bit(folder / "train" / "part-00000.parquet")
    (folder / "index.parquet").unlink()
    assert PreparedDataset.open(folder).verify() == ["train/part-00000.parquet: sha256 differs", "index.parquet: missing"]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda content: content["counts"]["val"].update(rows=21), "val: shards hold 20 rows, counts say 21"),
        (lambda content: content["counts"]["val"].update(normal=13), "val: index.parquet holds 12 normal, counts say 13"),
        (lambda content: content["counts"]["val"].update(metastatic=0), "val: index.parquet holds 8 metastatic, counts say 0"),
        (lambda content: content["counts"]["val"].update(groups=9), "val: index.parquet holds 10 groups, counts say 9"),
        (lambda content: content["counts"].pop("test"), "test: shards hold 10 rows, counts say 0"),
        (lambda content: content["shards"].pop(), "index.parquet: 70 rows, shards hold 60"),
        (lambda content: content["shards"][1].update(rows=19), "val/part-00000.parquet: 20 rows, but dataset.json says 19"),
        (lambda content: content["shards"][1].update(split="test"), "val: shards hold 0 rows, counts say 20"),
        (lambda content: content.update(fingerprint="0" * 64), "index.parquet: does not give the fingerprint of dataset.json"),
    ],
)
def test_a_manifest_that_its_files_contradict_is_found(folder: Path, edit: Callable[[dict[str, Any]], object], problem: str) -> None:
    edit_manifest(folder, edit)
    assert problem in PreparedDataset.open(folder).verify()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda table: table.slice(0, 69), "index.parquet: 69 rows, shards hold 70"),
        (lambda table: relabelled(table), "train: index.parquet holds 25 normal, counts say 24"),
        (lambda table: relabelled(table), "index.parquet: does not give the fingerprint of dataset.json"),
    ],
)
def test_an_index_that_was_rewritten_is_found_although_its_checksum_is_right(
    folder: Path, edit: Callable[[pa.Table], pa.Table], problem: str
) -> None:
    rewrite(folder, "index.parquet", edit)
    assert problem in PreparedDataset.open(folder).verify()


def nullable(table: pa.Table) -> pa.Table:
    return table.cast(pa.schema([pa.field(field.name, field.type) for field in table.schema]))


def column(table: pa.Table, name: str, edit: Callable[[list[Any]], object]) -> pa.Table:
    """The table with one column edited in place as a list."""
    values = table[name].to_pylist()
    edit(values)
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(values, table.schema.field(name).type))


def brighten(images: list[bytes]) -> None:
    images[3] = bytes([images[3][0] ^ 1]) + images[3][1:]


@pytest.mark.parametrize(
    ("name", "edit", "problem"),
    [
        ("id", lambda values: values.reverse(), "id differs from the index in 20 rows, the first is row 0"),
        ("label", lambda values: values.__setitem__(2, 1 - values[2]), "label differs from the index in 1 rows, the first is row 2"),
        ("group", lambda values: values.__setitem__(19, "x"), "group differs from the index in 1 rows, the first is row 19"),
        ("slide", lambda values: values.__setitem__(0, "s"), "slide differs from the index in 1 rows, the first is row 0"),
        ("image", brighten, "pixels differ from pixel_sha1 of the index in 1 rows, the first is row 3"),
    ],
)
def test_a_shard_that_contradicts_the_index_is_found_although_its_checksum_is_right(
    folder: Path, name: str, edit: Callable[[list[Any]], object], problem: str
) -> None:
    rewrite(folder, "val/part-00000.parquet", lambda table: column(table, name, edit))
    assert PreparedDataset.open(folder).verify() == [f"val/part-00000.parquet: {problem}"]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda index: column(index, "row", lambda rows: rows.__setitem__(1, 0)), "train/part-00000.parquet: the index has 40 rows of it"),
        (lambda index: column(index, "shard", lambda shards: shards.__setitem__(1, shards[-1])), "rows name a shard that is none of their split"),
        (lambda index: column(index, "id", lambda ids: ids.__setitem__(1, ids[0])), "index.parquet: 1 ids stand in it more than once"),
        (lambda index: column(index, "group", lambda groups: groups.__setitem__(0, groups[-1])), "index.parquet: 1 groups stand in several splits"),
        (lambda index: column(index, "fold", lambda folds: folds.__setitem__(0, folds[0] + 1)), "index.parquet: 1 groups stand in several folds"),
        (lambda index: column(index, "fold", lambda folds: folds.__setitem__(0, 3)), "index.parquet: 1 rows have a fold that they should not have"),
        (lambda index: column(index, "fold", lambda folds: folds.__setitem__(-1, 0)), "index.parquet: 1 rows have a fold that they should not have"),
        (lambda index: index.drop_columns("pixel_sha1"), "cannot be read"),
        (lambda index: column(nullable(index), "shard", lambda shards: shards.__setitem__(0, None)), "cannot be read"),
        (lambda index: index.slice(0, 0), "index.parquet: 0 rows, shards hold 70"),
    ],
)
def test_an_index_that_contradicts_itself_or_the_shards_is_found(folder: Path, edit: Callable[[pa.Table], pa.Table], problem: str) -> None:
    rewrite(folder, "index.parquet", edit)
    assert [line for line in PreparedDataset.open(folder).verify() if problem in line]


@pytest.mark.parametrize("method", ["random", "predefined", "all"])
def test_groups_may_straddle_where_the_split_promises_nothing(folder: Path, method: str) -> None:
    rewrite(folder, "index.parquet", lambda index: column(index, "group", lambda groups: groups.__setitem__(0, groups[-1])))
    edit_manifest(folder, lambda content: content["split"].update(method=method))
    assert not [line for line in PreparedDataset.open(folder).verify() if "straddl" in line or "several" in line]


def test_files_are_compared_with_their_records_wherever_they_lie(folder: Path, in_store: PreparedDataset) -> None:
    manifest = PreparedDataset.open(folder).manifest
    listed = [*manifest.shards, *manifest.files]
    assert check_records(folder, listed) == check_records(in_store.root, listed) == check_records(folder / "nothing", []) == []
    flip_a_bit(folder / "train/part-00000.parquet")
    (folder / "val/part-00000.parquet").write_bytes(b"")
    (folder / "index.parquet").unlink()
    assert check_records(folder, listed) == [
        "train/part-00000.parquet: sha256 differs",
        f"val/part-00000.parquet: 0 bytes, expected {manifest.shards[1].bytes}",
        "index.parquet: missing",
    ]
    assert check_records(folder / "nothing", listed[:1]) == ["train/part-00000.parquet: missing"]


def test_a_disk_that_fails_while_a_shard_is_verified_is_no_damage_to_the_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> pa.Buffer:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(dataset_checks, "_read_into_arrow", fails)
    with pytest.raises(StorageError, match=r"train/part-00000.parquet: cannot be read or written \(Input/output error\)"):
        PreparedDataset.open(folder).verify()


def test_a_shard_that_is_no_parquet_is_one_line(folder: Path) -> None:
    (folder / "val/part-00000.parquet").write_bytes(b"hello")
    rewritten = file_record(folder, "val/part-00000.parquet")
    edit_manifest(folder, lambda content: content["shards"][1].update(rewritten))
    (problem,) = PreparedDataset.open(folder).verify()
    assert problem.startswith("val/part-00000.parquet: cannot be read (")
    assert "\n" not in problem


def test_an_index_that_the_manifest_does_not_list_is_found(folder: Path) -> None:
    edit_manifest(folder, lambda content: content["files"].clear())
    assert PreparedDataset.open(folder).verify() == ["index.parquet: not listed in dataset.json"]


def test_files_that_the_manifest_does_not_list_are_of_no_concern(folder: Path) -> None:
    (folder / "train" / "part-99999.parquet").write_bytes(b"hello")
    (folder / "notes.txt").write_text("mine")
    assert PreparedDataset.open(folder).verify() == []


def test_a_data_set_in_an_object_store_is_that_on_disk(in_store: PreparedDataset, original: PreparedDataset) -> None:
    assert in_store.index == original.index
    assert str(in_store.path) == in_store.location.uri
    for fold in (None, 1):
        for found, expected in zip(in_store.read_train_and_val(fold), original.read_train_and_val(fold), strict=True):
            for name in ("ids", "labels", "groups", "images"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    ids, images = pickle.loads(pickle.dumps(in_store)).read_pixels(in_store.manifest.shards[0])  # noqa: S301
    assert ids == original.read_split("train").ids.tolist()
    assert images.shape == (40, 96, 96, 3)


def test_a_data_set_in_an_object_store_is_verified(in_store: PreparedDataset) -> None:
    assert verify_folder(in_store.location) == ("prepared data set", [])
    shard = in_store.root / "train/part-00000.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (in_store.root / "val/part-00000.parquet").write_bytes(b"")
    (in_store.root / "test/part-00000.parquet").remove()
    assert verify_folder(in_store.location.uri)[1][:3] == [
        "train/part-00000.parquet: sha256 differs",
        f"val/part-00000.parquet: 0 bytes, expected {in_store.manifest.shards[1].bytes}",
        "test/part-00000.parquet: missing",
    ]


def test_sentinode_verify_reads_an_object_store(in_store: PreparedDataset, capsys: pytest.CaptureFixture[str]) -> None:
    from ray_jobs.cli import main

    assert main(["verify", in_store.location.uri]) == 0
    assert "a whole prepared data set" in capsys.readouterr().out
    assert main(["verify", f"{in_store.location.uri}/nothing"]) == 2
    assert "nothing to verify" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_no_damage(
    in_store: PreparedDataset, flaky_s3: FlakyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray_jobs.cli import main

    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    flaky_s3.forever = "503"
    for read in (in_store.verify, lambda: in_store.read_split("train"), lambda: PreparedDataset.open(in_store.location)):
        with pytest.raises(StorageError, match="does not answer"):
            read()
    assert main(["verify", in_store.location.uri]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the storage does not answer" in line


def test_a_bucket_that_is_not_there_is_no_data_set(s3_folder: str) -> None:
    told = refusal(lambda: PreparedDataset.open("s3://no-such-bucket/data"), ManifestNotFoundError)
    assert told.startswith("not a prepared data set: s3://no-such-bucket/data (there is no such bucket)")


def relabelled(index: pa.Table) -> pa.Table:
    labels = index["label"].to_pylist()
    labels[labels.index(1)] = 0
    return index.set_column(1, index.schema.field("label"), pa.array(labels, pa.int8()))


def index_of(*rows: dict[str, Any]) -> pa.Table:
    defaults = dict.fromkeys(INDEX_SCHEMA.names) | {"group": "g", "shard": "s", "row": 0}
    return pa.Table.from_pylist([defaults | row for row in rows], schema=INDEX_SCHEMA)


def test_the_fingerprint_is_that_of_ids_labels_splits_and_pixels_in_the_order_of_ids() -> None:
    a = {"id": "a", "label": 1, "split": "train", "pixel_sha1": "00"}
    b = {"id": "b", "label": None, "split": "all", "pixel_sha1": "11"}
    # printf 'a,1,train,00\nb,,all,11\n' | sha256sum
    assert fingerprint(index_of(a, b)) == "6c82bb78f9b971af30d20f9477a5aaa4724f079d56ec27565b47eac9dc930263"
    assert fingerprint(index_of(a, b)) == fingerprint(index_of(b, a))
    assert fingerprint(index_of(a, b)) == fingerprint(index_of(a | {"group": "other", "slide": "s1", "row": 7}, b))
    for change in ({"label": 0}, {"split": "val"}, {"pixel_sha1": "01"}, {"id": "c"}):
        assert fingerprint(index_of(a | change, b)) != fingerprint(index_of(a, b))
