"""trials.csv: one row per epoch of each trial."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from sentinode.config import SweepConfig
from sentinode.search.journal import TrialRecord


def describe_point(point: Mapping[str, Any]) -> str:
    """Return `learning_rate 0.00032, unfreeze_depth 2`."""
    return ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in sorted(point.items()))


def trials_table(trials: list[TrialRecord], config: SweepConfig) -> pd.DataFrame:
    """Return one row per trial and epoch, and one for a trial without epochs.

    Columns: trial, kind, repeats (the trial whose configuration it is), seed, origin, status, error, the point as `config.*`, begun_at,
    start_seconds, fold (from 0), the epoch's record (epoch is counted from 1, as everywhere that people look), images_per_s, image_steps (so far),
    best (its best epoch, of the fold), at, checkpoint (of the best epoch, relative to the sweep's folder). Times are UTC.
    """
    rows: list[dict[str, Any]] = []
    for trial in trials:
        common: dict[str, Any] = {
            "trial": trial.name,
            "kind": trial.kind,
            "repeats": None if trial.repeats is None else f"{trial.repeats:05d}",
            "seed": trial.seed,
            "origin": trial.origin,
            "status": trial.status,
            "error": trial.error,
            **{f"config.{key}": trial.point.get(key) for key in config.keys},
            "begun_at": _utc(trial.begun_at),
            "start_seconds": trial.starts[0]["seconds"] if trial.starts else None,
        }
        best = {fold: trial.best(config.metric, fold) for fold in trial.folds}
        steps = 0
        for record in trial.epochs:
            steps += record["rows"]
            fold = record["fold"]
            row = {"fold": fold} | {name: value for name, value in record.items() if name not in ("fold", "at", "fold_over", "last")}
            row["epoch"] = record["epoch"] + 1
            row |= {
                "images_per_s": record["rows"] / record["seconds"] if record["seconds"] else None,
                "image_steps": steps,
                "best": record is best[fold],
                "at": _utc(record["at"]),
                "checkpoint": f"trials/{trial.name}" + ("" if fold is None else f"/fold-{fold}"),
            }
            rows.append(common | row)
        if not trial.epochs:
            rows.append(common)
    return pd.DataFrame(rows)


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
