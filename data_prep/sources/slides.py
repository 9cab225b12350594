"""The slides file: which slide each patch was cut from, where the layout itself does not say."""

from collections.abc import Mapping, Sequence

from data_prep.sources.cells import Cells, Wanted, column_names
from data_prep.sources.files import read_described
from data_prep.sources.text_table import read_text_table
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.locations import Location


def read_slides(config: PrepareConfig, slides: Location | None) -> tuple[dict[str, str], bytes]:
    """Read the columns `id,wsi` of a CSV file; without one nothing is known.

    Returns
    -------
    dict of str to str
        id -> slide, for `slides_of`; "" where none is given.
    bytes
        The file as it is.

    Raises
    ------
    UsageError
        The file cannot be read or contradicts itself.
    """
    if slides is None:
        return {}, b""
    content = read_described(slides, "slides file", "a CSV file with columns id,wsi")
    cells = _read(content, f"slides file {slides}", column_names(config))
    if not len(cells):
        raise UsageError(f"{cells.name}: no rows below the header")
    cells.refuse_long(cells.columns["wsi"], "slide")
    slide_of: dict[str, str] = {}
    for row, (id_, slide) in enumerate(zip(cells.columns["id"], cells.columns["wsi"], strict=True)):
        if row in cells.ragged:
            raise UsageError(f"{cells.name}: {cells.wrong_width(row)}")
        known = slide_of.get(id_)
        if slide and known and known != slide:
            raise UsageError(f"{cells.name}: {cells.place(row)} gives an id another slide than an earlier line")
        slide_of[id_] = slide or known or ""
    return slide_of, content


def slides_of(ids: Sequence[str], slide_of: Mapping[str, str], slides: Location | None) -> list[str | None]:
    """Return the slide of each id, None where it is unknown; raises UsageError where the file names none of the ids, so belongs to other patches."""
    if slides is not None and ids and slide_of.keys().isdisjoint(ids):
        raise UsageError(
            f"slides file {slides}: names none of the {len(ids)} ids of the source; its first is {next(iter(slide_of))[:80]!r}, "
            f"the source's {ids[0][:80]!r}"
        )
    return [slide_of.get(id_) or None for id_ in ids]


def _read(content: bytes, name: str, names: Mapping[str, str]) -> Cells:
    try:
        return read_text_table(content, Wanted(name, ("id", "wsi"), names=names))
    except UsageError as error:
        # Another name of the id may be meant for the labels file alone.
        try:
            return read_text_table(content, Wanted(name, ("id", "wsi"), names={column: other for column, other in names.items() if column != "id"}))
        except UsageError:
            raise error from None
