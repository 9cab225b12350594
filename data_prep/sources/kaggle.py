"""The layout of Kaggle's Histopathologic Cancer Detection: `train/<id>.tif` and `train_labels.csv` with `id,label`.

The labels file is the source of truth; every disagreement with the folder becomes a reject.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import pyarrow as pa

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import Source
from data_prep.sources.cells import Cells, column_names
from data_prep.sources.entries import entry_table, inputs_digest
from data_prep.sources.files import files_spec, read_described
from data_prep.sources.listing import list_images, repeated, stem_of
from data_prep.sources.slides import files_of, read_slides
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
    folder, prefix = where / IMAGES_NAME, f"{IMAGES_NAME}/"
    if not folder.is_dir():
        folder, prefix = where, ""
    listing = list_images(folder, recursive=False)
    cells = read_text_table(content, f"labels file {labels}", ("id", "label"), (), column_names(config))
    if not len(cells):
        raise UsageError(f"labels file {labels}: no rows below the header")
    entries, rejects = _join(cells, [prefix + name for name in listing.names], list(map(stem_of, listing.names)), slide_of)
    if not entries.num_rows:
        cells.refuse_if_all_labels_are_bad(rejects)
        _refuse_if_all_files_are_missing(cells, rejects, f"{folder}; the first image is {listing.names[0]!r}")
    return Source(
        kind="kaggle",
        where=str(where),
        entries=entries,
        rejects=tuple(rejects),
        inputs_sha256=inputs_digest([content, slides_content], listing.digest),
        reader=files_spec(where),
        files=files_of(labels=labels, slides=slides),
    )


def _join(cells: Cells, paths: list[str], stems: list[str], slide_of: Mapping[str, str]) -> tuple[pa.Table, list[Reject]]:
    """Match lines and files by id; `stems` are the ids of the files."""
    path_of = dict(zip(stems, paths, strict=True))
    # Lists only where they are needed: a list per patch would triple time and memory.
    lines_of = _collect(cells.columns["id"], cells.lines)
    paths_of = _collect(stems, paths)
    ids: list[str] = []
    labels: list[int] = []
    files: list[str] = []
    rejects: list[Reject] = []
    for row, (line, id_, label) in enumerate(zip(cells.lines, cells.columns["id"], cells.columns["label"], strict=True)):
        path = path_of.get(id_)
        if id_ in lines_of:
            rejects.append(Reject(RejectReason.DUPLICATE_ID, id_, path, f"line {line}; the id stands on lines {_listed(lines_of[id_])}"))
        elif row in cells.ragged:
            rejects.append(Reject(RejectReason.BAD_LABEL, id_, path, cells.wrong_width(row)))
        elif label not in ("0", "1"):
            rejects.append(Reject(RejectReason.BAD_LABEL, id_, path, f"line {line} has label {label[:40]!r}; expected 0 or 1"))
        elif path is None:
            rejects.append(Reject(RejectReason.MISSING, id_, None, f"line {line} names an id that has no image file"))
        elif id_ in paths_of:
            detail = f"several files have this id: {_listed(paths_of[id_])}"
            rejects += [Reject(RejectReason.DUPLICATE_ID, id_, name, detail) for name in paths_of[id_]]
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
    return entry_table(id=ids, label=labels, path=files, slide=list(map(slide_of.get, ids))), rejects


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
