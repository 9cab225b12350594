"""Is a prepared data set what its manifest and its index say, down to the pixels? A shard at a time, each file read once."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sentinode.dataset import PreparedDataset, column_to_images, fingerprint, row_schema, shape_problem
from sentinode.errors import ManifestError
from sentinode.locations import Location, locate
from sentinode.manifests import DatasetManifest, FileRecord, ShardRecord, SplitCounts
from sentinode.retries import try_local

# Each holds a shard twice: its file and its columns (about 0.2 GB together at 4096 patches of 96 px).
_SHARDS_AT_A_TIME = 2
_FILES_AT_A_TIME = 4
_READ_BYTES = 1 << 20
_INDEX = "index.parquet"


def problems_of(dataset: PreparedDataset) -> list[str]:
    """Return one line per problem of a data set, none if it is whole. Files that the manifest does not list are no concern of it.

    Checked are the size and SHA-256 of every file; counts against shards and index; the fingerprint; id, label, group, slide and pixels (SHA-1) of
    every row against the index; that no group straddles splits or folds where the split promises it.

    Raises
    ------
    StorageError
        The storage does not answer.
    """
    manifest, root = dataset.manifest, dataset.root
    sizes = _sizes(root)
    of_files = {record.path: _file_problem(root, record, sizes) for record in manifest.files}
    if _INDEX not in of_files:
        of_files[_INDEX] = "not listed in dataset.json"
    elif not of_files[_INDEX]:
        try:
            _ = dataset.index
        except ManifestError as error:
            of_files[_INDEX] = str(error)
    index = None if of_files[_INDEX] else dataset.index
    expected = {} if index is None else _rows_by_shard(index)

    def check(shard: ShardRecord) -> list[str]:
        problem = _size_problem(shard, sizes)
        return [problem] if problem else _shard_problems(root / shard.path, shard, manifest.patch_size_px, expected.get(shard.path))

    with ThreadPoolExecutor(_SHARDS_AT_A_TIME) as pool:
        problems = [
            f"{shard.path}: {problem}" for shard, found in zip(manifest.shards, pool.map(check, manifest.shards), strict=True) for problem in found
        ]
    problems += [f"{name}: {problem}" for name, problem in of_files.items() if problem]
    problems += _count_problems(manifest)
    if index is not None:
        problems += [*_index_problems(index, manifest), *_group_problems(index, manifest)]
    return problems


def check_records(folder: Path | Location, records: Sequence[FileRecord]) -> list[str]:
    """Compare files with their records: is each there, of this size and SHA-256? Pixels and rows are not looked at; `problems_of` does that.

    What a restarted run asks of a finished staging folder before it is published: a machine that lost power may have kept the manifest and lost what
    was written before it.

    Parameters
    ----------
    folder : Path or Location
        What the paths of the records are relative to: a staging folder itself, whatever the `root` of its manifest.
    records : sequence of FileRecord
        E.g. `[*manifest.shards, *manifest.files]`.

    Returns
    -------
    list of str
        One line "path: problem" per file that is missing or differs, in the order of the records; empty if all are whole.

    Raises
    ------
    StorageError
        The storage does not answer.
    OSError
        It refuses a file.
    """
    root = locate(folder)
    sizes = _sizes(root)
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        problems = pool.map(lambda record: _file_problem(root, record, sizes), records)
        return [f"{record.path}: {problem}" for record, problem in zip(records, problems, strict=True) if problem]


def _sizes(root: Location) -> dict[str, int]:
    return {entry.name: entry.size for entry in root.entries(recursive=True)} if root.is_dir() else {}


def _file_problem(root: Location, record: FileRecord, sizes: dict[str, int]) -> str | None:
    return _size_problem(record, sizes) or _digest_problem(root, record)


def _size_problem(record: FileRecord, sizes: dict[str, int]) -> str | None:
    if record.path not in sizes:
        return "missing"
    found = sizes[record.path]
    return None if found == record.bytes else f"{found} bytes, expected {record.bytes}"


def _digest_problem(root: Location, record: FileRecord) -> str | None:
    with (root / record.path).open_input() as file:
        return None if hashlib.file_digest(file, "sha256").hexdigest() == record.sha256 else "sha256 differs"  # type: ignore[arg-type]


def _rows_by_shard(index: pa.Table) -> dict[str, pa.Table]:
    """Return shard -> the rows of the index that say what is in it, in the order of `row`."""
    names, shards = _codes(index["shard"])
    order = np.lexsort((index["row"].to_numpy(), shards))
    ordered, ends = index.take(order), np.cumsum(np.bincount(shards, minlength=len(names))).tolist()
    return {name: ordered.slice(start, end - start) for name, start, end in zip(names, [0, *ends], ends, strict=False)}


def _codes(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the distinct values of a column without nulls, and for each row the position of its value among them."""
    values = column.combine_chunks().dictionary_encode()
    return values.dictionary.to_pylist(), values.indices.to_numpy().astype(np.int64)


