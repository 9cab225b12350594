"""A table that names the images: CSV, TSV or Parquet with `path,label` and what else is known of each patch."""

import hashlib
import os
import posixpath
import stat
from collections.abc import Iterable, Sequence

import pyarrow as pa

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import MAX_FILE_BYTES, Source
from data_prep.sources.cells import Cells, Wanted, column_names
from data_prep.sources.entries import entry_table, inputs_digest, without_too_large
from data_prep.sources.files import files_of, files_spec, place_of, read_described
from data_prep.sources.listing import repeated
from data_prep.sources.parquet_table import read_parquet_table
from data_prep.sources.slides import read_slides, slides_of
from data_prep.sources.text_table import read_text_table
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.locations import Entry, Location, locate

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")

_OPTIONAL = ("id", "slide", "centre", "x_px", "y_px", "split")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Of folders, one by one. A table that names objects in more of them costs one listing of all that lies below their common parent.
_MAX_LISTINGS = 100


def open_table(config: PrepareConfig, where: Location, *, slides: Location | None = None) -> Source:
    """Read a table; no image is opened.

    Parameters
    ----------
    config : PrepareConfig
        With source `unlabelled` the column `label` need not exist and is not read.
    where : Location
        File with columns `path,label` and any of `id,slide,centre,x_px,y_px,split`. Paths are relative to its folder, absolute, or URIs. Without
        `id`, the stem of the file's name is the id, or the path without suffix if some stems are equal.
    slides : Location, optional
        CSV file with columns `id,wsi`, where the table has no column `slide`.

    Raises
    ------
    UsageError
        The table cannot be read, or a value that decides where a patch lies or belongs is unusable; the line names file, line and value.
    """
    content = read_described(where, "table", "a CSV, TSV or Parquet file with columns path,label")
    read = read_parquet_table if where.name.lower().endswith(".parquet") else read_text_table
    required = ("path",) if config.source == "unlabelled" else ("path", "label")
    cells = read(content, Wanted(f"table {where}", required, _OPTIONAL, column_names(config)))
    if not len(cells):
        raise UsageError(f"{cells.name}: no {cells.line_word}s")
    if slides is not None and "slide" in cells.columns:
        raise UsageError(f"{cells.name}: has a column slide; leave --slides out")
    slide_of, slides_content = read_slides(config, slides)
    entries, rejects = _accept(cells, is_labelled="label" in required)
    if slides is not None:
        of_entries = slides_of(entries["id"].to_pylist(), slide_of, slides)
        entries = entries.set_column(entries.schema.get_field_index("slide"), "slide", pa.array(of_entries, pa.string()))
    base = Location(where.uri.rpartition("/")[0])
    stamps, too_large = _stamps(base, entries["path"].to_pylist(), cells)
    entries, refused = without_too_large(entries, too_large)
    return Source(
        kind="table",
        where=str(where),
        entries=entries,
        rejects=(*rejects, *refused),
        inputs_sha256=inputs_digest([content, slides_content], stamps),
        reader=files_spec(base, from_table=True),
        files=files_of(slides=slides),
    )


def _accept(cells: Cells, *, is_labelled: bool) -> tuple[pa.Table, list[Reject]]:
    """Check every row; return the entries and the refused rows."""
    paths, ids = cells.columns["path"], _ids(cells)
    cells.refuse_long(ids, "id")
    cells.refuse_long(cells.columns.get("slide", []), "slide")
    labels = cells.columns["label"] if is_labelled else None
    several = repeated(ids)
    kept: list[int] = []
    rejects: list[Reject] = []
    for row, (id_, path) in enumerate(zip(ids, paths, strict=True)):
        if row in cells.ragged:
            rejects.append(Reject(RejectReason.BAD_LABEL, id_ or None, path or None, cells.wrong_width(row)))
        elif not path:
            rejects.append(Reject(RejectReason.MISSING, id_ or None, None, f"{cells.place(row)} names no path"))
        elif id_ in several:
            rejects.append(Reject(RejectReason.DUPLICATE_ID, id_, path, f"{cells.place(row)} has an id that others have too"))
        elif labels is not None and labels[row] not in ("0", "1"):
            rejects.append(Reject(RejectReason.BAD_LABEL, id_, path, f"{cells.place(row)} has label {labels[row][:40]!r}; expected 0 or 1"))
        else:
            kept.append(row)
    if not kept:
        cells.refuse_if_all_labels_are_bad(rejects)
    _check_places(cells, kept)
    columns: dict[str, Sequence[object]] = {"id": [ids[row] for row in kept], "path": [paths[row] for row in kept]}
    if labels is not None:
        columns["label"] = [int(labels[row]) for row in kept]
    for name in cells.columns.keys() & {"slide", "centre"}:
        columns[name] = [cells.columns[name][row] or None for row in kept]
    for name in cells.columns.keys() & {"x_px", "y_px"}:
        columns[name] = cells.whole_numbers(name, kept)
    if "split" in cells.columns:
        columns["split"] = _splits(cells, kept)
    return entry_table(**columns), rejects


