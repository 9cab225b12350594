"""Telling the layout of a source and opening it."""

import os
from collections.abc import Mapping
from typing import Any

from data_prep.sources.base import Reader, Source
from data_prep.sources.files import FilesReader
from data_prep.sources.kaggle import LABELS_NAME, open_kaggle
from sentinode.config import PrepareConfig
from sentinode.errors import UsageError
from sentinode.storage import local_path


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
    """
    folder = str(local_path(where))
    if not os.path.isdir(folder):
        raise UsageError(f"source {folder}: no such folder")
    if labels is None and config.source == "auto" and not os.path.exists(os.path.join(folder, LABELS_NAME)):
        raise UsageError(f"source {folder}: no {LABELS_NAME} there; name a labels file with --labels")
    return open_kaggle(config, folder, labels=labels and str(local_path(labels)), slides=slides and str(local_path(slides)))


def reader_of(spec: Mapping[str, Any]) -> Reader:
    """Make, wherever a task runs, the Reader that `Source.reader` describes."""
    return _READERS[spec["kind"]].of(spec)


_READERS = {"files": FilesReader}
