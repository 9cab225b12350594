"""What a sweep found: ranking, trials.csv, report.html."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from sentinode import RESEARCH_USE_NOTICE
from sentinode.config import SweepConfig
from sentinode.dataset import PreparedDataset
from sentinode.manifests import LEAK_MEANING


@dataclass(frozen=True)
class TrialSummary:
    """One trial.

    Attributes
    ----------
    trial_id : str
    point : dict
        The values drawn for it.
    history : list of dict
        One record per finished epoch.
    best_epoch : int or None
        0-based.
    value : float or None
        The sweep's metric at the best epoch; None if no epoch was finished.
    error : str or None
        One line, if it failed.
    """

    trial_id: str
    point: dict[str, Any]
    history: list[dict[str, Any]]
    best_epoch: int | None
    value: float | None
    error: str | None


def describe_point(point: Mapping[str, Any]) -> str:
    """Return `learning_rate 0.00032, unfreeze_depth 2`."""
    return ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in sorted(point.items()))


def rank(trials: list[TrialSummary], metric: str) -> list[TrialSummary]:
    """Return the trials best first; those without a value last; ties by id, so that a repeated ranking is the same."""
    sign = 1 if metric == "val_loss" else -1
    return sorted(trials, key=lambda trial: (trial.value is None, 0 if trial.value is None else sign * trial.value, trial.trial_id))


def trials_table(trials: list[TrialSummary]) -> pd.DataFrame:
    """Return one row per trial and epoch (one for a trial without epochs): id, error, the point as `config.*`, the epoch's metrics."""
    rows = []
    for trial in trials:
        common = {"trial": trial.trial_id, "error": trial.error} | {f"config.{key}": value for key, value in trial.point.items()}
        rows += [common | record for record in trial.history or [{}]]
    return pd.DataFrame(rows)


def render(trials: list[TrialSummary], config: SweepConfig, dataset: PreparedDataset) -> str:
    """Return the leaderboard as one self-contained HTML page."""
    environment = Environment(loader=PackageLoader("ray_jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("sweep.html").render(
        trials=trials, config=config, data=dataset.manifest, leak_meaning=LEAK_MEANING[dataset.manifest.leak_level], notice=RESEARCH_USE_NOTICE
    )
