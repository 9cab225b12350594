"""Sweeps that nobody ran, for tests of what is told of them."""

import math
from typing import Any

import numpy as np

from ray_jobs.sweep.report import SweepFacts
from sentinode.config import SweepConfig
from sentinode.search.journal import TrialRecord
from sentinode.search.space import random_point
from tests.factories import dataset_manifest

SPACE = {"learning_rate": {"loguniform": [1e-5, 1e-2]}, "unfreeze_depth": {"choice": [0, 1, 2, 3, 4, 5]}}


def sweep_config(**changes: Any) -> SweepConfig:
    return SweepConfig(**{"space": SPACE, "base": {"epochs": 4, "weights": "none"}, "trials": 6} | changes)


def facts(config: SweepConfig, best: int | None = None, **changes: Any) -> SweepFacts:
    fields = dict(config=config, dataset=dataset_manifest(), epochs=4, folds=None, name="sweep", best=best, notes=[])
    return SweepFacts(**fields | changes)


def trial(number: int, values: list[float | None], point: dict[str, Any] | None = None, **changes: Any) -> TrialRecord:
    """A trial whose epochs have these figures; 100 patches and 2.5 s each."""
    fields: dict[str, Any] = {"kind": "search", "repeats": None, "seed": 42, "origin": "random", "status": "finished", "error": None}
    fields |= {"point": point or {"learning_rate": 1e-3, "unfreeze_depth": 5}, "begun_at": 1000.0 + 20 * number}
    record = TrialRecord(number, **fields | {key: value for key, value in changes.items() if key != "folds"})
    for epoch, value in enumerate(values):
        at = record.begun_at + 1 + 2.5 * (epoch + 1)
        loss = None if value is None else 1 - value
        one = {"epoch": epoch, "depth": 5, "train_loss": 0.5, "val_loss": loss, "val_roc_auc": value, "learning_rate": 1e-3, "rows": 100}
        record.epochs.append({**one, "seconds": 2.0, "val_seconds": 0.5, "fold": changes.get("folds", {}).get(epoch), "at": at})
    if record.epochs:
        record.starts = [{"seconds": 1.0, "gflops": 1.0 + number}]
    if record.status != "running":
        record.ended_at = record.begun_at + 1 + 2.5 * len(values) + 0.1
    return record


def large_sweep(config: SweepConfig, count: int, epochs: int = 8) -> list[TrialRecord]:
    """Trials that are the better, the nearer their rate is to 1e-3 and the deeper they train; a third is stopped, one fails, one is running."""
    generator = np.random.default_rng(0)
    trials = []
    for number in range(count):
        point = random_point(config, number)
        rate = math.log10(point.get("learning_rate", 1e-3))
        top = 0.93 - 0.03 * (rate + 3) ** 2 + 0.008 * point.get("unfreeze_depth", 3) + generator.normal(0, 0.004)
        values: list[float | None] = [float(top - 0.12 * math.exp(-epoch / 2) + generator.normal(0, 0.003)) for epoch in range(epochs)]
        if number == count - 1:
            trials.append(trial(number, values[:3], point, status="running"))
        elif number == 4:
            trials.append(trial(number, [], point, status="failed", error="epoch 1, step 3 of 9: the training loss is not finite; lower it"))
        elif number % 3 == 1:
            trials.append(trial(number, values[: 1 + number % 2 * 2], point, status="stopped"))
        else:
            trials.append(trial(number, values, point))
    return trials
