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
import pyarrow.compute as pc
from scipy.special import expit

from ray_jobs.cluster import connected
from ray_jobs.evaluation_report import Example, Pictures, render
from ray_jobs.inference import run_units
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode import RESEARCH_USE_NOTICE
from sentinode.bundle import Bundle
from sentinode.comparison import Judged, delong, differences
from sentinode.config import EvaluateConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import ManifestError, SentinodeError, UsageError
from sentinode.evaluation import EvaluatedRows, calibration, curve, review, robustness, subgroups, targets
from sentinode.explain import overlay
from sentinode.images import UInt8Array
from sentinode.inference import VIEWS
from sentinode.intervals import operating_point, score_metrics
from sentinode.locations import Location, locate
from sentinode.manifests import CALIBRATION_MEANING, LEAK_MEANING, REPORT_FORMAT_VERSION, Comparison, Confusion, EvaluationReport
from sentinode.metrics import IntArray
from sentinode.pages import data_uri
from sentinode.predictor import Predictor
from sentinode.probability import calibrated_logit, calibrated_probability
from sentinode.robustness import CHANGES, answers, is_chosen
from sentinode.sole_writer import sole_writer
from sentinode.storage import json_bytes, publish, staging_path, write_json, write_text_atomic
from sentinode.tissue import is_pale, tissue_fraction
from sentinode.versions import git_commit, library_versions


@dataclass(frozen=True)
class EvaluateResult:
    """Where the report lies, and the report."""

    path: Location
    report: EvaluationReport


def evaluate(
    config: EvaluateConfig, bundle: str | Path, data: str | Path, out: str | Path, *, against: str | Path | None = None, verbose: bool = False
) -> EvaluateResult:
    """Run the bundle, and the one it is compared with, over every row of the split exactly once and write the report.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        `bundle`, `against` or `data` is not what it should be.
    UsageError
        The split is empty or unlabelled, its patches have another size than a bundle accepts, or `out` holds something else.
    """
    model, dataset, target = Bundle.open(bundle), PreparedDataset.open(data), locate(out)
    other = Bundle.open(against) if against is not None else None
    # Raises where there is no such split, or nothing in it.
    dataset.shards(config.split)
    for each in (model, other):
        if each is not None and dataset.manifest.patch_size_px != each.manifest.patch_size_px:
            sizes = f"holds patches of {dataset.manifest.patch_size_px} px; the bundle accepts {each.manifest.patch_size_px} px"
            raise UsageError(f"{dataset.path} {sizes}")
    counts = dataset.manifest.counts[config.split]
    if counts.unlabelled:
        raise UsageError(f"{dataset.path}: {counts.unlabelled} rows of split {config.split} have no label; predict needs none")
    _check_replaceable(target)
    with sole_writer(target, say) as confirm_sole_writer, connected(config.workers * config.cpus_per_worker, verbose=verbose):
        rows, engine = _rows_of(model, dataset, config, "evaluate", min(1.0, config.robustness_rows / max(counts.rows, 1)))
        theirs = _rows_of(other, dataset, config, "compare", 0.0) if other else None
        report = make_report(rows, engine, model, dataset, config)
        if other and theirs:
            report = with_comparison(report, rows, model, theirs[0], theirs[1], other, config)
        page = render(report, pictures(rows, model, dataset, config))
        confirm_sole_writer()
        _publish(report, page, target)
    return EvaluateResult(target, report)


def _check_replaceable(target: Location) -> None:
    """Raise UsageError where something else than a report, or an empty folder, stands at `target`."""
    if (target / "report.json").exists() or not target.exists():
        return
    # In a store the page is put first, and a kill may leave it alone.
    if not target.is_dir() or {entry.name for entry in target.entries()} - {"report.html"}:
        raise UsageError(f"{target} exists and is not a report; use another --out")


def _publish(report: EvaluationReport, page: str, target: Location) -> None:
    """Write the report to its place; an older one is replaced."""
    if target.is_local:
        staging = staging_path(target.local)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_text_atomic(staging / "report.html", page)
        write_json(staging / "report.json", report.model_dump(mode="json"))
        publish(staging, target.local)
        return
    # The figures last, and none beside a page that is not theirs.
    (target / "report.json").remove()
    (target / "report.html").write_bytes(page.encode())
    (target / "report.json").write_bytes(json_bytes(report.model_dump(mode="json")))


