"""Combine bundles into one that evaluate, predict and serve use like any other.

    python -m ray_jobs.ensemble --bundles out/fold0/bundle out/fold1/bundle --data out/data --out out/ensemble

Its logit is the mean of the members' calibrated ones. It is calibrated, and its threshold chosen, on rows of --data that no member was trained on;
where there are none, on rows that each member judges only if it was not trained on them, and the bundle says so.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_jobs.cluster import connected
from ray_jobs.inference import run_units
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode.bundle import Bundle, check_replaceable, write_ensemble
from sentinode.colour import channel_sums
from sentinode.config import EnsembleConfig
from sentinode.dataset import PreparedDataset
from sentinode.ensemble import CalibrationPlan, calibration_plan, check_members, mean_logits
from sentinode.errors import SentinodeError, UsageError
from sentinode.finishing import Looks, fit
from sentinode.locations import Location, locate
from sentinode.manifests import CALIBRATION_MEANING, ShardRecord
from sentinode.predictor import Predictor
from sentinode.sole_writer import sole_writer
from sentinode.tissue import is_pale


def ensemble(config: EnsembleConfig, bundles: Sequence[str | Path], data: str | Path, out: str | Path, *, verbose: bool = False) -> Bundle:
    """Combine bundles; an older bundle at `out` is replaced.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        One of `bundles`, or `data`, is not what it should be.
    UsageError
        The bundles do not belong together, are fewer than two, the data set has no rows to calibrate on, or `out` holds something else.
    SentinodeError
        A member's outputs are not finite.
    """
    members, dataset, target = [Bundle.open(path) for path in bundles], PreparedDataset.open(data), locate(out)
    check_members(members)
    check_replaceable(target)
    for member in members:
        if f"{target}/".startswith(f"{member.where}/") or f"{member.where}/".startswith(f"{target}/"):
            raise UsageError(f"{target}: the ensemble would replace its member {member.where}, or lie in it; use another --out")
    if dataset.manifest.patch_size_px != members[0].manifest.patch_size_px:
        sizes = f"holds patches of {dataset.manifest.patch_size_px} px; the bundles accept {members[0].manifest.patch_size_px} px"
        raise UsageError(f"{dataset.path} {sizes}")
    plan = calibration_plan(members, dataset)
    # On disk it is locked, and older ones are replaced, when it is written.
    with nullcontext(lambda: None) if target.is_local else sole_writer(target, say) as confirm_sole_writer:
        return _combined(config, members, dataset, plan, target, confirm_sole_writer, verbose=verbose)


def _combined(
    config: EnsembleConfig,
    members: Sequence[Bundle],
    dataset: PreparedDataset,
    plan: CalibrationPlan,
    target: Location,
    confirm_sole_writer: Callable[[], None],
    *,
    verbose: bool,
) -> Bundle:
    with connected(config.workers * config.cpus_per_worker, verbose=verbose):
        answers = [_answers(member, number, dataset, plan, config) for number, member in enumerate(members)]
    rows = np.flatnonzero(plan.rows)
    logits = mean_logits(members, [answer.rows for answer in answers], [answer.logits for answer in answers], len(plan.rows))[rows]
    fitted = fit(
        logits,
        dataset.labels_in(plan.shards)[rows],
        np.asarray(dataset.index_of(plan.shards, ["group"])["group"].to_pylist(), np.str_)[rows],
        _looks(answers, rows, dataset.manifest.patch_size_px),
        target_recall=config.target_recall,
        review=config.review,
        samples=config.bootstrap_samples,
        seed=config.seed,
    )
    confirm_sole_writer()
    return write_ensemble(target, members, config=config, dataset=dataset.manifest, calibration_rows=plan.kind, notes=plan.notes, **fitted.fields())


class _Answers:
    """What one member said: places of the rows among all of the plan, in order, its logits, and what the rows look like."""

    def __init__(self, table: pa.Table) -> None:
        self.rows: npt.NDArray[np.int64] = table["row"].to_numpy()
        self.logits: npt.NDArray[np.float64] = table["logit"].to_numpy()
        self.pale = np.asarray(table["pale"].to_pylist(), bool)
        self.sums, self.squares = (table[name].combine_chunks().flatten().to_numpy().reshape(-1, 3) for name in ("sums", "sums_of_squares"))


def _answers(member: Bundle, number: int, dataset: PreparedDataset, plan: CalibrationPlan, config: EnsembleConfig) -> _Answers:
    """Ask one member about the rows that it judges."""
    ends = np.cumsum([shard.rows for shard in plan.shards])
    masks = np.split(plan.judges[number], ends[:-1])
    units = [unit for unit, mask in enumerate(masks) if mask.any()]
    wanted, doing = int(plan.judges[number].sum()), f"member {number:02d}"
    work = partial(_judge_shard, dataset, plan.shards, [int(end) - shard.rows for end, shard in zip(ends, plan.shards, strict=True)], masks, config)
    table = run_units(member, units, work, config, "ensemble", lambda done: say(f"{doing}: {done}/{wanted} patches"))
    found = _Answers(table)
    if len(found.rows) != wanted or len(np.unique(found.rows)) != wanted:
        raise SentinodeError(f"{doing}: {len(found.rows)} answers for {wanted} rows")
    if not np.isfinite(found.logits).all():
        raise SentinodeError(f"{member.where}: its outputs are not finite for some patches; nothing was written")
    return found


def _judge_shard(
    dataset: PreparedDataset,
    shards: list[ShardRecord],
    firsts: list[int],
    masks: list[npt.NDArray[np.bool_]],
    config: EnsembleConfig,
    predictor: Predictor,
    unit: int,
) -> pa.Table:
    _, images = dataset.read_pixels(shards[unit])
    chosen = np.flatnonzero(masks[unit])
    images = images[chosen]
    sums, squares = (pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 3) for values in channel_sums(images))
    return pa.table(
        {
            "row": firsts[unit] + chosen,
            "logit": predictor.logits(images, config.batch_size).astype(np.float64),
            "pale": is_pale(images),
            "sums": sums,
            "sums_of_squares": squares,
        }
    )


def _looks(answers: Sequence[_Answers], rows: npt.NDArray[np.int64], side_px: int) -> Looks:
    """Return what the rows look like, in their order; members that judged the same row saw the same pixels."""
    seen = np.concatenate([answer.rows for answer in answers])
    _, first = np.unique(seen, return_index=True)
    pale, sums, squares = (np.concatenate([getattr(answer, name) for answer in answers])[first] for name in ("pale", "sums", "squares"))
    assert len(pale) == len(rows)
    return Looks(pale, sums, squares, side_px * side_px)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--bundles", required=True, nargs="+", metavar="BUNDLE", help="folders made by train or tune, two or more")
    parser.add_argument("--data", required=True, metavar="DATASET", help="the data set that they were trained on")
    parser.add_argument("--out", required=True, metavar="DIR", help="the bundle to make")
    add_common_arguments(parser, EnsembleConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    bundle = ensemble(config_from(args, EnsembleConfig), args.bundles, args.data, args.out, verbose=args.verbose)
    manifest = bundle.manifest
    rule, metrics = manifest.threshold_rule, manifest.metrics
    for note in manifest.data.notes:
        say(f"note: {note}")
    say(
        f"{CALIBRATION_MEANING[manifest.calibration_rows]}\n"
        f"bundle: {bundle.where}\n"
        f"{len(manifest.members)} members; ROC-AUC {metrics['roc_auc']:.4f} on {metrics['rows']} rows; threshold {manifest.threshold:.4f} "
        f"(recall {metrics['recall']:.4f}; its lower 95 % bound {rule.bound:.4f} {'reaches' if rule.reached else 'does not reach'} "
        f"the target {rule.target_recall})"
    )
    return {
        "bundle": str(bundle.where),
        "digest": manifest.digest,
        "members": manifest.members,
        "calibration_rows": manifest.calibration_rows,
        "metrics": metrics,
    }


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.ensemble") -> int:
    """Entry point of `python -m ray_jobs.ensemble`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
