"""The slides file: which slide each patch was cut from, where the layout itself does not say."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_prep.sources.files import read_described
from data_prep.sources.text_table import TextTable, column_names, read_text_table
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError


@dataclass(frozen=True)
class Slides:
    """Content of a slides file.

    Attributes
    ----------
    of : mapping of str to str
        id -> slide, where one is given.
    content : bytes
        The file as it is; empty without one.
    must_be_known : bool
        A patch without a slide is refused, since slides decide the split.
    """

    of: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""
    must_be_known: bool = False


def read_slides(config: PrepareConfig, slides: str | None) -> Slides:
    """Read the columns `id,wsi` of a CSV file.

    Raises
    ------
    UsageError
        Slides decide the split and there is no file, or the file cannot be read or contradicts itself.
    """
    must_be_known = config.split == "slide"
    if slides is None:
        if must_be_known:
            raise UsageError("split slide needs --slides, a CSV file with columns id,wsi; or set split=overlap")
        return Slides()
    content = read_described(slides, "slides file", "a CSV file with columns id,wsi")
    table = _read_table(content, f"slides file {slides}", column_names(config))
    slide_of: dict[str, str] = {}
    for row, (line, id_, slide) in enumerate(zip(table.lines, table.columns["id"], table.columns["wsi"], strict=True)):
        if row in table.ragged:
            raise UsageError(f"slides file {slides}: line {line} has {table.ragged[row]} fields, the header {table.width}")
        if slide and slide_of.setdefault(id_, slide) != slide:
            raise UsageError(f"slides file {slides}: line {line} gives an id another slide than an earlier line")
    return Slides(slide_of, content, must_be_known)


def _read_table(content: bytes, name: str, names: Mapping[str, str]) -> TextTable:
    try:
        return read_text_table(content, name, ("id", "wsi"), (), names)
    except UsageError as error:
        # Another name of the id may be meant for the labels file alone.
        try:
            return read_text_table(content, name, ("id", "wsi"), (), {column: other for column, other in names.items() if column != "id"})
        except UsageError:
            raise error from None
