"""Telling the layout of a source and opening it."""

from collections.abc import Mapping
from typing import Any

from data_prep.sources.archive import ArchiveReader
from data_prep.sources.base import Reader, Source
from data_prep.sources.class_folders import open_class_folders
from data_prep.sources.dataset import ShardReader
from data_prep.sources.files import FilesReader
from data_prep.sources.hdf5 import Hdf5Reader
from data_prep.sources.kaggle import IMAGES_NAME, LABELS_NAME, open_kaggle
from data_prep.sources.pcam import STEM, is_pcam, open_pcam
from data_prep.sources.table import TABLE_SUFFIXES, open_table
from data_prep.sources.unlabelled import open_unlabelled
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.images import IMAGE_SUFFIXES
from sentinode.locations import Location, locate

# Which columns of ours `columns` can map in each layout; the slides file has id and wsi.
_COLUMNS = {
    "kaggle": {"id", "label", "wsi"},
    "class_folders": {"id", "wsi"},
    "unlabelled": {"id", "wsi"},
    "table": {"id", "label", "path", "slide", "centre", "x_px", "y_px", "split", "wsi"},
    "pcam": set[str](),
}


def open_source(config: PrepareConfig, where: str, *, labels: str | None = None, slides: str | None = None) -> Source:
    """List the inputs of a source in whatever layout; no image is opened.

    Parameters
    ----------
    config : PrepareConfig
        `source` names the layout, or leaves it to be told from what is there.
    where : str
        Folder or table, as a path or URI.
    labels : str, optional
        Labels file of the Kaggle layout, where it does not lie in the folder.
    slides : str, optional
        CSV file with columns `id,wsi`, for layouts that do not know the slides themselves.

    Raises
    ------
    UsageError
        The layout cannot be told, or something that it must have is missing or unusable.
    StorageError
        The storage does not answer.
    """
    location = locate(where)
    layout = _layout(config, location, has_labels=labels is not None)
    if labels is not None and layout != "kaggle":
        raise UsageError(f"--labels: the layout {layout} has no labels file; leave it out, or choose --set source=kaggle")
    if slides is not None and layout == "pcam":
        raise UsageError("--slides: the layout pcam takes the slides from its _meta.csv files; leave it out")
    if unread := sorted(config.columns.keys() - _COLUMNS[layout]):
        raise UsageError(f"columns.{unread[0]}: the layout {layout} reads no such column")
    slides_at = None if slides is None else locate(slides)
    if layout == "kaggle":
        return open_kaggle(config, location, labels=None if labels is None else locate(labels), slides=slides_at)
    if layout == "pcam":
        return open_pcam(location)
    openers = {"class_folders": open_class_folders, "table": open_table, "unlabelled": open_unlabelled}
    return openers[layout](config, location, slides=slides_at)


def _layout(config: PrepareConfig, where: Location, *, has_labels: bool) -> str:
    """Return the name of the layout, which the configuration or the content of the folder gives."""
    try:
        is_folder = {entry.name: entry.is_dir for entry in where.entries()}
    except NotADirectoryError:
        return _layout_of_file(config, where)
    except FileNotFoundError as error:
        raise UsageError(f"source {where}: {where.why_nothing('no such folder or file')}") from error
    except OSError as error:
        raise UsageError(f"source {where}: cannot be listed ({error.strerror or error})") from error
    if "dataset.json" in is_folder:
        raise UsageError(f"source {where}: is a prepared data set; to deal its patches to other splits, name it with --from")
    if config.source == "table":
        raise UsageError(f"source {where}: is a folder; the layout table needs the table itself, a file ending in {', '.join(TABLE_SUFFIXES)}")
    if config.source != "auto":
        return config.source
    classes = [name for name in config.class_folders if is_folder.get(name.partition("/")[0])]
    found = {
        f"kaggle ({LABELS_NAME})": LABELS_NAME in is_folder,
        f"class_folders ({' and '.join(config.class_folders)})": len(classes) == len(config.class_folders),
        f"pcam ({STEM}*_x.h5)": is_pcam(is_folder),
    }
    layouts = [name for name, is_there in found.items() if is_there]
    if has_labels:
        # It decides, unless there is nothing that it could be about.
        if layouts and not any(name == IMAGES_NAME or name.lower().endswith(IMAGE_SUFFIXES) for name in is_folder):
            raise UsageError(f"--labels: source {where} has the layout {layouts[0]}, which says the labels itself; leave --labels out")
        return "kaggle"
    if len(layouts) > 1:
        raise UsageError(f"source {where}: has several layouts, {' and '.join(layouts)}; choose with --set source=NAME")
    if not layouts:
        half = f" (of the two only {classes[0]} is there)" if classes else ""
        raise UsageError(
            f"source {where}: no labels found; looked for {', '.join(found)}{half}; name a labels file with --labels, or a table "
            f"({', '.join(TABLE_SUFFIXES)}) as the source; for predicting without labels: --set source=unlabelled"
        )
    return layouts[0].partition(" ")[0]


def _layout_of_file(config: PrepareConfig, where: Location) -> str:
    if config.source not in ("auto", "table", "unlabelled"):
        raise UsageError(f"source {where}: is a file; the layout {config.source} needs the folder")
    if not where.name.lower().endswith(TABLE_SUFFIXES):
        raise UsageError(f"source {where}: expected a folder, or a table ending in {', '.join(TABLE_SUFFIXES)}")
    return "table"


def reader_of(spec: Mapping[str, Any]) -> Reader:
    """Make, wherever a task runs, the Reader that `Source.reader` describes."""
    return _READERS[spec["kind"]].of(spec)


# Kind -> class; each has a constructor `of` for what its layout put into `Source.reader`.
_READERS: dict[str, type[FilesReader] | type[Hdf5Reader] | type[ShardReader] | type[ArchiveReader]] = {
    "files": FilesReader,
    "hdf5": Hdf5Reader,
    "shards": ShardReader,
    "archive": ArchiveReader,
}
