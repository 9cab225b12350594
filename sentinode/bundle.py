"""The bundle: weights and everything needed to use them. The only thing evaluate, predict, export and serve read."""

import hashlib
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sentinode import CLASS_NAMES
from sentinode.config import TrainConfig
from sentinode.errors import ManifestError, UsageError
from sentinode.manifests import (
    BUNDLE_FORMAT_VERSION,
    BundleManifest,
    DataReference,
    DatasetManifest,
    ReferenceStatistics,
    ThresholdRule,
    read_bundle_manifest,
)
from sentinode.model_card import model_card
from sentinode.storage import canonical_json, exclusive, local_path, publish, sha256_file, staging_path, write_json, write_text_atomic
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
    """A bundle on disk whose files were checked against its manifest."""

    path: Path
    manifest: BundleManifest

    @classmethod
    def open(cls, bundle: str | Path) -> "Bundle":
        """Open and verify.

        Raises
        ------
        ManifestNotFoundError
            `bundle` is not a bundle.
        ManifestError
            It was tampered with, is incomplete, or of another format version.
        """
        opened = cls(local_path(bundle), read_bundle_manifest(bundle))
        problems = opened.verify()
        if problems:
            raise ManifestError(f"{opened.path}: {problems[0]}")
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
        if WEIGHTS_FILE not in self.manifest.files:
            problems.append(f"bundle.json lists no {WEIGHTS_FILE}")
        elif digest_of(self.manifest.model_dump(mode="json")) != self.manifest.digest:
            problems.append("bundle.json: digest does not match its fields")
        # Fields of the format that this program does not act on yet: better refused than ignored.
        if self.manifest.class_names != CLASS_NAMES:
            problems.append(f"bundle.json: class_names {', '.join(self.manifest.class_names)}; this program knows {', '.join(CLASS_NAMES)} only")
        if self.manifest.members:
            problems.append("bundle.json: members: this program does not run ensembles")
        return problems

    def read_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights on the CPU, from the very bytes whose checksum is in the manifest.

        Raises
        ------
        ManifestError
            The file changed since the bundle was opened, or holds no tensors.
        """
        data = (self.path / WEIGHTS_FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest.files[WEIGHTS_FILE]:
            raise ManifestError(f"{self.path / WEIGHTS_FILE}: sha256 differs from bundle.json")
        try:
            return load(data)
        except SafetensorError as error:
            raise ManifestError(f"{self.path / WEIGHTS_FILE}: no safetensors file ({error})") from error


def digest_of(manifest: dict[str, Any]) -> str:
    """Return the digest of a manifest in its JSON form: SHA-256 over the weights' checksum and every field that decides a prediction."""
    deciding = {name: manifest[name] for name in _DECIDING_FIELDS} | {"weights": manifest["files"][WEIGHTS_FILE]}
    return hashlib.sha256(canonical_json(deciding)).hexdigest()


def write_bundle(
    out: str | Path,
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
    """Write a bundle; it appears whole or not at all. An older one at `out` is replaced, anything else there is not.

    Parameters
    ----------
    out : str or Path
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
    target = local_path(out)
    with exclusive(target):
        if target.exists() and not (target / "bundle.json").exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target} exists and is not a model bundle")
        staging = staging_path(target)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        # No metadata in the header: the same weights are the same bytes.
        (staging / WEIGHTS_FILE).write_bytes(save(weights))
        fields: dict[str, Any] = {
            "format_version": BUNDLE_FORMAT_VERSION,
            "name": name,
            "version": version,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "licence": licence,
            "arch": config.arch,
            "class_names": list(CLASS_NAMES),
            "patch_size_px": dataset.patch_size_px,
            "input_size_px": config.input_size_px,
            "spacing_um_px": dataset.spacing_um_px,
            "channel_order": "RGB",
            "mean": list(config.mean),
            "std": list(config.std),
            "temperature": temperature,
            "bias": bias,
            "threshold": threshold,
            "threshold_rule": threshold_rule.model_dump(mode="json"),
            "review": config.review.model_dump(mode="json"),
            "tta": config.tta,
            "training_config": config.model_dump(mode="json"),
            "data": DataReference(
                fingerprint=dataset.fingerprint,
                split_method=dataset.split.method,
                leak_level=dataset.leak_level,
                fold=config.fold,
                notes=dataset.split.notes,
            ).model_dump(mode="json"),
            "metrics": metrics,
            "reference": reference.model_dump(mode="json"),
            "git_commit": git_commit(),
            "library_versions": library_versions(),
            "members": [],
        }
        fields["files"] = {WEIGHTS_FILE: sha256_file(staging / WEIGHTS_FILE)}
        # Through the manifest, as a reader will see the fields: a temperature of 1 is 1.0 there.
        fields["digest"] = digest_of(BundleManifest(**fields, digest="0" * 64).model_dump(mode="json"))
        write_text_atomic(staging / CARD_FILE, model_card(fields))
        fields["files"][CARD_FILE] = sha256_file(staging / CARD_FILE)
        manifest = BundleManifest(**fields)
        write_json(staging / "bundle.json", manifest.model_dump(mode="json"))
        publish(staging, target)
    return Bundle(target, manifest)
