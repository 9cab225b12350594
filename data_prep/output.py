"""May prepare write here, and is there anything left to do? Answered before Ray starts."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow.compute as pc
from pydantic import ValidationError

from data_prep.rejects import Reject, RejectReason
from data_prep.sources.base import Source
from data_prep.sources.dataset import from_dataset as source_of_dataset
from data_prep.sources.detect import open_source
from sentinode import __version__
from sentinode.config import PrepareConfig
from sentinode.errors import ManifestError, UsageError
from sentinode.locations import Location, locate
from sentinode.manifests import DatasetManifest, read_dataset_manifest
from sentinode.publishing import staging_of
from sentinode.storage import canonical_json, local_path

WORK_FORMAT = 2
"""Raised whenever what an interrupted run left behind must not be continued by a newer program."""

Where = str | os.PathLike[str] | Location

# How the work is cut up, not what comes out.
_NOT_IN_THE_OUTPUT = ("workers", "decode_block_rows")


@dataclass(frozen=True)
class PrepareRequest:
    """What is asked for: the inputs, listed, how to prepare them, and where to.

    Attributes
    ----------
    config : PrepareConfig
    source : Source
    out : Location
        Folder to make.
    staging : Path
        Where the work lies until it is complete; all nodes must see it.
    overwrite : bool
        What is at `out` may be replaced if it is a prepared data set.
    work_is_private : bool
        `staging` lies where other machines do not see it.
    """

    config: PrepareConfig
    source: Source
    out: Location
    staging: Path
    overwrite: bool = False
    work_is_private: bool = False

    @cached_property
    def key(self) -> str:
        """Equal for requests that may continue each other's work, 16 hex digits."""
        same = {
            "work_format": WORK_FORMAT,
            "sentinode": __version__,
            "inputs_sha256": self.source.inputs_sha256,
            "config": self.config.model_dump(mode="json", exclude={"workers"}),
        }
        return hashlib.sha256(canonical_json(same)).hexdigest()[:16]

    @property
    def work(self) -> Path:
        """What is needed until the data set is finished. Named by `key`: a task that outlives its driver cannot write into another request's work."""
        return self.staging / self.key / "work"

    @property
    def data(self) -> Path:
        """The data set in the making, and nothing else."""
        return self.staging / self.key / "data"


