"""The bundle: weights and everything needed to use them. The only thing evaluate, predict, export and serve read.

An ensemble is a bundle that holds whole bundles instead of weights:

    <bundle>/bundle.json, model_card.md
    <bundle>/members/00/bundle.json, model.safetensors ...
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sentinode import CLASS_NAMES
from sentinode.bundle_copies import local_copy
from sentinode.config import EnsembleConfig, TrainConfig
from sentinode.errors import ManifestError, ManifestNotFoundError, UsageError
from sentinode.locations import Location, locate
from sentinode.manifests import (
    BUNDLE_FORMAT_VERSION,
    BundleManifest,
    CalibrationRowsKind,
    DataReference,
    DatasetManifest,
    ReferenceStatistics,
    ThresholdRule,
    read_bundle_manifest,
)
from sentinode.model_card import model_card
from sentinode.publishing import upload_folder
from sentinode.storage import canonical_json, exclusive, publish, sha256_file, staging_path, temporary_folder, write_json, write_text_atomic
from sentinode.versions import git_commit, library_versions

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model_card.md"

_DECIDING_FIELDS = (
    "arch",
    "class_names",
    "patch_size_px",
    "input_size_px",
    "channel_order",
    "mean",
    "std",
    "temperature",
    "bias",
    "threshold",
    "review",
    "tta",
    "members",
)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked against its manifest.

    Attributes
    ----------
    path : Path
        Its files on this machine: the bundle itself, or a copy of one in an object store.
    manifest : BundleManifest
    where : Location
        What it was opened as; to be opened on other machines, and named to people.
    """

    path: Path
    manifest: BundleManifest
    where: Location

    @classmethod
    def open(cls, bundle: str | Path | Location) -> "Bundle":
        """Open and verify; from an object store it is copied to this machine first.

        Raises
        ------
        ManifestNotFoundError
            `bundle` is not a bundle.
        ManifestError
            It was tampered with, is incomplete, or of another format version.
        StorageError
            The storage does not answer, or there is no room for the copy.
        """
        where = locate(bundle)
        if where.is_local:
            return cls._checked(where.local, where)
        try:
            return cls._checked(local_copy(where), where)
        except (ManifestNotFoundError, ManifestError):
            # Temporary files get cleared away, also some of a copy's.
            return cls._checked(local_copy(where, anew=True), where)

    @classmethod
    def _checked(cls, path: Path, where: Location) -> "Bundle":
        opened = cls(path, read_bundle_manifest(path), where)
        if problems := opened.verify():
            raise ManifestError(f"{where}: {problems[0]}")
        return opened

    def verify(self) -> list[str]:
        """Re-check every checksum and the digest; return one line per problem."""
        problems = []
        for name, expected in self.manifest.files.items():
            if Path(name).name != name:
                problems.append(f"{name}: not a plain file name")
            elif not (self.path / name).is_file():
                problems.append(f"{name}: missing")
            elif sha256_file(self.path / name) != expected:
                problems.append(f"{name}: sha256 differs from bundle.json")
        if (WEIGHTS_FILE in self.manifest.files) == bool(self.manifest.members):
            problems.append(f"bundle.json lists {'both members and ' if self.manifest.members else 'no '}{WEIGHTS_FILE}")
        elif digest_of(self.manifest.model_dump(mode="json")) != self.manifest.digest:
            problems.append("bundle.json: digest does not match its fields")
        # Fields of the format that this program does not act on yet: better refused than ignored.
        if self.manifest.class_names != CLASS_NAMES:
            problems.append(f"bundle.json: class_names {', '.join(self.manifest.class_names)}; this program knows {', '.join(CLASS_NAMES)} only")
        for number, digest in enumerate(self.manifest.members):
            problems += self._verify_member(f"members/{number:02d}", digest)
        return problems

    def _verify_member(self, name: str, digest: str) -> list[str]:
        try:
            member = Bundle(self.path / name, read_bundle_manifest(self.path / name), self.where / name)
        except (ManifestError, ManifestNotFoundError) as error:
            return [f"{name}: {error}"]
        if member.manifest.digest != digest:
            return [f"{name}: another bundle than bundle.json lists"]
        if member.manifest.members:
            return [f"{name}: an ensemble in an ensemble"]
        return [f"{name}: {problem}" for problem in member.verify()]

    def networks(self) -> list["Bundle"]:
        """Return the bundles that hold weights: the members of an ensemble in order, else this one itself.

        Raises
        ------
        ManifestNotFoundError, ManifestError
            A member is gone or was changed since the bundle was opened.
        """
        if not self.manifest.members:
            return [self]
        names = [f"members/{number:02d}" for number in range(len(self.manifest.members))]
        members = [Bundle._checked(self.path / name, self.where / name) for name in names]
        if [member.manifest.digest for member in members] != self.manifest.members:
            raise ManifestError(f"{self.where}: its members are others than bundle.json lists")
        return members

    def read_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights on the CPU, from the very bytes whose checksum is in the manifest.

        Raises
        ------
        UsageError
            The bundle is an ensemble, which has none of its own.
        ManifestError
            The file changed since the bundle was opened, or holds no tensors.
        """
        if self.manifest.members:
            raise UsageError(f"{self.where}: an ensemble, without weights of its own; name one of its members, {self.where / 'members/00'}")
        try:
            data = (self.path / WEIGHTS_FILE).read_bytes()
        except FileNotFoundError as error:
            raise ManifestError(f"{self.where / WEIGHTS_FILE}: is gone, or its copy on this machine is; run the same command again") from error
        if hashlib.sha256(data).hexdigest() != self.manifest.files[WEIGHTS_FILE]:
            raise ManifestError(f"{self.where / WEIGHTS_FILE}: sha256 differs from bundle.json")
        try:
            return load(data)
        except SafetensorError as error:
            raise ManifestError(f"{self.where / WEIGHTS_FILE}: no safetensors file ({error})") from error


def digest_of(manifest: dict[str, Any]) -> str:
    """Return the digest of a manifest in its JSON form: SHA-256 over the weights' checksum and every field that decides a prediction.

    An ensemble has no weights; the digests of its members are among the fields.
    """
    deciding = {name: manifest[name] for name in _DECIDING_FIELDS} | {"weights": manifest["files"].get(WEIGHTS_FILE)}
    return hashlib.sha256(canonical_json(deciding)).hexdigest()


def write_bundle(
    out: str | Path | Location,
    weights: dict[str, torch.Tensor],
    *,
    config: TrainConfig,
    dataset: DatasetManifest,
    temperature: float,
    bias: float,
    threshold: float,
    threshold_rule: ThresholdRule,
    metrics: dict[str, Any],
    reference: ReferenceStatistics,
    name: str = "sentinode",
    version: str = "1",
    licence: str = "Apache-2.0",
) -> Bundle:
    """Write a bundle; it appears whole or not at all. An older one at `out` is replaced, but not in an object store; anything else there is not.

    Parameters
    ----------
    out : str or Path or Location
        Folder to make.
    weights : dict of str to tensor
        `sentinode.model.state_for_storage` of the network.
    config : TrainConfig
        What it was trained with; stored whole.
    dataset : DatasetManifest
        What it was trained on.
    temperature, bias, threshold, threshold_rule
        Of `sentinode.calibration`, fitted on validation.
    metrics : dict
        Statistics of predictions on validation: no times, rates or paths; None, never NaN.
    reference : ReferenceStatistics
    name, version, licence : str
        For people.

    Raises
    ------
    UsageError
        `out` holds something else.
    """

    def fill(folder: Path) -> dict[str, str]:
        # No metadata in the header: the same weights are the same bytes.
        (folder / WEIGHTS_FILE).write_bytes(save(weights))
        return {WEIGHTS_FILE: sha256_file(folder / WEIGHTS_FILE)}

    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "licence": licence,
        "arch": config.arch,
        "patch_size_px": dataset.patch_size_px,
        "input_size_px": config.input_size_px,
        "spacing_um_px": dataset.spacing_um_px,
        "mean": list(config.mean),
        "std": list(config.std),
        "temperature": temperature,
        "bias": bias,
        "threshold": threshold,
        "threshold_rule": threshold_rule.model_dump(mode="json"),
        "review": config.review.model_dump(mode="json"),
        "tta": config.tta,
        "training_config": config.model_dump(mode="json"),
        "data": _reference(dataset, config.fold, dataset.split.notes),
        "metrics": metrics,
        "reference": reference.model_dump(mode="json"),
        "calibration_rows": "held_out",
        "members": [],
    }
    return _publish(locate(out), fields, fill)


def write_ensemble(
    out: str | Path | Location,
    members: Sequence[Bundle],
    *,
    config: EnsembleConfig,
    dataset: DatasetManifest,
    temperature: float,
    bias: float,
    threshold: float,
    threshold_rule: ThresholdRule,
    metrics: dict[str, Any],
    reference: ReferenceStatistics,
    calibration_rows: CalibrationRowsKind,
    notes: list[str],
    name: str = "sentinode-ensemble",
    version: str = "1",
) -> Bundle:
    """Write an ensemble with copies of its members and their engines; it appears whole or not at all, as with `write_bundle`.

    Parameters
    ----------
    members : sequence of Bundle
        At least one, of one network each, that accept patches of one size.
    dataset : DatasetManifest
        What it was calibrated on.
    temperature, bias : float
        Applied to the mean of the members' calibrated logits.
    calibration_rows, notes
        Of `sentinode.ensemble.calibration_plan`.

    Raises
    ------
    UsageError
        `out` holds something else.
    ManifestNotFoundError, ManifestError
        A member was changed while it was copied.
    """
    digests = [member.manifest.digest for member in members]
    first = members[0].manifest

    def fill(folder: Path) -> dict[str, str]:
        for number, member in enumerate(members):
            copy = folder / "members" / f"{number:02d}"
            shutil.copytree(member.path, copy, ignore=shutil.ignore_patterns(".*", "*.staging"))
            if Bundle.open(copy).manifest.digest != digests[number]:
                raise ManifestError(f"{member.where}: was replaced by another bundle meanwhile; run the same command again")
        return {}

    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "licence": ", ".join(dict.fromkeys(member.manifest.licence for member in members)),
        "arch": first.arch,
        "patch_size_px": first.patch_size_px,
        "input_size_px": first.input_size_px,
        "spacing_um_px": first.spacing_um_px,
        "mean": list(first.mean),
        "std": list(first.std),
        "temperature": temperature,
        "bias": bias,
        "threshold": threshold,
        "threshold_rule": threshold_rule.model_dump(mode="json"),
        "review": config.review.model_dump(mode="json"),
        "tta": min(member.manifest.tta for member in members),
        "training_config": config.model_dump(mode="json"),
        "data": _reference(dataset, None, [*dataset.split.notes, *notes]),
        "metrics": metrics,
        "reference": reference.model_dump(mode="json"),
        "calibration_rows": calibration_rows,
        "members": digests,
    }
    return _publish(locate(out), fields, fill)


def check_replaceable(target: Location) -> None:
    """Raise UsageError where something else than a bundle, or an empty folder, stands at `target`; in an object store, where anything does."""
    if not target.is_local:
        _check_free(target)
        return
    path = target.local
    if path.exists() and not (path / "bundle.json").exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{target} exists and is not a model bundle")


def _check_free(target: Location) -> None:
    if not target.name:
        raise UsageError(f"{target}: name a folder in the bucket")
    names = {entry.name for entry in target.entries()} if target.exists() else set()
    # Replaced file by file it would, for a while, be neither the old nor the new one.
    if "bundle.json" in names:
        raise UsageError(f"{target}: a bundle is there, and in an object store none is replaced; use another --out")
    # What an upload that was cut off has left is overwritten.
    if names - {WEIGHTS_FILE, CARD_FILE, "members"}:
        raise UsageError(f"{target} exists and is not a model bundle")


def _reference(dataset: DatasetManifest, fold: int | None, notes: list[str]) -> dict[str, Any]:
    return DataReference(
        fingerprint=dataset.fingerprint, split_method=dataset.split.method, leak_level=dataset.leak_level, fold=fold, notes=notes
    ).model_dump(mode="json")


def _publish(target: Location, fields: dict[str, Any], fill: Callable[[Path], dict[str, str]]) -> Bundle:
    """Publish a folder that `fill` has filled, which returns the checksums of its files, with its card and manifest."""
    if target.is_local:
        with exclusive(target.local):
            check_replaceable(target)
            staging = staging_path(target.local)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            _complete(staging, fields, fill)
            publish(staging, target.local)
    else:
        check_replaceable(target)
        with TemporaryDirectory(prefix="bundle-", dir=temporary_folder()) as staging_name:
            _complete(Path(staging_name), fields, fill)
            upload_folder(Path(staging_name), target, "bundle.json")
    return Bundle.open(target)


def _complete(staging: Path, fields: dict[str, Any], fill: Callable[[Path], dict[str, str]]) -> None:
    fields |= {
        "format_version": BUNDLE_FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "class_names": list(CLASS_NAMES),
        "channel_order": "RGB",
        "git_commit": git_commit(),
        "library_versions": library_versions(),
        "files": fill(staging),
    }
    # Through the manifest, as a reader will see the fields: a temperature of 1 is 1.0 there.
    fields["digest"] = digest_of(BundleManifest(**fields, digest="0" * 64).model_dump(mode="json"))
    write_text_atomic(staging / CARD_FILE, model_card(fields))
    fields["files"][CARD_FILE] = sha256_file(staging / CARD_FILE)
    write_json(staging / "bundle.json", BundleManifest(**fields).model_dump(mode="json"))
