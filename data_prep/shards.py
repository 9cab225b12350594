"""Writing accepted patches as Parquet shards, and the figures that come from them."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.rejects import DecodedPatch
from data_prep.spool import Spool
from sentinode.config import Rgb
from sentinode.dataset import INDEX_SCHEMA, images_to_column, row_schema
from sentinode.errors import SentinodeError
from sentinode.manifests import SplitCounts
from sentinode.storage import file_record

# About 28 MB of pixels at a time; a multiple of it may be one row group.
_MAX_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Placed:
    """An accepted patch and where it goes.

    Attributes
    ----------
    patch : DecodedPatch
    split, group : str
    fold : int or None
    shard : str
        Path of its Parquet file relative to the data set.
    row : int
        Row in that file.
    """

    patch: DecodedPatch
    split: str
    group: str
    fold: int | None
    shard: str
    row: int


def place(
    patches: Sequence[DecodedPatch],
    groups: Sequence[str],
    split_of: Mapping[str, str],
    fold_of: Mapping[str, int],
    seed: int,
    rows_per_shard: int,
) -> list[Placed]:
    """Give every patch its shard and row: within a split by sha256(f"{seed}:{id}"), so that each shard is a random sample of it.

    `patches` and `groups` go together; `split_of` and `fold_of` are by group. Returns the patches in the order train, val, test, then shard, row.
    """
    ordered: dict[str, list[tuple[str, DecodedPatch, str]]] = {"train": [], "val": [], "test": []}
    for patch, group in zip(patches, groups, strict=True):
        ordered[split_of[group]].append((hashlib.sha256(f"{seed}:{patch.id}".encode()).hexdigest(), patch, group))
    placed = []
    for split, members in ordered.items():
        for position, (_, patch, group) in enumerate(sorted(members, key=lambda member: (member[0], member[1].id))):
            shard, row = divmod(position, rows_per_shard)
            placed.append(Placed(patch, split, group, fold_of.get(group), f"{split}/part-{shard:05d}.parquet", row))
    return placed


def write_shard(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    spool: Spool,
    staging: Path,
    *,
    row_group_rows: int,
    compression: str,
) -> dict[str, Any]:
    """Write one shard and return its `{"path", "bytes", "sha256"}`; the file appears whole or not at all.

    Parameters
    ----------
    name : str
        Path relative to `staging`.
    rows : sequence of mapping
        id, label, group, slide, position (in the spool) and pixel_sha1 of each row, in order.
    spool : Spool
    staging : Path
    row_group_rows : int
    compression : str
        As in PrepareConfig: none, zstd, lz4 or snappy.

    Raises
    ------
    SentinodeError
        Pixels in the spool are not those that were decoded.
    """
    schema = row_schema(spool.size_px)
    path = staging / name
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(
            temporary,
            schema,
            compression=compression,
            # Pixels repeat nothing and have no useful minimum: a dictionary and statistics would only cost time and space.
            use_dictionary=["group", "slide"],
            write_statistics=["id", "label", "group", "slide"],
        ) as writer:
            for start in range(0, len(rows), row_group_rows):
                group = rows[start : start + row_group_rows]
                writer.write_table(_row_group(group, spool, schema), row_group_size=row_group_rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return file_record(staging, name)


def _row_group(rows: Sequence[Mapping[str, Any]], spool: Spool, schema: pa.Schema) -> pa.Table:
    columns = {name: pa.array([row[name] for row in rows], schema.field(name).type) for name in ("id", "label", "group", "slide")}
    chunks = []
    for start in range(0, len(rows), _MAX_BATCH_ROWS):
        part = rows[start : start + _MAX_BATCH_ROWS]
        images = spool.take(np.asarray([row["position"] for row in part], np.int64))
        for row, image in zip(part, images, strict=True):
            # 30 us a patch: a disk that lost a block between decoding and now must not become a wrong training image.
            if hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest() != row["pixel_sha1"]:
                raise SentinodeError("decoded pixels on disk have changed; delete the .staging folder beside the output and run again")
        chunks.append(images_to_column(images))
    return pa.table({**columns, "image": pa.chunked_array(chunks, schema.field("image").type)}, schema=schema)


def write_index(path: Path, placed: Iterable[Placed]) -> pa.Table:
    """Write index.parquet (`sentinode.dataset.INDEX_SCHEMA`), rows sorted by id, and return its rows."""
    rows = [
        {
            "id": item.patch.id,
            "label": item.patch.label,
            "split": item.split,
            "fold": item.fold,
            "group": item.group,
            "slide": item.patch.slide,
            "tissue_fraction": item.patch.tissue_fraction,
            "flags": list(item.patch.flags),
            "pixel_sha1": item.patch.pixel_sha1,
            "source_path": item.patch.path,
            "shard": item.shard,
            "row": item.row,
        }
        for item in sorted(placed, key=lambda item: item.patch.id)
    ]
    columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in INDEX_SCHEMA}
    index = pa.table(columns, schema=INDEX_SCHEMA)
    pq.write_table(index, path, compression="zstd")
    return index


def count_splits(placed: Sequence[Placed]) -> dict[str, SplitCounts]:
    """Return the counts of each split that has rows, in the order train, val, test."""
    counts = {}
    for split in ("train", "val", "test"):
        members = [item for item in placed if item.split == split]
        positive = sum(item.patch.label for item in members)
        if members:
            counts[split] = SplitCounts(
                rows=len(members), normal=len(members) - positive, metastatic=positive, groups=len({item.group for item in members})
            )
    return counts


def class_weights(counts: Mapping[str, SplitCounts]) -> dict[str, float] | None:
    """Return N_negative / N_positive of the training split as the weight of class 1; None where a class is absent."""
    train = counts["train"]
    if not train.normal or not train.metastatic:
        return None
    return {"normal": 1.0, "metastatic": train.normal / train.metastatic}


def channel_statistics(placed: Iterable[Placed], size_px: int) -> tuple[Rgb, Rgb]:
    """Return mean and standard deviation of the training split per channel, scale 0..1, RGB, from exact integer sums."""
    train = [item.patch for item in placed if item.split == "train"]
    pixels = len(train) * size_px * size_px
    means, stds = [], []
    for channel in range(3):
        total = sum(patch.sums[channel] for patch in train)
        squares = sum(patch.sums_of_squares[channel] for patch in train)
        means.append(total / pixels / 255)
        # Integers up to here: E[x^2] - E[x]^2 in floats would lose digits on 2 * 10^9 pixels.
        stds.append(((squares * pixels - total * total) / (pixels * pixels)) ** 0.5 / 255)
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


def shard_rows(placed: Iterable[Placed]) -> dict[str, list[dict[str, Any]]]:
    """Return shard name -> its rows as `write_shard` wants them."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for item in placed:
        patch = item.patch
        row = {"id": patch.id, "label": patch.label, "group": item.group, "slide": patch.slide}
        shards.setdefault(item.shard, []).append(row | {"position": patch.position, "pixel_sha1": patch.pixel_sha1})
    return shards
