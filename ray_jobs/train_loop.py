"""What each worker of a run does: join the group, go on from the last checkpoint, train, checkpoint."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ray_jobs.checkpoint_writers import CheckpointWriter
from ray_jobs.checkpoints import CheckpointError, Saved, lacking_room, remove_newer, restore
from ray_jobs.run_folder import features_folder, not_shared, problem_with
from ray_jobs.run_inputs import Loop
from ray_jobs.stopping import Wishes
from sentinode.errors import ManifestError, TrainingError, UsageError
from sentinode.frozen_features import FeatureStore
from sentinode.learner import Learner
from sentinode.locations import Location
from sentinode.model import build_model
from sentinode.training import Group, Hooks, Interrupted, Progress, train_epochs
from sentinode.worker import set_up_worker


def train_loop_per_worker(given: dict[str, Loop]) -> dict[str, str] | None:
    """Ray Train's per-worker function.

    Returns
    -------
    dict or None
        None when done, else why not, where starting again would not help: {"stopped": …}, {"failed": …} or {"usage": …}, each with one line.
    """
    import ray.train
    import ray.train.torch
    from ray.train.collective import broadcast_from_rank_zero

    loop = given["loop"]
    config = loop.config
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    # Before anything there is touched: on a node of its own the path may belong to another run, which must not lose its checkpoints.
    problem = problem_with(loop.folder, loop.run_id)
    if not all(group.gather(torch.tensor(int(problem is None)))):
        return {"usage": problem or not_shared(loop.folder)}
    set_up_worker(config.cpus_per_worker, group.device)
    # Dropout: every worker draws of its own.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, group.rank]).generate_state(1)[0]))

    saved = _last_saved(loop.folder)
    model = build_model(config.arch, weights="none", input_size_px=config.input_size_px)
    if saved is None:
        model.load_state_dict(ray.get(loop.initial))
    learner = Learner(model, config, device=group.device, world_size=group.world_size)
    if saved is not None:
        restore(learner, saved, group.rank)
    progress = saved.progress if saved is not None else Progress()
    number = saved.number if saved is not None else 0
    full = None
    if group.rank == 0:
        remove_newer(loop.folder, number)
        full = lacking_room(loop.folder, learner)
        if loop.log is not None:
            where = f", continuing {saved.where}" if saved is not None else ""
            loop.log.add.remote({"kind": "note", "text": f"training with {_count(group.world_size, 'worker')} on {group.device.type}{where}"})
    full = broadcast_from_rank_zero(full)
    if full:
        return {"failed": f"{full}; make room there and repeat the command"}

    writer = CheckpointWriter(loop.folder, loop.run_id, config, loop.rows.ingest, group.rank, group.world_size, number)
    wishes = Wishes(loop.log, group.rank, loop.checkpoint_interval_s)

    def checkpoint(now: Progress) -> None:
        writer.save(learner, now)
        wishes.saved()

    def wait_for_leave(now: Progress) -> None:
        # The others wait in the collective call that follows.
        if loop.waits and group.rank == 0 and not now.is_over(config) and not ray.get(loop.log.allowed.remote(now.epochs_done)):
            wishes.stop()

    def epoch_done(now: Progress) -> None:
        checkpoint(now)
        wait_for_leave(now)

    if progress.history and progress.partial is None:
        wait_for_leave(progress)
    source = loop.rows.source(config, group.device)
    try:
        hooks = Hooks(epoch_done, wishes, checkpoint)
        features = FeatureStore(features_folder(loop.folder, loop.rows.dataset.manifest.fingerprint), config.feature_cache_gib * 2**30)
        return ended(lambda: train_epochs(learner, source, loop.rows.validation(config), config, progress, hooks, group, features))
    finally:
        source.close()


def ended(training: Callable[[], None]) -> dict[str, str] | None:
    """Train, and return what all workers raise at the same place, as `train_loop_per_worker` does.

    Raises
    ------
    CheckpointError, ManifestError, StorageError
        What one worker meets alone, writing a checkpoint or reading rows. It must fail, since the others wait for it: were it to end in order, they
        would do so for as long as torch.distributed does.
    """
    try:
        training()
    except (CheckpointError, ManifestError):
        raise
    except Interrupted as error:
        return {"stopped": str(error)}
    except TrainingError as error:
        return {"failed": str(error)}
    except UsageError as error:
        return {"usage": str(error)}
    return None


def _last_saved(folder: Location) -> Saved | None:
    import ray.train

    registered = ray.train.get_checkpoint()
    if registered is None:
        return None
    saved = Saved.open(folder / Path(registered.path).name)
    if saved is None:
        raise CheckpointError(f"{registered.path}: not a whole checkpoint; is --out on a file system that all nodes share?")
    return saved


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
