"""Reading chosen columns of a delimited text file: the dialects that spreadsheets, pandas and R write, and a line for whatever cannot be read."""

import csv
from io import StringIO

from data_prep.sources.cells import Cells, Wanted
from sentinode.errors import UsageError

_DELIMITERS = (",", ";", "\t", "|")
_NOT_TEXT = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x1f\x8b": "gzip-compressed",
    b"PAR1": "a Parquet file",
}


def read_text_table(data: bytes, wanted: Wanted) -> Cells:
    """Read a text file with a header line, separated by `,` `;` tab or `|`.

    A byte order mark, CRLF, CR alone, quotes, further columns (also an unnamed leading one), any column order and upper case in the header are
    accepted.

    Parameters
    ----------
    data : bytes
        Content of the file.
    wanted : Wanted

    Raises
    ------
    UsageError
        The file is not text, has no such columns, or is malformed.
    """
    name = wanted.name
    text = _decode(data, name)
    delimiter = _delimiter(text, set(wanted.theirs.values()))
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    lines: list[int] = []
    ragged: dict[int, int] = {}
    try:
        header = next((row for row in reader if any(map(str.strip, row))), None)
        if header is None:
            raise UsageError(f"{name}: empty; expected a header line with columns {', '.join(wanted.required)}")
        places = wanted.find(header)
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
    return Cells(name, lines, columns, ragged, len(header))


def _decode(data: bytes, name: str) -> str:
    for signature, kind in _NOT_TEXT.items():
        if data.startswith(signature):
            raise UsageError(f"{name}: {kind}, not text; save it as CSV (UTF-8)")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:1024]:
        raise UsageError(f"{name}: UTF-16 or binary, not UTF-8 text; save it as CSV (UTF-8), e.g. with `iconv -f UTF-16 -t UTF-8`")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = max(data.count(end, 0, error.start) for end in (b"\n", b"\r")) + 1
        raise UsageError(f"{name}: not UTF-8 text (byte 0x{data[error.start]:02x} in line {line}); save it as CSV (UTF-8)") from error


def _delimiter(text: str, wanted: set[str]) -> str:
    """Return the separator that finds most of the wanted columns in the header; among equals the one that stands there most often."""
    first = next((line for line in StringIO(text, newline="") if line.strip()), "")

    def score(delimiter: str) -> tuple[int, int]:
        try:
            fields = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:  # a line of many columns is one field, larger than csv allows, to any separator but its own
            return 0, 0
        return len(wanted & {field.strip().casefold() for field in fields}), len(fields)

    return max(_DELIMITERS, key=score)