def _shard_problems(file: Location, shard: ShardRecord, patch_size_px: int, expected: pa.Table | None) -> list[str]:
    data = _read_whole(file)
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return ["sha256 differs"]
    names = row_schema(patch_size_px).names
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        return [f"cannot be read ({str(error).splitlines()[0]})"]
    if problem := shape_problem(table, shard, names, patch_size_px):
        return [problem]
    if expected is None:
        return []  # the index is damaged, which is said already, or names no row of this shard, which the counts tell
    if not np.array_equal(expected["row"].to_numpy(), np.arange(shard.rows)):
        return [f"the index has {expected.num_rows} rows of it; expected 0 to {shard.rows - 1}, each once"]
    problems = []
    for name in ("id", "label", "group", "slide"):
        if not table[name].equals(expected[name]):
            problems.append(f"{name} differs from the index in {_rows(table[name], expected[name])}")
    digests = pa.chunked_array([list(_pixel_digests(table["image"], patch_size_px))], pa.string())
    if not digests.equals(expected["pixel_sha1"]):
        problems.append(f"pixels differ from pixel_sha1 of the index in {_rows(digests, expected['pixel_sha1'])}")
    return problems


def _read_whole(file: Location) -> pa.Buffer:
    if not file.is_local:
        return pa.py_buffer(file.read_bytes())
    # Not mapped: a disk that fails must become an error, not a signal that kills the process. Into Arrow's memory, which is used again for the next
    # shard: pages that the system hands out anew cost as much as one of the digests.
    return try_local(file.uri, lambda: _read_into_arrow(file.local))


def _read_into_arrow(path: Path) -> pa.Buffer:
    with path.open("rb", buffering=0) as source:
        buffer, size = pa.allocate_buffer(os.fstat(source.fileno()).st_size), 0
        view = memoryview(buffer)
        while read := source.readinto(view[size : size + _READ_BYTES]):
            size += read
    return buffer.slice(0, size)


def _pixel_digests(column: pa.ChunkedArray, patch_size_px: int) -> Iterator[str]:
    for chunk in column.chunks:
        for image in column_to_images(chunk, patch_size_px):
            yield hashlib.sha1(image, usedforsecurity=False).hexdigest()


def _rows(found: Iterable[pa.Scalar], expected: Iterable[pa.Scalar]) -> str:
    wrong = [row for row, (one, other) in enumerate(zip(found, expected, strict=True)) if not one.equals(other)]
    return f"{len(wrong)} rows, the first is row {wrong[0]}"


def _count_problems(manifest: DatasetManifest) -> list[str]:
    problems = []
    rows = dict.fromkeys(manifest.counts, 0)
    for shard in manifest.shards:
        rows[shard.split] = rows.get(shard.split, 0) + shard.rows
    for split, found in rows.items():
        expected = manifest.counts[split].rows if split in manifest.counts else 0
        if found != expected:
            problems.append(f"{split}: shards hold {found} rows, counts say {expected}")
    return problems


def _index_problems(index: pa.Table, manifest: DatasetManifest) -> list[str]:
    problems = []
    for split, counts in manifest.counts.items():
        own = index.filter(pc.equal(index["split"], split))
        labels = own["label"].fill_null(-1).to_numpy()
        normal, metastatic, unlabelled = (int((labels == label).sum()) for label in (0, 1, -1))
        groups = pc.count_distinct(own["group"]).as_py()
        found = SplitCounts(rows=len(own), normal=normal, metastatic=metastatic, unlabelled=unlabelled, groups=groups)
        for name, value in found:
            if value != getattr(counts, name):
                problems.append(f"{split}: {_INDEX} holds {value} {name}, counts say {getattr(counts, name)}")
    if index.num_rows != (total := sum(shard.rows for shard in manifest.shards)):
        problems.append(f"{_INDEX}: {index.num_rows} rows, shards hold {total}")
    pairs = index.select(["shard", "split"]).group_by(["shard", "split"]).aggregate([([], "count_all")])
    split_of = {shard.path: shard.split for shard in manifest.shards}
    if wrong := sum(pair["count_all"] for pair in pairs.to_pylist() if split_of.get(pair["shard"]) != pair["split"]):
        problems.append(f"{_INDEX}: {wrong} rows name a shard that is none of their split")
    if (repeated := index.num_rows - pc.count_distinct(index["id"]).as_py()) > 0:
        problems.append(f"{_INDEX}: {repeated} ids stand in it more than once")
    if fingerprint(index) != manifest.fingerprint:
        problems.append(f"{_INDEX}: does not give the fingerprint of dataset.json")
    return problems


def _group_problems(index: pa.Table, manifest: DatasetManifest) -> list[str]:
    problems = []
    rows = index.select(["group", "split", "fold"]).to_pandas()
    with_fold = rows["split"].isin(("train", "val")) & (manifest.split.folds is not None)
    allowed = rows["fold"].between(0, (manifest.split.folds or 1) - 1).where(with_fold, rows["fold"].isna())
    if wrong := int((~allowed).sum()):
        problems.append(f"{_INDEX}: {wrong} rows have a fold that they should not have, or none")
    if manifest.split.method in ("overlap", "slide"):
        if straddling := int((rows.groupby("group")["split"].nunique() > 1).sum()):
            problems.append(f"{_INDEX}: {straddling} groups stand in several splits")
        if straddling := int((rows.groupby("group")["fold"].nunique() > 1).sum()):
            problems.append(f"{_INDEX}: {straddling} groups stand in several folds")
    return problems