def request_of(
    config: PrepareConfig,
    source: Where | None,
    out: Where,
    *,
    labels: Where | None = None,
    slides: Where | None = None,
    from_dataset: Where | None = None,
    work: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> PrepareRequest:
    """List the inputs; no image is opened. Of an `out` in an object store without `work`, the folder for the work is made.

    Parameters
    ----------
    config : PrepareConfig
    source : str or path or None
        Folder or table of patches.
    out : str or path
        Folder to make.
    labels, slides : str or path, optional
        CSV files `id,label` and `id,wsi`.
    from_dataset : str or path, optional
        A prepared data set to split anew instead of a source.
    work : str or path, optional
        For an `out` in an object store: local or mounted folder for the work; default the folder for temporary files.
    overwrite : bool
        Replace a prepared data set that is at `out`.

    Raises
    ------
    UsageError
        Something that must be there is missing, or options exclude each other.
    """
    if (source is None) == (from_dataset is None):
        raise UsageError("name what to prepare: either --source or --from")
    if from_dataset is not None:
        if labels is not None or slides is not None:
            raise UsageError("--from takes labels and slides from the data set; leave out --labels and --slides")
        listed = source_of_dataset(str(locate(from_dataset)))
        config = _as_prepared(config, listed)
    else:
        listed = open_source(config, str(locate(source or "")), labels=_text(labels), slides=_text(slides))
    if not listed.inputs:
        raise UsageError(f"{listed.where}: no inputs there")
    listed = _check_splits(config, listed)
    target = locate(out)
    if not target.name:
        raise UsageError(f"{target}: name a folder to make")
    if target.is_local and work is not None:
        raise UsageError("--work is for an --out in an object store; a local one is made beside its place, so that publishing is one rename")
    staging = staging_of(target, None if work is None else local_path(work))
    return PrepareRequest(config, listed, target, staging, overwrite, work_is_private=work is None and not target.is_local)


def _text(path: Where | None) -> str | None:
    return None if path is None else str(locate(path))


def _as_prepared(config: PrepareConfig, source: Source) -> PrepareConfig:
    """Take what pixels decide from the data set they come from."""
    manifest = read_dataset_manifest(source.where)
    own = {"patch_size_px": manifest.patch_size_px, "spacing_um_px": manifest.spacing_um_px}
    for key, value in own.items():
        if key in config.model_fields_set and getattr(config, key) != value:
            raise UsageError(f"{key} {getattr(config, key)} was set, but {source.where} was prepared with {value}")
    return config.model_copy(update=own)


def _check_splits(config: PrepareConfig, source: Source) -> Source:
    """Refuse a split method that would not be heeded or that the source lacks the columns for, and inputs that lack the value."""
    one = "patches without labels all go into one split" if not source.is_labelled else "split all deals nothing" if config.split == "all" else ""
    for key, says in (("split", config.split != "all"), ("folds", config.folds is not None)):
        if one and says and key in config.model_fields_set:
            raise UsageError(f"{key} {getattr(config, key)}: {one}; leave {key} out")
    if one or config.split not in ("slide", "predefined"):
        return source
    name = {"slide": "slide", "predefined": "split"}[config.split]
    known = source.entries[name].is_valid()
    if not pc.any(known).as_py():
        if config.split == "slide":
            raise UsageError("split slide needs the slide of each patch: --slides, a CSV file with columns id,wsi; or set split=overlap")
        raise UsageError(
            f"split predefined: this source ({source.kind}) has no splits of its own; expected PCam's files or a table with a column split"
        )
    unknown = source.entries.filter(pc.invert(known)).select(["id", "path"]).to_pylist()
    reason = {"slide": RejectReason.NO_SLIDE, "predefined": RejectReason.NO_SPLIT}[config.split]
    rejects = [Reject(reason, row["id"], row["path"], f"the {name} of this input is unknown") for row in unknown]
    return replace(source, entries=source.entries.filter(known), rejects=(*source.rejects, *rejects))


def is_complete(request: PrepareRequest) -> bool:
    """Tell whether the output already holds what is asked for; always False with `overwrite`.

    Raises
    ------
    UsageError
        The output holds something else, or cannot be used.
    """
    folder = request.out
    if folder.is_local:
        if _is_local_nothing(folder.local, request.source.where):
            return False
    elif not folder.bucket_may_exist():
        raise UsageError(f"{folder}: there is no such bucket; make it first")
    elif not (folder / "dataset.json").exists():
        return False  # parts without a manifest hurt nobody: a run puts its own below a prefix that no other uses
    if request.overwrite:
        return False
    try:
        manifest = read_dataset_manifest(folder)
    except ManifestError as error:
        raise UsageError(f"{error}; repeat with --overwrite to replace it") from error
    if manifest.source.get("inputs_sha256") != request.source.inputs_sha256:
        raise UsageError(f"{folder}: was prepared from other inputs; choose another --out or repeat with --overwrite")
    if changed := _changed_keys(manifest, request.config):
        raise UsageError(f"{folder}: was prepared with another config ({', '.join(changed)}); choose another --out or repeat with --overwrite")
    try:
        sizes = {entry.name: entry.size for entry in (folder / manifest.root).entries(recursive=True)}
    except FileNotFoundError:
        sizes = {}
    for record in (*manifest.shards, *manifest.files):
        if sizes.get(record.path) != record.bytes:
            raise UsageError(f"{folder}: {record.path} is missing or damaged; repeat with --overwrite")
    return True


def _is_local_nothing(folder: Path, source: str) -> bool:
    """Tell whether there is nothing at `folder`; UsageError where there is what may not be replaced."""
    if "://" not in source and Path(source).resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder}: holds the source; choose another --out")
    if not os.path.lexists(folder):
        return True
    if not folder.is_dir():
        raise UsageError(f"{folder}: exists and is not a folder; choose another --out")
    if not any(folder.iterdir()):
        return True
    if not (folder / "dataset.json").exists():
        # Not even --overwrite may delete what this program did not make.
        raise UsageError(f"{folder}: holds files but no prepared data set; choose another --out")
    return False


def belongs_to(manifest: DatasetManifest, request: PrepareRequest) -> bool:
    """Tell whether a manifest answers the request."""
    return manifest.source.get("inputs_sha256") == request.source.inputs_sha256 and not _changed_keys(manifest, request.config)


def rejected_at(out: Location) -> Location:
    """Where a failed run leaves its list of refused inputs."""
    return out.with_name(out.name + ".rejected.parquet")


def _changed_keys(manifest: DatasetManifest, config: PrepareConfig) -> list[str]:
    """Return the keys whose values differ. A key that the older data set did not know counts with its default."""
    try:
        old = PrepareConfig(**manifest.config).model_dump(mode="json")
    except ValidationError:
        old = manifest.config
    new = config.model_dump(mode="json")
    return sorted(key for key in (old.keys() | new.keys()).difference(_NOT_IN_THE_OUTPUT) if old.get(key) != new.get(key))
