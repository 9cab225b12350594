"""Evaluate a bundle on a split of a prepared data set.

    python -m ray_jobs.evaluate --bundle out/run/bundle --data out/data --out out/report

Writes <out>/report.json (for machines, unrounded) and <out>/report.html (for people).
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined

from ray_jobs.cluster import connected
from ray_jobs.inference import run_units
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode import RESEARCH_USE_NOTICE
from sentinode.bundle import Bundle
from sentinode.config import EvaluateConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import ManifestError, SentinodeError, UsageError
from sentinode.manifests import LEAK_MEANING, REPORT_FORMAT_VERSION, Confusion, EvaluationReport
from sentinode.metrics import operating_point, roc_auc_with_intervals
from sentinode.predictor import Predictor
from sentinode.probability import calibrated_probability
from sentinode.storage import exclusive, local_path, publish, staging_path, write_json, write_text_atomic
from sentinode.versions import git_commit, library_versions


@dataclass(frozen=True)
class EvaluateResult:
    """Where the report lies, and the report."""

    path: Path
    report: EvaluationReport


def evaluate(config: EvaluateConfig, bundle: str | Path, data: str | Path, out: str | Path, *, verbose: bool = False) -> EvaluateResult:
    """Run the bundle over every row of the split exactly once and write the report.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        `bundle` or `data` is not what it should be.
    UsageError
        The split is empty, its patches have another size than the bundle accepts, or `out` holds something else.
    """
    model, dataset, target = Bundle.open(bundle), PreparedDataset.open(data), local_path(out)
    shards = dataset.shards(config.split)
    if dataset.manifest.patch_size_px != model.manifest.patch_size_px:
        raise UsageError(f"{dataset.path} holds patches of {dataset.manifest.patch_size_px} px; the bundle accepts {model.manifest.patch_size_px} px")
    if target.exists() and not (target / "report.json").exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not a report; use another --out")
    rows_in_split = dataset.manifest.counts[config.split].rows
    with exclusive(target), connected(config.workers * config.cpus_per_worker, verbose=verbose):
        work = partial(_classify_shard, dataset, config)
        table = run_units(model.path, len(shards), work, config, "evaluate", lambda done, _: say(f"{done}/{rows_in_split} patches"))
        _check_rows(table, dataset, config.split)
        report = make_report(table, model, dataset, config)
        staging = staging_path(target)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_text_atomic(staging / "report.html", render(report))
        write_json(staging / "report.json", report.model_dump(mode="json"))
        publish(staging, target)
    return EvaluateResult(target, report)


def _classify_shard(dataset: PreparedDataset, config: EvaluateConfig, predictor: Predictor, unit: int) -> pa.Table:
    patches = dataset.read_shard(dataset.shards(config.split)[unit])
    logits = predictor.logits(patches.images, config.batch_size)
    return pa.table(
        {
            "id": patches.ids.tolist(),
            "label": patches.labels,
            "group": patches.groups.tolist(),
            "logit": logits.astype(np.float64),
            "engine": [predictor.engine] * len(patches),
        }
    )


def _check_rows(table: pa.Table, dataset: PreparedDataset, split: str) -> None:
    """Every row of the split exactly once, or no figure at all."""
    expected = dataset.manifest.counts[split].rows
    unique = len(set(table["id"].to_pylist()))
    if table.num_rows != expected or unique != expected:
        raise ManifestError(f"{dataset.path}: {table.num_rows} rows with {unique} ids were read from split {split}; dataset.json says {expected}")
    if not np.isfinite(table["logit"].to_numpy()).all():
        raise SentinodeError("the bundle's outputs are not finite for some patches; no report was written")


def make_report(table: pa.Table, bundle: Bundle, dataset: PreparedDataset, config: EvaluateConfig) -> EvaluationReport:
    """Compute the report from logits.

    Parameters
    ----------
    table : pa.Table
        Columns id, label, group, logit, engine: each row of the split once, any order.
    """
    table = table.sort_by("id")
    manifest, data = bundle.manifest, dataset.manifest
    labels = table["label"].to_numpy().astype(np.int64)
    groups = np.asarray(table["group"].to_pylist(), dtype=np.str_)
    logits = table["logit"].to_numpy()
    probabilities = calibrated_probability(logits, manifest.temperature, manifest.bias)
    area = roc_auc_with_intervals(labels, logits, groups, config.bootstrap_samples, config.seed)
    at_threshold, at_half = (
        operating_point(labels, probabilities, groups, threshold, config.bootstrap_samples, config.seed) for threshold in (manifest.threshold, 0.5)
    )
    return EvaluationReport(
        format_version=REPORT_FORMAT_VERSION,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        headline=_headline(area.value, area.group_interval.low, area.group_interval.high, config.split, data.leak_level),
        warnings=_warnings(bundle, dataset, config.split),
        notice=RESEARCH_USE_NOTICE,
        bundle={
            "path": str(bundle.path),
            "name": manifest.name,
            "version": manifest.version,
            "digest": manifest.digest,
            "arch": manifest.arch,
            "engine": table["engine"][0].as_py(),
        },
        data={
            "path": str(dataset.path),
            "fingerprint": data.fingerprint,
            "split": config.split,
            "split_method": data.split.method,
            "leak_level": data.leak_level,
            "rows": len(labels),
            "groups": len(np.unique(groups)),
            "prevalence": float(labels.mean()),
        },
        roc_auc=area.value,
        roc_auc_intervals=area,
        confusion=at_threshold.confusion,
        at_threshold=at_threshold,
        at_half=at_half,
        config=config.model_dump(mode="json"),
        library_versions=library_versions(),
        git_commit=git_commit(),
    )


def _headline(value: float | None, low: float | None, high: float | None, split: str, leak_level: str) -> str:
    if value is None or low is None or high is None:
        figure = "ROC-AUC is not defined: one class only"
    else:
        figure = f"ROC-AUC {value:.4f} (95 % group interval {low:.4f} to {high:.4f})"
    text = f"{figure} on the {split} split, leak level {leak_level}"
    return f"LEAKY SPLIT, figures too good: {text}" if leak_level == "none" else text


def _warnings(bundle: Bundle, dataset: PreparedDataset, split: str) -> list[str]:
    manifest, data = bundle.manifest, dataset.manifest
    warnings = [LEAK_MEANING[data.leak_level], *data.split.notes]
    rule = manifest.threshold_rule
    if not rule.reached:
        warnings.append(
            f"The threshold's rule was not met on validation: the lower bound of recall there is {rule.bound:.4f}, below {rule.target_recall}."
        )
    if manifest.data.fingerprint != data.fingerprint:
        warnings.append("The bundle was trained on another data set; whether patches of this one were among its training rows is not known.")
    elif split != "test":
        warnings.append(f"The {split} split took part in making the bundle, so these figures are optimistic.")
    return warnings


def render(report: EvaluationReport) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(loader=PackageLoader("ray_jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(report=report)


def _counts(confusion: Confusion) -> str:
    return ", ".join(f"{name.upper()} {count}" for name, count in confusion.model_dump().items())


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="folder made by train or tune")
    parser.add_argument("--data", required=True, metavar="DATASET", help="folder made by prepare")
    parser.add_argument("--split", choices=["train", "val", "test"], help="which rows (default: test)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.json and report.html")
    add_common_arguments(parser, EvaluateConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    overrides = {"split": args.split} if args.split else {}
    result = evaluate(config_from(args, EvaluateConfig, **overrides), args.bundle, args.data, args.out, verbose=args.verbose)
    report = result.report
    say(report.headline)
    for name, point in (("bundle's threshold", report.at_threshold), ("threshold 0.5", report.at_half)):
        figures = "  ".join(f"{metric} {_four(getattr(point, metric).value)}" for metric in ("recall", "specificity", "precision", "accuracy", "f1"))
        say(f"at {name} ({point.threshold:.4f}): {figures}  {_counts(point.confusion)}")
    for warning in report.warnings:
        say(f"note: {warning}")
    say(f"report: {result.path / 'report.html'}")
    return {"report": str(result.path), "roc_auc": report.roc_auc, "confusion": report.confusion.model_dump(), "headline": report.headline}


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.evaluate") -> int:
    """Entry point of `python -m ray_jobs.evaluate`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
