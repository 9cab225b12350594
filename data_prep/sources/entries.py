"""Making the table of inputs out of columns, and the digest that says which inputs they were."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from data_prep.sources.base import ENTRY_SCHEMA


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


def inputs_digest(files: Sequence[bytes], listing: bytes) -> str:
    """Return one SHA-256, 64 hex digits, for the content of the files that describe the inputs and the digest of the images' listing."""
    digest = hashlib.sha256()
    for content in files:
        digest.update(hashlib.sha256(content).digest())
    digest.update(listing)
    return digest.hexdigest()