def _rows_of(bundle: Bundle, dataset: PreparedDataset, config: EvaluateConfig, doing: str, changed_share: float) -> tuple[EvaluatedRows, str]:
    """Run a bundle over the split; return its rows by id, and the engine."""
    shards, expected = dataset.shards(config.split), dataset.manifest.counts[config.split].rows
    work = partial(_classify_shard, dataset, config, changed_share)
    table = run_units(bundle, range(len(shards)), work, config, doing, lambda done: say(f"{doing}: {done}/{expected} patches"))
    _check_rows(table, bundle, dataset, config.split)
    index = dataset.index_of(shards, ["id", "slide", "centre"])
    # Shards may have come back in any order: by id, like the rows.
    table, index = table.sort_by("id"), index.sort_by("id")
    if not pc.all(pc.equal(table["id"], index["id"])).as_py():
        raise ManifestError(f"{dataset.path}: ids in the shards of split {config.split} differ from those in index.parquet")
    rows = EvaluatedRows(
        ids=np.asarray(table["id"].to_pylist(), np.str_),
        labels=table["label"].to_numpy().astype(np.int64),
        groups=np.asarray(table["group"].to_pylist(), np.str_),
        logits=table["logit"].to_numpy(),
        pale=np.asarray(table["pale"].to_pylist(), bool),
        unusual=np.asarray(table["unusual"].to_pylist(), bool),
        tissue_fraction=table["tissue_fraction"].to_numpy(),
        slides=np.asarray(index["slide"].to_pylist(), object),
        centres=np.asarray(index["centre"].to_pylist(), object),
        perturbed=table["perturbed"].combine_chunks().flatten().to_numpy().reshape(-1, CHANGES),
    )
    return rows, table["engine"][0].as_py()


def _classify_shard(dataset: PreparedDataset, config: EvaluateConfig, changed_share: float, predictor: Predictor, unit: int) -> pa.Table:
    patches = dataset.read_shard(dataset.shards(config.split)[unit])
    logits = predictor.logits(patches.images, config.batch_size)
    ids = patches.ids.tolist()
    chosen = is_chosen(ids, changed_share)
    perturbed = np.full((len(patches), CHANGES), np.nan)
    if chosen.any():
        ask = partial(predictor.logits, batch_size=config.batch_size)
        perturbed[chosen] = answers(patches.images[chosen], ask, views=predictor.manifest.tta < VIEWS)
    return pa.table(
        {
            "id": ids,
            "label": patches.labels,
            "group": patches.groups.tolist(),
            "logit": logits.astype(np.float64),
            "pale": is_pale(patches.images),
            "unusual": predictor.unusual(patches.images),
            "tissue_fraction": tissue_fraction(patches.images),
            "perturbed": pa.FixedSizeListArray.from_arrays(pa.array(perturbed.reshape(-1)), CHANGES),
            "engine": [predictor.engine] * len(patches),
        }
    )


def _check_rows(table: pa.Table, bundle: Bundle, dataset: PreparedDataset, split: str) -> None:
    """Every row of the split exactly once, or no figure at all."""
    expected = dataset.manifest.counts[split].rows
    unique = len(set(table["id"].to_pylist()))
    if table.num_rows != expected or unique != expected:
        raise ManifestError(f"{dataset.path}: {table.num_rows} rows with {unique} ids were read from split {split}; dataset.json says {expected}")
    wrong = int((~np.isfinite(table["logit"].to_numpy())).sum())
    if wrong:
        raise SentinodeError(f"{bundle.where}: its outputs are not finite for {wrong} of {expected} patches; no report was written")


