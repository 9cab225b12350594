"""What every source of patches gives to prepare: a list of inputs, the refusals that need no pixels, and a reader of the pixels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from data_prep.rejects import Reject, RejectReason
from sentinode.images import UInt8Array

ENTRY_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.int8()),
        pa.field("path", pa.string(), nullable=False),
        pa.field("row", pa.int64()),
        pa.field("slide", pa.string()),
        pa.field("centre", pa.string()),
        pa.field("x_px", pa.int64()),
        pa.field("y_px", pa.int64()),
        pa.field("split", pa.string()),
    ]
)
"""One row per input, unknown = null. `id` is unique; `label` 0 normal, 1 metastatic; `path` relative to the source, or an absolute path or URI; `row`
counts patches inside a container file; (`x_px`, `y_px`) is the patch's origin in its slide; `split` (train, val, test) is the source's own."""


MAX_ID_CHARACTERS = 255
"""Of an id or the name of a slide, as a file's name may have: one that is a page long, a wrong column mostly, would take its length for every row."""

MAX_FILE_BYTES = 64 << 20
"""Of an image file. No patch needs more: 512 px a side are 0.8 MB. A whole slide that lies among them must not fill the memory."""


def too_many_bytes(size: int) -> str:
    """Return what to say of a file larger than MAX_FILE_BYTES."""
    return f"{size} bytes; a patch has fewer than {MAX_FILE_BYTES}"


@dataclass(frozen=True)
class Unread:
    """An input that could not be read at all: no bytes, no pixels."""

    reason: RejectReason
    detail: str


class Reader(Protocol):
    """Reads inputs on whichever node a task runs."""

    def read(self, entries: pa.Table) -> Iterator[bytes | UInt8Array | Unread]:
        """Yield, for each row of ENTRY_SCHEMA in order, the bytes of an image file, or pixels, uint8 (side, side, 3), RGB, or why there are none.

        Raises
        ------
        StorageError
            The storage does not answer. The run stops and can be continued; an input is never refused for it.
        """
        ...


@dataclass(frozen=True)
class Source:
    """What prepare will read.

    Attributes
    ----------
    kind : str
        Name of the layout.
    where : str
        The source as a path or URI.
    entries : pyarrow.Table
        ENTRY_SCHEMA, in the order in which reading is cheapest. Sorted by id where there is a file per patch.
    rejects : tuple of Reject
        What could be refused without reading pixels.
    inputs_sha256 : str
        Digest of everything that says what the inputs are: bytes of the label files, listing (name, size, time or tag) of the images.
    reader : dict
        JSON-able arguments of `detect.reader_of`, which makes the Reader in a task.
    files : mapping of str to str
        Further files that were read (labels, slides), for the manifest.
    overlaps : pyarrow.Table or None
        `sentinode.dataset.OVERLAP_SCHEMA`: which of the inputs share pixels, where that is known already and need not be searched for.
    """

    kind: str
    where: str
    entries: pa.Table
    rejects: tuple[Reject, ...]
    inputs_sha256: str
    reader: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    overlaps: pa.Table | None = None

    @property
    def inputs(self) -> int:
        """Number of inputs, accepted so far or refused."""
        return int(self.entries.num_rows) + len(self.rejects)

    @property
    def is_labelled(self) -> bool:
        """Whether the inputs have labels; either all have or none."""
        return bool(self.entries["label"].null_count == 0)
