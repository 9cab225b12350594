"""Reading a source in the Kaggle layout. The labels file is the source of truth; every disagreement with the folder becomes a reject."""

import csv
import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from data_prep.rejects import Reject, RejectReason
from sentinode.errors import UsageError
from sentinode.images import IMAGE_SUFFIXES
from sentinode.storage import local_path

LABELS_NAME = "train_labels.csv"
IMAGES_NAME = "train"
_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class Entry:
    """A labelled image file. `path` is relative to the source folder, `slide` None where unknown."""

    id: str
    label: int
    path: str
    slide: str | None


@dataclass(frozen=True)
class Source:
    """What prepare will read.

    Attributes
    ----------
    folder : Path
        The source folder.
    labels, slides : Path
        The CSV files; `slides` may be None.
    entries : tuple of Entry
        Sorted by id.
    rejects : tuple of Reject
        What could be refused without opening an image.
    inputs_sha256 : str
        Digest of the bytes of both CSV files and of the listing (name, size, modification time) of the images.
    """

    folder: Path
    labels: Path
    slides: Path | None
    entries: tuple[Entry, ...]
    rejects: tuple[Reject, ...]
    inputs_sha256: str

    @property
    def inputs(self) -> int:
        """Number of inputs, accepted so far or refused."""
        return len(self.entries) + len(self.rejects)


def read_source(
    source: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    slides: str | os.PathLike[str] | None = None,
    need_slides: bool = False,
) -> Source:
    """List a source folder and read its CSV files; no image is opened.

    Parameters
    ----------
    source : str or path
        Holds `train_labels.csv` and the images in `train/` (with `labels` given also directly).
    labels : str or path, optional
        Labels file with columns `id,label` instead of `<source>/train_labels.csv`.
    slides : str or path, optional
        CSV file with columns `id,wsi`.
    need_slides : bool
        Refuse patches whose slide is unknown.

    Raises
    ------
    UsageError
        Something that must be there is missing or empty; the line says what was looked for.
    """
    folder = local_path(source)
    if not folder.is_dir():
        raise UsageError(f"source {folder}: no such folder")
    labels_path = local_path(labels) if labels is not None else folder / LABELS_NAME
    slides_path = local_path(slides) if slides is not None else None
    if need_slides and slides_path is None:
        raise UsageError("split slide needs --slides, a CSV file with columns id,wsi; or set split=overlap")
    label_bytes = _read_bytes(labels_path, "labels file", "a CSV file with columns id,label; or name one with --labels")
    slide_bytes = _read_bytes(slides_path, "slides file", "a CSV file with columns id,wsi") if slides_path else b""
    image_folder = folder / IMAGES_NAME if (folder / IMAGES_NAME).is_dir() else folder
    files, listing = _list_images(image_folder)
    if not files:
        raise UsageError(f"source {folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in {image_folder}")
    rows = _read_table(label_bytes, labels_path, ("id", "label"))
    if not rows:
        raise UsageError(f"labels file {labels_path}: no rows below the header")
    slide_of = _read_slides(slide_bytes, slides_path) if slides_path else {}
    prefix = f"{IMAGES_NAME}/" if image_folder != folder else ""
    entries, rejects = _join(rows, {id_: [prefix + name for name in names] for id_, names in files.items()}, slide_of, need_slides)
    digest = hashlib.sha256()
    for part in (label_bytes, slide_bytes, listing):
        digest.update(hashlib.sha256(part).digest())
    ordered = tuple(sorted(entries, key=lambda entry: entry.id))
    return Source(folder, labels_path, slides_path, ordered, tuple(rejects), digest.hexdigest())


def _read_bytes(path: Path, what: str, expected: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}; expected {expected}") from error


