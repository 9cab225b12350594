"""Reading a prepared data set one Parquet row group at a time, on disk or in an object store."""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sentinode.dataset import PreparedDataset, column_to_images, schema_problem, unreadable
from sentinode.errors import ManifestError
from sentinode.images import UInt8Array
from sentinode.locations import Location
from sentinode.manifests import ShardRecord
from sentinode.object_store import ObjectFile
from sentinode.retries import try_local

_COLUMNS = ["label", "image"]
# Decoded at a time: 1.8 MB at 96 px, which stays in the processor's cache until it is copied, whatever the size of a row group.
_BLOCK_ROWS = 64
_READ_BYTES = 1 << 18
_PAGE_HEADER_BYTES = 64
_CONCURRENT_FOOTERS = 16
# POSIX allows 1024 on every system that we know; fewer are no slower.
_MAX_BUFFERS = 512

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Shard:
    file: Location
    record: ShardRecord
    footer: pq.FileMetaData
    image_column: int

    def image_chunk(self, row_group: int) -> pq.ColumnChunkMetaData:
        return self.footer.row_group(row_group).column(self.image_column)


class RowGroups:
    """The row groups of some shards. Footers are read once, when it is made; it may be used by several threads.

    Parameters
    ----------
    dataset : PreparedDataset
    shards : sequence of ShardRecord

    Attributes
    ----------
    starts : ndarray of int64, shape (groups + 1,)
        First row of each row group, counted over the rows of all shards in order; the last entry is the number of rows.

    Raises
    ------
    ManifestError
        A shard is missing, damaged, or not what the manifest says.
    StorageError
        The storage does not answer.
    """

    def __init__(self, dataset: PreparedDataset, shards: Sequence[ShardRecord]) -> None:
        self._size_px = dataset.manifest.patch_size_px
        files = [dataset.root / shard.path for shard in shards]
        with ThreadPoolExecutor(1 if dataset.root.is_local else _CONCURRENT_FOOTERS) as pool:
            footers = list(pool.map(self._footer, files, shards))
        self._places = [
            (_Shard(file, shard, footer, footer.schema.names.index("image")), number)
            for file, shard, footer in zip(files, shards, footers, strict=True)
            for number in range(footer.num_row_groups)
        ]
        rows = [shard.footer.row_group(number).num_rows for shard, number in self._places]
        self.starts = np.cumsum([0, *rows], dtype=np.int64)

    def _footer(self, file: Location, shard: ShardRecord) -> pq.FileMetaData:
        try:
            if file.is_local:
                footer = try_local(file.uri, lambda: pq.read_metadata(file.uri))
            else:
                # The size is known, so that this is one request.
                footer = pq.read_metadata(ObjectFile(shard.bytes, file.read_range))
        except (OSError, pa.ArrowException) as error:
            raise unreadable(file, error) from error
        if problem := schema_problem(footer.schema.to_arrow_schema(), footer.num_rows, shard, _COLUMNS, self._size_px):
            raise ManifestError(f"{file}: {problem}")
        return footer

    def __len__(self) -> int:
        return len(self._places)

    def file_of(self, group: int) -> Location:
        """Return the file that a row group lies in."""
        return self._places[group][0].file

    def read(self, group: int, rows: IntArray, into: UInt8Array, slots: IntArray) -> npt.NDArray[np.int8]:
        """Read rows of a row group, each into a slot.

        Parameters
        ----------
        group : int
        rows : ndarray of int64, shape (k,)
            Numbers within the group, ascending; a row may come several times.
        into : ndarray of uint8, shape (n, side, side, 3), contiguous
            Written to, RGB.
        slots : ndarray of int64, shape (k,)
            Where in `into` each row goes.

        Returns
        -------
        labels : ndarray of int8, shape (k,)
            -1 where unknown.

        Raises
        ------
        ManifestError
            The shard is missing, damaged or was changed.
        StorageError
            The storage does not answer.
        """
        shard, number = self._places[group]
        try:
            if shard.file.is_local:
                return try_local(shard.file.uri, lambda: self._read_local(shard, number, rows, into, slots))
            return self._read_fetched(shard, number, rows, into, slots)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(shard.file, error) from error

    def _read_local(self, shard: _Shard, number: int, rows: IntArray, into: UInt8Array, slots: IntArray) -> npt.NDArray[np.int8]:
        with open(shard.file.uri, "rb", buffering=0) as file:
            chunk, width = shard.image_chunk(number), into[0].nbytes
            if _is_one_plain_page(chunk, os.pread(file.fileno(), _PAGE_HEADER_BYTES, chunk.data_page_offset), width):
                # Half the work of decoding, most of which is fetching fresh memory: the operating system copies each row to where it belongs.
                values = _end_of(chunk) - chunk.num_values * width
                for run in _runs(rows):
                    _read_exactly(file.fileno(), [into[slot] for slot in slots[run].tolist()], values + int(rows[run.start]) * width)
            else:
                self._decode(file, shard, number, rows, into, slots)
            return _labels(file, shard, number)[rows]

    def _read_fetched(self, shard: _Shard, number: int, rows: IntArray, into: UInt8Array, slots: IntArray) -> npt.NDArray[np.int8]:
        group = shard.footer.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        start = min(map(_start_of, chunks))
        content = shard.file.read_range(start, max(map(_end_of, chunks)))
        # What was fetched in one request passes for the whole file.
        file = ObjectFile(shard.record.bytes, lambda first, last: content[first - start : last - start])
        chunk, width = shard.image_chunk(number), into[0].nbytes
        page = chunk.data_page_offset - start
        if _is_one_plain_page(chunk, content[page : page + _PAGE_HEADER_BYTES], width) and len(content) >= _end_of(chunk) - start:
            values = _end_of(chunk) - chunk.num_values * width - start
            images = np.frombuffer(content, np.uint8, chunk.num_values * width, values).reshape(-1, *into.shape[1:])
            for run in _runs(rows):
                first = int(rows[run.start])
                into[slots[run]] = images[first : first + run.stop - run.start]
        else:
            self._decode(file, shard, number, rows, into, slots)
        return _labels(file, shard, number)[rows]

    def _decode(self, file: Any, shard: _Shard, number: int, rows: IntArray, into: UInt8Array, slots: IntArray) -> None:
        first, expected = 0, shard.footer.row_group(number).num_rows
        with pq.ParquetFile(file, metadata=shard.footer, pre_buffer=False, buffer_size=_READ_BYTES) as reader:
            for block in reader.iter_batches(_BLOCK_ROWS, row_groups=[number], columns=["image"], use_threads=False):
                column = block.column("image")
                if column.null_count:
                    raise ManifestError(f"{shard.file}: nulls in column image")
                here = slice(*np.searchsorted(rows, [first, first + len(block)]))
                into[slots[here]] = column_to_images(column, self._size_px)[rows[here] - first]
                first += len(block)
        if first != expected:
            raise ManifestError(f"{shard.file}: a row group of {first} rows, but its footer says {expected}")


