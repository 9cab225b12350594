"""The overlap search over all blocks, as two stages of Ray tasks.

    anchors of all blocks, cut by hash -> candidates-*.npy -> merged, cut by first patch -> overlaps-*.npy -> Overlaps

A true pair has anchors in every hash range, so it is compared in the second stage, once. Each task writes one file in the work folder; a repeated
search in the same pixels takes the files that are there.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.anchors import UInt64Array, guards_of, places_of
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
    candidate_files = [work / f"candidates-{key}-{part:05d}-of-{parts:05d}.npy" for part in range(parts)]
    shared = {"spool": spool.to_json()}
    _run("overlap", _candidates_task, candidate_files, [{**shared, "part": part, "part_bits": part_bits} for part in range(parts)], progress, workers)
    cuts = _cuts(candidate_files)
    pieces = len(cuts) - 1
    overlap_files = [work / f"overlaps-{key}-{piece:05d}-of-{pieces:05d}-parts-{parts}.npy" for piece in range(pieces)]
    arguments = [{**shared, "sources": [str(file) for file in candidate_files], "low": low, "high": high} for low, high in pairwise(cuts)]
    _run("verify", _verify_task, overlap_files, arguments, progress, workers)
    return packing.unpack(np.concatenate([np.load(file) for file in overlap_files]))


def _delete_other_searches(work: Path, key: str) -> None:
    """Delete the files of searches in other pixels."""
    for kind in ("candidates", "overlaps"):
        for file in work.glob(f"{kind}-*.npy"):
            if not file.name.startswith(f"{kind}-{key}-"):
                file.unlink(missing_ok=True)


def _run(
    stage: str, function: Callable[..., int], files: Sequence[Path], arguments: Sequence[dict[str, Any]], progress: Progress, workers: int | None
) -> None:
    """Make the files that are missing."""
    missing = [{**arguments, "out": str(file)} for file, arguments in zip(files, arguments, strict=True) if not file.exists()]
    run_tasks(stage, function, missing, progress, where=files[0].parent, workers=workers, unit="parts", done=len(files) - len(missing))


def _candidates_task(spool: dict[str, Any], part: int, part_bits: int, out: str) -> int:
    """Join the anchors of one hash range."""
    pixels = Spool.from_json(spool)
    sources = [anchors_path(Path(out).parent, block) for block in range(len(pixels.rows))]
    found = candidates(pixels, sources, part, part_bits)
    save_array(Path(out), found)
    return len(found)


def candidates(spool: Spool, anchor_files: Sequence[Path], part: int = 0, part_bits: int = 0) -> UInt64Array:
    """Return the candidates of one of 2^part_bits equal hash ranges, packed, ascending.

    Parameters
    ----------
    spool : Spool
    anchor_files : sequence of Path
        What `anchors` returned for each block of the spool, in order, as .npy files.
    part, part_bits : int
        At most 16 bits. Within the part, anchors are joined in smaller ranges that stay in a core's cache.
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
        for packed in join(hashes, places, guards, packing, range_bits, seen):
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
