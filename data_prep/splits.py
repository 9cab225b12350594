"""Dealing groups to splits and folds so that no group straddles and each share looks like the whole."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.spool import IntArray

SPLITS = ("train", "val", "test")
TOLERANCE = 0.02
"""Prevalence, size and group-size mix of a split may differ by this much from what was asked before a note says so."""
_SIZE_CLASSES = ((1, 1, "alone"), (2, 7, "in groups of 2 to 7"), (8, None, "in groups of 8 or more"))

StrArray = npt.NDArray[np.str_]
Counts = tuple[int, int]


@dataclass(frozen=True)
class Dealt:
    """Where every patch went.

    Attributes
    ----------
    split : ndarray of str, shape (n,)
        train, val or test.
    fold : ndarray of int64, shape (n,)
        -1 for none.
    notes : list of str
        What is not as asked, and why.
    """

    split: StrArray
    fold: IntArray
    notes: list[str]


def deal_groups(groups: Mapping[str, Counts], ratios: Sequence[float], seed: int) -> dict[str, int]:
    """Deal groups to shares, largest first, each to the share that lacks most of what the group brings.

    Parameters
    ----------
    groups : mapping of str to (int, int)
        Group -> rows of class 0 and of class 1.
    ratios : sequence of float
        Size of each share; they sum to 1.
    seed : int
        Decides the order among groups of one size, and ties.

    Returns
    -------
    dict of str to int
        Group -> index into `ratios`. Depends on nothing but the arguments, in particular not on the order of `groups`.

    Notes
    -----
    The lack of a share is counted per class against the rows dealt *so far*, not against the final target. So the large groups, which are mostly
    tumour, are spread in proportion among themselves before the small ones come; against the final target they would all go to the largest share.
    """
    order = sorted(groups, key=lambda group: (-sum(groups[group]), _digest(seed, group)))
    seen_0, seen_1 = 0, 0
    have = [[0, 0] for _ in ratios]
    dealt = {}
    for group in order:  # as many as patches: written out for both classes
        count_0, count_1 = groups[group]
        seen_0, seen_1 = seen_0 + count_0, seen_1 + count_1
        scores = [(ratio * seen_0 - own[0]) * count_0 + (ratio * seen_1 - own[1]) * count_1 for ratio, own in zip(ratios, have, strict=True)]
        best = max(scores)
        chosen = scores.index(best)
        if scores.count(best) > 1:
            tied = [share for share, score in enumerate(scores) if score == best]
            chosen = max(tied, key=lambda share: _digest(seed, f"{group}:{share}"))
        have[chosen][0] += count_0
        have[chosen][1] += count_1
        dealt[group] = chosen
    return dealt


def deal(labels: IntArray, groups: StrArray, ratios: tuple[float, float, float], seed: int, folds: int | None = None) -> Dealt:
    """Deal all patches to train, val and test, and those of train and val to folds.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,), 0 or 1
    groups : ndarray of str, shape (n,)
        Group of each patch.
    ratios : tuple of float
        Shares of train, val and test.
    seed : int
    folds : int, optional
        Number of folds.
    """
    names, member, counts = _count(labels, groups)
    share_of = deal_groups(counts, ratios, seed)
    share = np.asarray([share_of[name] for name in names], np.int64)[member]
    split = np.asarray(SPLITS)[share]
    notes = _notes(names, member, counts, share, dict(zip(SPLITS, ratios, strict=True)), "split")
    fold, fold_notes = deal_folds(labels, groups, split, seed, folds)
    return Dealt(split, fold, notes + fold_notes)


def deal_folds(labels: IntArray, groups: StrArray, split: StrArray, seed: int, folds: int | None) -> tuple[IntArray, list[str]]:
    """Deal the patches of train and val to folds; returns the fold of each patch, int64 (n,), -1 for none, and notes."""
    fold = np.full(len(split), -1, np.int64)
    rest = np.isin(split, ("train", "val"))
    if folds is None or not rest.any():
        return fold, []
    names, member, counts = _count(labels[rest], groups[rest])
    fold_of = deal_groups(counts, [1 / folds] * folds, seed)
    fold[rest] = np.asarray([fold_of[name] for name in names], np.int64)[member]
    return fold, _notes(names, member, counts, fold[rest], {str(number): 1 / folds for number in range(folds)}, "fold")


def straddling(groups: StrArray, split: StrArray) -> list[str]:
    """Return the groups that have patches in more than one split, sorted."""
    pairs = np.unique(np.stack([groups, split], axis=1), axis=0)
    names, counts = np.unique(pairs[:, 0], return_counts=True)
    return [str(name) for name in names[counts > 1]]


def _count(labels: IntArray, groups: StrArray) -> tuple[list[str], IntArray, dict[str, Counts]]:
    """Return the groups sorted by name, the number of each patch's group among them, and each group's rows per class."""
    names, member = np.unique(groups, return_inverse=True)
    table = np.zeros((len(names), 2), np.int64)
    np.add.at(table, (member, labels), 1)
    listed = [str(name) for name in names]
    return listed, member.astype(np.int64), {name: (zero, one) for name, (zero, one) in zip(listed, table.tolist(), strict=True)}


def _digest(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _notes(names: list[str], member: IntArray, counts: Mapping[str, Counts], share: IntArray, ratios: Mapping[str, float], what: str) -> list[str]:
    """Say where the shares are not as asked. `member` and `share` are per patch; `names` and `counts` per group."""
    rows = np.asarray([counts[name] for name in names], np.float64).reshape(-1, 2)
    sizes, total = rows.sum(axis=1), float(rows.sum())
    shares = np.zeros(len(names), np.int64)
    shares[member] = share
    largest = int(sizes.argmax())
    reason = f"the largest of {len(sizes)} groups holds {sizes[largest] / total:.1%} of {total:.0f} rows"
    notes = []
    for number, (name, ratio) in enumerate(ratios.items()):
        if ratio == 0:
            continue
        if sizes[largest] > ratio * total:
            notes.append(
                f"{what} {name}: group {names[largest]} alone ({sizes[largest]:.0f} rows) is larger than its share of {ratio * total:.0f} rows"
            )
        inside = shares == number
        size = sizes[inside].sum()
        if not size:
            notes.append(f"{what} {name} is empty: {reason}")
            continue
        if not rows[inside].sum(axis=0).all() and rows.sum(axis=0).all():
            notes.append(f"{what} {name} holds patches of one class only: {reason}")
        traits = _traits(rows, sizes, inside)
        if apart := [f"{own:.1%} are {text} (of all {whole:.1%})" for text, own, whole in traits if abs(own - whole) > TOLERANCE]:
            notes.append(f"{what} {name}: of its rows {', '.join(apart)}; {reason}")
        if abs(size / total - ratio) > TOLERANCE:
            notes.append(f"{what} {name} holds {size / total:.1%} of the rows, {ratio:.1%} was asked; {reason}")
    return notes


def _traits(rows: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], inside: npt.NDArray[np.bool_]) -> list[tuple[str, float, float]]:
    """Return (name, share of the rows inside, share of all rows) of what must agree: tumour, and each class of group size."""
    traits = [("metastatic", rows[inside, 1].sum() / sizes[inside].sum(), rows[:, 1].sum() / sizes.sum())]
    for low, high, name in _SIZE_CLASSES:
        has = (sizes >= low) & (sizes <= (high or np.inf))
        traits.append((name, sizes[has & inside].sum() / sizes[inside].sum(), sizes[has].sum() / sizes.sum()))
    return [(name, float(own), float(whole)) for name, own, whole in traits]