def _list_images(folder: Path) -> tuple[dict[str, list[str]], bytes]:
    """Return stem -> file names, and the listing that the digest covers."""
    files: dict[str, list[str]] = defaultdict(list)
    lines = []
    with os.scandir(folder) as items:
        for item in items:
            stem, suffix = os.path.splitext(item.name)
            if suffix.lower() in IMAGE_SUFFIXES and not item.name.startswith(".") and not item.is_dir():
                try:
                    status = item.stat()
                    lines.append(f"{item.name}\0{status.st_size}\0{status.st_mtime_ns}\n")
                except OSError:  # a dangling link: decoding will refuse it as unreadable
                    lines.append(f"{item.name}\0unreadable\n")
                files[stem].append(item.name)
    return {stem: sorted(names) for stem, names in files.items()}, "".join(sorted(lines)).encode("utf-8", "surrogateescape")


def _read_table(data: bytes, path: Path, columns: tuple[str, str]) -> list[tuple[int, str, str | None]]:
    """Return (line number, first column, second column) of a CSV file; the second is None where the number of fields is wrong.

    A byte order mark, CRLF, `,` `;` or tab, further columns and any column order are accepted.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    header_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=header_line.count)
    rows = []
    header: list[str] | None = None
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            if header is None:
                header = [field.casefold() for field in fields]
                absent = [column for column in columns if header.count(column) != 1]
                if absent:
                    raise UsageError(f"{path}: columns {', '.join(map(repr, fields))} found; expected {' and '.join(columns)}, each once")
                continue
            first = header.index(columns[0])
            whole = len(fields) == len(header)
            rows.append((reader.line_num, fields[first] if first < len(fields) else "", fields[header.index(columns[1])] if whole else None))
    except csv.Error as error:
        raise UsageError(f"{path}: line {reader.line_num} is not CSV ({error})") from error
    if header is None:
        raise UsageError(f"{path}: empty; expected a CSV file with columns {','.join(columns)}")
    return rows


def _read_slides(data: bytes, path: Path) -> dict[str, str]:
    slide_of: dict[str, str] = {}
    for line, id_, slide in _read_table(data, path, ("id", "wsi")):
        if slide and slide_of.setdefault(id_, slide) != slide:
            raise UsageError(f"slides file {path}: line {line} gives an id another slide than an earlier line")
    return slide_of


def _join(
    rows: list[tuple[int, str, str | None]], files: dict[str, list[str]], slide_of: dict[str, str], need_slides: bool
) -> tuple[list[Entry], list[Reject]]:
    lines_of: dict[str, list[int]] = defaultdict(list)
    for line, id_, _ in rows:
        lines_of[id_].append(line)
    entries: list[Entry] = []
    rejects: list[Reject] = []
    for line, id_, label in rows:
        names = files.get(id_, [])
        path = names[0] if names else None
        if len(lines_of[id_]) > 1:
            rejects.append(Reject(RejectReason.DUPLICATE_ID, id_, path, f"line {line}; the id stands on lines {_listed(lines_of[id_])}"))
        elif label not in ("0", "1"):
            found = "the wrong number of fields" if label is None else f"label {label[:40]!r}"
            rejects.append(Reject(RejectReason.BAD_LABEL, id_, path, f"line {line} has {found}; expected 0 or 1"))
        elif path is None:
            rejects.append(Reject(RejectReason.MISSING, id_, None, f"line {line} names an id that has no image file"))
        elif len(names) > 1:
            rejects += [Reject(RejectReason.DUPLICATE_ID, id_, name, f"several files have this id: {', '.join(names)}") for name in names]
        elif need_slides and id_ not in slide_of:
            rejects.append(Reject(RejectReason.NO_SLIDE, id_, path, "the slides file does not name this id"))
        else:
            entries.append(Entry(id_, int(label), path, slide_of.get(id_)))
    for id_ in files.keys() - lines_of.keys():
        rejects += [Reject(RejectReason.NO_LABEL, id_, name, "the labels file does not name this file") for name in files[id_]]
    return entries, rejects


def _listed(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
