"""Why an input was refused, and the list of all that were."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from sentinode.dataset import REJECTED_SCHEMA


class RejectReason(StrEnum):
    """Values of rejected.parquet's `reason` besides those of `sentinode.errors.PatchErrorCode`. Stable."""

    MISSING = "missing"
    """The labels name an input that has no image file."""
    NO_LABEL = "no_label"
    """An image file that the labels file does not name."""
    BAD_LABEL = "bad_label"
    """The label is neither 0 nor 1, or the line has the wrong number of fields."""
    DUPLICATE_ID = "duplicate_id"
    """The id stands on several lines of the labels file, or several image files have it: all of them are refused."""
    NO_SLIDE = "no_slide"
    """Splitting by slide, and this input's slide is unknown."""
    NO_SPLIT = "no_split"
    """Keeping the source's own splits, and it gives none for this input."""
    UNREADABLE = "unreadable"
    """The system could not read the file, it is far too large for a patch, or its name cannot be kept."""
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


def count_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """Reason -> refused inputs, sorted by reason."""
    return dict(sorted(Counter(str(reject.reason) for reject in rejects).items()))


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    """Return the rows of rejected.parquet (`sentinode.dataset.REJECTED_SCHEMA`), sorted."""
    ordered = sorted(rejects, key=lambda reject: (str(reject.reason), reject.id or "", reject.path or "", reject.detail))
    columns = {
        # A file name need not be UTF-8; Parquet strings must.
        "path": [reject.path and reject.path.encode("utf-8", "replace").decode() for reject in ordered],
        "id": [reject.id and reject.id.encode("utf-8", "replace").decode() for reject in ordered],
        "reason": [str(reject.reason) for reject in ordered],
        "detail": [reject.detail for reject in ordered],
    }
    return pa.table(columns, schema=REJECTED_SCHEMA)
