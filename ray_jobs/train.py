"""Fine-tune a network on a prepared data set.

    python -m ray_jobs.train --data out/data --out out/run --set workers=2                         # CPU
    python -m ray_jobs.train --data /shared/data --out /shared/run --set workers=8 use_gpu=true    # 8 GPUs

Ends with <out>/bundle. Stopped in any way, the same command continues from the last checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from ray_jobs.checkpoints import Saved, best_and_last, last_good
from ray_jobs.cluster import Need, check_capacity, connected, signal_handlers_kept, wants_gpus
from ray_jobs.failures import task_error, training_error
from ray_jobs.progress import following
from ray_jobs.run_folder import RunRequest, open_finished_bundle, problem_with, remove_features
from ray_jobs.run_inputs import LoadedRows, load_rows
from ray_jobs.stopping import StopOnSignal
from ray_jobs.tracking import RunFacts, Tracking, check_trackers, tracking
from ray_jobs.trainer import checkpoint_interval_s, make_trainer, room_text
from ray_jobs.verb import add_common_arguments, config_from, duration_text, main_of, say
from ray_jobs.waiting import reserved
from sentinode.bundle import Bundle
from sentinode.config import TrainConfig
from sentinode.dataset import Patches, PreparedDataset
from sentinode.errors import SentinodeError, StoppedError, TrainingError, UsageError
from sentinode.finishing import finish_bundle
from sentinode.locations import Location, locate
from sentinode.manifests import BundleManifest
from sentinode.model import initial_state
from sentinode.sole_writer import sole_writer
from sentinode.training import Progress
from sentinode.versions import git_commit, library_versions


@dataclass(frozen=True)
class TrainResult:
    """What a training run left.

    Attributes
    ----------
    bundle : Bundle
    history : list of dict
        One record per epoch; empty where the run had been complete before.
    already_complete : bool
    """

    bundle: Bundle
    history: list[dict[str, Any]]
    already_complete: bool


def train(config: TrainConfig, data: str | Path, out: str | Path, *, verbose: bool = False) -> TrainResult:
    """Train until done and write `<out>/bundle`; continues what an earlier call with the same arguments began.

    Parameters
    ----------
    config : TrainConfig
    data : str or Path
        A prepared data set.
    out : str or Path
        The run's folder, on disk or in an object store: checkpoints in `checkpoint_*`, trackers' files, the result in `bundle`.

    Raises
    ------
    UsageError
        `data` is not a prepared data set, `out` belongs to another run or is not the same folder on every node, the weights cannot be had, the
        configuration needs GPUs that are not there, or a tracker needs its extra.
    CapacityError
        The cluster has too few CPUs or GPUs, or no GPUs for a run that was begun on them.
    TrainingError
        Workers failed more than `max_failures` times, a loss was not finite, or the disk is full.
    StoppedError
        Interrupted; a later call continues.
    """
    dataset = PreparedDataset.open(data)
    folder = locate(out)
    check_trackers(config, folder)
    with sole_writer(folder, say) as confirm_sole_writer:
        request = RunRequest(folder, "train", config, dataset.manifest.fingerprint, dataset.manifest.split.folds)
        request.check()
        finished = open_finished_bundle(folder)
        if finished is not None:
            return TrainResult(finished, [], already_complete=True)
        _, last = best_and_last(folder)
        # Weights that cannot be had are wrong use, found here in a second. A run that goes on has its own.
        initial = initial_weights(config) if last is None else None
        if config.weights == "none" and config.max_depth < 5:
            say(f"warning: weights none with unfreeze_depth {config.max_depth}: the frozen stages stay random")
        with connected(config.max_workers * config.cpus_per_worker, verbose=verbose):
            use_gpu = resolve_gpus(config, config.min_workers, last, "train")
            rows = load_rows(dataset, config, last.ingest if last else None)
            confirm_sole_writer()  # the cluster and the rows took their time
            # Not before: what is wrong with the data or the cluster must not leave a folder that then refuses the command put right.
            run_id = request.claim()
            with tracking(config, folder, _facts(folder, config, dataset)) as trackers:
                _record(trackers, last.progress if last else None)
                if last is None or not (last.progress.history and last.progress.is_over(config)):
                    _fit(config, folder, run_id, rows, initial, use_gpu=use_gpu, trackers=trackers)
                best = best_checkpoint(folder)
                if best is None:
                    raise TrainingError(f"{folder}: the run left no checkpoint")
                weights, progress = best
                _record(trackers, progress)
                bundle = finish(weights, rows, config, dataset, folder / "bundle", run_id, name=folder.name, use_gpu=use_gpu)
                remove_features(folder, dataset.manifest.fingerprint)
                trackers.end("finished", _result(bundle))
    return TrainResult(bundle, progress.history, already_complete=False)


def resolve_gpus(config: TrainConfig, workers: int, last: Saved | None, verb: str, gpus_per_worker: float = 1) -> bool:
    """Return whether workers get `gpus_per_worker` GPUs each, once it is certain that `workers` of them fit the cluster.

    A run goes on where its checkpoint `last` was made, whatever `use_gpu: auto` would find now: with another arithmetic, what comes out would be
    neither device's.

    Raises
    ------
    CapacityError
        They do not fit.
    UsageError
        The configuration needs GPUs, and `use_gpu: auto` found too few.
    """
    use_gpu = wants_gpus(config.use_gpu, workers) if last is None else last.device == "cuda"
    begun = ", begun on GPUs," if use_gpu and last is not None else ""
    check_capacity(Need(workers, config.cpus_per_worker, gpus_per_worker if use_gpu else 0), verb + begun)
    check_device(config, use_gpu=use_gpu)
    return use_gpu


def check_device(config: TrainConfig, *, use_gpu: bool) -> None:
    """Refuse what only GPUs can do, where there are none.

    Raises
    ------
    UsageError
        The configuration needs GPUs.
    """
    if not use_gpu and config.precision == "fp16":
        raise UsageError("precision fp16 needs GPUs, of which use_gpu auto found too few: set precision bf16 or fp32")
    if not use_gpu and config.sync_batch_norm:
        raise UsageError("sync_batch_norm needs GPUs, of which use_gpu auto found too few: torch has it for CUDA only")


def initial_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return the weights that a run starts from, a function of the seed: made here, so that a path or a download does not depend on the workers.

    Raises
    ------
    UsageError
        The weights cannot be had or do not fit the architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return initial_state(config.arch, config.weights, input_size_px=config.input_size_px)


def _facts(folder: Location, config: TrainConfig, dataset: PreparedDataset) -> RunFacts:
    facts = {"data_fingerprint": dataset.manifest.fingerprint, "git_commit": git_commit(), "fold": config.fold, **library_versions()}
    return RunFacts(folder.name, config.model_dump(mode="json"), {name: str(value) for name, value in facts.items() if value is not None})


def _record(trackers: Tracking, progress: Progress | None) -> None:
    """Give trackers what has been trained before they were there; they pass over what they have."""
    for record in progress.history if progress is not None else ():
        trackers.add(record)


def _result(bundle: Bundle) -> dict[str, float | str]:
    manifest = bundle.manifest
    numbers = {f"bundle_{name}": value for name, value in manifest.metrics.items() if isinstance(value, int | float)}
    return {"bundle_digest": manifest.digest, "bundle_threshold": manifest.threshold, **numbers}


def fit_run(config: TrainConfig, folder: Location, run_id: str, rows: LoadedRows, *, use_gpu: bool) -> None:
    """Train the run in `folder`, which has its request, until done; goes on where it stopped, and does nothing where it is done. No trackers.

    Raises
    ------
    TrainingError, UsageError, StoppedError
        As `train`.
    """
    _, last = best_and_last(folder)
    if last is None or not (last.progress.history and last.progress.is_over(config)):
        _fit(config, folder, run_id, rows, initial_weights(config) if last is None else None, use_gpu=use_gpu, trackers=Tracking({}))
    remove_features(folder, rows.dataset.manifest.fingerprint)


def _fit(
    config: TrainConfig,
    folder: Location,
    run_id: str,
    rows: LoadedRows,
    initial: dict[str, torch.Tensor] | None,
    *,
    use_gpu: bool,
    trackers: Tracking,
) -> None:
    from ray.train import TrainingFailedError

    from ray_jobs.train_callback import TellDriver, TellOfWaiting

    def show(record: dict[str, Any]) -> None:
        if record["kind"] in ("note", "waiting"):
            say(record["text"])
            return
        # First: what becomes of the terminal is not the trackers' concern.
        trackers.add(record)
        say(describe_epoch(record, config))

    with following(show) as log:
        trainer = make_trainer(
            config,
            folder,
            run_id,
            rows,
            ray.put(initial) if initial is not None else None,
            use_gpu=use_gpu,
            log=log,
            checkpoint_interval_s=checkpoint_interval_s(config),
            callbacks=[TellDriver(log, config.max_failures), TellOfWaiting(log, room_text(config, use_gpu=use_gpu))],
        )
        stop = StopOnSignal(log)
        trainer._register_sigint_handler = stop.install
        try:
            with signal_handlers_kept():
                outcome = trainer.fit().return_value or {}
        except TrainingFailedError as error:
            raise _with_last_good(training_error(error, folder), folder) from error
        except ray.exceptions.RayActorError as error:
            if not stop.requested:
                raise _with_last_good(training_error(error, folder), folder) from error
            raise StoppedError(f"stopped; repeat the command to continue from the last checkpoint in {folder}") from error
        finally:
            stop.over()
    if "usage" in outcome:
        raise UsageError(outcome["usage"])
    if "failed" in outcome:
        raise _with_last_good(TrainingError(outcome["failed"]), folder)
    if stop.requested:
        raise StoppedError(f"{outcome.get('stopped', 'stopped')}; repeat the command to continue from there ({folder})")


def _with_last_good(error: SentinodeError, folder: Location) -> SentinodeError:
    """Name the checkpoint that is left."""
    if not isinstance(error, TrainingError):
        return error
    good = last_good(folder)
    left = f"the last good checkpoint is {good.path}, {good.where}" if good is not None else "there is no checkpoint yet"
    return TrainingError(f"{error}; {left}")


def best_checkpoint(folder: Location) -> tuple[dict[str, torch.Tensor], Progress] | None:
    """Return the weights of the best epoch of a run and its progress; None where no epoch is done yet.

    Raises
    ------
    TrainingError
        The checkpoint of the best epoch is gone.
    """
    best, last = best_and_last(folder)
    return (best.weights(), last.progress) if best is not None and last is not None else None


def finish(
    weights: dict[str, torch.Tensor],
    rows: LoadedRows,
    config: TrainConfig,
    dataset: PreparedDataset,
    out: Location,
    run_id: str,
    *,
    name: str,
    use_gpu: bool,
) -> Bundle:
    """Calibrate, choose the threshold and write the bundle, in a task with the resources of one worker.

    `out` lies in the folder whose request has the id `run_id`.
    """
    with reserved(config.cpus_per_worker, int(use_gpu), "make the bundle") as place:
        task = _finish.options(num_cpus=config.cpus_per_worker, num_gpus=int(use_gpu), scheduling_strategy=place)
        try:
            ray.get(task.remote(weights, rows.calibration, config, dataset, out, run_id, name, "cuda" if use_gpu else "cpu"))
        except ray.exceptions.RayError as error:
            raise task_error(error, "making the bundle") from error
    return Bundle.open(out)


@ray.remote
def _finish(
    weights: dict[str, torch.Tensor],
    calibration: Patches,
    config: TrainConfig,
    dataset: PreparedDataset,
    out: Location,
    run_id: str,
    name: str,
    device: str,
) -> None:
    if problem := problem_with(out.parent, run_id):
        raise UsageError(problem)
    # Ray runs this again where the node was lost that had just finished it.
    if open_finished_bundle(out.parent) is not None:
        return
    torch.set_num_threads(config.cpus_per_worker)
    finish_bundle(weights, calibration, config, dataset.manifest, out, name=name, device=device)


def describe_epoch(record: dict[str, Any], config: TrainConfig) -> str:
    """Return what the terminal shows of an epoch. The time left is that of all epochs that are not done, by this one's."""
    auc = record.get("val_roc_auc")
    validation = f"val loss {record['val_loss']:.4f}  val AUC {'-' if auc is None else format(auc, '.4f')}"
    if record["epoch"] < 0:
        return f"initial weights: {validation}"
    best = "  best so far" if record["improvement"] else ""
    speed = record["rows"] / max(record["seconds"], 1e-9)
    left = (config.epochs - record["epoch"] - 1) * (record["seconds"] + record["val_seconds"])
    return (
        f"epoch {record['epoch'] + 1}/{config.epochs}  loss {record['train_loss']:.4f}  {validation}  "
        f"lr {record['learning_rate']:.2g}  {speed:.0f} images/s  {duration_text(left)} left{best}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--data", required=True, metavar="DATASET", help="folder made by prepare")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's folder; DIR/bundle is the result")
    add_common_arguments(parser, TrainConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    result = train(config_from(args, TrainConfig), args.data, args.out, verbose=args.verbose)
    manifest = result.bundle.manifest
    if result.already_complete:
        say(f"already complete: {result.bundle.where}")
    else:
        say(f"bundle: {result.bundle.where}\n{operating_point_text(manifest)}")
    return {"bundle": str(result.bundle.where), "digest": manifest.digest, "metrics": manifest.metrics, "already_complete": result.already_complete}


def operating_point_text(manifest: BundleManifest) -> str:
    """Return, in words, how good a bundle is on validation and whether its threshold keeps the target."""
    rule = manifest.threshold_rule
    return (
        f"validation AUC {manifest.metrics['roc_auc']:.4f}; threshold {manifest.threshold:.4f} (recall {manifest.metrics['recall']:.4f}; "
        f"its lower 95 % bound {rule.bound:.4f} {'reaches' if rule.reached else 'does not reach'} the target {rule.target_recall})"
    )


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.train") -> int:
    """Entry point of `python -m ray_jobs.train`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
