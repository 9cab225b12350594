"""Reading chosen columns of a Parquet file that describes the inputs."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.sources.cells import Cells, Wanted
from sentinode.errors import UsageError

_WHOLE = {"label", "x_px", "y_px"}


def read_parquet_table(data: bytes, wanted: Wanted) -> Cells:
    """Read a Parquet file; text may be dictionary-encoded, null counts as empty.

    Parameters
    ----------
    data : bytes
        Content of the file.
    wanted : Wanted

    Raises
    ------
    UsageError
        It is no Parquet file, or a column is missing or of a type that would have to be guessed at.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        header = file.schema_arrow.names
        places = wanted.find(header)
        found = file.read(columns=[header[place] for place in places.values()], use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{wanted.name}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error
    columns = {ours: _as_text(found.column(header[place]), ours, f"{wanted.name}: column {header[place]!r}") for ours, place in places.items()}
    return Cells(wanted.name, range(1, found.num_rows + 1), columns, {}, len(header), "row")


def _as_text(column: pa.ChunkedArray, ours: str, what: str) -> list[str]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    # pandas makes floats of whole numbers as soon as one of them is missing. A label has no such excuse.
    if pa.types.is_floating(kind) and ours in ("x_px", "y_px"):
        try:
            column, kind = column.cast(pa.int64()), pa.int64()
        except pa.ArrowInvalid as error:
            raise UsageError(f"{what} has values that are no whole numbers ({str(error).splitlines()[0]})") from error
    if not (_is_text(kind) or (pa.types.is_integer(kind) and ours in {*_WHOLE, "id"})):
        raise UsageError(f"{what} is of type {column.type}; expected {'whole numbers' if ours in _WHOLE else 'text'}")
    try:
        return [value.strip() for value in pc.fill_null(column.cast(pa.string()), "").to_pylist()]
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{what} cannot be read as text ({str(error).splitlines()[0]})") from error


def _is_text(kind: pa.DataType) -> bool:
    return any(is_one(kind) for is_one in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null))
