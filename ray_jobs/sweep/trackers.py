"""Trackers of a sweep: a run of its own for each trial (with folds, for each of its folds), in TensorBoard and MLflow as `train` has them."""

import os
from typing import Any

from ray_jobs.sweep.trial import trial_config, trial_folder
from ray_jobs.tracking import RunFacts, Tracking, open_trackers
from sentinode.config import SweepConfig
from sentinode.locations import Location
from sentinode.search.journal import TrialRecord
from sentinode.versions import git_commit, library_versions


class TrialTrackers:
    """Opens a trial's trackers with its first epoch; what they hold already they pass over.

    Parameters
    ----------
    sweep : SweepConfig
    folder : Location
        The sweep's. MLflow's file, unless another store is configured, lies there for all trials.
    data_fingerprint : str
    """

    def __init__(self, sweep: SweepConfig, folder: Location, data_fingerprint: str) -> None:
        self._sweep, self._folder = sweep, folder
        commit = git_commit()
        self._facts = {"sweep": folder.name, "data_fingerprint": data_fingerprint, **library_versions()} | ({"git_commit": commit} if commit else {})
        self._open: dict[tuple[int, int | None], Tracking] = {}

    def epoch(self, trial: TrialRecord, fold: int | None, record: dict[str, Any]) -> None:
        """Record an epoch, and whatever came before it."""
        key = (trial.number, fold)
        if key not in self._open:
            config = trial_config(self._sweep, trial.point, trial.seed, fold)
            where = {} if config.mlflow_uri else {"mlflow_uri": _store(self._folder)}
            name = f"{self._folder.name}/{trial.name}" + (f"/fold-{fold}" if fold is not None else "")
            facts = RunFacts(name, config.model_dump(mode="json"), {**self._facts, "trial": trial.name, "kind": trial.kind, "origin": trial.origin})
            self._open[key] = open_trackers(config.model_copy(update=where), trial_folder(self._folder, trial.number, fold), facts)
            for known in trial.epochs:
                if known["fold"] == fold:
                    self._open[key].add(known)
            return
        self._open[key].add(record)

    def ended(self, trial: TrialRecord, status: str) -> None:
        """Record how a trial ended: finished, stopped (to be continued) or failed."""
        best = trial.value(self._sweep.metric)
        result = {"status": trial.status} | ({} if best is None else {self._sweep.metric: best})
        for (number, _), tracking in self._open.items():
            if number == trial.number:
                tracking.end(status, result)
                tracking.finish()

    def close(self) -> None:
        """Wait for what is not written yet, for a bounded time."""
        for tracking in self._open.values():
            tracking.close()


def _store(folder: Location) -> str | None:
    # MLflow's own variable comes before a file of ours.
    return None if os.environ.get("MLFLOW_TRACKING_URI") else str(folder / "mlflow.db")
