"""Add an engine to a bundle: ONNX Runtime or OpenVINO instead of torch.

    python -m ray_jobs.export --bundle out/run/bundle --data out/data --engine openvino

Writes <bundle>/engines/<engine>/, if no probability of the validation split deviates from torch's by more than 1e-3 (1e-2 for int8).
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode.bundle import Bundle
from sentinode.config import ExportConfig
from sentinode.dataset import Patches, PreparedDataset
from sentinode.engine_export import FloatArray, engine_logits, engine_probabilities, times_in_turns, write_engine
from sentinode.engines import ENGINES, TORCH, Run, engine_run
from sentinode.errors import SentinodeError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import Location
from sentinode.manifests import ENGINE_FORMAT_VERSION, BundleManifest, EngineManifest, read_bundle_manifest
from sentinode.metrics import roc_auc
from sentinode.predictor import load_network
from sentinode.publishing import upload_folder
from sentinode.sole_writer import sole_writer
from sentinode.storage import publish, sha256_file, staging_path, temporary_folder, write_json
from sentinode.versions import cpu_name, git_commit, library_versions


class DeviationError(SentinodeError):
    """An engine's probabilities are too far from torch's. Exit code 1; nothing was published."""


@dataclass(frozen=True)
class ExportResult:
    """Where the engine lies, and its manifest."""

    path: Location
    manifest: EngineManifest


def export(config: ExportConfig, bundle: str | Path, data: str | Path, engine: str) -> ExportResult:
    """Make an engine, compare it with torch on validation rows, time both, and put it into the bundle; an older one of that name is replaced.

    Parameters
    ----------
    config : ExportConfig
    bundle : str or Path
        Of one network.
    data : str or Path
        Path or URI of the data set that it was trained on; of another one the split `val` is taken, with a note.
    engine : str
        A key of `sentinode.engines.ENGINES`.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        `bundle` or `data` is not what it should be.
    UsageError
        The engine is unknown, its libraries are not installed, the bundle is an ensemble, or the data set has no rows for it.
    DeviationError
        A probability deviates by more than the engine's limit.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine {engine}: expected one of {', '.join(ENGINES)}")
    model, dataset = Bundle.open(bundle), PreparedDataset.open(data)
    manifest, kind = model.manifest, ENGINES[engine]
    if manifest.members:
        raise UsageError(f"{model.where}: an ensemble; export each member before combining them")
    if dataset.manifest.patch_size_px != manifest.patch_size_px:
        sizes = f"holds patches of {dataset.manifest.patch_size_px} px; the bundle accepts {manifest.patch_size_px} px"
        raise UsageError(f"{dataset.path} {sizes}")
    is_same_data = manifest.data.fingerprint == dataset.manifest.fingerprint
    if not is_same_data:
        say("note: the bundle was trained on another data set; the deviation is measured on the split val of this one")
    fold = manifest.data.fold if is_same_data else None
    rows = _evenly(dataset.read_val(fold), config.validation_rows)
    calibration = _training_pixels(dataset, fold, 0 if kind.is_exact else config.calibration_rows)
    network = load_network(model)
    target = model.where / "engines" / engine
    with _staging_for(target) as (staging, confirm_sole_writer):
        write_engine(engine, network, manifest, staging, calibration)
        files = {name: (staging / name).read_bytes() for name in kind.files}
        ours, torchs = _compare(engine_run(engine, files), network, manifest, rows.images, config.batch_size)
        deviation = float(np.abs(ours - torchs).max())
        if not deviation <= kind.limit:  # NaN is not
            raise DeviationError(
                f"engine {engine}: a probability deviates from torch's by {deviation:.3g} on {len(rows)} validation rows, "
                f"more than {kind.limit:g}; nothing was published"
            )
        rates = _images_per_second(engine, files, network, manifest, rows.images, config)
        result = EngineManifest(
            format_version=ENGINE_FORMAT_VERSION,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            engine=engine,
            bundle_digest=manifest.digest,
            files={name: sha256_file(staging / name) for name in kind.files},
            data_fingerprint=dataset.manifest.fingerprint,
            validation_rows=len(rows),
            largest_deviation=deviation,
            roc_auc=roc_auc(rows.labels, ours),
            torch_roc_auc=roc_auc(rows.labels, torchs),
            calibration_rows=len(calibration),
            device="cpu",
            device_name=cpu_name(),
            threads=config.timing_threads,
            batch_size=config.timing_batch_size,
            images_per_second=rates[engine],
            torch_images_per_second=rates[TORCH],
            library_versions=library_versions(),
            git_commit=git_commit(),
        )
        write_json(staging / "engine.json", result.model_dump(mode="json"))
        if read_bundle_manifest(model.where).digest != manifest.digest:
            raise UsageError(f"{model.where}: was replaced by another bundle meanwhile; run the same command again")
        confirm_sole_writer()
        _publish(staging, target)
    return ExportResult(target, result)


