"""The layout of Kaggle's Histopathologic Cancer Detection: `train/<id>.tif` and `train_labels.csv` with `id,label`.

The labels file is the source of truth; every disagreement with the folder becomes a reject.
"""

import os
from collections import defaultdict
from collections.abc import Mapping

import pyarrow as pa

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import Source
from data_prep.sources.entries import entry_table, inputs_digest
from data_prep.sources.files import files_spec, read_described
from data_prep.sources.listing import list_images, stem_of
from data_prep.sources.slides import Slides, read_slides
from data_prep.sources.text_table import TextTable, column_names, read_text_table
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.images import IMAGE_SUFFIXES

LABELS_NAME = "train_labels.csv"
IMAGES_NAME = "train"


def open_kaggle(config: PrepareConfig, where: str, *, labels: str | None = None, slides: str | None = None) -> Source:
    """List the images and read the CSV files; no image is opened.

    Parameters
    ----------
    config : PrepareConfig
    where : str
        Folder that holds `train_labels.csv` and the images in `train/` (with `labels` given also directly).
    labels : str, optional
        Labels file with columns `id,label` instead of `<where>/train_labels.csv`.
    slides : str, optional
        CSV file with columns `id,wsi`.

    Raises
    ------
    UsageError
        Something that must be there is missing, empty or unusable; the line says what was looked for.
    """
    labels = labels or os.path.join(where, LABELS_NAME)
    known = read_slides(config, slides)
    content = read_described(labels, "labels file", "a CSV file with columns id,label; or name one with --labels")
    folder = os.path.join(where, IMAGES_NAME)
    prefix = f"{IMAGES_NAME}/"
    if not os.path.isdir(folder):
        folder, prefix = where, ""
    listing = list_images(folder, recursive=False)
    if not listing.names:
        raise UsageError(f"source {where}: no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}")
    table = read_text_table(content, f"labels file {labels}", ("id", "label"), (), column_names(config))
    if not len(table):
        raise UsageError(f"labels file {labels}: no rows below the header")
    paths: dict[str, list[str]] = defaultdict(list)
    for name in listing.names:
        paths[stem_of(name)].append(prefix + name)
    entries, rejects = _join(table, paths, known)
    if not entries.num_rows:
        _refuse_useless_labels(rejects, len(table), f"labels file {labels}", folder, listing.names[0])
    return Source(
        kind="kaggle",
        where=where,
        entries=entries,
        rejects=tuple(rejects),
        inputs_sha256=inputs_digest([content, known.content], listing.digest),
        reader=files_spec(where),
        files={"labels": labels} | ({"slides": slides} if slides else {}),
    )


def _join(table: TextTable, paths: Mapping[str, list[str]], slides: Slides) -> tuple[pa.Table, list[Reject]]:
    """Match lines and files by id."""
    lines_of: dict[str, list[int]] = defaultdict(list)
    for line, id_ in zip(table.lines, table.columns["id"], strict=True):
        lines_of[id_].append(line)
    ids: list[str] = []
    labels: list[int] = []
    files: list[str] = []
    rejects: list[Reject] = []
    for row, (line, id_, label) in enumerate(zip(table.lines, table.columns["id"], table.columns["label"], strict=True)):
        named = paths.get(id_, [])
        path = named[0] if named else None
        if len(lines_of[id_]) > 1:
            rejects.append(Reject(RejectReason.DUPLICATE_ID, id_, path, f"line {line}; the id stands on lines {_listed(lines_of[id_])}"))
        elif row in table.ragged:
            detail = f"line {line} has {table.ragged[row]} fields, the header {table.width}"
            rejects.append(Reject(RejectReason.BAD_LABEL, id_, path, detail))
        elif label not in ("0", "1"):
            rejects.append(Reject(RejectReason.BAD_LABEL, id_, path, f"line {line} has label {label[:40]!r}; expected 0 or 1"))
        elif path is None:
            rejects.append(Reject(RejectReason.MISSING, id_, None, f"line {line} names an id that has no image file"))
        elif len(named) > 1:
            rejects += [Reject(RejectReason.DUPLICATE_ID, id_, name, f"several files have this id: {', '.join(named)}") for name in named]
        elif slides.must_be_known and id_ not in slides.of:
            rejects.append(Reject(RejectReason.NO_SLIDE, id_, path, "the slides file does not name this id"))
        else:
            ids.append(id_)
            labels.append(int(label))
            files.append(path)
    for id_ in sorted(paths.keys() - lines_of.keys()):
        rejects += [Reject(RejectReason.NO_LABEL, id_, name, "the labels file does not name this file") for name in paths[id_]]
    return entry_table(id=ids, label=labels, path=files, slide=list(map(slides.of.get, ids))), rejects


def _refuse_useless_labels(rejects: list[Reject], rows: int, name: str, folder: str, first_image: str) -> None:
    """Say in one line what is wrong where the same thing is wrong with every line of the labels file."""
    by_reason: dict[str, list[Reject]] = defaultdict(list)
    for reject in rejects:
        by_reason[reject.reason].append(reject)
    if len(bad := by_reason[RejectReason.BAD_LABEL]) == rows:
        raise UsageError(f"{name}: none of its {rows} lines has a usable label; {bad[0].detail}")
    if len(missing := by_reason[RejectReason.MISSING]) == rows:
        raise UsageError(
            f"{name}: none of its {rows} ids names an image in {folder}; the first id is {str(missing[0].id)[:80]!r}, "
            f"the first image {first_image!r} (an id is a file name without its suffix)"
        )


def _listed(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
