"""What the data card says, as numbers: counted from the manifest and the tables of a prepared data set."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sentinode.manifests import DatasetManifest

GROUP_BOUNDS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025)
SLIDE_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
EXAMPLES_PER_REASON = 5
LARGEST_GROUPS = 10

FloatArray = npt.NDArray[np.float64]
StrArray = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Rows:
    """The columns of index.parquet that the card needs, as arrays of one length.

    Attributes
    ----------
    ids, splits, groups : ndarray of str
    slides, centres : ndarray of str or None
    labels : ndarray of int64; 0, 1, or -1 where there is none
    folds : ndarray of int64; -1 where there is none
    tissue : ndarray of float64, 0..1; NaN where unknown
    """

    ids: StrArray
    splits: StrArray
    groups: StrArray
    slides: StrArray
    centres: StrArray
    labels: npt.NDArray[np.int64]
    folds: npt.NDArray[np.int64]
    tissue: FloatArray

    @classmethod
    def of(cls, index: pa.Table) -> "Rows":
        """Take them from a table of INDEX_SCHEMA."""

        def texts(name: str) -> StrArray:
            return np.asarray([*index[name].to_pylist(), None], object)[:-1]

        def numbers(name: str) -> npt.NDArray[np.int64]:
            return np.asarray(index[name].fill_null(-1).to_numpy(), np.int64)

        return cls(
            ids=texts("id"),
            splits=texts("split"),
            groups=texts("group"),
            slides=texts("slide"),
            centres=texts("centre"),
            labels=numbers("label"),
            folds=numbers("fold"),
            tissue=np.asarray(index["tissue_fraction"].fill_null(float("nan")).to_numpy(), np.float64),
        )


def count_classes(labels: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    """Return how many labels are normal, metastatic and unknown (-1)."""
    normal, metastatic, unlabelled = (int((labels == label).sum()) for label in (0, 1, -1))
    return normal, metastatic, unlabelled


@dataclass(frozen=True)
class Balance:
    """Classes in one share of the data set. `prevalence`: 0..1 of the labelled rows; `difference`: to the whole, 0..1; None without labels."""

    name: str
    rows: int
    normal: int
    metastatic: int
    unlabelled: int
    groups: int
    prevalence: float | None
    difference: float | None = None


def balance(name: str, normal: int, metastatic: int, unlabelled: int, groups: int, whole: Balance | None = None) -> Balance:
    """Make one line of a table of classes; `whole`: what it is compared with."""
    labelled = normal + metastatic
    prevalence = metastatic / labelled if labelled else None
    difference = None if whole is None or prevalence is None or whole.prevalence is None else prevalence - whole.prevalence
    return Balance(name, labelled + unlabelled, normal, metastatic, unlabelled, groups, prevalence, difference)


def split_balance(manifest: DatasetManifest) -> tuple[list[Balance], Balance]:
    """Return the classes of each split, and of the whole."""
    counts = manifest.counts.values()
    normal, metastatic, unlabelled = (sum(getattr(one, name) for one in counts) for name in ("normal", "metastatic", "unlabelled"))
    whole = balance("whole", normal, metastatic, unlabelled, manifest.split.groups)
    return [balance(name, one.normal, one.metastatic, one.unlabelled, one.groups, whole) for name, one in manifest.counts.items()], whole


def fold_balance(rows: Rows) -> list[Balance]:
    """Return the classes of each fold, compared with all folds together; none without folds."""

    def count(name: str, chosen: npt.NDArray[np.bool_], whole: Balance | None) -> Balance:
        return balance(name, *count_classes(rows.labels[chosen]), len(set(rows.groups[chosen])), whole)

    whole = count("all folds", rows.folds >= 0, None)
    return [count(str(fold), rows.folds == fold, whole) for fold in np.unique(rows.folds[rows.folds >= 0])]


@dataclass(frozen=True)
class SizeClass:
    """Groups of similar size: how many, and how many patches they hold."""

    name: str
    groups: int
    rows: int


def size_classes(sizes: Iterable[int], bounds: Sequence[int]) -> list[SizeClass]:
    """Sort group sizes into classes that start at `bounds`; from the first to the last that occurs."""
    array = np.asarray(list(sizes), np.int64)
    table = []
    for low, following in zip(bounds, (*bounds[1:], None), strict=True):
        inside = array[(array >= low) & (array < (following or np.inf))]
        text = f"{low:,}+" if following is None else f"{low:,}" if following == low + 1 else f"{low:,}–{following - 1:,}"
        table.append(SizeClass(text, len(inside), int(inside.sum())))
    used = [number for number, one in enumerate(table) if one.groups]
    return table[used[0] : used[-1] + 1] if used else []


@dataclass(frozen=True)
class Group:
    """One group of several patches."""

    name: str
    rows: int
    normal: int
    metastatic: int
    splits: tuple[str, ...]


def largest_groups(rows: Rows) -> list[Group]:
    """Return the largest groups of several patches, largest first, ties by name."""
    sizes = Counter(rows.groups)
    chosen = sorted((name for name, size in sizes.items() if size > 1), key=lambda name: (-sizes[name], name))[:LARGEST_GROUPS]
    members = [np.flatnonzero(rows.groups == name) for name in chosen]
    return [
        Group(name, len(own), *count_classes(rows.labels[own])[:2], tuple(sorted(set(rows.splits[own]))))
        for name, own in zip(chosen, members, strict=True)
    ]


def grouped_by(manifest: DatasetManifest, rows: Rows) -> str:
    """Return what makes a group of this data set: slide, pixels, or nothing where each patch is one."""
    if manifest.split.method in ("random", "all"):
        return "nothing"
    return "slide" if (rows.groups == rows.slides).all() else "pixels"


@dataclass(frozen=True)
class SlideCounts:
    """Slides that have patches in one split, and how many patches they have there."""

    split: str
    slides: int
    patches: int
    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class SlideFacts:
    """The slides of a data set that knows them.

    Attributes
    ----------
    slides : int
    unknown : int
        Patches without a slide.
    straddling : int
        Slides with patches in more than one split.
    splits : list of SlideCounts
    sizes : list of SizeClass
        Over all slides.
    """

    slides: int
    unknown: int
    straddling: int
    splits: list[SlideCounts]
    sizes: list[SizeClass]


def slide_facts(rows: Rows, splits: Iterable[str]) -> SlideFacts | None:
    """Count slides; None where none is known."""
    known = np.asarray([slide is not None for slide in rows.slides], np.bool_)
    if not known.any():
        return None
    per_split = {split: Counter(rows.slides[known & (rows.splits == split)]) for split in splits}
    seen = Counter(slide for counts in per_split.values() for slide in counts)
    table = []
    for split, counts in per_split.items():
        sizes = np.asarray(list(counts.values()) or [0], np.int64)
        table.append(SlideCounts(split, len(counts), int(sizes.sum()), int(sizes.min()), float(np.median(sizes)), int(sizes.max())))
    sizes_of_all = size_classes(Counter(rows.slides[known]).values(), SLIDE_BOUNDS)
    return SlideFacts(len(seen), int((~known).sum()), sum(times > 1 for times in seen.values()), table, sizes_of_all)


def centre_table(rows: Rows, splits: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Return (medical centre, its patches in each split), sorted; none where no centre is known."""
    names = sorted({centre for centre in rows.centres if centre is not None})
    counts = Counter(zip(rows.centres, rows.splits, strict=True))
    return [(name, [counts[name, split] for split in splits]) for name in names]