def _labels(file: Any, shard: _Shard, number: int) -> npt.NDArray[np.int8]:
    with pq.ParquetFile(file, metadata=shard.footer, pre_buffer=False, buffer_size=_READ_BYTES) as reader:
        column = reader.read_row_group(number, columns=["label"], use_threads=False)["label"]
    labels: npt.NDArray[np.int8] = pc.fill_null(column, -1).to_numpy()
    if len(labels) != shard.footer.row_group(number).num_rows:
        raise ManifestError(f"{shard.file}: a row group of {len(labels)} rows, but its footer says {shard.footer.row_group(number).num_rows}")
    return labels


def _start_of(chunk: pq.ColumnChunkMetaData) -> int:
    return int(chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset)


def _end_of(chunk: pq.ColumnChunkMetaData) -> int:
    return _start_of(chunk) + int(chunk.total_compressed_size)


def _is_one_plain_page(chunk: pq.ColumnChunkMetaData, header: bytes, width: int) -> bool:
    """Tell whether a column chunk is one page header and then all values, `width` bytes each, as they are.

    `header` is how it begins: a struct in Thrift's compact protocol whose first three fields, 32-bit integers, are the type of the page (0, data) and
    its size before and after compression. Source: parquet.thrift, PageHeader.
    """
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or not set(chunk.encodings) <= {"PLAIN", "RLE"}:
        return False  # RLE is how levels are encoded; a column without nulls has none
    size = _varint(2 * chunk.num_values * width)  # zigzag: a number that is not negative, doubled
    return header.startswith(b"\x15\x00" + b"\x15" + size + b"\x15" + size)


def _varint(number: int) -> bytes:
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def _runs(rows: IntArray) -> list[slice]:
    """Cut ascending numbers where they do not follow each other, and after at most as many as the operating system takes in one call."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [
        slice(start, min(start + _MAX_BUFFERS, end)) for begin, end in itertools.pairwise([0, *ends]) for start in range(begin, end, _MAX_BUFFERS)
    ]


def _read_exactly(descriptor: int, buffers: Sequence[UInt8Array], offset: int) -> None:
    """Fill buffers, one after the other, from a place in a file; OSError where it ends before that."""
    left = [buffer.data.cast("B") for buffer in buffers]
    while left:
        count = os.preadv(descriptor, left, offset)
        if not count:
            raise OSError("the file ends within a row group")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
