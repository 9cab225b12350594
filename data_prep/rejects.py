"""Why an input was refused: the reasons, and the checks that need all decoded patches at once."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sentinode.dataset import REJECTED_SCHEMA


class RejectReason(StrEnum):
    """Values of rejected.parquet's `reason` besides those of `sentinode.errors.PatchErrorCode`. Stable."""

    MISSING = "missing"
    """The labels file names an id that has no image file."""
    NO_LABEL = "no_label"
    """An image file that the labels file does not name."""
    BAD_LABEL = "bad_label"
    """The label is neither 0 nor 1, or the line has the wrong number of fields."""
    DUPLICATE_ID = "duplicate_id"
    """The id stands on several lines of the labels file, or several image files have it: all of them are refused."""
    NO_SLIDE = "no_slide"
    """Splitting by slide, and the slides file does not name this id."""
    UNREADABLE = "unreadable"
    """The operating system could not read the file."""
    BLANK = "blank"
    """Black or white all over."""
    ID_MISMATCH = "id_mismatch"
    """Ids of this source are the SHA-1 of the pixels, and this one is not."""
    DUPLICATE_PIXELS = "duplicate_pixels"
    """Same pixels and label as another id; the smallest id is kept."""
    LABEL_CONFLICT = "label_conflict"
    """Same pixels as another id but another label: all of them are refused."""


@dataclass(frozen=True, order=True)
class Reject:
    """One refused input. `path` is relative to the source folder; `id` and `path` are None where unknown."""

    reason: str
    id: str | None
    path: str | None
    detail: str


@dataclass(frozen=True)
class DecodedPatch:
    """What is known of a decoded patch without its pixels.

    Attributes
    ----------
    position : int
        Place in the spool.
    id, path, slide : str
        As in the labels; `slide` None where unknown.
    label : int
        0 or 1.
    pixel_sha1 : str
        SHA-1 of the RGB pixels, 40 hex digits.
    tissue_fraction : float
        0..1.
    flags : tuple of str
        `pale`.
    sums, sums_of_squares : tuple of int
        Over all pixels, per channel, 8-bit values.
    """

    position: int
    id: str
    label: int
    path: str
    slide: str | None
    pixel_sha1: str
    tissue_fraction: float
    flags: tuple[str, ...]
    sums: tuple[int, int, int]
    sums_of_squares: tuple[int, int, int]


def check_all(patches: Sequence[DecodedPatch], check_ids: Literal["auto", "always", "never"]) -> tuple[list[DecodedPatch], list[Reject]]:
    """Apply the checks across patches: ids against pixels first, then equal pixels.

    Parameters
    ----------
    patches : sequence of DecodedPatch
    check_ids : {"auto", "always", "never"}
        `auto` compares ids where more than half of them are the SHA-1 of their pixels, as in the Kaggle set; elsewhere ids are only names.

    Returns
    -------
    list of DecodedPatch sorted by id, and list of Reject
    """
    rejects = []
    matching = sum(patch.id == patch.pixel_sha1 for patch in patches)
    kept = list(patches)
    if check_ids == "always" or (check_ids == "auto" and matching * 2 > len(patches)):
        kept = [patch for patch in patches if patch.id == patch.pixel_sha1]
        rejects += [
            Reject(RejectReason.ID_MISMATCH, patch.id, patch.path, f"SHA-1 of the pixels is {patch.pixel_sha1}")
            for patch in patches
            if patch.id != patch.pixel_sha1
        ]
    twins: dict[str, list[DecodedPatch]] = defaultdict(list)
    for patch in sorted(kept, key=lambda patch: patch.id):
        twins[patch.pixel_sha1].append(patch)
    accepted = []
    for same in twins.values():
        if len({patch.label for patch in same}) > 1:
            for patch in same:
                other = next(twin for twin in same if twin.label != patch.label)
                detail = f"label {patch.label}, but {other.id} has the same pixels and label {other.label}"
                rejects.append(Reject(RejectReason.LABEL_CONFLICT, patch.id, patch.path, detail))
            continue
        accepted.append(same[0])
        rejects += [Reject(RejectReason.DUPLICATE_PIXELS, patch.id, patch.path, f"same pixels as {same[0].id}, which is kept") for patch in same[1:]]
    return sorted(accepted, key=lambda patch: patch.id), rejects


def count_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """Reason -> refused inputs, sorted by reason."""
    return dict(sorted(Counter(str(reject.reason) for reject in rejects).items()))


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write rejected.parquet (`sentinode.dataset.REJECTED_SCHEMA`), rows sorted."""
    ordered = sorted(rejects, key=lambda reject: (str(reject.reason), reject.id or "", reject.path or "", reject.detail))
    columns = {
        # A file name need not be UTF-8; Parquet strings must.
        "path": [reject.path and reject.path.encode("utf-8", "replace").decode() for reject in ordered],
        "id": [reject.id and reject.id.encode("utf-8", "replace").decode() for reject in ordered],
        "reason": [str(reject.reason) for reject in ordered],
        "detail": [reject.detail for reject in ordered],
    }
    pq.write_table(pa.table(columns, schema=REJECTED_SCHEMA), path)
