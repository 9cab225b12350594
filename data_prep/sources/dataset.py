"""A prepared data set as a source: dealing its patches to other splits without decoding them again."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
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

_INDEX = "index.parquet"
_ADVICE = "`sentinode verify` checks the whole data set"


def from_dataset(path: str) -> Source:
    """Take the patches of a finished data set as inputs; only its tables are read, no pixels.

    `row` of an entry counts the patches through all shards in the order of the manifest, which is the order of the entries. What was refused stays
    refused. `split` is null where the old data set has one split for all: that is none of its own.

    Parameters
    ----------
    path : str
        Folder with dataset.json, as a path or URI.

    Raises
    ------
    ManifestNotFoundError
        There is no prepared data set.
    ManifestError
        It is damaged: a table is not the one that the manifest lists, or does not fit it.
    """
    where = locate(path)
    manifest = read_dataset_manifest(path)
    root = where / manifest.root
    sha256_of = {file.path: file.sha256 for file in manifest.files}
    if _INDEX not in sha256_of:
        raise ManifestError(f"{where / 'dataset.json'}: lists no {_INDEX}; {_ADVICE}")
    shards = [(shard.path, shard.rows) for shard in manifest.shards]
    entries = _entries(_read_table(root / _INDEX, INDEX_SCHEMA, sha256_of[_INDEX]), shards, root / _INDEX)

    def table(name: str, schema: pa.Schema) -> pa.Table | None:
        return _read_table(root / name, schema, sha256_of[name]) if name in sha256_of else None

    rejected = table("rejected.parquet", REJECTED_SCHEMA)
    return Source(
        kind="dataset",
        where=str(where),
        entries=entries,
        rejects=tuple(Reject(row["reason"], row["id"], row["path"], row["detail"] or "") for row in rejected.to_pylist())
        if rejected is not None
        else (),
        inputs_sha256=_digest(manifest),
        reader={
            "kind": "shards",
            "root": str(root),
            "shards": [list(shard) for shard in shards],
            "index_sha256": sha256_of[_INDEX],
            "patch_size_px": manifest.patch_size_px,
        },
        overlaps=table("overlaps.parquet", OVERLAP_SCHEMA),
    )


class ShardReader:
    """Reads pixels out of shards, a row group at a time, and compares each patch with the SHA-1 that the index has of it."""

    def __init__(self, root: Location, shards: Sequence[tuple[str, int]], index_sha256: str, patch_size_px: int) -> None:
        self._root, self._shards, self._index_sha256, self._size_px = root, tuple(shards), index_sha256, patch_size_px
        self._starts = [0, *accumulate(rows for _, rows in shards)]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "ShardReader":
        """Make it from `Source.reader`."""
        return cls(Location(spec["root"]), [(name, rows) for name, rows in spec["shards"]], spec["index_sha256"], spec["patch_size_px"])

    def read(self, entries: pa.Table) -> Iterator[UInt8Array]:
        """Yield the pixels of each entry, uint8 (side, side, 3), RGB, in order.

        Raises
        ------
        ManifestError
            A shard is damaged, or has not the pixels that were prepared.
        StorageError
            A shard has gone.
        """
        expected = _pixel_sha1s(self._root, self._shards, self._index_sha256)
        wanted = entries["row"].to_pylist()
        at = 0
        while at < len(wanted):
            shard = bisect_right(self._starts, wanted[at]) - 1
            end = at
            while end < len(wanted) and self._starts[shard] <= wanted[end] < self._starts[shard + 1]:
                end += 1
            name, rows = self._shards[shard][0], [row - self._starts[shard] for row in wanted[at:end]]
            for place, image in zip(wanted[at:end], self._read_shard(name, rows), strict=True):
                if hashlib.sha1(image.data, usedforsecurity=False).hexdigest() != expected[place].decode():
                    row = place - self._starts[shard]
                    raise ManifestError(f"{self._root / name}: the pixels of row {row} are not those that were prepared; {_ADVICE}")
                yield image
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
        except (OSError, pa.ArrowException, LookupError, ValueError) as error:
            raise _damaged(location, error) from error


def _entries(index: pa.Table, shards: Sequence[tuple[str, int]], location: Location) -> pa.Table:
    """Return the index as a table of ENTRY_SCHEMA, in reading order."""
    columns = {name: index[name] if name in INDEX_SCHEMA.names else None for name in ENTRY_SCHEMA.names} | {
        "path": pc.coalesce(index["source_path"], index["shard"]),
        "row": _places(index, shards, location),
        "split": pc.if_else(pc.equal(index["split"], "all"), None, index["split"]),
    }
    return pa.table(columns, schema=ENTRY_SCHEMA).sort_by("row").combine_chunks()


def _places(index: pa.Table, shards: Sequence[tuple[str, int]], location: Location) -> npt.NDArray[np.int64]:
    """Return the row of each patch of an index, counted through all shards."""
    starts = [0, *accumulate(rows for _, rows in shards)]
    shard = pc.index_in(index["shard"], pa.array([name for name, _ in shards], pa.string()))
    if shard.null_count or index.num_rows != starts[-1]:
        raise ManifestError(f"{location}: does not fit the shards of dataset.json; {_ADVICE}")
    places = pc.add(pc.take(pa.array(starts[:-1], pa.int64()), shard), index["row"]).to_numpy()
    if not np.array_equal(np.sort(places), np.arange(starts[-1])):
        raise ManifestError(f"{location}: two patches in one place; {_ADVICE}")
    return np.asarray(places, np.int64)


@lru_cache(maxsize=1)  # a process reads many blocks of one data set; its index may be 30 MB
def _pixel_sha1s(root: Location, shards: tuple[tuple[str, int], ...], index_sha256: str) -> npt.NDArray[np.bytes_]:
    """Return the SHA-1 of each patch's pixels, 40 hex digits, shape (n,), in the order of the shards."""
    schema = pa.schema([INDEX_SCHEMA.field(name) for name in ("shard", "row", "pixel_sha1")])
    index = _read_table(root / _INDEX, schema, index_sha256)
    found = np.empty(index.num_rows, "S40")
    found[_places(index, shards, root / _INDEX)] = np.asarray(index["pixel_sha1"].to_pylist(), "S40")
    return found


def _digest(manifest: DatasetManifest) -> str:
    """Return a digest of all files that are read."""
    records = [(record.path, record.sha256) for record in (*manifest.shards, *manifest.files) if record.path.endswith(".parquet")]
    return hashlib.sha256(canonical_json(sorted(records))).hexdigest()


def _read_table(location: Location, schema: pa.Schema, sha256: str) -> pa.Table:
    try:
        content = location.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ManifestError(f"{location}: is not the file that dataset.json lists (its sha256 differs); {_ADVICE}")
        return pq.ParquetFile(pa.BufferReader(content)).read(columns=schema.names, use_threads=False).cast(schema)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(location, error) from error


def _damaged(location: Location, error: Exception) -> ManifestError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return ManifestError(f"{location}: cannot be read ({reason}); {_ADVICE}")