@contextmanager
def _staging_for(target: Location) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield an empty folder to make an engine in, and what raises once another process makes one in `target` (see `sole_writer`)."""
    with sole_writer(target, say) as confirm_sole_writer:
        if not target.is_local:
            with TemporaryDirectory(prefix="engine-", dir=temporary_folder()) as name:
                yield Path(name), confirm_sole_writer
            return
        staging = staging_path(target.local)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging, confirm_sole_writer
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Location) -> None:
    if target.is_local:
        publish(staging, target.local)
        return
    # Without its manifest an engine in an object store does not count (`bundle_copies`).
    (target / "engine.json").remove()
    upload_folder(staging, target, "engine.json")


def _evenly(patches: Patches, rows: int | None) -> Patches:
    if rows is None or rows >= len(patches):
        return patches
    return patches.take(np.linspace(0, len(patches) - 1, rows).round().astype(np.int64))


def _training_pixels(dataset: PreparedDataset, fold: int | None, rows: int) -> UInt8Array:
    """Return the first `rows` training patches, uint8 (n, side, side, 3). Shards are in random order, so the first rows are a random sample."""
    side = dataset.manifest.patch_size_px
    if not rows:
        return np.empty((0, side, side, 3), np.uint8)
    shards, validates = dataset.train_and_val_rows(fold)
    found: list[UInt8Array] = []
    first = 0
    for shard in shards:
        trains = np.flatnonzero(~validates[first : first + shard.rows])
        first += shard.rows
        if len(trains):
            found.append(dataset.read_pixels(shard)[1][trains[: rows - sum(map(len, found))]])
        if sum(map(len, found)) >= rows:
            break
    return np.concatenate(found)


def _compare(run: Run, network: Run, bundle: BundleManifest, patches: UInt8Array, batch_size: int) -> tuple[FloatArray, FloatArray]:
    """Return the probabilities of the engine and of torch, float64 (n,) each."""

    def show(name: str) -> Callable[[int], None]:
        return lambda done: say(f"export: {name} {done}/{len(patches)} patches")

    ours = engine_probabilities(run, bundle, patches, batch_size, show("engine"))
    return ours, engine_probabilities(network, bundle, patches, batch_size, show(TORCH))


def _images_per_second(
    engine: str, files: dict[str, bytes], network: Run, bundle: BundleManifest, patches: UInt8Array, config: ExportConfig
) -> dict[str, float]:
    """Time the engine and torch in turns, pixels to logits; return images/s by name."""
    batch = np.resize(patches, (config.timing_batch_size, *patches.shape[1:]))
    with _threads(config.timing_threads):
        # Made again, since an engine keeps the number of threads that it was made with.
        runs = {engine: engine_run(engine, files), TORCH: network}
        steps: dict[str, Callable[[], object]] = {name: partial(engine_logits, run, bundle, batch, len(batch)) for name, run in runs.items()}
        times = times_in_turns(steps, config.timing_rounds)
    return {name: len(batch) / median(seconds) for name, seconds in times.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="folder made by train or tune")
    parser.add_argument("--data", required=True, metavar="DATASET", help="the data set that it was trained on")
    parser.add_argument("--engine", required=True, choices=list(ENGINES), help="what to add")
    add_common_arguments(parser, ExportConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    result = export(config_from(args, ExportConfig), args.bundle, args.data, args.engine)
    made = result.manifest
    areas = "" if ENGINES[made.engine].is_exact else f"; ROC-AUC {_four(made.torch_roc_auc)} before, {_four(made.roc_auc)} after"
    say(
        f"{made.engine}: largest deviation {made.largest_deviation:.2g} on {made.validation_rows} validation rows{areas}; "
        f"{made.images_per_second:.1f} images/s, torch {made.torch_images_per_second:.1f} ({made.threads} threads, batch {made.batch_size}, "
        f"{made.device_name}): {result.path}"
    )
    named = ("engine", "validation_rows", "largest_deviation", "roc_auc", "torch_roc_auc", "images_per_second", "torch_images_per_second")
    return {"path": str(result.path)} | {name: getattr(made, name) for name in named}


def _four(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.export") -> int:
    """Entry point of `python -m ray_jobs.export`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
