"""The overlap search over all blocks, as two stages of Ray tasks.

    anchors of all blocks, cut by hash -> candidates-*.npy -> merged, cut by first patch -> overlaps-*.npy -> Overlaps

Windows that very many patches share go a longer way, if there are any: crowded-*.npy -> needed-*.npy -> further candidates (crowds.py).

A true pair has anchors in every hash range, so it is compared in the second stage, once. Each task writes one file in the work folder; a repeated
search in the same pixels takes the files that are there.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.anchors import UInt64Array, guards_of, places_of
from data_prep.crowds import is_crowded, needed
from data_prep.overlap import Overlaps, Packing, empty_memory, join, sifted, unique, verify
from data_prep.spool import Spool, anchors_path, save_array
from data_prep.tasks import Progress, run_tasks

_ANCHORS_PER_PART = 1 << 23  # 10,000 patches of 96 px: seconds of work
_ANCHORS_PER_RANGE = 1 << 19  # what is joined at a time: some 40 MB
_MAX_RANGE_BITS = 16  # the anchors of a block are not sorted further
_CANDIDATES_GATHERED = 1 << 22  # 32 MB; tissue has fewer than one a patch
_CANDIDATES_PER_VERIFY = 1 << 19
_SAMPLE_STEP = 1 << 10  # every so many-th candidate of a file decides where the verification is cut


def search_overlaps(spool: Spool, work: Path, progress: Progress, *, key: str, workers: int | None = None) -> Overlaps:
    """Find all overlaps between the patches of a spool. Ray must run.

    Parameters
    ----------
    spool : Spool
        The pixels.
    work : Path
        Folder that holds what `anchors` returned for each block, at `anchors_path(work, block)`; it receives the files of the search.
    progress : Progress
    key : str
        Names the content of the spool, letters and digits: files of a search with another key are deleted. Blocks and rows alone do not tell: an
        input that could not be read and now can moves all patches behind it.
    workers : int, optional
        Tasks that run at a time; default as many as the cluster has CPUs.

    Raises
    ------
    SentinodeError
        There are more patches than one search can number, or a task failed.
    """
    _delete_other_searches(work, key)
    packing = Packing(len(spool), spool.size_px)
    blocks = len(spool.rows)
    anchors = sum(np.load(anchors_path(work, block), mmap_mode="r").shape[1] for block in range(blocks))
    part_bits = max(0, (-(-anchors // _ANCHORS_PER_PART) - 1).bit_length())
    parts = 1 << part_bits
    names = [f"{key}-{part:05d}-of-{parts:05d}.npy" for part in range(parts)]
    candidate_files = [work / f"candidates-{name}" for name in names]
    shared = {"spool": spool.to_json()}
    by_part = [{**shared, "part": part, "part_bits": part_bits} for part in range(parts)]
    crowded_files = [work / f"crowded-{name}" for name in names]
    arguments = [{**one, "anchors": _anchor_files(work, blocks), "crowded": str(file)} for one, file in zip(by_part, crowded_files, strict=True)]
    _run("overlap", _candidates_task, candidate_files, arguments, progress, workers)
    if any(len(np.load(file, mmap_mode="r")) for file in crowded_files):
        needed_files = [work / f"needed-{key}-{block:05d}.npy" for block in range(blocks)]
        arguments = [{**shared, "block": block, "crowded": [str(file) for file in crowded_files]} for block in range(blocks)]
        _run("crowds", _needed_task, needed_files, arguments, progress, workers)
        further_files = [work / f"candidates-{key}-further-{part:05d}-of-{parts:05d}.npy" for part in range(parts)]
        arguments = [{**one, "anchors": [str(file) for file in needed_files], "crowded": None} for one in by_part]
        _run("overlap in crowds", _candidates_task, further_files, arguments, progress, workers)
        candidate_files += further_files
    cuts = _cuts(candidate_files)
    pieces = len(cuts) - 1
    overlap_files = [work / f"overlaps-{key}-{piece:05d}-of-{pieces:05d}-parts-{parts}.npy" for piece in range(pieces)]
    arguments = [{**shared, "sources": [str(file) for file in candidate_files], "low": low, "high": high} for low, high in pairwise(cuts)]
    _run("verify", _verify_task, overlap_files, arguments, progress, workers)
    return packing.unpack(np.concatenate([np.load(file) for file in overlap_files]))


def _delete_other_searches(work: Path, key: str) -> None:
    """Delete the files of searches in other pixels."""
    for kind in ("candidates", "crowded", "needed", "overlaps"):
        for file in work.glob(f"{kind}-*.npy"):
            if not file.name.startswith(f"{kind}-{key}-"):
                file.unlink(missing_ok=True)


def _run(
    stage: str, function: Callable[..., int], files: Sequence[Path], arguments: Sequence[dict[str, Any]], progress: Progress, workers: int | None
) -> None:
    """Make the files that are missing."""
    missing = [{**arguments, "out": str(file)} for file, arguments in zip(files, arguments, strict=True) if not file.exists()]
    run_tasks(stage, function, missing, progress, where=files[0].parent, workers=workers, unit="parts", done=len(files) - len(missing))


def _anchor_files(work: Path, blocks: int) -> list[str]:
    return [str(anchors_path(work, block)) for block in range(blocks)]


def _candidates_task(spool: dict[str, Any], part: int, part_bits: int, anchors: list[str], crowded: str | None, out: str) -> int:
    """Join the anchors of one hash range; with `crowded` leave out the pairs of hashes that very many have, which go to that file."""
    crowds: list[UInt64Array] | None = None if crowded is None else [np.empty(0, np.uint64)]
    found = candidates(Spool.from_json(spool), [Path(file) for file in anchors], part, part_bits, crowds)
    if crowded is not None and crowds is not None:
        save_array(Path(crowded), np.concatenate(crowds))
    save_array(Path(out), found)
    return len(found)


def _needed_task(spool: dict[str, Any], block: int, crowded: list[str], out: str) -> int:
    """Find the anchors of one block that an overlap can depend on although very many have their hashes."""
    hashes = np.unique(np.concatenate([np.load(file) for file in crowded]))
    found = needed_of_block(Spool.from_json(spool), block, anchors_path(Path(out).parent, block), hashes)
    save_array(Path(out), found)
    return len(found[0])


def needed_of_block(spool: Spool, block: int, anchor_file: Path, crowded: UInt64Array) -> UInt64Array:
    """Return `crowds.needed` of the patches of a block that have anchors with crowded hashes, places as in the anchors of the whole block."""
    area = np.uint64(spool.size_px * spool.size_px)
    hashes, rows = np.load(anchor_file, mmap_mode="r")
    patches = np.unique(places_of(rows[is_crowded(hashes, crowded)]) // int(area))
    found = needed(spool.block(block)[patches], crowded)
    if len(patches):
        moved = patches.astype(np.uint64) - np.arange(len(patches), dtype=np.uint64)  # never negative: patches ascend
        found[1] += moved[(places_of(found[1]) // int(area))] * area
    return found


def candidates(
    spool: Spool, anchor_files: Sequence[Path], part: int = 0, part_bits: int = 0, crowded: list[UInt64Array] | None = None
) -> UInt64Array:
    """Return the candidates of one of 2^part_bits equal hash ranges, packed, ascending.

    Parameters
    ----------
    spool : Spool
    anchor_files : sequence of Path
        What `anchors` returned for each block of the spool, in order, as .npy files.
    part, part_bits : int
        At most 16 bits. Within the part, anchors are joined in smaller ranges that stay in a core's cache.
    crowded : list, optional
        As in `overlap.join`.
    """
    packing, patch_px = Packing(len(spool), spool.size_px), spool.size_px * spool.size_px
    blocks = [np.asarray(np.load(file, mmap_mode="r")) for file in anchor_files]
    starts = (spool.starts[:-1] * patch_px).tolist()
    anchors = sum(block.shape[1] for block in blocks) >> part_bits
    range_bits = min(_MAX_RANGE_BITS, part_bits + (anchors // _ANCHORS_PER_RANGE).bit_length())
    ranges = np.arange(part << (range_bits - part_bits), (part + 1) << (range_bits - part_bits)).astype(np.uint64)
    last = np.uint64((int(ranges[-1]) << (64 - range_bits)) + (1 << (64 - range_bits)) - 1)
    bounds = [
        np.append(np.searchsorted(block[0], ranges << np.uint64(64 - range_bits)), np.searchsorted(block[0], last, side="right")) for block in blocks
    ]
    seen = empty_memory()
    found = _Gatherer(spool, packing)
    for number in range(len(ranges)):
        cuts = [slice(bound[number], bound[number + 1]) for bound in bounds]
        hashes = np.concatenate([block[0, cut] for block, cut in zip(blocks, cuts, strict=True)])
        rows = [block[1, cut] for block, cut in zip(blocks, cuts, strict=True)]
        places = np.concatenate([places_of(row) + start for row, start in zip(rows, starts, strict=True)])
        guards = np.concatenate([guards_of(row) for row in rows])
        for packed in join(hashes, places, guards, packing, range_bits, seen, crowded):
            found.add(packed)
    return found.result()


class _Gatherer:
    """Gathers candidates in bounded memory: where they become many, most of them are none, and these go at once."""

    def __init__(self, spool: Spool, packing: Packing) -> None:
        self._spool, self._packing = spool, packing
        self._sifted = np.empty(0, np.uint64)
        self._fresh: list[UInt64Array] = []
        self._count = 0

    def add(self, packed: UInt64Array) -> None:
        self._fresh.append(packed)
        self._count += len(packed)
        if self._count > _CANDIDATES_GATHERED:
            fresh = unique(np.concatenate(self._fresh))
            self._sifted = unique(np.concatenate([self._sifted, sifted(self._spool, fresh, self._packing)]))
            self._fresh, self._count = [], 0

    def result(self) -> UInt64Array:
        """Return the candidates, ascending."""
        return unique(np.concatenate([self._sifted, *self._fresh]))


def _verify_task(spool: dict[str, Any], sources: list[str], low: int, high: int, out: str) -> int:
    """Compare the pixels of the candidates from `low` to below `high`."""
    pixels = Spool.from_json(spool)
    found = overlaps(pixels, [Path(source) for source in sources], low, high)
    save_array(Path(out), found)
    return len(found)


def overlaps(spool: Spool, candidate_files: Sequence[Path], low: int, high: int) -> UInt64Array:
    """Return the verified candidates from `low` to below `high`, of all candidate files together, packed, ascending."""
    slices = [np.empty(0, np.uint64)]
    for file in candidate_files:
        packed = np.asarray(np.load(file, mmap_mode="r"))
        begin, end = np.searchsorted(packed, np.array([low, high], np.uint64))
        slices.append(packed[begin:end])
    return verify(spool, unique(np.concatenate(slices)), Packing(len(spool), spool.size_px))


def _cuts(files: Sequence[Path]) -> list[int]:
    """Return where to cut the candidates of all files, ascending, into ranges of about _CANDIDATES_PER_VERIFY."""
    sorted_files = [np.load(file, mmap_mode="r") for file in files]
    total = sum(len(packed) for packed in sorted_files)
    sample = np.sort(np.concatenate([packed[::_SAMPLE_STEP] for packed in sorted_files]))
    pieces = max(1, -(-total // _CANDIDATES_PER_VERIFY))
    inner = np.unique(sample[np.arange(1, pieces) * len(sample) // pieces])
    return [0, *inner.tolist(), 2**64 - 1]
