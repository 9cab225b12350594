"""Search learning rate, unfreeze depth or any other field of TrainConfig.

    python -m ray_jobs.tune --data out/data --out out/sweep --config tune_configs/smoke.yaml            # minutes on two cores
    python -m ray_jobs.tune --data /shared/data --out /shared/sweep --config tune_configs/lr_depth_asha.yaml

Ends with <out>/bundle (the best trial), trials.csv, best.yaml (feeds `ray_jobs.train --config`) and report.html. Stopped in any way, the same
command continues: finished trials are not repeated, running ones go on from their last checkpoint.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

from ray_jobs.checkpoints import ABOUT_FILE, Saved
from ray_jobs.cluster import connected, known_capacity
from ray_jobs.progress import following
from ray_jobs.run_folder import REQUEST_FILE, RunRequest, open_finished_bundle, problem_with, remove_features
from ray_jobs.run_inputs import FoldRows, LoadedRows, load_folds, load_rows
from ray_jobs.sweep.course import Course
from ray_jobs.sweep.progress import SweepProgress
from ray_jobs.sweep.report import SweepFacts, render
from ray_jobs.sweep.table import describe_point, trials_table
from ray_jobs.sweep.trackers import TrialTrackers
from ray_jobs.sweep.trial import Shared, rows_key, trial_config, trial_folder
from ray_jobs.sweep.tune_search import DRIVER_CPUS, tune_search
from ray_jobs.sweep.winner import Standing, standings
from ray_jobs.tracking import check_trackers
from ray_jobs.train import best_checkpoint, finish, fit_run, initial_weights, operating_point_text, resolve_gpus
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode.bundle import Bundle
from sentinode.config import SweepConfig, TrainConfig
from sentinode.dataset import PreparedDataset
from sentinode.errors import ConfigError, StoppedError, TrainingError, UsageError
from sentinode.locations import Location, locate
from sentinode.search.journal import Journal, TrialRecord
from sentinode.search.point_sources import PointSource, point_source
from sentinode.search.warm_start import kept_warm_start, warm_start
from sentinode.sole_writer import sole_writer
from sentinode.storage import json_bytes


@dataclass(frozen=True)
class TuneResult:
    """What a sweep left.

    Attributes
    ----------
    bundle : Bundle
        Of the best trial.
    trials : list of TrialRecord
        In order of beginning.
    standings : list of Standing
        Configurations, best first.
    already_complete : bool
    """

    bundle: Bundle
    trials: list[TrialRecord]
    standings: list[Standing]
    already_complete: bool


def tune(config: SweepConfig, data: str | Path, out: str | Path, *, verbose: bool = False) -> TuneResult:
    """Run the sweep until done; continues what an earlier call with the same arguments began.

    Raises
    ------
    UsageError
        `data` is not a prepared data set or lacks the folds, `out` belongs to another run, or the weights cannot be had.
    CapacityError
        The cluster has no room for one trial.
    TrainingError
        Every trial failed.
    StorageError
        A checkpoint or the journal cannot be written.
    StoppedError
        Interrupted; a later call continues.
    """
    dataset, folder = PreparedDataset.open(data), locate(out)
    base = config.train_config({})
    check_trackers(base, folder)
    with sole_writer(folder, say) as confirm_sole_writer:
        request = RunRequest(folder, "tune", config, dataset.manifest.fingerprint, dataset.manifest.split.folds)
        request.check()
        finished = open_finished_bundle(folder)
        journal = Journal(folder)
        if finished is not None:
            return TuneResult(finished, journal.trials, standings(journal.trials, config), already_complete=True)
        folds = _folds(config, dataset)
        started = kept_warm_start(folder) or warm_start(config, dataset.manifest.fingerprint)
        source = point_source(config, started.first, started.known)
        notes = [*_warnings(config, base, folds), *started.notes]
        # Weights that cannot be had are wrong use, found here in a second.
        initial = None if "weights" in config.keys else initial_weights(base)
        for note in notes:
            say(f"warning: {note}")
        with connected(_wanted_cpus(config, base), verbose=verbose):
            # Begun on GPUs it goes on there, as a run does.
            begun = _begun(folder)
            use_gpu = resolve_gpus(base, config.workers_per_trial, begun, "tune (one trial)", config.gpus_per_worker)
            rows = _load_rows(dataset, base, folds)
            confirm_sole_writer()  # the cluster and the rows took their time
            run_id = request.claim()
            # Again: a process that had the sweep until now may have written until now.
            journal = Journal(folder)
            journal.problem = lambda: problem_with(folder, run_id)
            sweep = _Sweep(config, base, dataset, folder, run_id, rows, initial, journal, use_gpu)
            started.keep(folder)
            _search(sweep, source, verbose=verbose)
            remove_features(folder, dataset.manifest.fingerprint)
            bundle = _finish(sweep, notes)
    return TuneResult(bundle, journal.trials, standings(journal.trials, config), already_complete=False)


def _begun(folder: Location) -> Saved | None:
    """Return a checkpoint of any trial, None where there is none."""
    try:
        files = (folder / "trials").entries(recursive=True)
    except FileNotFoundError:
        return None
    places = (folder / "trials" / file.name.rpartition("/")[0] for file in files if file.name.endswith(f"/{ABOUT_FILE}"))
    return next((saved for place in places if (saved := Saved.open(place)) is not None), None)


@dataclass(frozen=True)
class _Sweep:
    """What a sweep is carried out with."""

    config: SweepConfig
    base: TrainConfig
    dataset: PreparedDataset
    folder: Location
    run_id: str
    rows: dict[int | None, LoadedRows | FoldRows]
    initial: dict[str, torch.Tensor] | None
    journal: Journal
    use_gpu: bool

    @property
    def folds(self) -> list[int] | None:
        """Folds that each trial is scored on."""
        return None if None in self.rows else [fold for fold in self.rows if fold is not None]


def _folds(config: SweepConfig, dataset: PreparedDataset) -> list[int] | None:
    """Return the folds that trials are scored on; raises UsageError where the data set does not have them."""
    if config.folds is None:
        return None
    there = dataset.manifest.split.folds or 0
    folds = list(range(there)) if config.folds == "all" else list(config.folds)
    if len(folds) < 2 or max(folds) >= there:
        has = f"has folds 0 to {there - 1}" if there else "was prepared without folds: prepare it with --set folds=5"
        raise UsageError(f"folds {config.folds}: {dataset.path} {has}")
    return folds


def _warnings(config: SweepConfig, base: TrainConfig, folds: list[int] | None) -> list[str]:
    found = []
    if "weights" not in config.keys and base.weights == "none" and config.smallest("unfreeze_depth") < 5:
        searched = "unfreeze_depth" in config.keys
        which = "below 5 in the space: the frozen stages of those trials" if searched else f"{base.unfreeze_depth}: the frozen stages of all trials"
        found.append(f"weights none with unfreeze_depth {which} are random, and stay so")
    if config.scheduler.kind != "none":
        unit, units = ("epochs", config.largest("epochs")) if folds is None else ("folds", len(folds))
        grace = config.scheduler.grace_period_epochs if folds is None else config.scheduler.grace_period_folds
        if grace >= units:
            found.append(f"scheduler {config.scheduler.kind}: ends no trial before {unit[:-1]} {grace}, and none has more than {units}")
    return found


def _wanted_cpus(config: SweepConfig, base: TrainConfig) -> float:
    """CPUs of a Ray that we start: room for as many trials as are wanted at a time, or for one."""
    return (config.max_concurrent_trials or 1) * config.workers_per_trial * base.cpus_per_worker


def _load_rows(dataset: PreparedDataset, base: TrainConfig, folds: list[int] | None) -> dict[int | None, LoadedRows | FoldRows]:
    return {None: load_rows(dataset, base)} if folds is None else dict(load_folds(dataset, base, folds).items())


def _limit(config: SweepConfig, base: TrainConfig, use_gpu: bool) -> int:
    """As many trials at a time as have room, at most as many as asked for: more would only wait for each other's workers."""
    have = known_capacity()
    workers = config.workers_per_trial
    # One CPU is left for loading rows and for Ray's own helpers.
    room = int((have["CPU"] - 1) // (workers * base.cpus_per_worker + (DRIVER_CPUS if workers > 1 else 0)))
    if use_gpu:
        room = min(room, int(have["GPU"] / (workers * config.gpus_per_worker) + 1e-6))
    return max(1, min(room, config.max_concurrent_trials or room))


def _search(sweep: _Sweep, source: PointSource, *, verbose: bool) -> None:
    """Run, or go on with, the trials; what became of them is in the journal."""
    config, base, folder, journal, folds = sweep.config, sweep.base, sweep.folder, sweep.journal, sweep.folds
    epochs, limit = config.largest("epochs"), _limit(config, base, sweep.use_gpu)
    total = source.total + config.repeats * min(config.repeat_top, source.total)
    # How long it takes until those that wait go on, and how many do, no past trial tells.
    estimates = config.scheduler.kind != "halving"
    progress = SweepProgress(config.metric, journal, total, epochs * len(folds or [0]), limit, say, estimates=estimates)
    trackers = TrialTrackers(config, folder, sweep.dataset.manifest.fingerprint)
    if journal.trials:
        say(f"continuing the sweep: {progress.standing(0)}")
    course = Course(config, folder, journal, source, limit=limit, epochs=epochs, folds=folds, seed=base.seed, progress=progress, trackers=trackers)
    try:
        with following(lambda record: say(record["text"])) as log:
            initial = None if sweep.initial is None else ray.put(sweep.initial)
            shared = Shared(config, base, sweep.dataset, folder, sweep.run_id, sweep.rows, initial, log, sweep.use_gpu, os.getcwd())
            gpus = config.gpus_per_worker if sweep.use_gpu else 0
            went_through = tune_search(course, shared, gpus=gpus, max_failures=base.max_failures, verbose=verbose)
    finally:
        trackers.close()
    if course.broken is not None:
        raise course.broken
    unfinished = sum(trial.status == "running" for trial in journal.trials)
    if not went_through or unfinished:
        raise StoppedError(f"stopped with {unfinished} trials unfinished; repeat the command to continue in {folder}")


def _finish(sweep: _Sweep, notes: list[str]) -> Bundle:
    """Write trials.csv, best.yaml, the report, and last the bundle: a sweep with a bundle is complete."""
    config, dataset, folder, trials = sweep.config, sweep.dataset, sweep.folder, sweep.journal.trials
    if problem := problem_with(folder, sweep.run_id):
        raise UsageError(problem)
    best = next(iter(standings(trials, config)), None)
    if best is None:
        errors = [trial.error for trial in trials if trial.error]
        raise TrainingError(f"every trial failed; the first: {errors[0] if errors else 'no epoch had a figure'} (see {folder / 'trials'})")
    best_config = trial_config(config, best.trial.point, best.trial.seed, None)
    (folder / "trials.csv").write_bytes(trials_table(trials, config).to_csv(index=False).encode())
    (folder / "best.yaml").write_bytes(best_yaml(best, best_config, config).encode())
    facts = SweepFacts(config, dataset.manifest, config.largest("epochs"), sweep.folds, folder.name, best.trial.number, notes)
    (folder / "report.html").write_bytes(render(trials, facts).encode())
    rows = sweep.rows.get(None)
    if not isinstance(rows, LoadedRows) or rows_key(best_config) != rows_key(sweep.base):
        rows = load_rows(dataset, best_config)
    weights_from = trial_folder(folder, best.trial.number, None)
    if sweep.folds is not None:
        say("training the best configuration on the train split, for the bundle")
        weights_from = folder / "trials/best"
        _train_best(best_config, weights_from, sweep.run_id, rows, use_gpu=sweep.use_gpu)
    kept = best_checkpoint(weights_from)
    if kept is None:
        raise TrainingError(f"{weights_from}: the checkpoints of the best trial are gone")
    return finish(kept[0], rows, best_config, dataset, folder / "bundle", sweep.run_id, name=folder.name, use_gpu=sweep.use_gpu)


def _train_best(config: TrainConfig, folder: Location, run_id: str, rows: LoadedRows, *, use_gpu: bool) -> None:
    """Train what was scored on folds as `train` would with best.yaml; goes on with what an interrupted call began."""
    (folder / REQUEST_FILE).write_bytes(json_bytes({"id": run_id, "verb": "trial"}))
    fit_run(config, folder, run_id, rows, use_gpu=use_gpu)


def best_yaml(best: Standing, config: TrainConfig, sweep: SweepConfig) -> str:
    """Return a file that `ray_jobs.train --config` takes as it is: the whole configuration of the best trial."""
    seeds = "" if len(best.values) == 1 else f", mean of {len(best.values)} seeds"
    folds = "" if sweep.folds is None else ", mean over the folds"
    header = f"# Best configuration of a sweep, trial {best.trial.name}: {sweep.metric} {best.value:.6f} on validation{folds}{seeds}.\n"
    return header + str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--data", required=True, metavar="DATASET", help="folder made by prepare")
    parser.add_argument("--out", required=True, metavar="DIR", help="the sweep's folder; DIR/bundle is the best trial's")
    add_common_arguments(parser, SweepConfig, "trials=8 base.epochs=3")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    if not args.config:
        raise ConfigError("--config: a sweep needs its YAML, e.g. --config tune_configs/lr_depth_asha.yaml")
    config = config_from(args, SweepConfig)
    result = tune(config, args.data, args.out, verbose=args.verbose)
    folder = result.bundle.where.parent
    best = result.standings[0] if result.standings else None
    if result.already_complete:
        say(f"already complete: {folder}")
    elif best is not None:
        searched = [trial for trial in result.trials if trial.kind == "search"]
        ended = {status: sum(trial.status == status for trial in searched) for status in ("stopped", "failed")}
        also = "".join(f", {count} {status}" for status, count in ended.items() if count)
        say(
            f"best of {len(searched)} trials{also}: {describe_point(best.trial.point)}: {config.metric} {best.value:.4f}{best.spread_text}\n"
            f"bundle: {result.bundle.where}\n{operating_point_text(result.bundle.manifest)}\nreport: {folder / 'report.html'}\n"
            f"train it again: sentinode train --config {folder / 'best.yaml'} --data {args.data} --out DIR"
        )
    summary = {"bundle": str(result.bundle.where), "digest": result.bundle.manifest.digest, "already_complete": result.already_complete}
    return summary | ({"best": best.trial.point, config.metric: best.value, "trials": len(result.trials)} if best is not None else {})


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.tune") -> int:
    """Entry point of `python -m ray_jobs.tune`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
