import gzip
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from data_prep.rejects import RejectReason
from data_prep.sources.base import Unread
from data_prep.sources.detect import reader_of
from data_prep.sources.unpack import unpack
from sentinode.errors import SentinodeError, StorageError, UsageError
from sentinode.images import UInt8Array
from tests.data_prep.sources.helpers import column, opened, pixels, refused, rows

STEM = "camelyonpatch_level_2_split_"


def noise_images(count: int, seed: int = 0) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)


def write_part(
    folder: Path,
    name: str,
    count: int,
    *,
    seed: int = 0,
    packed: bool = False,
    meta: bool = True,
    images: UInt8Array | None = None,
    slide: str = "camelyon16_train_normal",
) -> UInt8Array:
    """Write one split as published, its patches from three slides; returns its pixels."""
    folder.mkdir(exist_ok=True)
    images = noise_images(count, seed) if images is None else images
    for kind, data in (("x", images), ("y", (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1))):
        with h5py.File(folder / f"{STEM}{name}_{kind}.h5", "w") as file:
            file[kind] = data
        if packed:
            pack(folder / f"{STEM}{name}_{kind}.h5")
    if meta:
        lines = [f"{row},{100 + row},{200 + row},True,False,{slide}_{row % 3:03d}" for row in range(count)]
        (folder / f"{STEM}{name}_meta.csv").write_text("\n".join([",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", *lines]) + "\n")
    return images


def pack(path: Path) -> Path:
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    path.unlink()
    return path.with_name(f"{path.name}.gz")


def no_progress(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for seed, (name, count) in enumerate((("train", 5), ("valid", 3), ("test", 2))):
        write_part(tmp_path / "pcam", name, count, seed=seed)
    return tmp_path / "pcam"


def test_the_official_splits_labels_slides_and_places_are_kept(source: Path) -> None:
    read = opened(source)
    assert read.kind == "pcam"
    found = {row[0]: row[1:] for row in rows(read, "id", "label", "split", "slide", "x_px", "y_px", "row")}
    assert list(found) == sorted(found)
    assert len(found) == 10
    assert found["train-000001"] == (1, "train", "camelyon16_train_normal_001", 201, 101, 1)
    assert found["valid-000002"] == (0, "val", "camelyon16_train_normal_002", 202, 102, 2)
    assert found["test-000000"][1] == "test"
    assert read.rejects == ()


def test_the_reader_gives_the_pixels_of_each_row_in_any_order(source: Path) -> None:
    expected = write_part(source, "train", 700, seed=5)
    read = opened(source)
    train = read.entries.slice(2, 700)
    assert np.array_equal(np.stack(list(reader_of(read.reader).read(train))), expected)
    shuffled = np.random.default_rng(0).permutation(700)[:40]
    assert np.array_equal(np.stack(list(reader_of(read.reader).read(train.take(pa.array(shuffled))))), expected[shuffled])
    assert list(reader_of(read.reader).read(train.slice(0, 0))) == []


def test_one_split_alone_will_do_and_so_will_no_places(tmp_path: Path) -> None:
    write_part(tmp_path, "valid", 2, meta=False)
    assert rows(opened(tmp_path), "id", "slide", "x_px", "split") == [("valid-000000", None, None, "val"), ("valid-000001", None, None, "val")]


def test_compressed_files_are_unpacked_once_and_then_read(source: Path, tmp_path: Path) -> None:
    expected = write_part(source, "train", 5, seed=3, packed=True)
    pack(source / f"{STEM}train_meta.csv")
    read = opened(source)
    assert column(read, "label").count(1) == 2 + 1 + 1
    with pytest.raises(SentinodeError, match="must be unpacked before reading"):
        reader_of(read.reader)
    seen: list[tuple[str, int, int]] = []
    work = tmp_path / "work"
    ready = unpack(read, work, lambda *state: seen.append(state))
    assert seen[0] == ("unpack", 0, (source / f"{STEM}train_x.h5.gz").stat().st_size)
    assert seen[-1][1] == seen[-1][2] == (source / f"{STEM}train_x.h5.gz").stat().st_size
    found = pixels(ready)
    assert all(np.array_equal(found[f"train-{row:06d}"], expected[row]) for row in range(5))
    assert [path.name for path in work.iterdir()] == [f"{STEM}train_x.h5"]
    before = (work / f"{STEM}train_x.h5").stat()
    assert unpack(read, work, no_progress) == ready
    assert (work / f"{STEM}train_x.h5").stat() == before
    assert ready.inputs_sha256 == read.inputs_sha256


def test_of_a_file_that_is_there_both_ways_the_plain_one_is_read(source: Path, tmp_path: Path) -> None:
    (source / f"{STEM}train_x.h5.gz").write_bytes(b"never read")
    read = opened(source)
    assert unpack(read, tmp_path / "work", no_progress) is read
    assert not (tmp_path / "work").exists()


def test_an_interrupted_unpacking_leaves_nothing_that_looks_complete(source: Path, tmp_path: Path) -> None:
    write_part(source, "train", 5, packed=True)
    read = opened(source)
    work = tmp_path / "work"

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(read, work, interrupt)
    assert list(work.iterdir()) == []
    assert len(pixels(unpack(read, work, no_progress))) == 10


def test_a_damaged_archive_is_named(source: Path, tmp_path: Path) -> None:
    write_part(source, "train", 5, packed=True)
    archive = source / f"{STEM}train_x.h5.gz"
    whole = archive.read_bytes()
    for damaged in (whole[:-100], whole[:50000] + b"0000" + whole[50004:], b"no gzip"):
        archive.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"train_x.h5.gz: damaged gzip file .*; download it again") as caught:
            unpack(opened(source), tmp_path / "work", no_progress)
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "work").iterdir()) == []
    archive.write_bytes(gzip.compress(b"no HDF5"))
    with pytest.raises(UsageError, match=r"train_x.h5.gz: damaged or no HDF5 file .*; download it again"):
        unpack(opened(source), tmp_path / "work", no_progress)
    archive.write_bytes(gzip.compress((source / f"{STEM}valid_x.h5").read_bytes()))
    with pytest.raises(UsageError, match=r"train_x.h5.gz: 3 patches, but .* 5 labels"):
        unpack(opened(source), tmp_path / "work", no_progress)


