"""Fine-tune a network on a prepared data set.

    python -m ray_jobs.train --data out/data --out out/run --set workers=2                         # CPU
    python -m ray_jobs.train --data /shared/data --out /shared/run --set workers=8 use_gpu=true    # 8 GPUs

Ends with <out>/bundle. Stopped in any way, the same command continues from the last epoch.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from ray_jobs.cluster import Need, check_capacity, connected, signal_handlers_kept, wants_gpus
from ray_jobs.progress import following
from ray_jobs.run_folder import RunRequest, open_finished_bundle
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode.bundle import Bundle
from sentinode.config import TrainConfig
from sentinode.dataset import Patches, PreparedDataset
from sentinode.errors import SentinodeError, StoppedError, TrainingError, one_line, root_of
from sentinode.finishing import finish_bundle, split_calibration
from sentinode.model import build_model, set_unfreeze_depth, state_for_storage
from sentinode.storage import exclusive, local_path
from sentinode.training import Learner, Progress, train_epochs

_STATE_FILE = "state.pt"
_WEIGHTS_FILE = "model.safetensors"
# Worker groups that could not be started before a run gives up: enough for a node that dies while starting, not for ever.
_START_FAILURES = 3


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


@dataclass(frozen=True)
class LoadedRows:
    """References to the rows of a run, once per node in shared memory.

    Attributes
    ----------
    train, val, calibration : ObjectRef of Patches
        To train on, to choose the epoch by, and to calibrate on.
    """

    train: Any
    val: Any
    calibration: Any


def train(config: TrainConfig, data: str | Path, out: str | Path, *, verbose: bool = False) -> TrainResult:
    """Train until done and write `<out>/bundle`; continues what an earlier call with the same arguments began.

    Parameters
    ----------
    config : TrainConfig
    data : str or Path
        A prepared data set.
    out : str or Path
        The run's folder: checkpoints in `checkpoint_*`, the result in `bundle`.

    Raises
    ------
    UsageError
        `data` is not a prepared data set, `out` belongs to another run, or the weights cannot be had.
    CapacityError
        The cluster has too few CPUs or GPUs.
    TrainingError
        Workers failed more than `max_failures` times, or a loss was not finite.
    StoppedError
        Interrupted; a later call continues.
    """
    dataset = PreparedDataset.open(data)
    folder = local_path(out)
    if config.weights != "none":
        # Weights that cannot be had are wrong use, found here in a second rather than by every worker in turn.
        build_model(config.arch, weights=config.weights)
    elif config.unfreeze_depth < 5:
        say(f"warning: weights none with unfreeze_depth {config.unfreeze_depth}: the frozen stages stay random")
    with exclusive(folder):
        request = RunRequest(folder, "train", config, dataset.manifest.fingerprint, dataset.manifest.split.folds)
        request.check()
        finished = open_finished_bundle(folder)
        if finished is not None:
            return TrainResult(finished, [], already_complete=True)
        with connected(config.max_workers, verbose=verbose):
            use_gpu = wants_gpus(config.use_gpu, config.min_workers)
            check_capacity(Need(config.min_workers, config.cpus_per_worker, int(use_gpu)), "train")
            request.claim()
            rows = load_rows(dataset, config)
            with following(lambda record: say(_describe_epoch(record, config))) as log:
                _fit(config, dataset, folder, rows, use_gpu=use_gpu, log=log)
            best = best_checkpoint(folder, config)
            if best is None:
                raise TrainingError(f"{folder}: the run left no checkpoint")
            weights, progress = best
            bundle = finish(weights, rows, config, dataset, folder / "bundle", name=folder.name, use_gpu=use_gpu)
    return TrainResult(bundle, progress.history, already_complete=False)


def load_rows(dataset: PreparedDataset, config: TrainConfig) -> LoadedRows:
    """Read the rows into Ray's shared memory, in a task, so that the driver does not hold them.

    Raises
    ------
    SentinodeError
        The data set cannot be read, or lacks the split or fold.
    """
    one_set = config.calibration_fraction == 0
    task = _load_rows.options(num_returns=2 if one_set else 3)
    train_ref, val_ref, *more = task.remote(dataset, config.fold, config.calibration_fraction, config.seed)
    calibration_ref = val_ref if one_set else more[0]
    try:
        # Fails where the task failed; only the small split travels to the driver.
        ray.get(calibration_ref)
    except ray.exceptions.RayError as error:
        raise task_error(error, "reading the data set") from error
    return LoadedRows(train_ref, val_ref, calibration_ref)


@ray.remote(num_cpus=1)
def _load_rows(dataset: PreparedDataset, fold: int | None, calibration_fraction: float, seed: int) -> tuple[Patches, ...]:
    rows, val = dataset.read_train_and_val(fold)
    if calibration_fraction == 0:
        return rows, val
    return rows, *split_calibration(val, calibration_fraction, seed)


def make_trainer(
    config: TrainConfig, dataset: PreparedDataset, folder: Path, rows: LoadedRows, *, use_gpu: bool, log: Any = None, callbacks: Sequence[Any] = ()
) -> Any:
    """Return a TorchTrainer whose run lies in `folder`; `.fit()` resumes a run that lies there already.

    `log` is a ProgressLog actor or None; `callbacks` are Ray Train's.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"config": config, "rows": rows, "log": log, "device_count": int(use_gpu)},
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=_START_FAILURES),
            # One best is kept, and Ray Train never deletes the last.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute="improvement",
                checkpoint_score_order="max",
            ),
            callbacks=list(callbacks),
        ),
    )


