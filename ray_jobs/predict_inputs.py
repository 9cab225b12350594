"""What predict runs over: one row per input, whatever the source. Labels are ignored, and what prepare would refuse is a row that says why."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa

from data_prep.rejects import Reject
from data_prep.sources.archive import ARCHIVE_SUFFIXES, PACKED_TAR_SUFFIXES, archive_spec, list_archive
from data_prep.sources.base import Source, too_many_bytes
from data_prep.sources.dataset import from_dataset
from data_prep.sources.files import files_spec
from data_prep.sources.hdf5 import count_patches, hdf5_spec, open_hdf5
from data_prep.sources.listing import Listing, list_images
from data_prep.sources.pcam import STEM
from data_prep.sources.table import TABLE_SUFFIXES, open_table
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.images import IMAGE_SUFFIXES
from sentinode.locations import Entry, Location, locate
from sentinode.manifests import read_dataset_manifest

INPUT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("shown", pa.string()),
        pa.field("path", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("error", pa.string()),
    ]
)
"""One row per input, in reading order. `shown` goes into column `path` of the predictions; a reader of data_prep takes `path` and `row`; where
`error` is set there is nothing to read."""

_HDF5_SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class Inputs:
    """What predict will read.

    Attributes
    ----------
    where : Location
        The source.
    table : pyarrow.Table
        INPUT_SCHEMA.
    reader : mapping
        Arguments of `data_prep.sources.detect.reader_of`.
    sha256 : str
        Says which inputs they are: names, sizes and times (or an object store's tags), or the digests of a data set's files.
    patch_size_px : int or None
        Side of every patch, where it is known before any is read.
    """

    where: Location
    table: pa.Table
    reader: Mapping[str, Any]
    sha256: str
    patch_size_px: int | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)


def open_inputs(source: str | Location) -> Inputs:
    """List the inputs of a source, local or in an object store; no image is opened.

    Parameters
    ----------
    source : str or Location
        A prepared data set; a folder of images, searched recursively, or of HDF5 files like PatchCamelyon's; one such HDF5 file; a zip or tar of
        images; a CSV, TSV or Parquet table with a column `path`.

    Raises
    ------
    UsageError
        There is no such source, nothing in it, or it cannot be read.
    ManifestError
        The data set is damaged.
    StorageError
        The storage does not answer.
    """
    where = locate(source)
    try:
        entries = where.entries()
    except NotADirectoryError:
        inputs = _of_file(where)
    except FileNotFoundError as error:
        raise UsageError(f"source {where}: {where.why_nothing('no such folder or file')}") from error
    except OSError as error:
        raise UsageError(f"source {where}: cannot be listed ({error.strerror or error})") from error
    else:
        inputs = _of_folder(where, entries)
    if not len(inputs):
        raise UsageError(f"source {where}: no inputs in it")
    return inputs


def _of_file(where: Location) -> Inputs:
    name = where.name.lower()
    if name.endswith(PACKED_TAR_SUFFIXES):
        raise UsageError(
            f"source {where}: is compressed as a whole, so that its files cannot be reached singly; unpack it, or make a .zip or .tar of it"
        )
    if name.endswith(ARCHIVE_SUFFIXES):
        return _of_archive(where)
    if name.endswith(_HDF5_SUFFIXES):
        folder = Location(where.uri.rpartition("/")[0])
        return _of_hdf5(where, folder, [entry for entry in folder.entries() if entry.name == where.name])
    if name.endswith(TABLE_SUFFIXES):
        return _of_table(where)
    expected = ", ".join((*ARCHIVE_SUFFIXES, *_HDF5_SUFFIXES, *TABLE_SUFFIXES))
    raise UsageError(f"source {where}: expected a folder, or a file ending in {expected}")


def _of_folder(where: Location, entries: list[Entry]) -> Inputs:
    names = {entry.name for entry in entries if not entry.is_dir}
    if "dataset.json" in names:
        return _of_dataset(where)
    hdf5 = [entry for entry in entries if entry.name in names and entry.name.lower().endswith(_HDF5_SUFFIXES)]
    # Of PatchCamelyon's files, those that hold patches; the others hold labels.
    if hdf5 := [entry for entry in hdf5 if entry.name.endswith("_x.h5")] or hdf5:
        if image := next((name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES)), None):
            raise UsageError(f"source {where}: holds both HDF5 files ({hdf5[0].name}) and images ({image}); name one of the two")
        return _of_hdf5(where, where, hdf5)
    if packed := sorted(name for name in names if name.endswith("_x.h5.gz")):
        raise UsageError(f"source {where}: {packed[0]} is compressed; gunzip it first, or make a prepared data set of it, which predict reads too")
    listing = list_images(where, recursive=True)
    return Inputs(where, _files_table(listing, f"{where}/", {}), files_spec(where), listing.digest.hex())


def _of_archive(where: Location) -> Inputs:
    listing, rows = list_archive(where)
    if not listing.names and not listing.refused:
        raise UsageError(f"source {where}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    return Inputs(where, _files_table(listing, f"{where}/", rows), archive_spec(where), listing.digest.hex())


def _files_table(listing: Listing, prefix: str, rows: Mapping[str, int]) -> pa.Table:
    """Return one row per file of a listing; an id is the name of the file without folders and suffix."""
    errors = {name: f"unreadable: {too_many_bytes(size)}" for name, size in listing.too_large.items()}
    errors |= {str(reject.path): f"{reject.reason}: {reject.detail}" for reject in listing.refused}
    names = [*listing.names, *(str(reject.path) for reject in listing.refused)]
    texts = [_text(name) for name in names]
    columns = {
        "id": [text.rpartition("/")[2].rpartition(".")[0] for text in texts],
        "shown": [prefix + text for text in texts],
        # What is refused is not read, and its name may be none that Parquet can hold.
        "path": [None if name in errors else name for name in names],
        "row": [rows.get(name) for name in names],
        "error": [errors.get(name) for name in names],
    }
    table = pa.table(columns, schema=INPUT_SCHEMA)
    return table.sort_by("row" if rows else "shown").combine_chunks()


def _text(name: str) -> str:
    """Return a file name, which may be any bytes, as text."""
    return name.encode("utf-8", "replace").decode()


def _of_hdf5(where: Location, folder: Location, files: list[Entry]) -> Inputs:
    counts = {}
    for entry in files:
        with open_hdf5(folder / entry.name) as file:
            counts[entry.name] = count_patches(file, folder / entry.name)
    columns: dict[str, Any] = {
        # As prepare calls PatchCamelyon's patches: test-000000.
        "id": [f"{_stem(name)}-{row:06d}" for name, count in counts.items() for row in range(count)],
        "shown": _spread({name: f"{folder}/{name}" for name in counts}, counts),
        "path": _spread({name: name for name in counts}, counts),
        "row": list(chain.from_iterable(range(count) for count in counts.values())),
        "error": pa.nulls(sum(counts.values()), pa.string()),
    }
    listing = "".join(f"{entry.name}\0{entry.size}\0{entry.stamp}\n" for entry in files)
    return Inputs(where, pa.table(columns, schema=INPUT_SCHEMA), hdf5_spec(folder, {}, None), hashlib.sha256(listing.encode()).hexdigest())


def _stem(name: str) -> str:
    return name.rpartition(".")[0].removeprefix(STEM).removesuffix("_x")


def _spread(texts: Mapping[str, str], counts: Mapping[str, int]) -> list[str]:
    return [texts[name] for name, count in counts.items() for _ in range(count)]


def _of_table(where: Location) -> Inputs:
    source = open_table(PrepareConfig(source="unlabelled"), where)
    entries = _entries_table(source, source.entries["path"])
    refused = [_refused(reject) for reject in source.rejects]
    table = pa.concat_tables([entries, pa.Table.from_pylist(refused, schema=INPUT_SCHEMA)]).combine_chunks()
    return Inputs(where, table, source.reader, source.inputs_sha256)


def _refused(reject: Reject) -> dict[str, Any]:
    path = None if reject.path is None else _text(reject.path)
    return {"id": _text(reject.id or path or ""), "shown": path, "error": f"{reject.reason}: {reject.detail}"}


def _of_dataset(where: Location) -> Inputs:
    source, manifest = from_dataset(str(where)), read_dataset_manifest(where)
    # Entries come in the order of the shards' rows.
    shards = [shard.path for shard in manifest.shards for _ in range(shard.rows)]
    return Inputs(where, _entries_table(source, pa.array(shards, pa.string())), source.reader, source.inputs_sha256, manifest.patch_size_px)


def _entries_table(source: Source, shown: pa.Array | pa.ChunkedArray) -> pa.Table:
    entries = source.entries
    columns = {"id": entries["id"], "shown": shown, "path": entries["path"], "row": entries["row"], "error": pa.nulls(len(entries), pa.string())}
    return pa.table(columns, schema=INPUT_SCHEMA).combine_chunks()
