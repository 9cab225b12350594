"""One training in this very process, an epoch at a time: a trial with one worker needs no process group, no controller and no second process.

On a CPU it makes, bitwise, what `train` with one worker makes of the same configuration: the winner of a sweep can be trained again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_jobs.checkpoint_writers import LoneCheckpointWriter
from ray_jobs.checkpoints import best_and_last, lacking_room, restore, tidy
from ray_jobs.run_inputs import FoldRows, LoadedRows
from ray_jobs.stopping import Wishes
from sentinode.config import TrainConfig
from sentinode.errors import StorageError
from sentinode.frozen_features import FeatureStore
from sentinode.learner import Learner
from sentinode.locations import Location
from sentinode.model import build_model
from sentinode.training import Group, Hooks, Interrupted, Progress, Wish, train_epochs
from sentinode.worker import set_up_worker


class LoneTraining:
    """A training whose run lies in `folder`; goes on from the checkpoint that is there.

    Parameters
    ----------
    config : TrainConfig
    folder : Location
        Has its request (`run_folder.REQUEST_FILE`) already.
    run_id : str
        Of that request.
    rows : LoadedRows or FoldRows
    initial : callable
        Returns the weights to start from; not called where there is a checkpoint.
    use_gpu : bool
    log : ActorHandle or None
        A ProgressLog, whose wish to stop is heeded.
    features : Path or None
        Where outputs of frozen stages are kept, for all trainings on these data; without, the run's folder, which is on disk then.
    told : int
        Epochs of this training that the caller knows: `next_epoch` begins with the one after them.

    Raises
    ------
    StorageError
        There is no room for a checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Location,
        run_id: str,
        rows: LoadedRows | FoldRows,
        initial: Callable[[], dict[str, torch.Tensor]],
        *,
        use_gpu: bool,
        log: Any = None,
        features: Path | None = None,
        told: int = 0,
    ) -> None:
        device = torch.device("cuda" if use_gpu else "cpu")
        set_up_worker(config.cpus_per_worker, device)
        # As each worker of `train` does.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, 0]).generate_state(1)[0]))
        tidy(folder)
        _, last = best_and_last(folder)
        model = build_model(config.arch, weights="none", input_size_px=config.input_size_px)
        if last is None:
            model.load_state_dict(initial())
        self._config, self._told = config, told
        self._learner = Learner(model, config, device=device)
        if last is not None:
            restore(self._learner, last, 0)
        if full := lacking_room(folder, self._learner):
            raise StorageError(f"{full}; make room there and repeat the command")
        self.progress = last.progress if last is not None else Progress()
        self._writer = LoneCheckpointWriter(folder, run_id, config, rows.ingest, last.number if last is not None else 0)
        self._wishes = Wishes(log, 0, config.checkpoint_interval_s)
        self._group = Group(device=device)
        self._source = rows.source(config, device)
        self._val = rows.validation(config)
        self._features = FeatureStore(features or folder.local / "features", config.feature_cache_gib * 2**30)
        self._epoch_done = False

    def next_epoch(self) -> dict[str, Any] | None:
        """Train one epoch and return its record; None where none is due. Its checkpoint is being written then, see `close`.

        Raises
        ------
        Interrupted
            The log wished to stop; a checkpoint within the epoch is on the disk.
        TrainingError, CheckpointError
            As `train_epochs` and `LoneCheckpointWriter`.
        """
        # More than once where the caller knows of an epoch whose checkpoint a kill has cut off: it is trained again, and comes out the same.
        while self._told >= len(self.progress.history):
            if self.progress.history and self.progress.is_over(self._config):
                return None
            self._train_one()
        self._told += 1
        return self.progress.history[self._told - 1]

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left to be told of."""
        return self._told >= len(self.progress.history) > 0 and self.progress.is_over(self._config)

    def _train_one(self) -> None:
        self._epoch_done = False
        hooks = Hooks(self._on_epoch, self._wish, self._on_checkpoint)
        try:
            train_epochs(self._learner, self._source, self._val, self._config, self.progress, hooks, self._group, self._features)
        except Interrupted:
            # After the epoch that was asked for it is no interruption.
            if not self._epoch_done:
                self._writer.wait()
                raise

    def _on_epoch(self, progress: Progress) -> None:
        self._writer.save(self._learner, progress)
        self._wishes.saved()
        self._epoch_done = True

    def _on_checkpoint(self, progress: Progress) -> None:
        self._writer.save(self._learner, progress)
        self._wishes.saved()

    def _wish(self) -> Wish:
        return Wish.STOP if self._epoch_done else self._wishes()

    def close(self) -> None:
        """Let go of the rows, and wait until the last checkpoint is on the disk; raises as `LoneCheckpointWriter.wait`."""
        self._source.close()
        self._writer.wait()