def _fit(config: TrainConfig, dataset: PreparedDataset, folder: Path, rows: LoadedRows, *, use_gpu: bool, log: Any) -> None:
    from ray.train import TrainingFailedError

    trainer = make_trainer(config, dataset, folder, rows, use_gpu=use_gpu, log=log)
    try:
        with signal_handlers_kept():
            result = trainer.fit()
    except TrainingFailedError as error:
        raise training_error(error, folder) from error
    except SystemExit as error:  # what Ray Train's own Ctrl-C handler ends with
        raise StoppedError(f"stopped; repeat the command to continue from the last epoch in {folder}") from error
    if result.return_value:
        raise TrainingError(result.return_value)


def training_error(error: Exception, folder: Path) -> SentinodeError:
    """Turn what Ray Train raises into one line; an error of our own inside a worker comes back as itself."""
    failures = getattr(error, "worker_failures", None) or {}
    roots = [root_of(failure) for failure in failures.values()] or [root_of(error)]
    # Where one rank fails, the others fail on the broken connection to it: an error of our own says more than theirs.
    root = next((root for root in roots if isinstance(root, SentinodeError)), roots[0])
    if isinstance(root, SentinodeError):
        return root
    return TrainingError(f"training failed: {one_line(root)} (checkpoints so far in {folder}; -v shows the traceback)")


def task_error(error: ray.exceptions.RayError, what: str) -> SentinodeError:
    """Turn the failure of a Ray task of ours into one line."""
    root = root_of(error)
    return root if isinstance(root, SentinodeError) else SentinodeError(f"{what} failed: {one_line(root)}")


def train_loop_per_worker(loop: dict[str, Any]) -> str | None:
    """Ray Train's per-worker function: join the group, continue from the last checkpoint, train, checkpoint each epoch.

    Returns a one-line reason where the numbers stopped being finite, which no restart would mend; None when done.
    """
    import ray.train
    import ray.train.torch

    config: TrainConfig = loop["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(config.cpus_per_worker)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    rows: LoadedRows = loop["rows"]
    train_rows, val_rows = ray.get([rows.train, rows.val])

    torch.manual_seed(config.seed)
    model = build_model(config.arch, weights=config.weights)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_unfreeze_depth(model, config.unfreeze_depth)
    progress, learner_state = Progress(), None
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            progress, learner_state = _restore(model, Path(directory), rank)
    learner = Learner.make(ray.train.torch.prepare_model(model), config)
    if learner_state is not None:
        learner.restore(learner_state)

    def on_epoch(now: Progress) -> None:
        with tempfile.TemporaryDirectory() as directory:
            if rank == 0:
                _save(learner, now, Path(directory))
            torch.save(torch.get_rng_state(), Path(directory) / f"rng_rank{rank}.pt")
            metrics = {key: value for key, value in now.history[-1].items() if value is not None}
            metrics |= {"epochs_done": now.epochs_done, "improvement": now.improvement}
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))
        if rank == 0 and loop["log"] is not None:
            loop["log"].add.remote(now.history[-1] | {"best_epoch": now.best_epoch})

    try:
        train_epochs(learner, train_rows, val_rows, config, progress, on_epoch, rank=rank, world_size=world_size, device=device)
    except TrainingError as error:
        return str(error)
    return None