def make_report(rows: EvaluatedRows, engine: str, bundle: Bundle, dataset: PreparedDataset, config: EvaluateConfig) -> EvaluationReport:
    """Compute the report, without a comparison.

    Parameters
    ----------
    rows : EvaluatedRows
        Each row of the split once, by id.
    engine : str
        What ran the network.
    """
    manifest, data = bundle.manifest, dataset.manifest
    samples, seed = config.bootstrap_samples, config.seed
    logits = calibrated_logit(rows.logits, manifest.temperature, manifest.bias)
    probabilities = expit(logits)
    scores = score_metrics(rows.labels, logits, rows.groups, samples, seed)
    at_threshold, at_half = (
        operating_point(rows.labels, probabilities, rows.groups, threshold, samples, seed) for threshold in (manifest.threshold, 0.5)
    )
    area = scores["roc_auc"]
    return EvaluationReport(
        format_version=REPORT_FORMAT_VERSION,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        headline=_headline(area.value, area.group_interval.low, area.group_interval.high, config.split, data.leak_level),
        warnings=_warnings(bundle, dataset, config.split),
        notice=RESEARCH_USE_NOTICE,
        bundle=_about(bundle, engine),
        data={
            "path": str(dataset.path),
            "fingerprint": data.fingerprint,
            "split": config.split,
            "split_method": data.split.method,
            "leak_level": data.leak_level,
            "rows": len(rows),
            "groups": len(np.unique(rows.groups)),
            "prevalence": float(rows.labels.mean()),
        },
        roc_auc=area.value,
        roc_auc_intervals=area,
        average_precision=scores["average_precision"],
        brier=scores["brier"],
        nll=scores["nll"],
        confusion=at_threshold.confusion,
        at_threshold=at_threshold,
        at_half=at_half,
        threshold_rule=manifest.threshold_rule,
        targets=targets(at_threshold, area),
        calibration=calibration(rows, manifest),
        review=review(rows, manifest, samples, seed),
        subgroups=subgroups(rows, manifest, samples, seed),
        robustness=robustness(rows, manifest),
        curve=curve(rows.labels, probabilities),
        comparison=None,
        published=_published(dataset, config.split, area.value, at_threshold.f1.value),
        config=config.model_dump(mode="json"),
        library_versions=library_versions(),
        git_commit=git_commit(),
    )


def with_comparison(
    report: EvaluationReport, rows: EvaluatedRows, ours: Bundle, their_rows: EvaluatedRows, engine: str, theirs: Bundle, config: EvaluateConfig
) -> EvaluationReport:
    """Add what the same rows say of two bundles; `rows` and `their_rows` are the same ones in the same order."""
    sides = [
        Judged(calibrated_logit(side.logits, bundle.manifest.temperature, bundle.manifest.bias), bundle.manifest.threshold)
        for side, bundle in ((rows, ours), (their_rows, theirs))
    ]
    found = differences(rows.labels, sides[0], sides[1], rows.groups, config.bootstrap_samples, config.seed)
    area = found["roc_auc"]
    if area.value is None or area.group_interval.low is None or area.group_interval.high is None:
        figure = "the difference in ROC-AUC is not defined: one class only"
    else:
        low, high = area.group_interval.low, area.group_interval.high
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        figure = f"ROC-AUC {area.value:+.4f} (95 % paired group interval {low:+.4f} to {high:+.4f}): {verdict}"
    comparison = Comparison(
        headline=f"Against {theirs.manifest.name} {theirs.manifest.version}: {figure}",
        bundle=_about(theirs, engine),
        threshold=theirs.manifest.threshold,
        differences=found,
        delong=delong(rows.labels, rows.logits, their_rows.logits),
    )
    notes = []
    if theirs.manifest.data.fingerprint not in (ours.manifest.data.fingerprint, report.data["fingerprint"]):
        notes.append("The bundle compared with was trained on another data set; whether it saw patches of this one in training is not known.")
    return report.model_copy(
        update={
            "comparison": comparison,
            "headline": f"{report.headline}. {comparison.headline}",
            "warnings": [*report.warnings, *notes],
        }
    )


def pictures(rows: EvaluatedRows, bundle: Bundle, dataset: PreparedDataset, config: EvaluateConfig) -> Pictures:
    """Return the score distribution and the worst errors with their Grad-CAM, where the network has one."""
    manifest = bundle.manifest
    probabilities = calibrated_probability(rows.logits, manifest.temperature, manifest.bias)
    positive, sick = probabilities >= manifest.threshold, rows.labels == 1
    # Ties by id, so that the same rows give the same page.
    order = np.argsort(probabilities, kind="stable")
    missed = order[(~positive & sick)[order]][: config.error_examples]
    alarms = order[::-1][(positive & ~sick)[order[::-1]]][: config.error_examples]
    if not len(missed) + len(alarms):
        return Pictures(rows.labels, probabilities)
    patches = _pixels(dataset, config.split, rows.ids[np.concatenate([missed, alarms])].tolist())
    layer, shown = "", {}
    try:
        explainer = Predictor(bundle).explainer()
        layer = explainer.layer
        shown = dict(zip(patches, explainer.maps(np.stack(list(patches.values()))), strict=True))
    except UsageError as error:
        say(f"note: no Grad-CAM: {error}")

    def examples(chosen: IntArray) -> list[Example]:
        return [
            Example(
                id=id_,
                probability=probability,
                picture=data_uri(patches[id_]),
                overlay=data_uri(overlay(patches[id_], shown[id_])) if shown else None,
            )
            for id_, probability in zip(rows.ids[chosen].tolist(), probabilities[chosen].tolist(), strict=True)
        ]

    return Pictures(rows.labels, probabilities, examples(missed), examples(alarms), layer)