@dataclass(frozen=True)
class Pair:
    """Two patches that share pixels; offsets as in OVERLAP_SCHEMA, `shared`: the common part's share of a patch, 0..1."""

    first_id: str
    second_id: str
    dy_px: int
    dx_px: int
    shared: float


@dataclass(frozen=True)
class OverlapFacts:
    """The pairs of patches that share pixels.

    Attributes
    ----------
    pairs : int
    patches : int
        That are in some pair.
    straddling : int
        Pairs with their patches in different splits.
    shared : ndarray of float64, shape (pairs,)
        The common part's share of a patch, 0..1.
    example : Pair or None
        The one with the median share, the smallest ids where several have it.
    """

    pairs: int
    patches: int
    straddling: int
    shared: FloatArray
    example: Pair | None


def overlap_facts(overlaps: pa.Table, index: pa.Table, side_px: int) -> OverlapFacts:
    """Count the rows of an OVERLAP_SCHEMA table; `side_px`: side of the patches."""
    dy, dx = (np.asarray(overlaps[name].to_numpy(), np.int64) for name in ("dy_px", "dx_px"))
    shared = (side_px - np.abs(dy)) * (side_px - np.abs(dx)) / side_px**2
    ends = [pc.index_in(overlaps[name].combine_chunks(), index["id"].combine_chunks()) for name in ("first_id", "second_id")]
    splits = [index["split"].combine_chunks().take(end) for end in ends]
    straddling = pc.sum(pc.not_equal(*splits)).as_py() or 0
    patches = len(np.unique(np.concatenate([end.to_numpy(zero_copy_only=False) for end in ends])))
    example = None
    if len(shared):
        middle = np.partition(shared, len(shared) // 2)[len(shared) // 2]
        same = overlaps.take(pa.array(np.flatnonzero(shared == middle)))
        row = same.take(pc.sort_indices(same, [("first_id", "ascending"), ("second_id", "ascending")])[:1]).to_pylist()[0]
        example = Pair(**row, shared=float(middle))
    return OverlapFacts(len(shared), patches, straddling, shared, example)


@dataclass(frozen=True)
class Refusals:
    """Inputs refused for one reason; `examples`: (id, path, detail), each None where unknown."""

    reason: str
    count: int
    examples: list[tuple[str | None, str | None, str | None]]


def refusals(manifest: DatasetManifest, rejected: pa.Table) -> list[Refusals]:
    """Return the refusals of each reason with the first few of them, in order of reason."""
    found = []
    for reason, count in sorted(manifest.rejected.items()):
        examples = rejected.filter(pc.equal(rejected["reason"], reason))[:EXAMPLES_PER_REASON].to_pylist()
        found.append(Refusals(reason, count, [(one["id"], one["path"], one["detail"]) for one in examples]))
    return found


def count_flags(index: pa.Table) -> dict[str, int]:
    """Flag -> accepted patches that carry it, `pale` and `duplicate` first, whether they occur or not."""
    found = Counter(pc.list_flatten(index["flags"]).to_pylist())
    return {flag: found[flag] for flag in ("pale", "duplicate", *sorted(set(found) - {"pale", "duplicate"}))}


@dataclass(frozen=True)
class Tissue:
    """Tissue fraction of the patches of one class.

    Attributes
    ----------
    patches : int
        Those whose tissue fraction is known.
    mean, median : float, 0..1
    hardly : float, 0..1
        Share of the patches with a tissue fraction under 0.1.
    histogram : ndarray of float64, shape (20,)
        Share of the patches in each bin over 0..1.
    """

    patches: int
    mean: float
    median: float
    hardly: float
    histogram: FloatArray


def tissue_by_label(rows: Rows) -> dict[int, Tissue]:
    """Return the tissue fractions of each label that occurs; -1 stands for no label."""
    table = {}
    for label in (0, 1, -1):
        values = rows.tissue[(rows.labels == label) & ~np.isnan(rows.tissue)]
        if len(values):
            histogram = np.histogram(values, 20, (0, 1))[0] / len(values)
            table[label] = Tissue(len(values), float(values.mean()), float(np.median(values)), float((values < 0.1).mean()), histogram)
    return table
