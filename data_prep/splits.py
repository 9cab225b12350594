"""Dealing groups to splits and folds so that no group straddles and each share looks like the whole."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.rejects import DecodedPatch

SPLITS = ("train", "val", "test")
TOLERANCE = 0.02
"""Prevalence, size and group-size mix of a split may differ by this much from what was asked before a note says so."""
_SIZE_CLASSES = ((1, 1, "alone"), (2, 7, "in groups of 2 to 7"), (8, None, "in groups of 8 or more"))

Counts = tuple[int, int]


@dataclass(frozen=True)
class Dealt:
    """Where every patch went.

    Attributes
    ----------
    split : dict of str to str
        Group -> train, val or test.
    fold : dict of str to int
        Group -> fold, for the groups of train and val; empty without folds.
    notes : list of str
        What is not as asked, and why.
    """

    split: dict[str, str]
    fold: dict[str, int]
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
    seen = [0, 0]
    have = [[0, 0] for _ in ratios]
    dealt = {}
    for group in order:
        counts = groups[group]
        seen = [seen[c] + counts[c] for c in (0, 1)]
        scores = [sum((ratio * seen[c] - own[c]) * counts[c] for c in (0, 1)) for ratio, own in zip(ratios, have, strict=True)]
        best = max(scores)
        tied = [share for share, score in enumerate(scores) if score == best]
        chosen = tied[0] if len(tied) == 1 else max(tied, key=lambda share: _digest(seed, f"{group}:{share}"))
        have[chosen] = [have[chosen][c] + counts[c] for c in (0, 1)]
        dealt[group] = chosen
    return dealt


def deal(patches: Sequence[DecodedPatch], groups: Sequence[str], ratios: tuple[float, float, float], seed: int, folds: int | None = None) -> Dealt:
    """Deal all patches to train, val and test, and those of train and val to folds.

    Parameters
    ----------
    patches : sequence of DecodedPatch
    groups : sequence of str
        Group of each patch.
    ratios : tuple of float
        Shares of train, val and test.
    seed : int
    folds : int, optional
        Number of folds.
    """
    labels = np.asarray([patch.label for patch in patches], np.int64)
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    table = np.zeros((len(names), 2), np.int64)
    np.add.at(table, (member, labels), 1)
    counts = {str(name): (int(zero), int(one)) for name, (zero, one) in zip(names, table, strict=True)}
    split = {group: SPLITS[share] for group, share in deal_groups(counts, ratios, seed).items()}
    notes = _notes(counts, split, dict(zip(SPLITS, ratios, strict=True)), "split")
    fold: dict[str, int] = {}
    if folds is not None:
        rest = {group: counts[group] for group in counts if split[group] != "test"}
        fold = deal_groups(rest, [1 / folds] * folds, seed)
        notes += _notes(rest, {group: str(number) for group, number in fold.items()}, {str(k): 1 / folds for k in range(folds)}, "fold")
    return Dealt(split, fold, notes)


def _digest(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _notes(counts: Mapping[str, Counts], share_of: Mapping[str, str], ratios: Mapping[str, float], what: str) -> list[str]:
    """Say where a share differs by more than the tolerance from the whole, and what kept the dealing from doing better."""
    rows = np.asarray([counts[group] for group in counts], np.float64).reshape(-1, 2)
    sizes = rows.sum(axis=1)
    shares = np.asarray([share_of[group] for group in counts])
    total = sizes.sum()
    if not total:
        return []
    reason = f"the largest of {len(sizes)} groups holds {sizes.max() / total:.1%} of {total:.0f} rows"
    notes = []
    for name, ratio in ratios.items():
        if ratio == 0:
            continue
        inside = shares == name
        size = sizes[inside].sum()
        if not size:
            notes.append(f"{what} {name} is empty: {reason}")
            continue
        if not rows[inside].sum(axis=0).all() and rows.sum(axis=0).all():
            notes.append(f"{what} {name} holds patches of one class only: {reason}")
        for text, own, whole in _traits(rows, sizes, inside):
            if abs(own - whole) > TOLERANCE:
                notes.append(f"{what} {name}: {own:.1%} of the rows are {text}, {whole:.1%} of the whole; {reason}")
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
