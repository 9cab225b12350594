"""Reading chosen columns of a delimited text file: the dialects that spreadsheets, pandas and R write, and a line for whatever cannot be read."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

from sentinode.config import PrepareConfig
from sentinode.errors import UsageError

_DELIMITERS = (",", ";", "\t", "|")
_NOT_TEXT = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x1f\x8b": "gzip-compressed",
    b"PAR1": "a Parquet file",
}
_SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class TextTable:
    """Columns of a delimited text file.

    Attributes
    ----------
    lines : list of int
        Line of the file that each row ends on, counted from 1.
    columns : mapping of str to list of str
        Our name of a column -> its values without surrounding spaces; "" where the row is too short. Optional columns that are absent have no key.
    ragged : mapping of int to int
        Row -> its number of fields, for the rows that have not `width` of them: their values may belong to other columns.
    width : int
        Number of fields of the header.
    """

    lines: list[int]
    columns: Mapping[str, list[str]]
    ragged: Mapping[int, int]
    width: int

    def __len__(self) -> int:
        return len(self.lines)


def read_text_table(data: bytes, name: str, required: Sequence[str], optional: Sequence[str], names: Mapping[str, str]) -> TextTable:
    """Read a text file with a header line, separated by `,` `;` tab or `|`.

    A byte order mark, CRLF, quotes, further columns (also an unnamed leading one), any column order and upper case in the header are accepted.

    Parameters
    ----------
    data : bytes
        Content of the file.
    name : str
        Path of the file, for errors.
    required, optional : sequence of str
        Columns to read, by our names.
    names : mapping of str to str
        Our name of a column -> its name in the file, where the two differ.

    Raises
    ------
    UsageError
        The file is not text, has no such columns, or is malformed.
    """
    text = _decode(data, name)
    theirs = {column: names.get(column, column).strip().casefold() for column in (*required, *optional)}
    delimiter = _delimiter(text, set(theirs.values()))
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    lines: list[int] = []
    ragged: dict[int, int] = {}
    try:
        header = next((row for row in reader if any(map(str.strip, row))), None)
        if header is None:
            raise UsageError(f"{name}: empty; expected a header line with columns {', '.join(required)}")
        places = _places(header, name, required, theirs, names)
        columns: dict[str, list[str]] = {column: [] for column in places}
        targets = [(columns[column], place) for column, place in places.items()]
        for row in reader:
            if len(row) != len(header):
                if not any(map(str.strip, row)):
                    continue
                ragged[len(lines)] = len(row)
                row += [""] * (len(header) - len(row))
            elif not any(row) or not any(map(str.strip, row)):
                continue
            lines.append(reader.line_num)
            for values, place in targets:
                values.append(row[place].strip())
    except csv.Error as error:
        raise UsageError(f"{name}: line {reader.line_num} is not CSV ({error})") from error
    return TextTable(lines, columns, ragged, len(header))


def column_names(config: PrepareConfig) -> dict[str, str]:
    """Our name of a column -> its name in the files, where the configuration gives one."""
    return {str(ours): theirs for ours, theirs in config.columns.items()}


def check_columns(found: Sequence[str], name: str, required: Sequence[str], names: Mapping[str, str]) -> None:
    """Raise UsageError with what was found, expected and can be done, unless each required column, and each that `names` maps, is there once."""
    folded = [column.strip().casefold() for column in found]
    absent = [column for column in required if folded.count(names.get(column, column).strip().casefold()) != 1]
    if not absent:
        return
    shown = ", ".join(map(repr, found[:_SHOWN_COLUMNS])) + (", …" if len(found) > _SHOWN_COLUMNS else "")
    wanted = [f"{names[column]!r} (columns.{column})" if column in names else column for column in required]
    expected = " and ".join([", ".join(wanted[:-1]), wanted[-1]] if len(wanted) > 1 else wanted)
    advice = " ".join(f"--set columns.{column}=NAME" for column in absent)
    raise UsageError(f"{name}: columns {shown} found; expected {expected}, each once; if a column has another name: {advice}")


def _places(header: list[str], name: str, required: Sequence[str], theirs: Mapping[str, str], names: Mapping[str, str]) -> dict[str, int]:
    """Our name of each column that is there -> its place."""
    header = [field.strip() for field in header]
    folded = [field.casefold() for field in header]
    # An optional column counts as required where it is there twice or the configuration names it.
    needed = [column for column, wanted in theirs.items() if column in required or column in names or folded.count(wanted) > 1]
    check_columns(header, name, needed, names)
    return {column: folded.index(wanted) for column, wanted in theirs.items() if wanted in folded}


def _decode(data: bytes, name: str) -> str:
    for signature, kind in _NOT_TEXT.items():
        if data.startswith(signature):
            raise UsageError(f"{name}: {kind}, not text; save it as CSV (UTF-8)")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:1024]:
        raise UsageError(f"{name}: UTF-16 or binary, not UTF-8 text; save it as CSV (UTF-8), e.g. with `iconv -f UTF-16 -t UTF-8`")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}: not UTF-8 text (byte 0x{data[error.start]:02x} in line {line}); save it as CSV (UTF-8)") from error


def _delimiter(text: str, wanted: set[str]) -> str:
    """Return the separator that finds most of the wanted columns in the header; among equals the one that stands there most often."""
    first = next((line for line in StringIO(text) if line.strip()), "")

    def score(delimiter: str) -> tuple[int, int]:
        fields = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        return len(wanted & {field.strip().casefold() for field in fields}), len(fields)

    return max(_DELIMITERS, key=score)