def _pixels(dataset: PreparedDataset, split: str, ids: list[str]) -> dict[str, UInt8Array]:
    """Read the patches with these ids: id -> uint8 (side, side, 3)."""
    shards, wanted = dataset.shards(split), set(ids)
    index = dataset.index_of(shards, ["id", "shard"])
    holding = {shard for id_, shard in zip(index["id"].to_pylist(), index["shard"].to_pylist(), strict=True) if id_ in wanted}
    found: dict[str, UInt8Array] = {}
    for shard in shards:
        if shard.path in holding:
            names, images = dataset.read_pixels(shard)
            found |= {name: images[number].copy() for number, name in enumerate(names) if name in wanted}
    return found


def _about(bundle: Bundle, engine: str) -> dict[str, Any]:
    manifest = bundle.manifest
    names = {"name": manifest.name, "version": manifest.version, "digest": manifest.digest, "arch": manifest.arch}
    return {"path": str(bundle.where), **names, "engine": engine}


def _published(dataset: PreparedDataset, split: str, area: float | None, f1: float | None) -> list[str]:
    """Figures that others published on PatchCamelyon's own test split, where this is that split."""
    data = dataset.manifest
    if data.source.get("kind") != "pcam" or data.split.method != "predefined" or split != "test":
        return []
    return [
        f"F1 {_four(f1)} at the bundle's threshold; TIAToolbox's resnet34-pcam: 0.889 (patch_predictor documentation, read 2026)",
        f"ROC-AUC {_four(area)}; Veeling et al. 2018, rotation equivariant P4M-DenseNet: 0.963",
    ]


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
    if manifest.calibration_rows != "held_out":
        warnings.append(CALIBRATION_MEANING[manifest.calibration_rows])
    if any(network.manifest.data.fingerprint != data.fingerprint for network in bundle.networks()):
        who = "A member of the bundle" if manifest.members else "The bundle"
        warnings.append(f"{who} was trained on another data set; whether patches of this one were among its training rows is not known.")
    elif split != "test":
        warnings.append(f"The {split} split took part in making the bundle, so these figures are optimistic.")
    return warnings


def _counts(confusion: Confusion) -> str:
    return ", ".join(f"{name.upper()} {count}" for name, count in confusion.model_dump().items())


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="folder made by train or tune")
    parser.add_argument("--data", required=True, metavar="DATASET", help="folder made by prepare")
    parser.add_argument("--against", metavar="BUNDLE", help="another bundle, to be compared on the same patches")
    parser.add_argument("--split", choices=["train", "val", "test"], help="which rows (default: test)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.json and report.html")
    add_common_arguments(parser, EvaluateConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    overrides = {"split": args.split} if args.split else {}
    result = evaluate(config_from(args, EvaluateConfig, **overrides), args.bundle, args.data, args.out, against=args.against, verbose=args.verbose)
    report = result.report
    say(report.headline)
    for name, point in (("bundle's threshold", report.at_threshold), ("threshold 0.5", report.at_half)):
        figures = "  ".join(f"{metric} {_four(getattr(point, metric).value)}" for metric in ("recall", "specificity", "precision", "accuracy", "f1"))
        say(f"at {name} ({point.threshold:.4f}): {figures}  {_counts(point.confusion)}")
    for warning in report.warnings:
        say(f"note: {warning}")
    say(f"engine: {report.bundle['engine']}\nreport: {result.path / 'report.html'}")
    return {
        "report": str(result.path),
        "engine": report.bundle["engine"],
        "roc_auc": report.roc_auc,
        "confusion": report.confusion.model_dump(),
        "headline": report.headline,
    }


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.evaluate") -> int:
    """Entry point of `python -m ray_jobs.evaluate`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
