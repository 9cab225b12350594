"""Re-checking what a manifest promises."""

import hashlib
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from sentinode.bundle import Bundle
from sentinode.bundle_copies import fetch
from sentinode.dataset import PreparedDataset
from sentinode.engines import verify_engines
from sentinode.errors import ManifestNotFoundError
from sentinode.locations import Location, locate
from sentinode.manifests import read_bundle_manifest, read_predictions_manifest
from sentinode.storage import temporary_folder


def verify_folder(path: str | Path | Location) -> tuple[str, list[str]]:
    """Re-check every checksum and count of a data set, a bundle with its engines, or a folder of predictions, on disk or in an object store.

    Returns
    -------
    (kind, problems)
        One line per problem; none if the folder is whole.

    Raises
    ------
    ManifestNotFoundError
        The folder has none of the three manifests.
    ManifestError
        Its manifest is malformed or of another format version.
    StorageError
        The storage does not answer.
    """
    location = locate(path)
    if (location / "dataset.json").exists():
        return "prepared data set", PreparedDataset.open(location).verify()
    if (location / "bundle.json").exists():
        if location.is_local:
            return _verify_bundle(location.local, location)
        # What is in the store is asked about, not a copy that this machine may have of it.
        with TemporaryDirectory(prefix="verify-", dir=temporary_folder()) as folder:
            fetch(location, Path(folder))
            return _verify_bundle(Path(folder), location)
    if (location / "_manifest.json").exists():
        return "folder of predictions", _verify_predictions(location)
    nothing = "nothing to verify (no dataset.json, bundle.json or _manifest.json there; of a run name its bundle)"
    raise ManifestNotFoundError(f"{location}: {location.why_nothing(nothing)}")


def _verify_bundle(folder: Path, where: Location) -> tuple[str, list[str]]:
    bundle = Bundle(folder, read_bundle_manifest(folder), where)
    problems = bundle.verify()
    if not problems or not bundle.manifest.members:
        for network in bundle.networks():
            inside = network.path.relative_to(folder)
            problems += [f"{inside}: {problem}" if bundle.manifest.members else problem for problem in verify_engines(network)]
    return "ensemble" if bundle.manifest.members else "model bundle", problems


def _verify_predictions(folder: Location) -> list[str]:
    manifest = read_predictions_manifest(folder)
    problems = []
    for part in manifest.parts:
        try:
            data = (folder / part.path).read_bytes()
        except FileNotFoundError:
            problems.append(f"{part.path}: missing")
            continue
        if hashlib.sha256(data).hexdigest() != part.sha256:
            problems.append(f"{part.path}: sha256 differs")
        elif (rows := pq.read_metadata(BytesIO(data)).num_rows) != part.rows:
            problems.append(f"{part.path}: {rows} rows, expected {part.rows}")
    if sum(part.rows for part in manifest.parts) != manifest.rows:
        problems.append(f"the parts hold {sum(part.rows for part in manifest.parts)} rows, the manifest says {manifest.rows}")
    return problems
