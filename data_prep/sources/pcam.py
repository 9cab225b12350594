"""PatchCamelyon as published: `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, each also as `.gz`, and `_meta.csv` with slides and places.

Identical patches, which PatchCamelyon has, are no matter of the layout: they are found by their pixels later.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import Source
from data_prep.sources.cells import Cells, Wanted
from data_prep.sources.entries import entry_table, inputs_digest
from data_prep.sources.files import read_described
from data_prep.sources.hdf5 import check_pixels, hdf5_spec, open_hdf5, read_labels
from data_prep.sources.text_table import read_text_table
from sentinode.errors import UsageError
from sentinode.locations import Entry, Location

STEM = "camelyonpatch_level_2_split_"
_SPLIT_OF = {"train": "train", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class _Part:
    """One of the three published splits: its name, and its files where they are there."""

    name: str
    pixels: Entry
    labels: Entry
    meta: Entry | None


@dataclass(frozen=True)
class _ReadPart:
    """What is known of one split without its pixels. `contents`: of the files that say it; `files`: their names."""

    pixels: Entry
    rows: int
    entries: pa.Table
    rejects: list[Reject]
    contents: list[bytes]
    files: dict[str, str]


def is_pcam(names: Iterable[str]) -> bool:
    """Tell whether a folder with these names has files of patches of this layout."""
    return any(name.startswith(STEM) and name.endswith(("_x.h5", "_x.h5.gz")) for name in names)


def open_pcam(where: Location) -> Source:
    """Read labels and places of those of the three splits that are there; pixels are not read. An id is `train-000000`, counted as in the file.

    Where files of pixels are compressed, the source must pass `unpack.unpack` before it can be read.

    Parameters
    ----------
    where : Location
        Folder of the files.

    Raises
    ------
    UsageError
        A file is missing, damaged, or does not fit another one.
    """
    read = [_read_part(where, part) for part in _parts(where)]
    packed = {part.pixels.name: part.rows for part in read if part.pixels.name.endswith(".gz")}
    listing = "".join(f"{part.pixels.name}\0{part.pixels.size}\0{part.pixels.stamp}\n" for part in read)
    return Source(
        kind="pcam",
        where=str(where),
        entries=pa.concat_tables(part.entries for part in read).combine_chunks(),
        rejects=tuple(reject for part in read for reject in part.rejects),
        inputs_sha256=inputs_digest([content for part in read for content in part.contents], hashlib.sha256(listing.encode()).digest()),
        reader=hdf5_spec(where, packed, None),
        files={what: str(where / name) for part in read for what, name in part.files.items()},
    )


def _parts(where: Location) -> list[_Part]:
    """Find the files of each split, in the order of their names."""
    try:
        there = {entry.name: entry for entry in where.entries() if not entry.is_dir}
    except OSError as error:
        raise UsageError(f"source {where}: cannot be listed ({error.strerror or error})") from error

    def find(stem: str) -> Entry | None:
        # Of both, the one that need not be unpacked.
        return there.get(stem) or there.get(f"{stem}.gz")

    parts = []
    for name in sorted(_SPLIT_OF):
        pixels, labels, meta = (find(f"{STEM}{name}_{kind}") for kind in ("x.h5", "y.h5", "meta.csv"))
        if pixels and labels:
            parts.append(_Part(name, pixels, labels, meta))
        elif pixels or labels:
            present, absent = ("x", "y") if pixels else ("y", "x")
            raise UsageError(f"source {where}: {STEM}{name}_{present}.h5 is there, but {STEM}{name}_{absent}.h5 (or .h5.gz) is not")
    if not parts:
        raise UsageError(f"source {where}: no {STEM}{{{','.join(_SPLIT_OF)}}}_x.h5 or .h5.gz there")
    return parts


def _read_part(where: Location, part: _Part) -> _ReadPart:
    labels, labels_content = _labels(where / part.labels.name)
    rows = len(labels)
    if not part.pixels.name.endswith(".gz"):
        with open_hdf5(where / part.pixels.name) as file:
            check_pixels(file, where / part.pixels.name, rows, part.labels.name)
    columns: dict[str, Any] = {
        "id": [f"{part.name}-{row:06d}" for row in range(rows)],
        "path": [part.pixels.name] * rows,
        "row": range(rows),
        "split": [_SPLIT_OF[part.name]] * rows,
    }
    meta_content = b""
    if part.meta is not None:
        meta, meta_content = _meta(where / part.meta.name, rows)
        meta.refuse_long(meta.columns["wsi"], "slide")
        columns |= {"slide": [slide or None for slide in meta.columns["wsi"]]}
        columns |= {ours: meta.whole_numbers(theirs, range(rows)) for ours, theirs in (("x_px", "coord_x"), ("y_px", "coord_y"))}
    usable = [label in (0, 1) for label in labels]
    rejects = [
        Reject(
            RejectReason.BAD_LABEL, columns["id"][row], part.pixels.name, f"row {row} of {part.labels.name} has label {labels[row]}; expected 0 or 1"
        )
        for row, is_usable in enumerate(usable)
        if not is_usable
    ]
    entries = entry_table(label=[label if is_usable else None for label, is_usable in zip(labels, usable, strict=True)], **columns)
    if rejects:
        entries = entries.filter(pa.array(usable))
    files = {f"{part.name}_labels": part.labels.name} | ({f"{part.name}_meta": part.meta.name} if part.meta else {})
    return _ReadPart(part.pixels, rows, entries, rejects, [labels_content, meta_content], files)


def _labels(location: Location) -> tuple[list[int], bytes]:
    content = _content(location, "labels file")
    with open_hdf5(location, content) as file:
        return read_labels(file, location), content


def _meta(location: Location, rows: int) -> tuple[Cells, bytes]:
    content = _content(location, "meta file")
    cells = read_text_table(content, Wanted(f"meta file {location}", ("coord_x", "coord_y", "wsi")))
    if cells.ragged:
        raise UsageError(f"{cells.name}: {cells.wrong_width(next(iter(cells.ragged)))}")
    if len(cells) != rows:
        raise UsageError(f"{cells.name}: {len(cells)} lines, but there are {rows} labels")
    return cells, content


def _content(location: Location, what: str) -> bytes:
    content = read_described(location, what, "a file of PatchCamelyon")
    if not location.name.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{what} {location}: damaged gzip file ({error}); download it again") from error
