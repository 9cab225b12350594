"""Which image files lie in a folder, and the ids that their names give them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import MAX_FILE_BYTES, MAX_ID_CHARACTERS, Source
from data_prep.sources.cells import too_long
from data_prep.sources.entries import inputs_digest, without_too_large
from data_prep.sources.files import files_of, files_spec
from sentinode.errors import PatchErrorCode, UsageError
from sentinode.images import IMAGE_SUFFIXES
from sentinode.locations import Entry, Location

_SLIDES = (".bif", ".btf", ".czi", ".dcm", ".dicom", ".mrxs", ".ndpi", ".qptiff", ".scn", ".svs", ".svslide", ".vms", ".vmu", ".vsi")
_JPEGS = (".heic", ".heif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpf", ".jpx", ".jxl")
_PICTURES = (".apng", ".avif", ".bmp", ".dib", ".exr", ".gif", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".tga")
OTHER_IMAGE_SUFFIXES = frozenset((*_SLIDES, *_JPEGS, *_PICTURES))
"""Endings of images that are no patches of an accepted format, but were perhaps meant as some."""


@dataclass(frozen=True)
class Listing:
    """Image files of a folder.

    Attributes
    ----------
    names : list of str
        Paths relative to the source, separated by slashes, sorted.
    refused : list of Reject
        Of files with the ending of another image format, and of names that cannot be kept.
    too_large : dict of str to int
        Name -> bytes of those of `names` that are larger than MAX_FILE_BYTES.
    digest : bytes
        SHA-256 over name, size and modification time (or the object store's tag) of each, also of the refused.
    """

    names: list[str]
    refused: list[Reject]
    too_large: dict[str, int]
    digest: bytes


def list_images(source: Location, below: str = "", *, recursive: bool) -> Listing:
    """List the image files of a source, or of the folder `below` in it, told by their suffix; none is opened.

    Inputs are the files that end in IMAGE_SUFFIXES, and those in OTHER_IMAGE_SUFFIXES, each of which is refused. Everything else (text and tables,
    files without an ending, hidden files and folders) is no input and goes unmentioned.

    Raises
    ------
    UsageError
        There are none that could be accepted, or the folder, or with `recursive` one inside it, cannot be listed.
    """
    folder, prefix = source / below, f"{below}/" if below else ""
    try:
        found = folder.entries(recursive=recursive)
    except OSError as error:
        raise UsageError(f"source {error.filename or folder}: cannot be listed ({error.strerror or error})") from error
    listing = listing_of(found, prefix)
    if not listing.names:
        refused = listing.refused
        others = f"; {len(refused)} files there are refused: {refused[0].detail}" if refused else ""
        raise UsageError(f"source {folder}: no images ({', '.join(IMAGE_SUFFIXES)}) there{others}")
    return listing


def listing_of(found: Sequence[Entry], prefix: str = "") -> Listing:
    """Tell inputs from the rest of a folder's or an archive's content, by name; as `list_images`, which puts `prefix` before the names."""
    accepted: list[Entry] = []
    refused: list[Reject] = []
    lines: list[str] = []
    for entry in found:
        name = entry.name
        is_accepted = name[-5:].lower().endswith(IMAGE_SUFFIXES)
        if not (is_accepted or _suffix_of(name) in OTHER_IMAGE_SUFFIXES) or entry.is_dir or name[0] == "." or "/." in name:
            continue
        lines.append(f"{name}\0{entry.size}\0{entry.stamp}\n")
        if not is_accepted:
            detail = f"the name ends in {_suffix_of(name)}; expected {', '.join(IMAGE_SUFFIXES)}"
            refused.append(Reject(PatchErrorCode.FORMAT_NOT_ALLOWED, stem_of(name), prefix + name, detail))
        elif not (name.isascii() or _is_utf8(name)):  # on a disk it may be any bytes, in Parquet it is UTF-8
            refused.append(Reject(RejectReason.UNREADABLE, None, prefix + name, "the file name is not UTF-8"))
        elif name[0] == "/":  # cannot be told from the object without the second slash
            refused.append(Reject(RejectReason.UNREADABLE, stem_of(name), prefix + name, "the object's name below the folder begins with a slash"))
        else:
            accepted.append(entry)
    return Listing(
        names=[prefix + entry.name for entry in accepted],
        refused=refused,
        too_large={prefix + entry.name: entry.size for entry in accepted if entry.size > MAX_FILE_BYTES},
        digest=hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).digest(),
    )


def stem_of(name: str) -> str:
    """Return the path of an image file without its suffix."""
    return name[: name.rindex(".")]


def repeated(ids: Sequence[str]) -> set[str]:
    """Return the ids that stand there more than once."""
    return {id_ for id_, count in Counter(ids).items() if count > 1} if len(set(ids)) < len(ids) else set()


def refuse_long_ids(ids: Sequence[str], source: Location) -> None:
    """Raise UsageError naming the first path below a source that is too long to be an id."""
    if (longest := next((id_ for id_ in ids if len(id_) > MAX_ID_CHARACTERS), None)) is not None:
        raise UsageError(f"source {source}: has {too_long(longest, 'id')}")


def listed_source(
    kind: str, where: Location, listing: Listing, entries: pa.Table, rejects: Sequence[Reject], contents: Sequence[bytes], **files: Location | None
) -> Source:
    """Return the source that reads files of a listing.

    Parameters
    ----------
    kind, where
        As in `Source`.
    listing : Listing
    entries : pyarrow.Table
        ENTRY_SCHEMA: those of its files that are inputs, too large ones among them.
    rejects : sequence of Reject
        All others.
    contents : sequence of bytes
        Of the files that say more of the inputs.
    **files : Location, optional
        These files, by what they are.
    """
    entries, too_large = without_too_large(entries, listing.too_large)
    return Source(
        kind=kind,
        where=str(where),
        entries=entries,
        rejects=(*rejects, *too_large),
        inputs_sha256=inputs_digest(contents, listing.digest),
        reader=files_spec(where),
        files=files_of(**files),
    )


def _suffix_of(name: str) -> str:
    return name[dot:].lower() if (dot := name.rfind(".")) > 0 else ""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
