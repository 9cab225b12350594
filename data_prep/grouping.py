"""Which patches belong together, and what the splits then keep apart."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.checks import equal_runs
from data_prep.overlap import Overlaps, connected_groups
from data_prep.splits import straddling
from sentinode.dataset import OVERLAP_SCHEMA
from sentinode.manifests import LeakLevel, SplitMethod

StrArray = npt.NDArray[np.str_]
_SHOWN_GROUPS = 5


@dataclass(frozen=True)
class Grouping:
    """The group of each patch.

    Attributes
    ----------
    groups : ndarray of str, shape (n,)
        Name of the slide, or the smallest id of those that share pixels; a patch alone has its own id. Patches with the same pixels, where those are
        kept, are always in one group (of slides: the one whose name comes first).
    by : {"slide", "pixels", "nothing"}
        What makes a group.
    overlaps : pyarrow.Table or None
        `sentinode.dataset.OVERLAP_SCHEMA`, sorted; None where overlaps were not searched for.
    """

    groups: StrArray
    by: str
    overlaps: pa.Table | None


def grouping_kind(method: SplitMethod, *, slides_known: bool) -> str:
    """Return by what a split method groups: slide, pixels or nothing. The source's own splits are grouped by slide where all slides are known."""
    if method == "predefined":
        return "slide" if slides_known else "pixels"
    return {"overlap": "pixels", "slide": "slide", "random": "nothing", "all": "nothing"}[method]


def group_patches(patches: pa.Table, kind: str, find: Callable[[], pa.Table]) -> Grouping:
    """Group patches.

    Parameters
    ----------
    patches : pyarrow.Table
        Accepted patches, sorted by id, with columns id, slide, pixel_sha1.
    kind : {"slide", "pixels", "nothing"}
    find : callable
        Returns which patches share pixels, OVERLAP_SCHEMA; called for `pixels` only.
    """
    ids = _strings(patches["id"])
    overlaps, names, edges = None, ids, []
    if kind == "slide":
        names = _strings(patches["slide"])
        edges += _chains(patches["slide"])
    elif kind == "pixels":
        overlaps = find()
        first, second = (pc.index_in(overlaps[name], value_set=patches["id"].combine_chunks()) for name in ("first_id", "second_id"))
        both = pc.and_(pc.is_valid(first), pc.is_valid(second))  # refused patches glue nothing: they are not in the data set
        overlaps = overlaps.filter(both)
        edges.append(np.stack([column.filter(both).to_numpy().astype(np.int64) for column in (first, second)]))
    edges += _chains(patches["pixel_sha1"])  # also where they are too plain to count as an overlap
    first, second = np.concatenate(edges, axis=1) if edges else np.empty((2, 0), np.int64)
    component = connected_groups(len(ids), first, second)
    return Grouping(_smallest(names, component), kind, overlaps)


def _chains(column: pa.ChunkedArray) -> list[npt.NDArray[np.int64]]:
    """Return edges that connect the rows of equal values, int64 (2, k) each."""
    return [np.stack([run[:-1], run[1:]]) for run in equal_runs(column)]


def _smallest(names: StrArray, component: npt.NDArray[np.int64]) -> StrArray:
    """Return for each row the smallest name in its component."""
    order = np.lexsort((names, component))
    first = order[np.searchsorted(component[order], component)]
    return names[first]


def overlap_table(found: Overlaps, positions: npt.NDArray[np.int64], ids: StrArray, size_px: int) -> pa.Table:
    """Return overlaps as OVERLAP_SCHEMA, sorted: by id instead of place, one row per pair.

    Parameters
    ----------
    found : Overlaps
        By place in the spool, with all offsets.
    positions : ndarray of int64, shape (n,)
        Place in the spool of each accepted patch.
    ids : ndarray of str, shape (n,)
        Their ids, ascending.
    size_px : int
        Side of the patches.
    """
    rank = np.full(max(int(positions.max(initial=-1)), int(found.first.max(initial=-1)), int(found.second.max(initial=-1))) + 1, -1, np.int64)
    rank[positions] = np.arange(len(positions))
    first, second = rank[found.first], rank[found.second]
    accepted = (first >= 0) & (second >= 0)
    first, second, dy, dx = first[accepted], second[accepted], found.dy[accepted], found.dx[accepted]
    swap = first > second
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    dy, dx = np.where(swap, -dy, dy), np.where(swap, -dx, dx)
    common = (size_px - np.abs(dy)) * (size_px - np.abs(dx))
    order = np.lexsort((dx, dy, -common, second, first))
    first, second, dy, dx = first[order], second[order], dy[order], dx[order]
    is_best = np.concatenate([[True], (first[1:] != first[:-1]) | (second[1:] != second[:-1])])[: len(first)]
    columns = [ids[first[is_best]], ids[second[is_best]], dy[is_best].astype(np.int16), dx[is_best].astype(np.int16)]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, OVERLAP_SCHEMA, strict=True)], schema=OVERLAP_SCHEMA)


def leak_level(method: SplitMethod, grouping: Grouping, split: StrArray) -> tuple[LeakLevel, list[str]]:
    """Return what the splits keep apart, measured where the source made them, and notes."""
    if method == "all":
        return "unsplit", []
    if method == "random":
        return "none", []
    level: LeakLevel = "slide" if grouping.by == "slide" else "pixels"
    if method == "predefined" and (names := straddling(grouping.groups, split)):
        shown = ", ".join(names[:_SHOWN_GROUPS]) + (", ..." if len(names) > _SHOWN_GROUPS else "")
        what = "slides (or slides with identical patches)" if grouping.by == "slide" else "groups of patches that share pixels"
        return "none", [f"the source's own splits leak: {len(names)} {what} stand in more than one of them ({shown})"]
    return level, []


def _strings(column: pa.ChunkedArray) -> StrArray:
    return np.asarray(column.to_pylist(), dtype=np.str_)
