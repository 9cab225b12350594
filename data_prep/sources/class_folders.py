"""The layout of one folder per class: `normal/**/*.tif` and `metastatic/**/*.tif`, as image classifiers commonly read it."""

from pathlib import PurePosixPath

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import Source
from data_prep.sources.entries import entry_table
from data_prep.sources.listing import list_images, listed_source, refuse_long_ids, repeated, stem_of
from data_prep.sources.slides import read_slides, slides_of
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.locations import Location


def open_class_folders(config: PrepareConfig, where: Location, *, slides: Location | None = None) -> Source:
    """List both folders; no image is opened.

    An id is the path below its class folder, without suffix; where the two folders have such a path in common, all ids begin with the class folder.

    Parameters
    ----------
    config : PrepareConfig
        `class_folders` names the folders of class 0 and 1.
    where : Location
        Folder that holds both. Images elsewhere in it are refused, since nothing says what they are.
    slides : Location, optional
        CSV file with columns `id,wsi`.

    Raises
    ------
    UsageError
        A class has no images, or the slides file is unusable.
    """
    prefixes = [_prefix(name) for name in config.class_folders]
    if prefixes[0].startswith(prefixes[1]) or prefixes[1].startswith(prefixes[0]):
        raise UsageError(f"class_folders {list(config.class_folders)}: one lies in the other")
    slide_of, slides_content = read_slides(config, slides)
    listing = list_images(where, recursive=True)
    rejects = list(listing.refused)
    found: tuple[list[str], list[str]] = ([], [])
    for name in listing.names:
        label = next((label for label, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if label is None:
            detail = f"lies in neither {config.class_folders[0]} nor {config.class_folders[1]}"
            rejects.append(Reject(RejectReason.NO_LABEL, stem_of(name), name, detail))
        else:
            found[label].append(name)
    for label, name in enumerate(config.class_folders):
        if not found[label]:
            raise UsageError(
                f"source {where}: no images in its folder {name}; expected images of both classes, or --set class_folders=[normal, metastatic]"
            )
    paths = [*found[0], *found[1]]
    labels = [0] * len(found[0]) + [1] * len(found[1])
    short = [[stem_of(path[len(prefix) :]) for path in of_class] for prefix, of_class in zip(prefixes, found, strict=True)]
    ids = [*short[0], *short[1]] if set(short[0]).isdisjoint(short[1]) else [stem_of(path) for path in paths]
    refuse_long_ids(ids, where)
    if several := repeated(ids):
        detail = "several files of the folder have this id"
        rejects += [Reject(RejectReason.DUPLICATE_ID, id_, path, detail) for id_, path in zip(ids, paths, strict=True) if id_ in several]
        kept = [row for row, id_ in enumerate(ids) if id_ not in several]
        ids, paths, labels = [ids[row] for row in kept], [paths[row] for row in kept], [labels[row] for row in kept]
    entries = entry_table(id=ids, label=labels, path=paths, slide=slides_of(ids, slide_of, slides))
    return listed_source("class_folders", where, listing, entries, rejects, [slides_content], slides=slides)


def _prefix(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UsageError(f"class_folders: {name!r} is no name of a folder inside the source")
    return f"{path}/"
