"""Writing accepted patches as Parquet shards, and the figures that come from them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.spool import IntArray, Spool, checksums
from sentinode.colour import channel_statistics
from sentinode.config import Rgb
from sentinode.dataset import INDEX_SCHEMA, column_to_images, images_to_column, row_schema
from sentinode.errors import SentinodeError
from sentinode.manifests import SplitCounts
from sentinode.storage import temporary_name

SPLIT_ORDER = ("train", "val", "test", "all")
PLAN_COLUMNS = ("id", "label", "group", "slide", "position", "checksum")
"""Columns of the placed patches that `write_shard` needs."""

# About 28 MB of pixels at a time; a multiple of it may be one row group.
_MAX_BATCH_ROWS = 1024


def place(patches: pa.Table, groups: npt.NDArray[np.str_], split: npt.NDArray[np.str_], fold: IntArray, seed: int, rows_per_shard: int) -> pa.Table:
    """Give every patch its shard and row: within a split by SHA-256 of `seed:id`, so that each shard is a random sample of it.

    Parameters
    ----------
    patches : pyarrow.Table
        Sorted by id.
    groups, split, fold : ndarray, shape (n,)
        Of each patch; fold -1 for none.
    seed : int
    rows_per_shard : int

    Returns
    -------
    pyarrow.Table
        `patches` with columns group, split, fold, shard (path relative to the data set) and row, in the order of SPLIT_ORDER, then shard, row.
    """
    # 64 of the 256 bits: should two be equal, the smaller id comes first.
    keys = [int.from_bytes(hashlib.sha256(f"{seed}:{id_}".encode()).digest()[:8], "big") for id_ in patches["id"].to_pylist()]
    names, member = np.unique(split, return_inverse=True)
    number = np.asarray([SPLIT_ORDER.index(name) for name in names], np.int64)[member]
    order = np.lexsort((np.asarray(keys, np.uint64), number))
    position = np.arange(len(order)) - np.searchsorted(number[order], number[order])
    shard, row = np.divmod(position, rows_per_shard)
    paths = [f"{name}/part-{part:05d}.parquet" for name, part in zip(split[order].tolist(), shard.tolist(), strict=True)]
    placed = patches.take(pa.array(order))
    for name, column in {
        "group": pa.array(groups[order], pa.string()),
        "split": pa.array(split[order], pa.string()),
        "fold": pa.array(fold[order], pa.int8(), mask=fold[order] < 0),
        "shard": pa.array(paths, pa.string()),
        "row": pa.array(row, pa.int64()),
    }.items():
        if name in placed.column_names:  # `split` and `row` of the source
            placed = placed.drop_columns([name])
        placed = placed.append_column(name, column)
    return placed


def write_shard(name: str, rows: pa.Table, spool: Spool, staging: Path, *, row_group_rows: int, compression: str) -> dict[str, Any]:
    """Write one shard, read it back, and return its `{"path", "bytes", "sha256"}`; the file appears whole or not at all.

    Parameters
    ----------
    name : str
        Path relative to `staging`.
    rows : pyarrow.Table
        PLAN_COLUMNS, in the order of the shard.
    spool : Spool
    staging : Path
    row_group_rows : int
    compression : str
        As in PrepareConfig: none, zstd, lz4 or snappy.

    Raises
    ------
    SentinodeError
        Pixels in the spool are not those that were decoded, or what was written does not read back equal.
    """
    path = staging / name
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_rows(temporary, rows, spool, row_group_rows=row_group_rows, compression=compression)
        record = _read_back(name, temporary, rows, spool.size_px)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return record


def write_rows(path: Path, rows: pa.Table, spool: Spool, *, row_group_rows: int, compression: str) -> None:
    """Write the Parquet file of one shard; parameters as in `write_shard`. Raises SentinodeError where the spool does not hold what was decoded."""
    schema = row_schema(spool.size_px)
    with pq.ParquetWriter(
        path,
        schema,
        compression=compression,
        # Pixels repeat nothing and have no useful minimum: a dictionary and statistics would only cost time and space.
        use_dictionary=["group", "slide"],
        write_statistics=["id", "label", "group", "slide"],
    ) as writer:
        for start in range(0, len(rows), row_group_rows):
            writer.write_table(_row_group(rows.slice(start, row_group_rows), spool, schema), row_group_size=row_group_rows)


def _row_group(rows: pa.Table, spool: Spool, schema: pa.Schema) -> pa.Table:
    positions, expected = rows["position"].to_numpy(), rows["checksum"].to_numpy()
    chunks = []
    for start in range(0, len(rows), _MAX_BATCH_ROWS):
        part = slice(start, start + _MAX_BATCH_ROWS)
        images = spool.take(positions[part])
        # A disk that lost a block between decoding and now must not become a wrong training image.
        if not np.array_equal(checksums(images), expected[part]):
            raise SentinodeError("decoded pixels on disk have changed; delete the .staging folder beside the output and run again")
        chunks.append(images_to_column(images))
    columns = {name: rows[name] for name in ("id", "label", "group", "slide")}
    return pa.table({**columns, "image": pa.chunked_array(chunks, schema.field("image").type)}, schema=schema)


def _read_back(name: str, path: Path, rows: pa.Table, size_px: int) -> dict[str, Any]:
    """Read a shard as its users will, compare it with what it should hold, and return its record."""
    with pa.memory_map(str(path)) as data:
        size, digest = data.size(), hashlib.sha256(data.read_buffer()).hexdigest()
        start = 0
        for group in range((file := pq.ParquetFile(data)).num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            expected = rows.slice(start, len(table))
            start += len(table)
            same = all(table[column].equals(expected[column]) for column in ("id", "label", "group", "slide"))
            if not same or not np.array_equal(checksums(column_to_images(table["image"], size_px)), expected["checksum"].to_numpy()):
                raise SentinodeError(
                    f"{name}: what was written does not read back equal; the disk or the memory of this machine is not to be trusted"
                )
    if start != len(rows):
        raise SentinodeError(f"{name}: {start} rows read back, {len(rows)} were written")
    return {"path": name, "bytes": size, "sha256": digest}


def index_of(placed: pa.Table) -> pa.Table:
    """Return the rows of index.parquet (`sentinode.dataset.INDEX_SCHEMA`), sorted by id."""
    ordered = placed.take(pc.sort_indices(placed, [("id", "ascending")]))
    named = {"source_path": ordered["path"], "flags": _flags(ordered)}
    return pa.table({name: named[name] if name in named else ordered[name] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def _flags(patches: pa.Table) -> pa.ListArray:
    pale, duplicate = (patches[name].to_numpy() for name in ("pale", "duplicate"))
    offsets = np.concatenate([[0], np.cumsum(pale.astype(np.int32) + duplicate)]).astype(np.int32)
    both = np.stack([np.where(pale, "pale", ""), np.where(duplicate, "duplicate", "")], axis=1).ravel()
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(both[both != ""], pa.string()))


def count_splits(placed: pa.Table) -> dict[str, SplitCounts]:
    """Return the counts of each split that has rows, in SPLIT_ORDER."""
    counts = {}
    for split in SPLIT_ORDER:
        members = placed.filter(pc.equal(placed["split"], split))
        if len(members):
            labels = members["label"].combine_chunks()
            positive = pc.sum(labels).as_py() or 0
            counts[split] = SplitCounts(
                rows=len(members),
                normal=len(members) - labels.null_count - positive,
                metastatic=positive,
                unlabelled=labels.null_count,
                groups=pc.count_distinct(members["group"]).as_py(),
            )
    return counts


def class_weights(counts: Mapping[str, SplitCounts]) -> dict[str, float] | None:
    """Return N_negative / N_positive of the training split as the weight of class 1; None without such a split or where it lacks a class."""
    train = counts.get("train")
    if train is None or not train.normal or not train.metastatic:
        return None
    return {"normal": 1.0, "metastatic": train.normal / train.metastatic}


def training_colours(placed: pa.Table, size_px: int) -> tuple[Rgb, Rgb]:
    """Return mean and standard deviation per channel, scale 0..1, RGB, of the training split (of all rows where there is none)."""
    train = placed.filter(pc.equal(placed["split"], "train"))
    rows = train if len(train) else placed
    sums, squares = (rows[name].combine_chunks().flatten().to_numpy().reshape(-1, 3) for name in ("sums", "sums_of_squares"))
    return channel_statistics(sums, squares, size_px * size_px)
