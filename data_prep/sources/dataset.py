"""A prepared data set as a source: dealing its patches to other splits without decoding them again."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.rejects import Reject
from data_prep.sources.base import ENTRY_SCHEMA, Source
from sentinode.dataset import INDEX_SCHEMA, OVERLAP_SCHEMA, REJECTED_SCHEMA, column_to_images
from sentinode.errors import ManifestError, StorageError
from sentinode.images import UInt8Array
from sentinode.locations import Location, locate
from sentinode.manifests import DatasetManifest, read_dataset_manifest
from sentinode.storage import canonical_json


def from_dataset(path: str) -> Source:
    """Take the patches of a finished data set as inputs; only its index is read.

    `row` of an entry counts the patches through all shards in the order of the manifest, which is the order of the entries. What was refused stays
    refused.

    Parameters
    ----------
    path : str
        Folder with dataset.json, as a path or URI.

    Raises
    ------
    ManifestNotFoundError
        There is no prepared data set.
    ManifestError
        It is damaged.
    """
    where = locate(path)
    manifest = read_dataset_manifest(path)
    root = where / manifest.root
    index = _read_table(root / "index.parquet", INDEX_SCHEMA)
    entries = _entries(index, manifest, root)
    listed = {file.path for file in manifest.files}
    rejected = _read_table(root / "rejected.parquet", REJECTED_SCHEMA) if "rejected.parquet" in listed else REJECTED_SCHEMA.empty_table()
    return Source(
        kind="dataset",
        where=str(where),
        entries=entries,
        rejects=tuple(Reject(row["reason"], row["id"], row["path"], row["detail"] or "") for row in rejected.to_pylist()),
        inputs_sha256=_digest(manifest),
        reader={
            "kind": "shards",
            "root": str(root),
            "shards": [[shard.path, shard.rows] for shard in manifest.shards],
            "patch_size_px": manifest.patch_size_px,
        },
        overlaps=_read_table(root / "overlaps.parquet", OVERLAP_SCHEMA) if "overlaps.parquet" in listed else None,
    )


class ShardReader:
    """Reads pixels out of shards, a row group at a time."""

    def __init__(self, root: Location, shards: Sequence[tuple[str, int]], patch_size_px: int) -> None:
        self._root, self._names, self._size_px = root, [name for name, _ in shards], patch_size_px
        self._starts = [0, *accumulate(rows for _, rows in shards)]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "ShardReader":
        """Make it from `Source.reader`."""
        return cls(Location(spec["root"]), spec["shards"], spec["patch_size_px"])

    def read(self, entries: pa.Table) -> Iterator[UInt8Array]:
        """Yield the pixels of each entry, uint8 (side, side, 3), RGB, in order.

        Raises
        ------
        ManifestError
            A shard is damaged.
        StorageError
            A shard has gone.
        """
        wanted = entries["row"].to_pylist()
        at = 0
        while at < len(wanted):
            shard = bisect_right(self._starts, wanted[at]) - 1
            end = at
            while end < len(wanted) and self._starts[shard] <= wanted[end] < self._starts[shard + 1]:
                end += 1
            yield from self._read_shard(self._names[shard], [row - self._starts[shard] for row in wanted[at:end]])
            at = end

    def _read_shard(self, name: str, rows: Sequence[int]) -> Iterator[UInt8Array]:
        location = self._root / name
        try:
            with location.open_input() as stream:
                file = pq.ParquetFile(stream)
                ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)))
                loaded, images = -1, np.empty((0, self._size_px, self._size_px, 3), np.uint8)
                for row in rows:
                    group = bisect_right(ends, row)
                    if group != loaded:
                        images = column_to_images(file.read_row_group(group, columns=["image"], use_threads=False)["image"], self._size_px)
                        loaded = group
                    yield images[row - (ends[group - 1] if group else 0)]
        except FileNotFoundError as error:
            raise StorageError(f"{location}: has gone; every node must see it as it was when prepare began") from error
        except (OSError, pa.ArrowException, IndexError) as error:
            raise _damaged(location, error) from error


def _entries(index: pa.Table, manifest: DatasetManifest, root: Location) -> pa.Table:
    """Return the index as a table of ENTRY_SCHEMA, in reading order."""
    names = [shard.path for shard in manifest.shards]
    starts = [0, *accumulate(shard.rows for shard in manifest.shards)]
    shard = pc.index_in(index["shard"], pa.array(names, pa.string()))
    if shard.null_count or index.num_rows != starts[-1]:
        raise ManifestError(f"{root / 'index.parquet'}: does not fit the shards of dataset.json; `sentinode verify` checks the whole data set")
    row = pc.add(pc.take(pa.array(starts[:-1], pa.int64()), shard), index["row"])
    if len(row.unique()) != index.num_rows or pc.min_max(row)["max"].as_py() not in (None, starts[-1] - 1):
        raise ManifestError(f"{root / 'index.parquet'}: two patches in one place; `sentinode verify` checks the whole data set")
    columns = {name: index[name] if name in INDEX_SCHEMA.names and name != "row" else None for name in ENTRY_SCHEMA.names} | {
        "path": pc.coalesce(index["source_path"], index["shard"]),
        "row": row,
    }
    return pa.table(columns, schema=ENTRY_SCHEMA).sort_by("row").combine_chunks()


def _digest(manifest: DatasetManifest) -> str:
    """Return a digest of all files that are read."""
    records = [(record.path, record.sha256) for record in (*manifest.shards, *manifest.files) if record.path.endswith(".parquet")]
    return hashlib.sha256(canonical_json(sorted(records))).hexdigest()


def _read_table(location: Location, schema: pa.Schema) -> pa.Table:
    try:
        with location.open_input() as stream:
            return pq.ParquetFile(stream).read(columns=schema.names, use_threads=False).cast(schema)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(location, error) from error


def _damaged(location: Location, error: Exception) -> ManifestError:
    return ManifestError(f"{location}: cannot be read ({str(error).splitlines()[0]}); `sentinode verify` checks the whole data set")
