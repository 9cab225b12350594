"""Is a prepared data set what its manifest and its index say, down to the pixels? A shard at a time, each file read once."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sentinode.dataset import PreparedDataset, column_to_images, fingerprint, row_schema, shape_problem
from sentinode.errors import ManifestError
from sentinode.locations import Location
from sentinode.manifests import DatasetManifest, FileRecord, ShardRecord, SplitCounts

# Each holds a shard twice: its file and its columns (about 0.2 GB together at 4096 patches of 96 px).
_SHARDS_AT_A_TIME = 2
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
    sizes = {entry.name: entry.size for entry in root.entries(recursive=True)} if root.is_dir() else {}
    of_files = {record.path: _size_problem(record, sizes) or _digest_problem(root, record) for record in manifest.files}
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
    shards, rows = np.asarray(index["shard"].to_pylist(), dtype=np.str_), index["row"].to_numpy()
    order = np.lexsort((rows, shards))
    names, starts = np.unique(shards[order], return_index=True)
    ordered, ends = index.take(order), [*starts[1:].tolist(), len(order)]
    return {name: ordered.slice(start, end - start) for name, start, end in zip(names.tolist(), starts.tolist(), ends, strict=True)}


def _shard_problems(file: Location, shard: ShardRecord, patch_size_px: int, expected: pa.Table | None) -> list[str]:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return ["sha256 differs"]
    names = row_schema(patch_size_px).names
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (OSError, pa.ArrowException) as error:
        return [f"cannot be read ({str(error).splitlines()[0]})"]
    if problem := shape_problem(table, shard, names, patch_size_px):
        return [problem]
    if expected is None:
        return []  # the index is damaged, which is said already, or names no row of this shard, which the counts tell
    if expected["row"].to_pylist() != list(range(shard.rows)):
        return [f"the index has {expected.num_rows} rows of it; expected 0 to {shard.rows - 1}, each once"]
    problems = []
    for name in ("id", "label", "group", "slide"):
        if wrong := _differing(table[name].to_pylist(), expected[name].to_pylist()):
            problems.append(f"{name} differs from the index in {_rows(wrong)}")
    images = column_to_images(table["image"], patch_size_px)
    digests = [hashlib.sha1(image, usedforsecurity=False).hexdigest() for image in images]
    if wrong := _differing(digests, expected["pixel_sha1"].to_pylist()):
        problems.append(f"pixels differ from pixel_sha1 of the index in {_rows(wrong)}")
    return problems


def _differing(found: Sequence[object], expected: Sequence[object]) -> list[int]:
    return [row for row, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]


def _rows(wrong: list[int]) -> str:
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
    splits = np.asarray(index["split"].to_pylist(), dtype=np.str_)
    labels = np.asarray(index["label"].fill_null(-1).to_pylist(), dtype=np.int64)
    groups = np.asarray(index["group"].to_pylist(), dtype=np.str_)
    for split, counts in manifest.counts.items():
        own = splits == split
        normal, metastatic, unlabelled = (int((labels[own] == label).sum()) for label in (0, 1, -1))
        found = SplitCounts(rows=int(own.sum()), normal=normal, metastatic=metastatic, unlabelled=unlabelled, groups=len(np.unique(groups[own])))
        for name, value in found:
            if value != getattr(counts, name):
                problems.append(f"{split}: {_INDEX} holds {value} {name}, counts say {getattr(counts, name)}")
    if index.num_rows != (total := sum(shard.rows for shard in manifest.shards)):
        problems.append(f"{_INDEX}: {index.num_rows} rows, shards hold {total}")
    split_of = {shard.path: shard.split for shard in manifest.shards}
    if wrong := sum(split_of.get(shard) != split for shard, split in zip(index["shard"].to_pylist(), splits.tolist(), strict=True)):
        problems.append(f"{_INDEX}: {wrong} rows name a shard that is none of their split")
    if (repeated := index.num_rows - len(set(index["id"].to_pylist()))) > 0:
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
