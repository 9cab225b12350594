"""Reading a prepared data set, on disk or in an object store. Files are found through dataset.json only."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sentinode.errors import ManifestError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import Location, locate
from sentinode.manifests import DatasetManifest, ShardRecord, read_dataset_manifest
from sentinode.retries import try_local

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.int8()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("fold", pa.int8()),
        pa.field("group", pa.string(), nullable=False),
        pa.field("slide", pa.string()),
        pa.field("centre", pa.string()),
        pa.field("x_px", pa.int64()),
        pa.field("y_px", pa.int64()),
        pa.field("tissue_fraction", pa.float32()),
        pa.field("flags", pa.list_(pa.string())),
        pa.field("pixel_sha1", pa.string(), nullable=False),
        pa.field("source_path", pa.string()),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
"""Of index.parquet: one row per accepted patch. Unknown = null."""

REJECTED_SCHEMA = pa.schema(
    [pa.field("path", pa.string()), pa.field("id", pa.string()), pa.field("reason", pa.string(), nullable=False), pa.field("detail", pa.string())]
)
"""Of rejected.parquet: one row per refused input."""

OVERLAP_SCHEMA = pa.schema(
    [
        pa.field("first_id", pa.string(), nullable=False),
        pa.field("second_id", pa.string(), nullable=False),
        pa.field("dy_px", pa.int16(), nullable=False),
        pa.field("dx_px", pa.int16(), nullable=False),
    ]
)
"""Of overlaps.parquet: one row per pair of patches that share pixels, first_id < second_id. Pixel (y, x) of the second patch is pixel
(y + dy_px, x + dx_px) of the first, wherever both exist; of several such offsets the one with the largest common part."""


def row_schema(patch_size_px: int) -> pa.Schema:
    """Return the schema of a shard. `image` holds the raw pixels, uint8, RGB, height x width x channel; its shape is in the field's metadata."""
    shape = f"[{patch_size_px}, {patch_size_px}, 3]"
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.int8()),
            pa.field("group", pa.string(), nullable=False),
            pa.field("slide", pa.string()),
            pa.field(
                "image",
                pa.binary(patch_size_px * patch_size_px * 3),
                nullable=False,
                metadata={"shape": shape, "dtype": "uint8", "channel_order": "RGB"},
            ),
        ]
    )


def images_to_column(images: UInt8Array) -> pa.FixedSizeBinaryArray:
    """Wrap pixels, uint8 (n, h, w, 3), as a fixed-size-binary column without copying them."""
    contiguous = np.ascontiguousarray(images)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(int(np.prod(images.shape[1:]))), len(images), [None, pa.py_buffer(contiguous)])


