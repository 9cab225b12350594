"""Rows reach the network exactly once per epoch, from memory and streamed, in little memory, and what is damaged is said."""

import gc
import os
import shutil
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_prep.shards import write_rows
from data_prep.spool import Spool, checksums
from sentinode import ingest
from sentinode.dataset import Patches, PreparedDataset, concatenate
from sentinode.epoch_plan import EpochPlan
from sentinode.errors import ManifestError, StorageError, UsageError
from sentinode.ingest import ResidentRows, RowSource, StreamedRows, pixel_bytes, resolve_ingest
from sentinode.locations import locate
from sentinode.publishing import publish
from sentinode.read_ahead import ReadAhead, plan_loads
from sentinode.row_groups import RowGroups
from sentinode.storage import write_json
from tests.conditions import wait_until
from tests.s3 import FlakyServer, Server
from tests.sentinode.stored_rows import SIDE_PX, store

IntArray = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """65 training rows in ten row groups of two shards."""
    return store(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not ingest_threads()


def ingest_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sentinode-ingest")]


@pytest.fixture
def streamed() -> Iterator[Callable[..., StreamedRows]]:
    """Makes sources that are closed after the test."""
    made: list[StreamedRows] = []

    def make(dataset: PreparedDataset, window_rows: int = 16, fold: int | None = None) -> StreamedRows:
        made.append(StreamedRows(dataset, fold, "cpu", window_rows))
        return made[-1]

    yield make
    for source in made:
        source.close()


def batches_of(piece: IntArray, batch_size: int) -> list[IntArray]:
    return [piece[start : start + batch_size] for start in range(0, len(piece), batch_size)]


def epoch_of(source: RowSource, epoch: int, world_size: int, batch_size: int) -> list[list[IntArray]]:
    """The batches of each worker."""
    order = source.order(7, epoch, world_size, batch_size)
    return [batches_of(piece, batch_size) for piece in np.array_split(order, world_size)]


def delivered(source: RowSource, batches: Sequence[IntArray]) -> npt.NDArray[np.uint8]:
    return np.concatenate([batch.numpy().copy() for batch in source.batches(batches)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("shard_rows", "row_group_rows", "batch_size", "window_rows"),
    [
        ((40, 25), 8, 4, 16),
        ((40, 25), 8, 4, 1000),
        ((40, 25), 8, 5, 7),
        ((40, 25), 100, 4, 10),  # row groups larger than two windows
        ((1, 1, 1), 256, 4, 16),  # fewer rows than workers
        ((33,), 1, 3, 4),
        ((64, 64), 16, 32, 1),  # batches larger than two windows
        ((101,), 10, 1, 3),
        ((1100,), 2000, 50, 2000),  # more rows in one row group than buffers in one system call
    ],
)
def test_every_row_arrives_exactly_once_an_epoch_streamed_and_resident(
    tmp_path: Path,
    streamed: Callable[..., StreamedRows],
    shard_rows: Sequence[int],
    row_group_rows: int,
    batch_size: int,
    window_rows: int,
    world_size: int,
) -> None:
    stored = store(tmp_path / "data", shard_rows, row_group_rows=row_group_rows)
    train = stored.read_split("train")
    for source in (ResidentRows(train, "cpu"), streamed(stored, window_rows)):
        np.testing.assert_array_equal(source.labels, train.labels)
        for epoch in range(2):
            seen = []
            for batches in epoch_of(source, epoch, world_size, batch_size):
                count = 0
                for rows, batch in zip(batches, source.batches(batches), strict=True):
                    assert (batch.dtype, tuple(batch.shape)) == (torch.uint8, (len(rows), SIDE_PX, SIDE_PX, 3))
                    np.testing.assert_array_equal(batch.numpy(), train.images[rows])
                    seen += rows.tolist()
                    count += 1
                assert count == len(batches)
            assert sorted(seen) == list(range(len(train)))


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_the_order_is_a_function_of_seed_epoch_and_workers(dataset: PreparedDataset, streamed: Callable[..., StreamedRows], kind: str) -> None:
    def make() -> RowSource:
        return ResidentRows(dataset.read_split("train"), "cpu") if kind == "resident" else streamed(dataset)

    source = make()
    order = source.order(1, 2, 3, 4)
    assert order.dtype == np.int64
    source.order(5, 6, 7, 8)
    for again in (source, make()):
        np.testing.assert_array_equal(again.order(1, 2, 3, 4), order)
    for other in (source.order(2, 2, 3, 4), source.order(1, 3, 3, 4), source.order(1, 2, 2, 4)):
        assert sorted(other) == sorted(order)
        assert (other != order).mean() > 0.5


def test_resident_rows_are_permuted_globally(tmp_path: Path) -> None:
    source = ResidentRows(store(tmp_path / "data", (4000,), row_group_rows=4000).read_split("train"), "cpu")
    displacement = np.abs(source.order(1, 0, 1, 32) - np.arange(4000))
    # The mean distance of two random places of n is n / 3; its standard deviation over permutations is below n / 150 here.
    assert displacement.mean() == pytest.approx(4000 / 3, rel=0.06)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("window_rows", [5, 16, 30])
def test_streamed_rows_stay_in_the_window_of_their_row_groups_place(
    dataset: PreparedDataset, streamed: Callable[..., StreamedRows], window_rows: int, world_size: int
) -> None:
    base = streamed(dataset, 1).order(3, 4, world_size, 4)
    group_of = np.concatenate([np.arange(40) // 8, 5 + np.arange(25) // 8])
    runs = [list(run) for run in np.split(base, np.flatnonzero(np.diff(group_of[base])) + 1)]
    assert sorted(runs) == [np.flatnonzero(group_of == group).tolist() for group in range(9)], "each row group from its first row to its last"
    assert runs != sorted(runs), "row groups come in random order"
    order = streamed(dataset, window_rows).order(3, 4, world_size, 4)
    for piece, base_piece in zip(np.array_split(order, world_size), np.array_split(base, world_size), strict=True):
        windows = list(zip(batches_of(piece, window_rows), batches_of(base_piece, window_rows), strict=True))
        for window, base_window in windows:
            assert sorted(window) == sorted(base_window)
        assert any(window.tolist() != base_window.tolist() for window, base_window in windows)
    place, base_place = np.argsort(order), np.argsort(base)
    assert np.abs(place - base_place).max() < window_rows


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_starting_in_the_middle_gives_the_tail_of_the_whole(dataset: PreparedDataset, streamed: Callable[..., StreamedRows], kind: str) -> None:
    source: RowSource = ResidentRows(dataset.read_split("train"), "cpu") if kind == "resident" else streamed(dataset)
    for batches in epoch_of(source, 0, 2, 4):
        whole = [batch.clone() for batch in source.batches(batches)]
        for start in range(len(batches) + 1):
            tail = [batch.clone() for batch in source.batches(batches[start:])]
            assert len(tail) == len(batches) - start
            assert all(torch.equal(one, other) for one, other in zip(tail, whole[start:], strict=True))


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("done", [[(3, 2)], [(3, 2), (2, 3)], [(1, 4), (4, 1)]])
def test_an_epoch_that_goes_on_with_another_number_of_workers_has_every_row_once(
    dataset: PreparedDataset, streamed: Callable[..., StreamedRows], done: list[tuple[int, int]], kind: str
) -> None:
    train = dataset.read_split("train")
    source: RowSource = ResidentRows(train, "cpu") if kind == "resident" else streamed(dataset, 8)
    seen = []
    # What each group of workers did before the next one took over, and the last one to the end.
    for number, (world_size, count) in enumerate([*done, (2, 1000)]):
        for rank in range(world_size):
            plan = EpochPlan(source.order(7, 0, done[0][0], 4), world_size, 4, done=done[:number])
            batches = [batch for step in plan.of_rank(rank) for batch in step.batches][:count]
            for batch, pixels in zip(batches, source.batches([batch.rows for batch in batches]), strict=True):
                np.testing.assert_array_equal(pixels.numpy(), train.images[batch.rows])
                seen += batch.rows[: batch.own].tolist()
    assert sorted(seen) == list(range(65))


def test_any_rows_in_any_order_are_served(dataset: PreparedDataset, streamed: Callable[..., StreamedRows]) -> None:
    source, images = streamed(dataset, 3), dataset.read_split("train").images
    generator = np.random.default_rng(0)
    for _ in range(5):
        batches = [generator.integers(0, len(images), size) for size in generator.integers(0, 12, 40)]
        np.testing.assert_array_equal(delivered(source, batches), images[np.concatenate(batches)])
    assert list(source.batches([])) == []
    for other in (source, ResidentRows(dataset.read_split("train"), "cpu")):
        for rows in ([len(images)], [-1]):
            with pytest.raises(IndexError, match=f"asked of a source of {len(images)}"):
                other.batches([np.asarray(rows)])


def test_rows_of_the_batch_before_may_come_again(dataset: PreparedDataset, streamed: Callable[..., StreamedRows]) -> None:
    source, images = streamed(dataset, 8), dataset.read_split("train").images
    (batches,) = epoch_of(source, 0, 1, 4)
    borrowing = [np.concatenate([batch, before[-2:]]) for before, batch in zip([batches[-1], *batches], batches, strict=False)]
    np.testing.assert_array_equal(delivered(source, borrowing), images[np.concatenate(borrowing)])


def test_a_batch_is_valid_until_the_next_is_asked_for_and_its_memory_is_used_again(
    dataset: PreparedDataset, streamed: Callable[..., StreamedRows]
) -> None:
    train = dataset.read_split("train")
    for source in (ResidentRows(train, "cpu"), streamed(dataset)):
        (batches,) = epoch_of(source, 0, 1, 4)
        places = set()
        for rows, batch in zip(batches, source.batches(batches), strict=True):
            np.testing.assert_array_equal(batch.numpy(), train.images[rows])
            places.add(batch.data_ptr())
        assert len(places) == 1


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_a_fold_streams_the_rows_of_the_other_folds(dataset: PreparedDataset, streamed: Callable[..., StreamedRows], fold: int) -> None:
    source, (train, _) = streamed(dataset, fold=fold), dataset.read_train_and_val(fold)
    assert 0 < len(train) < 75
    np.testing.assert_array_equal(source.labels, train.labels)
    for world_size in (1, 2):
        rows = [rows for batches in epoch_of(source, 0, world_size, 4) for rows in batches]
        assert sorted(np.concatenate(rows)) == list(range(len(train)))
        np.testing.assert_array_equal(delivered(source, rows), train.images[np.concatenate(rows)])


FORMATS = {
    "one plain page": {},
    "several pages": {"data_page_size": 64, "write_batch_size": 3},
    "dictionary": {"use_dictionary": ["image"]},
    "statistics and checksums": {"write_statistics": True, "write_page_checksum": True},
    "data pages of version 2": {"data_page_version": "2.0"},
    "page index": {"write_page_index": True},
    "zstd": {"compression": "zstd"},
    "lz4": {"compression": "lz4"},
    "snappy": {"compression": "snappy"},
}


@pytest.mark.parametrize("fold", [None, 0])
@pytest.mark.parametrize("name", FORMATS)
def test_pixels_are_read_however_parquet_holds_them(tmp_path: Path, streamed: Callable[..., StreamedRows], name: str, fold: int | None) -> None:
    stored = store(tmp_path / "data", (190, 65), row_group_rows=150, parquet=FORMATS[name])
    source, train = streamed(stored, fold=fold), stored.read_train_and_val(fold)[0]
    (batches,) = epoch_of(source, 0, 1, 4)
    np.testing.assert_array_equal(delivered(source, batches), train.images[np.concatenate(batches)])


def test_pixels_that_are_unknown_are_refused(tmp_path: Path, streamed: Callable[..., StreamedRows]) -> None:
    stored = store(tmp_path / "data", (10,))
    path = stored.path / "train" / "part-00000.parquet"
    pixels = [None, *([b"x" * SIDE_PX * SIDE_PX * 3] * 9)]
    rewrite(path, lambda table: table.set_column(4, "image", pa.array(pixels, pa.binary(SIDE_PX * SIDE_PX * 3))))
    source = streamed(stored)
    assert served_until_refused(source, epoch_of(source, 0, 1, 4)[0], ManifestError)[1] == f"{path}: nulls in column image"


def test_a_file_system_that_answers_in_small_parts_is_read_to_the_end(
    dataset: PreparedDataset, streamed: Callable[..., StreamedRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, parts = os.preadv, []

    def read_a_part(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        parts.append(len(buffers))
        return preadv(descriptor, [*buffers[:1], *(buffer[:20] for buffer in buffers[1:2])], offset)

    monkeypatch.setattr(os, "preadv", read_a_part)
    source = streamed(dataset)
    (batches,) = epoch_of(source, 0, 1, 4)
    np.testing.assert_array_equal(delivered(source, batches), dataset.read_split("train").images[np.concatenate(batches)])
    assert len(parts) > 60


def test_what_prepare_writes_is_read_straight_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(RowGroups, "_decode")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (300, 96, 96, 3), np.uint8)
    entries = pa.table({"id": [f"{row:03d}" for row in range(300)], "label": pa.array([0] * 300, pa.int8()), "slide": pa.nulls(300, pa.string())})
    plan = entries.append_column("group", entries["id"]).append_column("position", pa.array(np.arange(300)))
    (tmp_path / "pixels").write_bytes(images.tobytes())
    spool = Spool((tmp_path / "pixels",), (300,), 96)
    path = tmp_path / "part.parquet"
    write_rows(path, plan.append_column("checksum", pa.array(checksums(images))), spool, row_group_rows=256, compression="none")
    dataset = store(tmp_path / "data", (300,), side_px=96, row_group_rows=300)
    path.rename(dataset.path / "train" / "part-00000.parquet")
    groups = RowGroups(dataset, dataset.shards("train"))
    assert groups.starts.tolist() == [0, 256, 300]
    pool = np.zeros_like(images)
    for group, rows in ((0, np.arange(256)), (1, np.array([0, 1, 1, 7, 43]))):
        slots = 299 - np.arange(len(rows))
        assert (groups.read(group, rows, pool, slots) == 0).all()
        np.testing.assert_array_equal(pool[slots], images[groups.starts[group] + rows])


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that were read, in the order of reading."""
    groups: list[int] = []
    read = RowGroups.read

    def noted(self: RowGroups, group: int, rows: IntArray, into: npt.NDArray[np.uint8], slots: IntArray) -> npt.NDArray[np.int8]:
        groups.append(group)
        return read(self, group, rows, into, slots)

    monkeypatch.setattr(RowGroups, "read", noted)
    return groups


def test_a_row_group_is_read_once_where_windows_are_not_smaller_than_row_groups(
    tmp_path: Path, streamed: Callable[..., StreamedRows], groups_read: list[int]
) -> None:
    stored = store(tmp_path / "data", (400, 400), row_group_rows=16)
    source = streamed(stored, 64)
    for world_size in (1, 3):
        for batches in epoch_of(source, 0, world_size, 4):
            groups_read.clear()
            delivered(source, batches)
            groups = set(np.concatenate(batches) // 16)
            assert set(groups_read) == groups
            # A group that lies across two windows may be needed at the first row of the one and the last of the other.
            assert len(groups_read) <= len(groups) + 2


def test_a_worker_reads_the_row_groups_of_its_piece_alone(tmp_path: Path, streamed: Callable[..., StreamedRows], groups_read: list[int]) -> None:
    source = streamed(store(tmp_path / "data", (160,), row_group_rows=16), 1000)
    seen = []
    for batches in epoch_of(source, 0, 3, 4):
        groups_read.clear()
        delivered(source, batches)
        seen.append(set(groups_read))
    assert set.union(*seen) == set(range(10))
    assert sum(map(len, seen)) <= 12, "10 groups, of which the two ends of pieces may each cut one"


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize(
    ("groups", "slots", "batch_size"),
    [
        (np.repeat(np.arange(40), 8), 64, 4),
        (np.random.default_rng(0).integers(0, 30, 300), 20, 9),
        (np.zeros(50, np.int64), 2, 1),
    ],
)
def test_reading_runs_ahead_as_far_as_there_are_slots_and_takes_none_in_use(groups: IntArray, slots: int, batch_size: int, readers: int) -> None:
    loads = plan_loads(groups, slots - batch_size)
    largest_load = np.bincount(loads).max()
    pool, lock = np.full(slots, -1), threading.Lock()
    filled = asked = most_held = 0

    def fill(uses: IntArray, into: IntArray) -> None:
        nonlocal filled, most_held
        with lock:
            filled += len(uses)
            most_held = max(most_held, filled - asked)
        pool[into] = uses

    reading = ReadAhead(fill, loads, slots, readers)
    reading.start()
    for asked in range(0, len(groups), batch_size):
        last = min(asked + batch_size, len(groups))
        np.testing.assert_array_equal(pool[reading.wait_for(asked, last)], np.arange(asked, last))
        if asked == 0:
            # Nothing more is used until it waits for a slot.
            wait_until(lambda: filled > slots - largest_load)
    reading.stop()
    assert filled == len(groups)
    assert slots - largest_load < most_held <= slots


def test_what_fails_ahead_does_not_keep_back_what_is_still_being_read() -> None:
    def fill(uses: IntArray, into: IntArray) -> None:
        if uses[0] == 1:
            raise OSError("the second load cannot be read")
        wait_until(lambda: is_in_wait_for(threading.main_thread()))

    reading = ReadAhead(fill, np.array([0, 1]), 2, 2)
    reading.start()
    wait_until(lambda: len(ingest_threads()) == 1)  # the reader that failed has ended
    assert len(reading.wait_for(0, 1)) == 1
    with pytest.raises(OSError, match="the second load cannot be read"):
        reading.wait_for(1, 2)
    reading.stop()


def is_in_wait_for(thread: threading.Thread) -> bool:
    frame: FrameType | None = sys._current_frames()[cast(int, thread.ident)]
    while frame is not None and frame.f_code is not threading.Condition.wait_for.__code__:
        frame = frame.f_back
    return frame is not None


def test_an_epoch_takes_the_memory_of_two_windows(tmp_path: Path) -> None:
    row_bytes, window_rows = 32 * 32 * 3, 64
    source = StreamedRows(store(tmp_path / "data", (800, 800), row_group_rows=16, side_px=32), None, "cpu", window_rows)
    peaks = []
    for epoch in range(2):
        (batches,) = epoch_of(source, epoch, 1, 8)
        gc.collect()
        tracemalloc.start()
        for _ in source.batches(batches):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    source.close()
    pool, bookkeeping = 2 * window_rows * row_bytes, 250_000
    assert pool <= peaks[0] <= pool + bookkeeping < 1600 * row_bytes / 7
    assert peaks[1] < bookkeeping, "the pool is allocated once"


def corrupt(dataset: PreparedDataset, group: int) -> Path:
    """Overwrite the page header of the pixels of a row group of the first shard."""
    path = dataset.path / dataset.shards("train")[0].path
    chunk = pq.read_metadata(path).row_group(group).column(4)
    with open(path, "r+b") as file:
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 16)
    return Path(path)


def served_until_refused(source: RowSource, batches: Sequence[IntArray], kind: type[Exception]) -> tuple[int, str]:
    served: list[torch.Tensor] = []
    with pytest.raises(kind) as caught:
        served.extend(source.batches(batches))
    return len(served), str(caught.value)


def test_a_damaged_row_group_ends_the_epoch_at_the_batch_that_needs_it_with_one_line(tmp_path: Path, streamed: Callable[..., StreamedRows]) -> None:
    stored = store(tmp_path / "data")
    path = corrupt(stored, 2)
    source = streamed(stored, 8)
    (batches,) = epoch_of(source, 0, 1, 4)
    expected = next(number for number, rows in enumerate(batches) if ((rows >= 16) & (rows < 24)).any())
    assert expected > 0, "the seed was chosen so"
    for _ in range(2):
        served, message = served_until_refused(source, batches, ManifestError)
        assert served == expected
        assert message.startswith(f"{path}: cannot be read (")
        assert message.endswith("`sentinode verify` checks the whole data set")
        assert "\n" not in message
        assert not ingest_threads()


def test_a_shard_that_disappears_amid_an_epoch_is_one_line(tmp_path: Path, streamed: Callable[..., StreamedRows]) -> None:
    stored = store(tmp_path / "data", (400,), row_group_rows=4)
    source = streamed(stored, 4)
    (batches,) = epoch_of(source, 0, 1, 4)
    path = stored.path / stored.shards("train")[0].path
    iterator = source.batches(batches)
    next(iterator)
    path.unlink()
    with pytest.raises(ManifestError, match=r"part-00000.parquet: cannot be read \("):
        list(iterator)
    assert not ingest_threads()


def test_an_unexpected_error_while_reading_reaches_the_consumer(
    dataset: PreparedDataset, streamed: Callable[..., StreamedRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: RowGroups, *arguments: object) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(RowGroups, "read", read)
    source = streamed(dataset)
    (batches,) = epoch_of(source, 0, 1, 4)
    assert served_until_refused(source, batches, MemoryError) == (0, "no memory left")


def rewrite(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(path, partitioning=None)), path, row_group_size=8)


def with_labels(labels: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index("label"), table.schema.field("label"), labels)


def test_labels_that_contradict_the_index_are_refused(tmp_path: Path, streamed: Callable[..., StreamedRows]) -> None:
    stored = store(tmp_path / "data", (40,))
    path = stored.path / "train" / "part-00000.parquet"
    rewrite(path, with_labels(pa.array((1 - stored.read_split("train").labels).tolist(), pa.int8())))
    source = streamed(stored)
    _, message = served_until_refused(source, epoch_of(source, 0, 1, 4)[0], ManifestError)
    assert message == f"{path}: labels differ from those in index.parquet; `sentinode verify` checks the whole data set"


@pytest.mark.parametrize(
    ("name", "edit", "kind", "message"),
    [
        ("index.parquet", with_labels(pa.nulls(75, pa.int8())), UsageError, "unlabelled rows; training and evaluation need labels"),
        ("index.parquet", lambda table: table.slice(1), ManifestError, "rows of the shards are missing"),
        ("train/part-00001.parquet", lambda table: table.slice(1), ManifestError, "24 rows, but dataset.json says 25"),
        ("train/part-00001.parquet", lambda table: table.drop_columns("image"), ManifestError, "no column image"),
        ("train/part-00001.parquet", lambda table: table.set_column(4, "image", [[b"123"] * 25]), ManifestError, "column image is of type binary"),
    ],
)
def test_a_data_set_that_is_not_what_its_manifest_says_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, edit: Callable[[pa.Table], pa.Table], kind: type[Exception], message: str
) -> None:
    stored = store(tmp_path / "data")
    if name == "index.parquet" and kind is ManifestError:
        rewrite(stored.path / name, lambda table: edit(table.sort_by("shard")))  # the first rows are of train
    else:
        rewrite(stored.path / name, edit)
    with pytest.raises(kind, match=message) as caught:
        StreamedRows(stored, None, "cpu", 16)
    assert str(caught.value).startswith(f"{stored.path / name}: ")


def test_a_footer_that_is_missing_or_damaged_is_one_line(tmp_path: Path) -> None:
    stored = store(tmp_path / "data")
    path = stored.path / "train" / "part-00001.parquet"
    for content in (b"hello", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ManifestError, match=r"part-00001.parquet: cannot be read \("):
            StreamedRows(stored, None, "cpu", 16)


def test_closing_ends_the_threads_and_the_iterator(dataset: PreparedDataset, streamed: Callable[..., StreamedRows]) -> None:
    source = streamed(dataset, 4)
    (batches,) = epoch_of(source, 0, 1, 4)
    iterator = source.batches(batches)
    next(iterator)
    assert ingest_threads()
    source.close()
    assert not ingest_threads()
    with pytest.raises(RuntimeError, match="was closed"):
        next(iterator)
    source.close()
    np.testing.assert_array_equal(delivered(source, batches), dataset.read_split("train").images[np.concatenate(batches)])


def test_reading_begins_before_the_first_batch_is_asked_for(
    dataset: PreparedDataset, streamed: Callable[..., StreamedRows], groups_read: list[int]
) -> None:
    source, images = streamed(dataset, 1000), dataset.read_split("train").images
    (batches,) = epoch_of(source, 0, 1, 4)
    iterator = source.batches(batches)
    wait_until(lambda: len(groups_read) == 9)
    for rows, batch in zip(batches, iterator, strict=True):
        np.testing.assert_array_equal(batch.numpy(), images[rows])
    source.batches(batches)
    source.close()
    assert not ingest_threads(), "nor of an iterator that was never used"


def test_an_error_of_the_consumer_leaves_no_thread(dataset: PreparedDataset, streamed: Callable[..., StreamedRows]) -> None:
    source = streamed(dataset, 4)
    (batches,) = epoch_of(source, 0, 1, 4)

    def train() -> None:
        for _ in source.batches(batches):
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        train()
    source.close()
    assert not ingest_threads()


def test_a_new_iterator_ends_the_one_before(dataset: PreparedDataset, streamed: Callable[..., StreamedRows]) -> None:
    source, images = streamed(dataset, 4), dataset.read_split("train").images
    (batches,) = epoch_of(source, 0, 1, 4)
    first = source.batches(batches)
    next(first)
    second = source.batches(batches[1:])
    np.testing.assert_array_equal(next(second).numpy(), images[batches[1]])
    with pytest.raises(RuntimeError, match="asked for other batches"):
        next(first)
    for rows, batch in zip(batches[2:], second, strict=True):
        np.testing.assert_array_equal(batch.numpy(), images[rows])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_source_on_the_device_gives_the_same_rows(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    monkeypatch.setattr(ingest, "_fits", lambda needed_bytes, device: on_gpu)
    train = dataset.read_split("train")
    monkeypatch.setattr(ingest, "_COPY_ROWS", 7)
    source = ResidentRows(train, "cpu")
    batches = [np.array([3, 1]), np.array([], np.int64), np.array([64, 64, 0])]
    results = [batch.clone() for batch in source.batches(batches)]
    assert [len(batch) for batch in results] == [2, 0, 3]
    for rows, batch in zip(batches, results, strict=True):
        np.testing.assert_array_equal(batch.numpy(), train.images[rows])
    assert list(source.batches([])) == []
    with pytest.raises(IndexError):
        source.batches([np.array([65])])
    source.close()
    source.close()


def test_read_only_pixels_are_served(dataset: PreparedDataset) -> None:
    """Ray's shared memory is read-only."""
    train = dataset.read_split("train")
    images = train.images.copy()
    images.flags.writeable = False
    source = ResidentRows(Patches(train.ids, train.labels, train.groups, images), "cpu")
    (batch,) = source.batches([np.arange(5)])
    np.testing.assert_array_equal(batch.numpy(), images[:5])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["on the GPU", "pinned", "streamed"])
def test_batches_for_a_gpu_are_right_while_copies_are_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    stored = store(tmp_path / "data", (500, 500), side_px=96, row_group_rows=32)
    train = stored.read_split("train")
    if kind == "pinned":
        monkeypatch.setattr(ingest, "_GPU_SHARE", 0.0)
    source: RowSource = StreamedRows(stored, None, "cuda", 128) if kind == "streamed" else ResidentRows(train, "cuda")
    for epoch in range(3):
        (batches,) = epoch_of(source, epoch, 1, 37)
        # Nothing here waits for the device, so that buffers would be overwritten too early if they could be.
        sums = [batch.long().flatten(1).sum(1) for batch in source.batches(batches)]
        expected = train.images.reshape(len(train), -1).sum(1, dtype=np.int64)[np.concatenate(batches)]
        np.testing.assert_array_equal(torch.cat(sums).cpu().numpy(), expected)
    source.close()


@pytest.fixture
def in_store(dataset: PreparedDataset, s3_folder: str, tmp_path: Path) -> PreparedDataset:
    staging = Path(shutil.copytree(dataset.path, tmp_path / "staging"))
    write_json(staging / "dataset.json", dataset.manifest.model_dump(mode="json") | {"root": "parts-1", "format_version": 2})
    publish(staging, locate(s3_folder), "dataset.json")
    return PreparedDataset.open(s3_folder)


def test_rows_stream_from_an_object_store_one_request_a_row_group(
    in_store: PreparedDataset, dataset: PreparedDataset, flaky_s3: FlakyServer, streamed: Callable[..., StreamedRows]
) -> None:
    source, same = streamed(in_store), streamed(dataset)
    assert source.order(1, 0, 2, 4).tolist() == same.order(1, 0, 2, 4).tolist()
    (batches,) = epoch_of(source, 0, 1, 4)
    flaky_s3.requests.clear()
    flaky_s3.failures += ["503", "drop"]
    np.testing.assert_array_equal(delivered(source, batches), delivered(same, batches))
    assert len(flaky_s3.requests) <= 9 + 2 + 2, "nine row groups, two failures, and two groups that may lie across windows"


def test_a_store_that_stops_answering_amid_an_epoch_is_said(
    in_store: PreparedDataset, flaky_s3: FlakyServer, streamed: Callable[..., StreamedRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", "0")
    source = streamed(in_store, 8)
    (batches,) = epoch_of(source, 0, 1, 4)
    iterator = source.batches(batches)
    next(iterator)
    flaky_s3.forever = "503"
    with pytest.raises(StorageError, match="does not answer"):
        list(iterator)
    assert not ingest_threads()


def test_a_row_group_that_was_cut_in_the_store_is_one_line(
    in_store: PreparedDataset, s3_server: Server, streamed: Callable[..., StreamedRows]
) -> None:
    source = streamed(in_store)
    bucket, _, key = str(in_store.root / "train/part-00000.parquet").removeprefix("s3://").partition("/")
    content = s3_server.client().get_object(Bucket=bucket, Key=key)["Body"].read()
    chunk = pq.read_metadata(pa.BufferReader(content)).row_group(2).column(4)
    for end in (chunk.data_page_offset + chunk.total_compressed_size - 10, chunk.data_page_offset + 10):
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=content[:end])
        message = served_until_refused(source, [np.array([16, 17])], ManifestError)[1]
        assert "train/part-00000.parquet: cannot be read (" in message
        assert "\n" not in message


def test_uses_of_a_row_group_that_are_close_share_one_reading() -> None:
    assert plan_loads(np.array([5, 5, 9, 5, 9, 5]), 10).tolist() == [0, 0, 1, 0, 1, 0]
    assert plan_loads(np.array([5, 5, 9, 5, 9, 5]), 3).tolist() == [0, 0, 1, 0, 1, 2]
    assert plan_loads(np.array([5, 5, 9, 5, 9, 5]), 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert plan_loads(np.array([], np.int64), 3).tolist() == []


@pytest.mark.parametrize(
    ("ingest", "needed_bytes", "shared_memory_bytes", "expected"),
    [
        ("auto", 70, 100, "resident"),
        ("auto", 71, 100, "stream"),
        ("auto", 1, 0, "stream"),
        ("resident", 1000, 100, "resident"),
        ("stream", 1, 100, "stream"),
    ],
)
def test_rows_are_streamed_where_they_do_not_fit(ingest: str, needed_bytes: int, shared_memory_bytes: int, expected: str) -> None:
    assert resolve_ingest(ingest, needed_bytes, shared_memory_bytes) == expected


def test_what_would_lie_in_memory_is_known_from_the_manifest(dataset: PreparedDataset) -> None:
    both = concatenate(list(dataset.read_train_and_val(None)))
    assert pixel_bytes(dataset) == both.images.nbytes == 75 * SIDE_PX * SIDE_PX * 3
