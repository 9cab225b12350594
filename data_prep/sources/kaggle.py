"""The layout of Kaggle's Histopathologic Cancer Detection: `train/<id>.tif` and `train_labels.csv` with `id,label`.

The labels file is the source of truth; every disagreement with the folder becomes a reject.
"""

from collections.abc import Sequence
from typing import TypeVar

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import Source
from data_prep.sources.cells import Cells, Wanted, column_names
from data_prep.sources.entries import entry_table
from data_prep.sources.files import read_described
from data_prep.sources.listing import Listing, list_images, listed_source, repeated, stem_of
from data_prep.sources.slides import read_slides, slides_of
from data_prep.sources.text_table import read_text_table
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.locations import Location

LABELS_NAME = "train_labels.csv"
IMAGES_NAME = "train"

_T = TypeVar("_T")


def open_kaggle(config: PrepareConfig, where: Location, *, labels: Location | None = None, slides: Location | None = None) -> Source:
    """List the images and read the CSV files; no image is opened.

    Parameters
    ----------
    config : PrepareConfig
    where : Location
        Folder that holds `train_labels.csv` and the images in `train/` (with `labels` given also directly).
    labels : Location, optional
        Labels file with columns `id,label` instead of `<where>/train_labels.csv`.
    slides : Location, optional
        CSV file with columns `id,wsi`.

    Raises
    ------
    UsageError
        Something that must be there is missing, empty or unusable; the line says what was looked for.
    """
    labels = labels or where / LABELS_NAME
    slide_of, slides_content = read_slides(config, slides)
    content = read_described(labels, "labels file", "a CSV file with columns id,label; or name one with --labels")
    below = IMAGES_NAME if (where / IMAGES_NAME).is_dir() else ""
    listing = list_images(where, below, recursive=False)
    cells = read_text_table(content, Wanted(f"labels file {labels}", ("id", "label"), names=column_names(config)))
    if not len(cells):
        raise UsageError(f"labels file {labels}: no rows below the header")
    cells.refuse_long(cells.columns["id"], "id")
    prefix = f"{below}/" if below else ""
    ids, labels_of_ids, paths, rejects = _join(cells, listing, prefix)
    if not ids:
        cells.refuse_if_all_labels_are_bad(rejects)
        _refuse_if_all_files_are_missing(cells, rejects, f"{where / below}; the first image is {listing.names[0].removeprefix(prefix)!r}")
    entries = entry_table(id=ids, label=labels_of_ids, path=paths, slide=slides_of(ids, slide_of, slides))
    return listed_source("kaggle", where, listing, entries, rejects, [content, slides_content], labels=labels, slides=slides)


def _join(cells: Cells, listing: Listing, prefix: str) -> tuple[list[str], list[int], list[str], list[Reject]]:
    """Match lines and files by id, the name of a file without `prefix` and suffix; return ids, labels and paths, and what does not match."""
    paths = listing.names
    stems = [stem_of(path)[len(prefix) :] for path in paths]
    path_of = dict(zip(stems, paths, strict=True))
    refused_files = {reject.id for reject in listing.refused}
    # Lists only where they are needed: a list per patch would triple time and memory.
    lines_of = _collect(cells.columns["id"], cells.lines)
    paths_of = _collect(stems, paths)
    ids: list[str] = []
    labels: list[int] = []
    files: list[str] = []
    rejects = list(listing.refused)

    def refuse(reason: RejectReason, id_: str, paths: Sequence[str | None], detail: str) -> None:
        rejects.extend(Reject(reason, id_, path, detail) for path in paths)

    for row, (line, id_, label) in enumerate(zip(cells.lines, cells.columns["id"], cells.columns["label"], strict=True)):
        path = path_of.get(id_)
        every_path = paths_of.get(id_, [path])
        if id_ in lines_of:
            # Each line and each file once, not each line with each file: refusals are counted.
            named = every_path if line == lines_of[id_][0] else [path]
            refuse(RejectReason.DUPLICATE_ID, id_, named, f"line {line}; the id stands on lines {_listed(lines_of[id_])}")
        elif row in cells.ragged:
            refuse(RejectReason.BAD_LABEL, id_, every_path, cells.wrong_width(row))
        elif label not in ("0", "1"):
            refuse(RejectReason.BAD_LABEL, id_, every_path, f"line {line} has label {label[:40]!r}; expected 0 or 1")
        elif path is None:
            if id_ not in refused_files:
                refuse(RejectReason.MISSING, id_, [None], f"line {line} names an id that has no image file")
        elif id_ in paths_of:
            refuse(RejectReason.DUPLICATE_ID, id_, every_path, f"several files have this id: {_listed(every_path)}")
        else:
            ids.append(id_)
            labels.append(int(label))
            files.append(path)
    unnamed = path_of.keys() - set(cells.columns["id"])
    rejects += [
        Reject(RejectReason.NO_LABEL, stem, path, "the labels file does not name this file")
        for stem, path in zip(stems, paths, strict=True)
        if stem in unnamed
    ]
    return ids, labels, files, rejects


def _refuse_if_all_files_are_missing(cells: Cells, rejects: Sequence[Reject], images: str) -> None:
    """Say in one line that the labels file belongs to other images."""
    missing = [reject for reject in rejects if reject.reason == RejectReason.MISSING]
    if len(missing) == len(cells):
        raise UsageError(
            f"{cells.name}: none of its {len(cells)} ids, the first {str(missing[0].id)[:80]!r}, names an image in {images}; "
            "an id is a file name without its suffix"
        )


def _collect(ids: Sequence[str], values: Sequence[_T]) -> dict[str, list[_T]]:
    """Return the values of each id that stands there more than once."""
    several = repeated(ids)
    found: dict[str, list[_T]] = {id_: [] for id_ in several}
    for id_, value in zip(ids, values, strict=True) if several else ():
        if id_ in several:
            found[id_].append(value)
    return found


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")