def column_to_images(column: pa.ChunkedArray | pa.Array, patch_size_px: int) -> UInt8Array:
    """Return the pixels of an `image` column, uint8 (n, patch_size_px, patch_size_px, 3), RGB; read-only where no copy was needed."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    width = patch_size_px * patch_size_px * 3
    parts = []
    for chunk in chunks:
        flat = np.frombuffer(chunk.buffers()[1], dtype=np.uint8) if len(chunk) else np.empty(0, np.uint8)
        parts.append(flat[chunk.offset * width : (chunk.offset + len(chunk)) * width])
    pixels = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint8)])
    return pixels.reshape(-1, patch_size_px, patch_size_px, 3)


@dataclass(frozen=True)
class Patches:
    """Rows of a prepared data set in memory.

    Attributes
    ----------
    ids : ndarray of str, shape (n,)
    labels : ndarray of int64, shape (n,), 0 or 1
    groups : ndarray of str, shape (n,)
    images : ndarray of uint8, shape (n, side, side, 3), RGB
    """

    ids: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_]
    images: UInt8Array

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: IntArray | BoolArray) -> "Patches":
        """Return the chosen rows, as copies."""
        return Patches(self.ids[rows], self.labels[rows], self.groups[rows], self.images[rows])


@dataclass(frozen=True)
class PreparedDataset:
    """A finished output of prepare. What reads it raises StorageError where the storage does not answer."""

    location: Location
    manifest: DatasetManifest

    @classmethod
    def open(cls, data: str | os.PathLike[str] | Location) -> "PreparedDataset":
        """Open by its manifest; raises like `read_dataset_manifest`."""
        location = locate(data)
        return cls(location, read_dataset_manifest(location))

    @property
    def path(self) -> Path | Location:
        """Where it lies: a Path if that is on this machine."""
        return self.location.local if self.location.is_local else self.location

    @property
    def root(self) -> Location:
        """What the paths in the manifest are relative to."""
        return self.location / self.manifest.root

    def shards(self, split: str) -> list[ShardRecord]:
        """Return the shards of one split, in order.

        Raises
        ------
        UsageError
            The data set has no rows in that split.
        """
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        if not any(shard.rows for shard in shards):
            raise UsageError(f"{self.path}: no rows in split {split!r}; it has {', '.join(self.manifest.counts)}")
        return shards

    @cached_property
    def index(self) -> pa.Table:
        """index.parquet, one row per patch; raises like `read_shard`."""
        return self._read_index(INDEX_SCHEMA.names)

    def _read_index(self, columns: list[str]) -> pa.Table:
        file = self.root / "index.parquet"
        try:
            return _read_parquet(file, columns).cast(pa.schema([INDEX_SCHEMA.field(name) for name in columns]))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise unreadable(file, error) from error

    def read_shard(self, shard: ShardRecord) -> Patches:
        """Read one shard.

        Raises
        ------
        ManifestError
            The file is missing, damaged, or has another number of rows than the manifest says.
        """
        table = self._read_table(shard, ["id", "label", "group", "image"])
        return Patches(
            ids=np.asarray(table["id"].to_pylist(), dtype=np.str_),
            labels=labels_of(table["label"], self.root / shard.path),
            groups=np.asarray(table["group"].to_pylist(), dtype=np.str_),
            images=column_to_images(table["image"], self.manifest.patch_size_px),
        )

    def read_pixels(self, shard: ShardRecord) -> tuple[list[str], UInt8Array]:
        """Return ids and pixels, uint8 (n, side, side, 3), of one shard, labelled or not; raises like `read_shard`."""
        table = self._read_table(shard, ["id", "image"])
        return table["id"].to_pylist(), column_to_images(table["image"], self.manifest.patch_size_px)

    def _read_table(self, shard: ShardRecord, columns: list[str]) -> pa.Table:
        file = self.root / shard.path
        try:
            table = _read_parquet(file, columns)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(file, error) from error
        if problem := shape_problem(table, shard, columns, self.manifest.patch_size_px):
            raise ManifestError(f"{file}: {problem}")
        return table

    def read_split(self, split: str) -> Patches:
        """Read a whole split into memory (27,648 bytes a patch at 96 px), in shard order. Holds one shard beside what it returns."""
        return self.read_shards(self.shards(split))

    def read_shards(self, shards: list[ShardRecord]) -> Patches:
        """Read all rows of some shards into memory, in order. Holds one shard beside what it returns."""
        (rows,) = self._read_rows(shards, [np.ones(sum(shard.rows for shard in shards), np.bool_)])
        return rows

    def read_train_and_val(self, fold: int | None) -> tuple[Patches, Patches]:
        """Read the rows to train on and the rows to validate on: the splits, or with `fold` the other folds and that fold.

        Each shard is read once; one of them is held beside what is returned.

        Raises
        ------
        UsageError
            The data set has no such fold, or one side is empty.
        ManifestError
            The index lacks a row of the shards.
        """
        if fold is None:
            return self.read_split("train"), self.read_split("val")
        shards, validates = self.train_and_val_rows(fold)
        train, val = self._read_rows(shards, [~validates, validates])
        return train, val

    def read_val(self, fold: int | None) -> Patches:
        """Read the rows to validate on alone; they and what is raised are as in `read_train_and_val`."""
        if fold is None:
            return self.read_split("val")
        shards, validates = self.train_and_val_rows(fold)
        (val,) = self._read_rows(shards, [validates])
        return val

    def train_and_val_rows(self, fold: int | None) -> tuple[list[ShardRecord], BoolArray]:
        """Tell, without reading pixels, which rows train and which validate; raises like `read_train_and_val`.

        Returns
        -------
        shards : list of ShardRecord
            Those of the splits train and val, in order.
        validates : ndarray of bool, shape (n,)
            Of all rows of `shards`, in order. The others train.
        """
        if fold is None:
            train, val = self.shards("train"), self.shards("val")
            return [*train, *val], np.repeat([False, True], [sum(shard.rows for shard in side) for side in (train, val)])
        folds = self.manifest.split.folds
        if folds is None or fold >= folds:
            raise UsageError(
                f"{self.path}: no fold {fold}; " + ("it was prepared without folds" if folds is None else f"it has folds 0 to {folds - 1}")
            )
        shards = [shard for split in ("train", "val") if split in self.manifest.counts for shard in self.shards(split)]
        validates = np.asarray(pc.fill_null(pc.equal(self.index_of(shards, ["fold"])["fold"], fold), False))
        if validates.all() or not validates.any():
            raise UsageError(f"{self.path}: fold {fold} leaves {(~validates).sum()} rows to train on and {validates.sum()} to validate on")
        return shards, validates

    def index_of(self, shards: list[ShardRecord], columns: list[str]) -> pa.Table:
        """Return columns of the index for all rows of some shards, in the order of the shards' rows.

        Raises
        ------
        ManifestError
            The index cannot be read, or lacks a row of the shards.
        """
        index = self._read_index([name for name in INDEX_SCHEMA.names if name in (*columns, "shard", "row")])
        counts = np.asarray([shard.rows for shard in shards], np.int64)
        shard = pc.fill_null(pc.index_in(index["shard"], pa.array([shard.path for shard in shards], pa.string())), -1).to_numpy()
        row = index["row"].to_numpy()
        listed = np.flatnonzero((shard >= 0) & (row >= 0) & (row < counts[shard]))
        places = np.full(counts.sum(), -1, np.int64)
        places[(np.cumsum(counts) - counts)[shard[listed]] + row[listed]] = listed
        if (places < 0).any():
            raise ManifestError(f"{self.root / 'index.parquet'}: rows of the shards are missing; `sentinode verify` checks the whole data set")
        return index.select(columns).take(pa.array(places))

    def labels_in(self, shards: list[ShardRecord]) -> IntArray:
        """Return the labels of all rows of some shards, int64, 0 or 1, in order, without reading pixels; raises like `index_of` and `labels_of`."""
        return labels_of(self.index_of(shards, ["label"])["label"], self.root / "index.parquet")

    def _read_rows(self, shards: list[ShardRecord], masks: list[BoolArray]) -> list[Patches]:
        """Read, for each mask over all rows of `shards`, the rows that it chooses, in order."""
        if len(shards) == 1 and len(masks) == 1 and masks[0].all():
            return [self.read_shard(shards[0])]
        side = self.manifest.patch_size_px
        # Allocated once and filled: joining parts at the end would hold everything twice.
        images = [np.empty((np.count_nonzero(mask), side, side, 3), np.uint8) for mask in masks]
        parts: list[list[Patches]] = [[] for _ in masks]
        filled, first = [0] * len(masks), 0
        for shard in shards:
            chosen = [np.flatnonzero(mask[first : first + shard.rows]) for mask in masks]
            first += shard.rows
            if not any(map(len, chosen)):
                continue
            part = self.read_shard(shard)
            for number, rows in enumerate(chosen):
                place = images[number][filled[number] : filled[number] + len(rows)]
                filled[number] += len(rows)
                np.take(part.images, rows, axis=0, out=place, mode="clip")  # "raise" would take a copy of `place`
                parts[number].append(Patches(part.ids[rows], part.labels[rows], part.groups[rows], place))
        return [_joined(of_mask, pixels) for of_mask, pixels in zip(parts, images, strict=True)]

    def verify(self) -> list[str]:
        """Re-check every file, row and pixel; return one line per problem, none if the data set is whole (`sentinode.dataset_checks`)."""
        from sentinode.dataset_checks import problems_of

        return problems_of(self)


def _read_parquet(file: Location, columns: list[str]) -> pa.Table:
    if file.is_local:
        return try_local(file.uri, lambda: pq.read_table(file.uri, columns=columns, partitioning=None))
    # One read of everything: nearly all of a shard is pixels, and each of the small reads of a Parquet reader would be a request.
    return pq.read_table(pa.BufferReader(file.read_bytes()), columns=columns)


def labels_of(column: pa.ChunkedArray, file: Location) -> IntArray:
    """Return a `label` column as int64, 0 or 1; raises UsageError where a label is unknown and ManifestError where it is another, naming `file`."""
    if column.null_count:
        raise UsageError(f"{file}: unlabelled rows; training and evaluation need labels")
    labels: IntArray = column.to_numpy().astype(np.int64)
    if not np.isin(labels, (0, 1)).all():
        raise ManifestError(f"{file}: labels other than 0 and 1")
    return labels


def shape_problem(table: pa.Table, shard: ShardRecord, columns: list[str], patch_size_px: int) -> str | None:
    """Return what is wrong with the rows and columns of a shard, None if nothing is."""
    if problem := schema_problem(table.schema, table.num_rows, shard, columns, patch_size_px):
        return problem
    for field in map(row_schema(patch_size_px).field, columns):
        if not field.nullable and table[field.name].null_count:
            return f"nulls in column {field.name}"
    return None


def schema_problem(schema: pa.Schema, rows: int, shard: ShardRecord, columns: list[str], patch_size_px: int) -> str | None:
    """Return what is wrong with a shard of which only the footer was read, None if nothing is."""
    if rows != shard.rows:
        return f"{rows} rows, but dataset.json says {shard.rows}"
    for field in map(row_schema(patch_size_px).field, columns):
        if field.name not in schema.names:
            return f"no column {field.name}"
        if (found := schema.field(field.name).type) != field.type:
            return f"column {field.name} is of type {found}, not {field.type}"
    return None


def unreadable(file: Location, error: Exception) -> ManifestError:
    """Return the one line for a file of a data set that cannot be read."""
    return ManifestError(f"{file}: cannot be read ({str(error).splitlines()[0]}); `sentinode verify` checks the whole data set")


def fingerprint(index: pa.Table) -> str:
    """Return the SHA-256 over the lines `id,label,split,pixel_sha1` of an index, sorted by id; an unknown label is an empty field."""
    rows = sorted(zip(*(index[name].to_pylist() for name in ("id", "label", "split", "pixel_sha1")), strict=True), key=lambda row: str(row[0]))
    lines = (f"{id_},{'' if label is None else label},{split},{sha1}\n" for id_, label, split, sha1 in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def concatenate(parts: list[Patches]) -> Patches:
    """Join row sets in the given order."""
    if len(parts) == 1:
        return parts[0]
    return _joined(parts, np.concatenate([part.images for part in parts]))


def _joined(parts: list[Patches], images: UInt8Array) -> Patches:
    """Join row sets whose pixels lie in one array already."""
    return Patches(
        ids=np.concatenate([part.ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        groups=np.concatenate([part.groups for part in parts]),
        images=images,
    )
