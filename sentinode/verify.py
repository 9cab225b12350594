"""Re-checking what a manifest promises."""

from pathlib import Path

import pyarrow.parquet as pq

from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from sentinode.engines import verify_engines
from sentinode.errors import ManifestNotFoundError
from sentinode.locations import Location, locate
from sentinode.manifests import read_bundle_manifest, read_predictions_manifest
from sentinode.storage import sha256_file


def verify_folder(path: str | Path | Location) -> tuple[str, list[str]]:
    """Re-check every checksum and count of a data set (on disk or in an object store), a bundle with its engines, or a folder of predictions.

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
    if not location.is_local:
        raise ManifestNotFoundError(f"{location}: nothing to verify (no dataset.json there; bundles and predictions are verified on disk only)")
    folder = location.local
    if (folder / "bundle.json").exists():
        bundle = Bundle(folder, read_bundle_manifest(folder))
        problems = bundle.verify()
        if not problems or not bundle.manifest.members:
            for network in bundle.networks():
                inside = network.path.relative_to(folder)
                problems += [f"{inside}: {problem}" if bundle.manifest.members else problem for problem in verify_engines(network)]
        return "ensemble" if bundle.manifest.members else "model bundle", problems
    if (folder / "_manifest.json").exists():
        return "folder of predictions", _verify_predictions(folder)
    raise ManifestNotFoundError(f"{folder}: nothing to verify (no dataset.json, bundle.json or _manifest.json there)")


def _verify_predictions(folder: Path) -> list[str]:
    manifest = read_predictions_manifest(folder)
    problems = []
    for part in manifest.parts:
        file = folder / part.path
        if not file.is_file():
            problems.append(f"{part.path}: missing")
        elif sha256_file(file) != part.sha256:
            problems.append(f"{part.path}: sha256 differs")
        elif pq.read_metadata(file).num_rows != part.rows:
            problems.append(f"{part.path}: {pq.read_metadata(file).num_rows} rows, expected {part.rows}")
    if sum(part.rows for part in manifest.parts) != manifest.rows:
        problems.append(f"the parts hold {sum(part.rows for part in manifest.parts)} rows, the manifest says {manifest.rows}")
    return problems
