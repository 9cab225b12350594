"""A prepared data set of tiny random patches in several shards and row groups."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sentinode.dataset import INDEX_SCHEMA, PreparedDataset, images_to_column, row_schema
from sentinode.manifests import FileRecord, ShardRecord, SplitCounts
from sentinode.storage import file_record, write_json
from tests.factories import dataset_manifest

SIDE_PX = 4
DEFAULTS = {"compression": "none", "use_dictionary": False}
"""How pixels are stored by prepare."""


def store(
    folder: Path,
    shard_rows: Sequence[int] = (40, 25),
    *,
    row_group_rows: int = 8,
    side_px: int = SIDE_PX,
    val_rows: int = 10,
    parquet: Mapping[str, Any] | None = None,
) -> PreparedDataset:
    """A prepared data set of random pixels: shards of train of the given rows and one of val; train and val rows have folds 0..2.

    `parquet` are options of `pyarrow.parquet.write_table`.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(shard_rows))
    shards, index = [], []
    for number, (split, rows) in enumerate([*(("train", rows) for rows in shard_rows), ("val", val_rows)]):
        name = f"{split}/part-{number:05d}.parquet"
        (folder / split).mkdir(exist_ok=True)
        columns = {
            "id": [f"{number}-{row:05d}" for row in range(rows)],
            "label": generator.integers(0, 2, rows).tolist(),
            "group": [f"{number}-{row // 2}" for row in range(rows)],
            "slide": [None] * rows,
            "image": images_to_column(generator.integers(0, 256, (rows, side_px, side_px, 3), np.uint8)),
        }
        pq.write_table(
            pa.table(columns, schema=row_schema(side_px)), folder / name, row_group_size=row_group_rows, **(DEFAULTS | dict(parquet or {}))
        )
        shards.append(ShardRecord(split=split, rows=rows, **file_record(folder, name)))
        for row in range(rows):
            known = {column: columns[column][row] for column in ("id", "label", "group")}
            known |= {"split": split, "fold": row // 2 % 3, "shard": name, "row": row}
            index.append(dict.fromkeys(INDEX_SCHEMA.names) | known | {"pixel_sha1": ""})
    # Sorted by id backwards: nothing may rely on the order of the index.
    pq.write_table(pa.Table.from_pylist(index[::-1], schema=INDEX_SCHEMA), folder / "index.parquet")
    counts = {
        split: SplitCounts(rows=sum(shard.rows for shard in shards if shard.split == split), normal=0, metastatic=0, groups=0)
        for split in ("train", "val")
    }
    manifest = dataset_manifest(
        patch_size_px=side_px,
        counts=counts,
        shards=shards,
        files=[FileRecord(**file_record(folder, "index.parquet"))],
        split=dataset_manifest().split.model_copy(update={"folds": 3}),
    )
    write_json(folder / "dataset.json", manifest.model_dump(mode="json"))
    return PreparedDataset.open(folder)
