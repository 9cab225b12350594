"""Making the table of inputs out of columns, and the digest that says which inputs they were."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import ENTRY_SCHEMA, too_many_bytes


def entry_table(**columns: Sequence[Any] | pa.Array) -> pa.Table:
    """Return a table of ENTRY_SCHEMA sorted by id; columns that are not given are null.

    Parameters
    ----------
    **columns : sequence or pyarrow.Array
        Values by column name, all of one length; `id` and `path` must be among them.
    """
    rows = len(columns["id"])
    arrays = [pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(rows, field.type) for field in ENTRY_SCHEMA]
    table = pa.table(arrays, schema=ENTRY_SCHEMA)
    return table.sort_by("id").combine_chunks() if rows else table


def without_too_large(entries: pa.Table, too_large: Mapping[str, int]) -> tuple[pa.Table, list[Reject]]:
    """Part entries into those that will be read and refusals.

    Parameters
    ----------
    entries : pyarrow.Table
        ENTRY_SCHEMA.
    too_large : mapping of str to int
        Path -> bytes of what is larger than MAX_FILE_BYTES. Known from a listing, since an object store gives an object's size only with its content.
    """
    if not too_large:
        return entries, []
    refused = pc.is_in(entries["path"], pa.array(list(too_large), pa.string()))
    rejects = [
        Reject(RejectReason.UNREADABLE, row["id"], row["path"], too_many_bytes(too_large[row["path"]]))
        for row in entries.filter(refused).select(["id", "path"]).to_pylist()
    ]
    return entries.filter(pc.invert(refused)).combine_chunks(), rejects


def inputs_digest(files: Sequence[bytes], listing: bytes) -> str:
    """Return one SHA-256, 64 hex digits, for the content of the files that describe the inputs and the digest of the images' listing."""
    digest = hashlib.sha256()
    for content in files:
        digest.update(hashlib.sha256(content).digest())
    digest.update(listing)
    return digest.hexdigest()