def _save(learner: Learner, progress: Progress, directory: Path) -> None:
    from safetensors.torch import save_file

    save_file(state_for_storage(learner.module), directory / _WEIGHTS_FILE)
    torch.save(learner.state() | {"progress": asdict(progress)}, directory / _STATE_FILE)


def _restore(model: torch.nn.Module, directory: Path, rank: int) -> tuple[Progress, dict[str, Any]]:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(directory / _WEIGHTS_FILE))
    state = torch.load(directory / _STATE_FILE, map_location="cpu", weights_only=True)
    rng = directory / f"rng_rank{rank}.pt"
    if rng.exists():  # an elastic group may have grown since
        torch.set_rng_state(torch.load(rng, weights_only=True))
    return Progress(**state["progress"]), state


def best_checkpoint(folder: Path, config: TrainConfig) -> tuple[dict[str, torch.Tensor], Progress] | None:
    """Return the weights of the best epoch of a run and its progress; None where the run has no checkpoint yet.

    Raises
    ------
    TrainingError
        The checkpoint of the best epoch is gone.
    """
    from ray.train import Result
    from safetensors.torch import load_file

    if not (folder / "checkpoint_manager_snapshot.json").exists():
        return None
    kept = Result.from_path(str(folder)).best_checkpoints or []
    if not kept:
        return None
    last = max(kept, key=lambda item: item[1]["epoch"])
    state = torch.load(Path(last[0].path) / _STATE_FILE, map_location="cpu", weights_only=True)
    progress = Progress(**state["progress"])
    best = next((item for item in kept if item[1]["epoch"] == progress.best_epoch), None)
    if best is None:
        raise TrainingError(f"{folder}: the checkpoint of the best epoch, {progress.best_epoch}, is gone")
    return load_file(Path(best[0].path) / _WEIGHTS_FILE), progress


def finish(
    weights: dict[str, torch.Tensor], rows: LoadedRows, config: TrainConfig, dataset: PreparedDataset, out: Path, *, name: str, use_gpu: bool
) -> Bundle:
    """Calibrate, choose the threshold and write the bundle, in a task with the resources of one worker."""
    task = _finish.options(num_cpus=config.cpus_per_worker, num_gpus=int(use_gpu))
    try:
        bundle: Bundle = ray.get(task.remote(weights, rows.calibration, config, dataset, out, name, "cuda" if use_gpu else "cpu"))
    except ray.exceptions.RayError as error:
        raise task_error(error, "making the bundle") from error
    return bundle


@ray.remote
def _finish(
    weights: dict[str, torch.Tensor], calibration: Patches, config: TrainConfig, dataset: PreparedDataset, out: Path, name: str, device: str
) -> Bundle:
    torch.set_num_threads(config.cpus_per_worker)
    return finish_bundle(weights, calibration, config, dataset.manifest, out, name=name, device=device)


def _describe_epoch(record: dict[str, Any], config: TrainConfig) -> str:
    if record["epoch"] < 0:
        return f"initial weights: validation loss {record['val_loss']:.4f}"
    auc = record["val_roc_auc"]
    best = "  best so far" if record["best_epoch"] == record["epoch"] else ""
    speed = record["rows"] / max(record["seconds"], 1e-9)
    left = (config.epochs - record["epoch"] - 1) * record["seconds"]
    return (
        f"epoch {record['epoch'] + 1}/{config.epochs}  loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}  "
        f"val AUC {'-' if auc is None else format(auc, '.4f')}  lr {record['learning_rate']:.2g}  {speed:.0f} images/s  {left:.0f} s left{best}"
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
        say(f"already complete: {result.bundle.path}")
    else:
        reached = "reached" if manifest.threshold_rule.reached else "not reached"
        say(
            f"bundle: {result.bundle.path}\n"
            f"validation AUC {manifest.metrics['roc_auc']:.4f}; threshold {manifest.threshold:.4f} "
            f"(recall {manifest.metrics['recall']:.4f}, lower bound {manifest.threshold_rule.bound:.4f}, "
            f"target {manifest.threshold_rule.target_recall} {reached})"
        )
    return {"bundle": str(result.bundle.path), "digest": manifest.digest, "metrics": manifest.metrics, "already_complete": result.already_complete}


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.train") -> int:
    """Entry point of `python -m ray_jobs.train`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