def _ids(cells: Cells) -> list[str]:
    if ids := cells.columns.get("id"):
        if (row := next((row for row, id_ in enumerate(ids) if not id_ and row not in cells.ragged), None)) is not None:
            raise UsageError(f"{cells.name}: {cells.place(row)} has no id; give every {cells.line_word} one, or leave the column out")
        return ids
    paths = [os.path.splitext(path)[0] for path in cells.columns["path"]]
    stems = [path.rpartition("/")[2] for path in paths]
    return paths if repeated([stem for stem in stems if stem]) else stems


def _check_places(cells: Cells, rows: Sequence[int]) -> None:
    """Refuse places that are not allowed or that this machine has no package for."""
    paths = cells.columns["path"]
    seen = set()
    for row in rows:
        scheme, separator, rest = paths[row].partition("://")
        if scheme == "file" and not rest.startswith("/"):
            raise UsageError(f"{cells.name}: {cells.place(row)} has path {paths[row][:80]!r}; expected file:///, then the rest of an absolute path")
        if not separator or (root := (scheme, rest.partition("/")[0])) in seen:
            continue
        try:
            place_of(Location(""), paths[row])
        except UsageError as error:
            raise UsageError(f"{cells.name}: {cells.place(row)} has {error}") from error
        locate(paths[row])
        seen.add(root)


def _splits(cells: Cells, rows: Sequence[int]) -> list[str | None]:
    values = cells.columns["split"]
    found = [_SPLITS.get(values[row].casefold()) for row in rows]
    for row, split in zip(rows, found, strict=True):
        if split is None and values[row]:
            raise UsageError(f"{cells.name}: {cells.place(row)} has split {values[row][:40]!r}; expected one of {', '.join(_SPLITS)}")
    return found


def _stamps(base: Location, paths: Sequence[str], cells: Cells) -> tuple[bytes, dict[str, int]]:
    """Ask for size and time (or the object store's tag) of the files; objects are listed by folder, since each alone would be a request.

    Returns
    -------
    bytes
        Digest of them.
    dict of str to int
        Path -> bytes of those larger than MAX_FILE_BYTES.

    Raises
    ------
    UsageError
        Not one of the files exists: they are looked for in the wrong place. Or a folder in an object store may not be listed.
    """
    places = [place_of(base, path) for path in paths]
    objects = _listed({(root / name).uri for root, name in places if not root.is_local})
    lines, too_large, absent = [], {}, 0
    for path, (root, name) in zip(paths, places, strict=True):
        found = _file_at(f"{root}/{name}") if root.is_local else objects.get((root / name).uri)
        if found is None:  # reading will refuse it
            absent += 1
            lines.append(f"{path}\0unreadable\n")
            continue
        lines.append(f"{path}\0{found.size}\0{found.stamp}\n")
        if found.size > MAX_FILE_BYTES:
            too_large[path] = found.size
    if absent and absent == len(paths):
        raise UsageError(f"{cells.name}: none of the {absent} files that it names exists; the first is {paths[0][:200]!r}, looked for in {base}")
    return hashlib.sha256("".join(sorted(lines)).encode()).digest(), too_large


def _file_at(path: str) -> Entry | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in it
        return None
    return Entry(path, status.st_size if stat.S_ISREG(status.st_mode) else 0, str(status.st_mtime_ns))


def _listed(uris: Iterable[str]) -> dict[str, Entry]:
    """Return what listings say of those objects that exist."""
    wanted = set(uris)
    folders_of: dict[str, set[str]] = {}
    for uri in wanted:
        scheme, _, place = uri.partition("://")
        bucket, _, key = place.partition("/")
        folders_of.setdefault(f"{scheme}://{bucket}", set()).add(posixpath.dirname(key))
    found = {}
    for bucket, folders in folders_of.items():
        is_many = len(folders) > _MAX_LISTINGS
        for name in [posixpath.commonpath(folders)] if is_many else sorted(folders):
            folder = Location(bucket) / name
            found.update({uri: entry for entry in _objects_in(folder, recursive=is_many) if (uri := f"{folder}/{entry.name}") in wanted})
    return found


def _objects_in(folder: Location, *, recursive: bool) -> list[Entry]:
    try:
        return folder.entries(recursive=recursive)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed, which tells whether its objects have changed ({error.strerror or error})") from error
