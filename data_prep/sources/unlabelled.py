"""A folder of images that nothing is known about: for predicting, never for training."""

from data_prep.sources.base import Source
from data_prep.sources.entries import entry_table
from data_prep.sources.listing import list_images, listed_source, refuse_long_ids, repeated, stem_of
from data_prep.sources.slides import read_slides, slides_of
from sentinode.config import PrepareConfig
from sentinode.locations import Location


def open_unlabelled(config: PrepareConfig, where: Location, *, slides: Location | None = None) -> Source:
    """List the images of a folder and all folders in it; none is opened. An id is the relative path without suffix; with it if some were equal else.

    Parameters
    ----------
    config : PrepareConfig
    where : Location
    slides : Location, optional
        CSV file with columns `id,wsi`.

    Raises
    ------
    UsageError
        There are no images, or the slides file is unusable.
    """
    slide_of, slides_content = read_slides(config, slides)
    listing = list_images(where, recursive=True)
    ids = [stem_of(name) for name in listing.names]
    if repeated(ids):
        ids = listing.names
    refuse_long_ids(ids, where)
    entries = entry_table(id=ids, path=listing.names, slide=slides_of(ids, slide_of, slides))
    return listed_source("unlabelled", where, listing, entries, listing.refused, [slides_content], slides=slides)
