"""May prepare write here, and is there anything left to do? Answered before Ray starts."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.labels import Source, read_source
from sentinode import __version__
from sentinode.config import PrepareConfig
from sentinode.errors import ManifestError, UsageError
from sentinode.manifests import DatasetManifest, read_dataset_manifest
from sentinode.storage import local_path

WORK_FORMAT = 1
"""Raised whenever what an interrupted run left behind must not be continued by a newer program."""


@dataclass(frozen=True)
class PrepareRequest:
    """What is asked for: the inputs, listed, and how to prepare them."""

    config: PrepareConfig
    source: Source

    def as_json(self) -> dict[str, Any]:
        """Return what must be equal for an interrupted run to be continued."""
        return {
            "work_format": WORK_FORMAT,
            "sentinode": __version__,
            "inputs_sha256": self.source.inputs_sha256,
            "config": self.config.model_dump(mode="json"),
        }


def request_of(
    config: PrepareConfig,
    source: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    slides: str | os.PathLike[str] | None = None,
) -> PrepareRequest:
    """List the inputs; raises UsageError like `data_prep.labels.read_source`."""
    return PrepareRequest(config, read_source(source, labels=labels, slides=slides, need_slides=config.split == "slide"))


def is_complete(request: PrepareRequest, out: str | os.PathLike[str], *, overwrite: bool = False) -> bool:
    """Tell whether `out` already holds what is asked for.

    Parameters
    ----------
    request : PrepareRequest
    out : str or path
    overwrite : bool
        What is at `out` may be replaced if it is a prepared data set; then the answer is always False.

    Raises
    ------
    UsageError
        `out` holds something else, or cannot be used.
    """
    folder = local_path(out)
    if request.source.folder.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder}: holds the source; choose another --out")
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise UsageError(f"{folder}: exists and is not a folder; choose another --out")
    if not any(folder.iterdir()):
        return False
    if not (folder / "dataset.json").exists():
        # Not even --overwrite may delete what this program did not make.
        raise UsageError(f"{folder}: holds files but no prepared data set; choose another --out")
    if overwrite:
        return False
    try:
        manifest = read_dataset_manifest(folder)
    except ManifestError as error:
        raise UsageError(f"{error}; repeat with --overwrite to replace it") from error
    if manifest.source.get("inputs_sha256") != request.source.inputs_sha256:
        raise UsageError(f"{folder}: was prepared from other inputs; choose another --out or repeat with --overwrite")
    if changed := _changed_keys(manifest, request.config):
        raise UsageError(f"{folder}: was prepared with another config ({', '.join(changed)}); choose another --out or repeat with --overwrite")
    for record in (*manifest.shards, *manifest.files):
        path = folder / record.path
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise UsageError(f"{folder}: {record.path} is missing or damaged; repeat with --overwrite")
    return True


def belongs_to(manifest: DatasetManifest, request: PrepareRequest) -> bool:
    """Tell whether a manifest answers the request."""
    return manifest.source.get("inputs_sha256") == request.source.inputs_sha256 and not _changed_keys(manifest, request.config)


def rejected_path(out: Path) -> Path:
    """Where a failed run leaves its list of refused inputs."""
    return out.with_name(out.name + ".rejected.parquet")


def _changed_keys(manifest: DatasetManifest, config: PrepareConfig) -> list[str]:
    """Return the keys whose values differ. A key that the older data set did not know counts with its default."""
    try:
        old = PrepareConfig(**manifest.config).model_dump(mode="json")
    except ValidationError:
        old = manifest.config
    new = config.model_dump(mode="json")
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
