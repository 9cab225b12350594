"""Columns of a file that describes the inputs, as text, whatever the file's format; finding them by name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import MAX_ID_CHARACTERS
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError

_SHOWN_COLUMNS = 12
# pandas writes 12.0 for 12 as soon as one number of the column is missing. More digits than fit 64 bits are no place in a slide.
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,19})(\.0)?", re.ASCII)
_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True)
class Cells:
    """Chosen columns of a file.

    Attributes
    ----------
    name : str
        What kind of file it is and where, for errors.
    lines : sequence of int
        Where each row is in the file, counted from 1.
    columns : mapping of str to list of str
        Our name of a column -> its values without surrounding spaces; "" where there is none. Optional columns that are absent have no key.
    ragged : mapping of int to int
        Row -> its number of fields, for the rows that have not `width` of them: their values may belong to other columns.
    width : int
        Number of fields of the header.
    line_word : str
        What `lines` counts.
    """

    name: str
    lines: Sequence[int]
    columns: Mapping[str, list[str]]
    ragged: Mapping[int, int]
    width: int
    line_word: str = "line"

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Return e.g. "line 7"."""
        return f"{self.line_word} {self.lines[row]}"

    def wrong_width(self, row: int) -> str:
        """Return what to say of a ragged row."""
        return f"{self.place(row)} has {self.ragged[row]} fields, the header {self.width}"

    def whole_numbers(self, column: str, rows: Iterable[int]) -> list[int | None]:
        """Return the values of some rows; raises UsageError naming the first that is no whole number of 64 bits."""
        values, found = self.columns[column], list[int | None]()
        for row in rows:
            if not values[row]:
                found.append(None)
            elif (match := _WHOLE_NUMBER.fullmatch(values[row])) and (number := int(match[1])) in _INT64:
                found.append(number)
            else:
                raise UsageError(f"{self.name}: {self.place(row)} has {column} {values[row][:40]!r}; expected a whole number")
        return found

    def refuse_long(self, values: Sequence[str], what: str) -> None:
        """Raise UsageError naming the first row whose value, of a column or made of one, is too long for `what`: an id, a slide."""
        if (row := next((row for row, value in enumerate(values) if len(value) > MAX_ID_CHARACTERS), None)) is not None:
            raise UsageError(f"{self.name}: {self.place(row)} has {too_long(values[row], what)}")

    def refuse_if_all_labels_are_bad(self, rejects: Sequence[Reject]) -> None:
        """Raise UsageError with the first reason where no row at all has a usable label: then it is not the labels that are wrong, but the file."""
        bad = [reject for reject in rejects if reject.reason == RejectReason.BAD_LABEL]
        if bad and len(bad) == len(self):
            raise UsageError(f"{self.name}: none of its {len(self)} {self.line_word}s has a usable label; {bad[0].detail}")


def too_long(value: str, what: str) -> str:
    """Return what to say of a value that has more than MAX_ID_CHARACTERS."""
    advice = "; a table with a column id can name the patches otherwise" if what == "id" else ""
    return f"{what} {value[:40]!r}…, {len(value)} characters; expected at most {MAX_ID_CHARACTERS}{advice}"


def column_names(config: PrepareConfig) -> dict[str, str]:
    """Our name of a column -> its name in the files, where the configuration gives one."""
    return {str(ours): theirs for ours, theirs in config.columns.items()}


@dataclass(frozen=True)
class Wanted:
    """The columns to read of a file.

    Attributes
    ----------
    name : str
        What kind of file it is and where, for errors.
    required, optional : sequence of str
        Columns to find, by our names.
    names : mapping of str to str
        Our name of a column -> its name in the file, where the two differ.
    """

    name: str
    required: Sequence[str]
    optional: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def theirs(self) -> dict[str, str]:
        """Our name of each column -> the file's, in lower case."""
        return {column: self.names.get(column, column).strip().casefold() for column in (*self.required, *self.optional)}

    def find(self, header: Sequence[str]) -> dict[str, int]:
        """Find the columns by name; upper and lower case are the same.

        Parameters
        ----------
        header : sequence of str
            Names of all columns.

        Returns
        -------
        dict of str to int
            Our name -> place in the header, for those that are there.

        Raises
        ------
        UsageError
            A required one, or one that `names` maps, is not there, or one is there twice.
        """
        header = [field.strip() for field in header]
        folded = [field.casefold() for field in header]
        theirs = self.theirs
        needed = [column for column, wanted in theirs.items() if column in self.required or column in self.names or folded.count(wanted) > 1]
        absent = [column for column in needed if folded.count(theirs[column]) != 1]
        if absent:
            shown = ", ".join(map(repr, header[:_SHOWN_COLUMNS])) + (", …" if len(header) > _SHOWN_COLUMNS else "")
            wanted = [f"{self.names[column]!r} (columns.{column})" if column in self.names else column for column in needed]
            expected = " and ".join([", ".join(wanted[:-1]), wanted[-1]] if len(wanted) > 1 else wanted)
            advice = " ".join(f"--set columns.{column}=NAME" for column in absent)
            raise UsageError(f"{self.name}: columns {shown} found; expected {expected}, each once; if a column has another name: {advice}")
        return {column: folded.index(wanted) for column, wanted in theirs.items() if wanted in folded}
