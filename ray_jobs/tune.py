"""Search learning rate, unfreeze depth or any other field of TrainConfig.

    python -m ray_jobs.tune --data out/data --out out/sweep --config tune_configs/smoke.yaml            # minutes on two cores
    python -m ray_jobs.tune --data /shared/data --out /shared/sweep --config tune_configs/lr_depth_asha.yaml

Ends with <out>/bundle (the best trial), trials.csv, best.yaml (feeds `ray_jobs.train --config`) and report.html. Stopped in any way, the same
command continues: finished trials are not repeated, running ones go on from their last epoch.
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from ray_jobs.checkpoints import saved_checkpoints
from ray_jobs.cluster import capacity, connected, signal_handlers_kept
from ray_jobs.run_folder import REQUEST_FILE, RunRequest, is_run, not_shared, open_finished_bundle
from ray_jobs.run_inputs import LoadedRows, load_rows
from ray_jobs.sweep_report import TrialSummary, describe_point, rank, render, trials_table
from ray_jobs.train import best_checkpoint, check_device, finish, initial_weights, resolve_gpus
from ray_jobs.trainer import make_trainer
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode.bundle import Bundle
from sentinode.config import AshaConfig, Choice, Domain, Grid, LogUniform, RandInt, SweepConfig, TrainConfig, Uniform
from sentinode.dataset import PreparedDataset
from sentinode.errors import ConfigError, StoppedError, TrainingError, UsageError, one_line, root_of
from sentinode.storage import exclusive, local_path, write_json, write_text_atomic

# A trial's driver only waits; Ray refuses 0 for it.
_DRIVER_CPUS = 0.1
_ROW_FIELDS = ("fold", "calibration_fraction", "seed", "ingest")
_WEIGHT_FIELDS = ("arch", "weights", "input_size_px", "seed")


@dataclass(frozen=True)
class TuneResult:
    """What a sweep left.

    Attributes
    ----------
    bundle : Bundle
        Of the best trial.
    trials : list of TrialSummary
        Best first; empty where the sweep had been complete before.
    already_complete : bool
    """

    bundle: Bundle
    trials: list[TrialSummary]
    already_complete: bool


def tune(config: SweepConfig, data: str | Path, out: str | Path, *, verbose: bool = False) -> TuneResult:
    """Run the sweep until done; continues what an earlier call with the same arguments began.

    Raises
    ------
    UsageError
        `data` is not a prepared data set, `out` belongs to another run, or the weights cannot be had.
    CapacityError
        The cluster has no room for one trial.
    TrainingError
        Every trial failed.
    StoppedError
        Interrupted; a later call continues.
    """
    dataset, folder = PreparedDataset.open(data), local_path(out)
    base = config.train_config({})
    with exclusive(folder):
        request = RunRequest(folder, "tune", config, dataset.manifest.fingerprint, dataset.manifest.split.folds)
        request.check()
        finished = open_finished_bundle(folder)
        if finished is not None:
            return TuneResult(finished, [], already_complete=True)
        if "weights" not in config.space and base.weights != "none":
            initial_weights(base)
        elif base.weights == "none" and _smallest_depth(config, base) < 5:
            say("warning: weights none with unfreeze_depth below 5 in the space: the frozen stages of those trials stay random")
        concurrent = config.max_concurrent_trials or 1
        with connected(concurrent * config.workers_per_trial * base.cpus_per_worker, verbose=verbose):
            begun = [saved[-1] for trial in (folder / "trials").glob("*/") if (saved := saved_checkpoints(trial))]
            use_gpu = resolve_gpus(base, config.workers_per_trial, begun[0] if begun else None, "tune (one trial)")
            rows = load_rows(dataset, base)
            run_id = request.claim()
            trials = rank(_search(config, base, dataset, folder, run_id, rows, use_gpu=use_gpu), config.metric)
            best = trials[0]
            if best.value is None:
                raise TrainingError(f"every trial failed; the first: {best.error or 'no epoch was finished'} (see {folder / 'trials'})")
            best_config = config.train_config(best.point)
            kept = best_checkpoint(folder / "trials" / best.trial_id)
            if kept is None:
                raise TrainingError(f"{folder / 'trials' / best.trial_id}: the checkpoints of the best trial are gone")
            write_text_atomic(folder / "trials.csv", trials_table(trials).to_csv(index=False))
            write_text_atomic(folder / "best.yaml", best_yaml(best, best_config, config.metric))
            write_text_atomic(folder / "report.html", render(trials, config, dataset))
            # Last: a sweep with a bundle is complete.
            same_rows = _key(best_config, _ROW_FIELDS) == _key(base, _ROW_FIELDS)
            best_rows = rows if same_rows else load_rows(dataset, best_config)
            bundle = finish(kept[0], best_rows, best_config, dataset, folder / "bundle", run_id, name=folder.name, use_gpu=use_gpu)
    return TuneResult(bundle, trials, already_complete=False)


def _smallest_depth(config: SweepConfig, base: TrainConfig) -> int:
    domain = config.space.get("unfreeze_depth")
    if domain is None:
        return base.unfreeze_depth
    values: list[int] = next(iter(domain.model_dump().values()))
    return min(values)


def _key(config: TrainConfig, fields: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in fields)


def _concurrency(config: SweepConfig, base: TrainConfig, use_gpu: bool) -> int:
    """As many trials at a time as have room, at most as many as asked for: more would only wait for each other's workers."""
    have = capacity()
    # One CPU is left for loading rows and for Ray's own helpers.
    room = int((have["CPU"] - 1) // (config.workers_per_trial * base.cpus_per_worker + _DRIVER_CPUS))
    if use_gpu:
        room = min(room, int(have["GPU"] // config.workers_per_trial))
    return max(1, min(room, config.max_concurrent_trials or room))


def _search(
    config: SweepConfig, base: TrainConfig, dataset: PreparedDataset, folder: Path, run_id: str, rows: LoadedRows, *, use_gpu: bool
) -> list[TrialSummary]:
    """Run or resume the trials and return what became of each."""
    # Tune's own loggers and its box of settings: trials.csv, the report and SweepProgress say the same to people.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune
    from ray.tune.search import BasicVariantGenerator

    from ray_jobs.sweep_progress import SweepProgress

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trials_folder = folder / "trials"
    trials_folder.mkdir(exist_ok=True)
    # Parameters go through Ray's object store once, not into every trial.
    shared = Shared(run_id, base, rows, None if "weights" in config.space else ray.put(initial_weights(base)))
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(run_trial, sweep=config, dataset=dataset, trials_folder=trials_folder, shared=shared, use_gpu=use_gpu),
        {"CPU": _DRIVER_CPUS},
    )
    progress = SweepProgress(config.metric, _number_of_trials(config), say)
    state = folder / "sweep"
    if ray_tune.Tuner.can_restore(str(state)):
        say("continuing the sweep")
        tuner = ray_tune.Tuner.restore(str(state), trainable, resume_unfinished=True, resume_errored=True)
        # Callbacks are stored with the sweep; the one restored must be this process's.
        tuner._local_tuner._run_config.callbacks = [progress]
    else:
        tuner = ray_tune.Tuner(
            trainable,
            param_space={key: _sampled(domain) for key, domain in config.space.items()},
            tune_config=ray_tune.TuneConfig(
                metric=config.metric,
                mode="max" if config.metric == "val_roc_auc" else "min",
                num_samples=config.trials if config.searcher == "random" else 1,
                search_alg=BasicVariantGenerator(max_concurrent=_concurrency(config, base, use_gpu), random_state=config.seed),
                scheduler=_scheduler(config, base),
                trial_dirname_creator=_trial_name,
                trial_name_creator=_trial_name,
            ),
            run_config=ray_tune.RunConfig(name="sweep", storage_path=str(folder), callbacks=[progress], verbose=0),
        )
    with signal_handlers_kept():
        results = tuner.fit()
    if progress.unfinished:
        raise StoppedError(f"stopped with {progress.unfinished} trials unfinished; repeat the command to continue in {folder}")
    return [_summary(result, trials_folder, config) for result in results]


def _number_of_trials(config: SweepConfig) -> int:
    combinations = math.prod(len(domain.grid) for domain in config.space.values() if isinstance(domain, Grid))
    return combinations * (config.trials if config.searcher == "random" else 1)


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


def _sampled(domain: Domain) -> Any:
    from ray import tune as ray_tune

    match domain:
        case LogUniform(loguniform=(low, high)):
            return ray_tune.loguniform(low, high)
        case Uniform(uniform=(low, high)):
            return ray_tune.uniform(low, high)
        case RandInt(randint=(first, last)):
            return ray_tune.randint(first, last + 1)
        case Choice(choice=values):
            return ray_tune.choice(values)
        case Grid(grid=values):
            return ray_tune.grid_search(values)
    raise ConfigError(f"space: {domain!r} is not a known kind")


def _scheduler(config: SweepConfig, base: TrainConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if not isinstance(config.scheduler, AshaConfig):
        return FIFOScheduler()
    return ASHAScheduler(
        # Not Tune's own count of reports, which starts anew when a sweep is continued.
        time_attr="epochs_done",
        max_t=max(base.epochs, config.scheduler.grace_period_epochs),
        grace_period=config.scheduler.grace_period_epochs,
        reduction_factor=config.scheduler.reduction_factor,
    )


@dataclass(frozen=True)
class Shared:
    """What trials have in common, put into Ray's shared memory once.

    Attributes
    ----------
    run_id : str
        Of the sweep's folder.
    base : TrainConfig
        What it was made for; a trial that differs in that makes its own.
    rows : LoadedRows
    initial : ObjectRef of dict of str to tensor, or None
        Weights to start from; None where the sweep searches over them.
    """

    run_id: str
    base: TrainConfig
    rows: LoadedRows
    initial: Any


def run_trial(point: dict[str, Any], *, sweep: SweepConfig, dataset: PreparedDataset, trials_folder: Path, shared: Shared, use_gpu: bool) -> None:
    """One trial: a driver that runs a DDP training of its own (the only way Ray 2.60 joins Tune and Train)."""
    from ray import tune as ray_tune
    from ray.tune.integration.ray_train import TuneReportCallback

    config = sweep.train_config(point)
    check_device(config, use_gpu=use_gpu)
    if not is_run(trials_folder.parent, shared.run_id):
        raise UsageError(not_shared(trials_folder.parent))
    rows = shared.rows if _key(config, _ROW_FIELDS) == _key(shared.base, _ROW_FIELDS) else load_rows(dataset, config)
    # The name holds nothing that changes, so that a trial begun again finds its checkpoints.
    folder = trials_folder / str(ray_tune.get_context().get_trial_id())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST_FILE, {"id": shared.run_id, "verb": "trial"})
    initial = shared.initial
    if saved_checkpoints(folder):
        initial = None
    elif initial is None or _key(config, _WEIGHT_FIELDS) != _key(shared.base, _WEIGHT_FIELDS):
        initial = ray.put(initial_weights(config))
    # No checkpoints within an epoch: Tune would take them for results.
    trainer = make_trainer(config, folder, shared.run_id, rows, initial, use_gpu=use_gpu, callbacks=[TuneReportCallback()])
    for kind, message in (trainer.fit().return_value or {}).items():
        raise UsageError(message) if kind == "usage" else TrainingError(message)


def _summary(result: Any, trials_folder: Path, config: SweepConfig) -> TrialSummary:
    """Read a trial's epochs from its own last checkpoint: Tune keeps only what it saw in its last life."""
    point = dict(result.config or {})
    trial_id = Path(result.path).name
    error = one_line(root_of(result.error)) if result.error else None
    kept = best_checkpoint(trials_folder / trial_id)
    if kept is None:
        return TrialSummary(trial_id, point, [], None, None, error or "no epoch was finished")
    progress = kept[1]
    return TrialSummary(trial_id, point, progress.history, progress.best_epoch, progress.best_value, error)


def best_yaml(best: TrialSummary, config: TrainConfig, metric: str) -> str:
    """Return a file that `ray_jobs.train --config` takes as it is: the whole configuration of the best trial."""
    header = f"# Best trial {best.trial_id}: {metric} {best.value:.6f} on validation after epoch {(best.best_epoch or 0) + 1}.\n"
    return header + str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--data", required=True, metavar="DATASET", help="folder made by prepare")
    parser.add_argument("--out", required=True, metavar="DIR", help="the sweep's folder; DIR/bundle is the best trial's")
    add_common_arguments(parser, SweepConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    if not args.config:
        raise ConfigError("--config: a sweep needs its YAML, e.g. --config tune_configs/lr_depth_asha.yaml")
    config = config_from(args, SweepConfig)
    result = tune(config, args.data, args.out, verbose=args.verbose)
    folder = result.bundle.path.parent
    if result.already_complete:
        say(f"already complete: {folder}")
    else:
        best = result.trials[0]
        say(
            f"best of {len(result.trials)} trials: {describe_point(best.point)}: {config.metric} {best.value:.4f}\n"
            f"bundle: {result.bundle.path}\nreport: {folder / 'report.html'}\n"
            f"train it longer: sentinode train --config {folder / 'best.yaml'} --data {args.data} --out DIR"
        )
    return {"bundle": str(result.bundle.path), "digest": result.bundle.manifest.digest, "already_complete": result.already_complete}


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.tune") -> int:
    """Entry point of `python -m ray_jobs.tune`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