def test_too_little_space_is_said_before_unpacking(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(source, "train", 5, packed=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(
        SentinodeError, match=r"0.0 GB are needed to unpack .*train_x.h5.gz, 0.0 GB are free; make room, or put the files unpacked"
    ) as caught:
        unpack(opened(source), tmp_path / "work", no_progress)
    assert caught.value.exit_code == 1


def test_a_disk_that_is_full_while_unpacking_is_no_wrong_use(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(source, "train", 5, packed=True)

    def full(path: Path) -> Path:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.symlink_to("/dev/full")
        return temporary

    monkeypatch.setattr("data_prep.sources.unpack.temporary_name", full)
    with pytest.raises(SentinodeError, match=rf"^{tmp_path}/work: no space left for unpacking {STEM}train_x.h5.gz; make room and run") as caught:
        unpack(opened(source), tmp_path / "work", no_progress)
    assert caught.value.exit_code == 1
    assert list((tmp_path / "work").iterdir()) == []


def rewrite(path: Path, **datasets: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file[name] = data


@pytest.mark.parametrize(
    ("name", "datasets", "message"),
    [
        ("train_x", {"x": np.zeros((4, 96, 96, 3), np.uint8)}, "train_x.h5: 4 patches, but .*train_y.h5 has 5 labels"),
        ("train_x", {"x": np.zeros((5, 48, 48, 3), np.uint8)}, r"dataset x is uint8 \(5, 48, 48, 3\); expected uint8 \(n, 96, 96, 3\)"),
        ("train_x", {"x": np.zeros((5, 96, 96, 3), np.float32)}, "dataset x is float32"),
        ("train_x", {"y": np.zeros(5, np.uint8)}, "train_x.h5: no dataset 'x' in it; found 'y'"),
        ("train_y", {"y": np.zeros((5, 2), np.uint8)}, r"dataset y is uint8 \(5, 2\); expected whole numbers"),
        ("train_y", {"y": np.zeros(5, np.float32)}, "dataset y is float32"),
        ("train_y", {}, "train_y.h5: no dataset 'y' in it; found nothing"),
    ],
)
def test_files_of_another_shape_are_named(source: Path, name: str, datasets: dict[str, np.ndarray], message: str) -> None:
    rewrite(source / f"{STEM}{name}.h5", **datasets)
    with pytest.raises(UsageError, match=message):
        opened(source)


def test_labels_other_than_0_and_1_are_refused(source: Path) -> None:
    rewrite(source / f"{STEM}test_y.h5", y=np.array([1, 7], np.uint8).reshape(-1, 1, 1, 1))
    read = opened(source)
    assert refused(read) == [("bad_label", "test-000001")]
    assert read.inputs == 10


@pytest.mark.parametrize("kind", ["x", "y"])
def test_a_truncated_file_is_named(source: Path, kind: str) -> None:
    path = source / f"{STEM}train_{kind}.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=rf"train_{kind}.h5: damaged or no HDF5 file \(.*truncated.*\); download it again"):
        opened(source)


def test_a_file_without_its_partner_is_named(source: Path) -> None:
    (source / f"{STEM}valid_y.h5").unlink()
    with pytest.raises(UsageError, match=rf"{STEM}valid_x.h5 is there, but {STEM}valid_y.h5 \(or .h5.gz\) is not"):
        opened(source)
    with pytest.raises(UsageError, match="no camelyonpatch_level_2_split_"):
        opened(source.parent, source="pcam")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "4 lines, but there are 5 labels"),
        (lambda text: text.replace("wsi", "slide"), "expected coord_x, coord_y and wsi, each once"),
        (lambda text: text.replace(",202,", ",far,"), "line 4 has coord_x 'far'; expected a whole number"),
        (lambda text: text.replace(",202,", f",{10**20},"), "line 4 has coord_x '100000000000000000000'; expected a whole number"),
        (lambda text: text.replace("camelyon16", "x" * 300), "line 2 has slide 'xxx.*…, 317 characters; expected at most 255"),
        (lambda text: text.replace(",202,", ","), "line 4 has 5 fields, the header 6"),
    ],
)
def test_places_that_do_not_fit_are_named(source: Path, change: object, message: str) -> None:
    path = source / f"{STEM}train_meta.csv"
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(UsageError, match=message) as caught:
        opened(source)
    assert "train_meta.csv" in str(caught.value)


def test_a_damaged_chunk_costs_its_own_rows_only(tmp_path: Path) -> None:
    images = write_part(tmp_path, "test", 6)
    path = tmp_path / f"{STEM}test_x.h5"
    with h5py.File(path, "w") as file:
        chunked = file.create_dataset("x", data=images, chunks=(2, 96, 96, 3), fletcher32=True)
        place = chunked.id.get_chunk_info(1).byte_offset
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(b"\0" * 100)
    found = pixels(opened(tmp_path))
    lost = [id_ for id_, content in found.items() if isinstance(content, Unread)]
    assert lost == ["test-000002", "test-000003"]
    assert found["test-000002"].reason == RejectReason.UNREADABLE  # type: ignore[union-attr]
    assert np.array_equal(found["test-000004"], images[4])


def test_a_file_that_has_gone_stops_the_run_and_refuses_nothing(source: Path) -> None:
    read = opened(source)
    (source / f"{STEM}train_x.h5").unlink()
    with pytest.raises(StorageError, match=r"train_x.h5: cannot be opened; every node must see it"):
        pixels(read)


def test_the_digest_follows_labels_places_and_pixels(source: Path) -> None:
    digests = {opened(source).inputs_sha256, opened(source).inputs_sha256}
    assert len(digests) == 1
    path = source / f"{STEM}train_meta.csv"
    path.write_text(path.read_text().replace("normal_001", "normal_009"))
    digests.add(opened(source).inputs_sha256)
    write_part(source, "test", 2, seed=8)
    digests.add(opened(source).inputs_sha256)
    rewrite(source / f"{STEM}valid_y.h5", y=np.ones((3, 1, 1, 1), np.uint8))
    digests.add(opened(source).inputs_sha256)
    assert len(digests) == 4
