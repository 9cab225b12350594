"""Run a bundle over a folder of images, or over a prepared data set.

    python -m ray_jobs.predict --bundle out/run/bundle --source folder/of/patches --out out/predictions.parquet

Writes a folder of Parquet parts with a _manifest.json. An image that cannot be read is a row with `error`, never a lost row.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.cluster import connected
from ray_jobs.inference import run_units
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode import RESEARCH_USE_NOTICE
from sentinode.bundle import Bundle
from sentinode.config import PredictConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import PatchError, SentinodeError, UsageError
from sentinode.images import IMAGE_SUFFIXES, UInt8Array, decode_patch
from sentinode.locations import locate
from sentinode.manifests import PREDICTIONS_FORMAT_VERSION, PredictionPart, PredictionsManifest
from sentinode.predictor import Predictor
from sentinode.probability import Decision
from sentinode.storage import exclusive, file_record, local_path, publish, staging_path, write_json
from sentinode.versions import git_commit, library_versions

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("logit", pa.float64()),
        pa.field("probability", pa.float64()),
        pa.field("prediction", pa.string()),
        pa.field("needs_review", pa.bool_()),
        pa.field("review_reasons", pa.list_(pa.string())),
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
"""One row per input. `probability` is calibrated and of class 1; everything but id, path and model_digest is null where `error` is set."""

_FILES_PER_PART = 1024


@dataclass(frozen=True)
class PredictResult:
    """Where the predictions lie, and their manifest."""

    path: Path
    manifest: PredictionsManifest


def predict(config: PredictConfig, bundle: str | Path, source: str | Path, out: str | Path, *, verbose: bool = False) -> PredictResult:
    """Predict every image below `source` (recursive), or every row of the prepared data set `source` (a path or URI); labels are ignored.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        `bundle` is not a bundle, or is damaged.
    UsageError
        `source` holds no images, or `out` exists.
    """
    model, where, target = Bundle.open(bundle), locate(source), local_path(out)
    if target.exists():
        raise UsageError(f"{target} exists; remove it or use another --out")
    staging = staging_path(target)
    if (where / "dataset.json").exists():
        dataset = PreparedDataset.open(where)
        units, total = len(dataset.manifest.shards), sum(shard.rows for shard in dataset.manifest.shards)
        work = partial(_predict_shard, dataset, config.batch_size, staging)
    else:
        paths = find_images(where.local)
        units, total = -(-len(paths) // _FILES_PER_PART), len(paths)
        work = partial(_predict_files, paths, config.batch_size, staging)
    with exclusive(target), connected(config.workers * config.cpus_per_worker, verbose=verbose):
        if target.exists():  # another process may have finished it since
            raise UsageError(f"{target} exists; remove it or use another --out")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        summary = run_units(model.path, units, work, config, "predict", lambda done, all_: say(f"{done}/{all_} parts")).sort_by("part")
        rows = sum(summary["rows"].to_pylist())
        if rows != total:
            raise SentinodeError(f"{rows} predictions for {total} inputs; nothing was published")
        manifest = PredictionsManifest(
            format_version=PREDICTIONS_FORMAT_VERSION,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            source=str(where),
            rows=rows,
            errors=sum(summary["errors"].to_pylist()),
            model={
                "name": model.manifest.name,
                "version": model.manifest.version,
                "digest": model.manifest.digest,
                "engine": summary["engine"][0].as_py(),
            },
            parts=[
                PredictionPart(rows=part_rows, **file_record(staging, part))
                for part, part_rows in zip(summary["part"].to_pylist(), summary["rows"].to_pylist(), strict=True)
            ],
            notice=RESEARCH_USE_NOTICE,
            config=config.model_dump(mode="json"),
            library_versions=library_versions(),
            git_commit=git_commit(),
        )
        write_json(staging / "_manifest.json", manifest.model_dump(mode="json"))
        publish(staging, target)
    return PredictResult(target, manifest)


def find_images(folder: Path) -> list[Path]:
    """Return every image file below a folder, sorted.

    Raises
    ------
    UsageError
        There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UsageError(f"{folder}: no images in it ({', '.join(IMAGE_SUFFIXES)}), and no dataset.json")
    return paths


def _predict_shard(dataset: PreparedDataset, batch_size: int, staging: Path, predictor: Predictor, unit: int) -> pa.Table:
    shard = dataset.manifest.shards[unit]
    ids, images = dataset.read_pixels(shard)
    return _write_part(staging, unit, predictor, ids, [shard.path] * len(ids), predictor.decide(images, batch_size))


def _predict_files(paths: list[Path], batch_size: int, staging: Path, predictor: Predictor, unit: int) -> pa.Table:
    mine = paths[unit * _FILES_PER_PART : (unit + 1) * _FILES_PER_PART]
    images: list[UInt8Array] = []
    outcomes: list[Decision | str] = []
    for path in mine:
        try:
            images.append(decode_patch(path.read_bytes(), size_px=predictor.manifest.patch_size_px))
            outcomes.append("")
        except PatchError as error:
            outcomes.append(f"{error.code}: {error}")
        except OSError as error:
            outcomes.append(f"unreadable: {error.strerror}")
    decisions = iter(predictor.decide(np.stack(images), batch_size) if images else [])
    outcomes = [outcome or next(decisions) for outcome in outcomes]
    return _write_part(staging, unit, predictor, [path.stem for path in mine], [str(path) for path in mine], outcomes)


def _write_part(staging: Path, unit: int, predictor: Predictor, ids: list[str], paths: list[str], outcomes: Sequence[Decision | str]) -> pa.Table:
    """Write one part and return its line of the summary."""
    rows = []
    for id_, path, outcome in zip(ids, paths, outcomes, strict=True):
        row: dict[str, Any] = {"id": id_, "path": path, "model_digest": predictor.manifest.digest}
        if isinstance(outcome, str):
            row["error"] = outcome
        else:
            row |= {"logit": outcome.logit, "probability": outcome.probability, "prediction": outcome.prediction}
            row |= {"needs_review": outcome.needs_review, "review_reasons": list(outcome.review_reasons)}
        rows.append(row)
    part = f"part-{unit:05d}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), staging / part)
    errors = sum(isinstance(outcome, str) for outcome in outcomes)
    return pa.table({"part": [part], "rows": [len(rows)], "errors": [errors], "engine": [predictor.engine]})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="folder made by train or tune")
    parser.add_argument("--source", required=True, metavar="DIR", help="folder of images (recursive) or prepared data set")
    parser.add_argument("--out", required=True, metavar="NAME.parquet", help="folder of Parquet parts to make")
    add_common_arguments(parser, PredictConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    result = predict(config_from(args, PredictConfig), args.bundle, args.source, args.out, verbose=args.verbose)
    predicted: Counter[str] = Counter()
    for part in result.manifest.parts:
        predicted.update(value or "error" for value in pq.read_table(result.path / part.path, columns=["prediction"])["prediction"].to_pylist())
    say(f"{result.manifest.rows} inputs: {', '.join(f'{count} {name}' for name, count in sorted(predicted.items()))}")
    say(f"engine: {result.manifest.model['engine']}\npredictions: {result.path}")
    if result.manifest.errors:
        say("column `error` says why an input could not be used")
    manifest = result.manifest
    return {"predictions": str(result.path), "engine": manifest.model["engine"], "rows": manifest.rows, "errors": manifest.errors}


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.predict") -> int:
    """Entry point of `python -m ray_jobs.predict`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
