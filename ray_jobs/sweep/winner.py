"""Which configuration of a sweep is the best: by one seed, or by the mean over several where the best were trained again."""

from dataclasses import dataclass

import numpy as np

from sentinode.config import SweepConfig
from sentinode.search.journal import TrialRecord, rank


@dataclass(frozen=True)
class Standing:
    """One configuration.

    Attributes
    ----------
    trial : TrialRecord
        Of the search.
    values : list of float
        The metric for each seed, that of the search first.
    """

    trial: TrialRecord
    values: list[float]

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def spread_text(self) -> str:
        """Return " (mean of 3 seeds, standard deviation 0.0040)", empty for one seed."""
        return "" if self.spread is None else f" (mean of {len(self.values)} seeds, standard deviation {self.spread:.4f})"


def standings(trials: list[TrialRecord], config: SweepConfig) -> list[Standing]:
    """Return the configurations of the search that have a figure, best first: those trained with most seeds, by the mean over them.

    A configuration that was trained once is not compared with one that was trained several times: the best single figure of many is partly luck.
    """
    metric = config.metric
    ranked = rank([trial for trial in trials if trial.kind == "search" and trial.status != "failed"], metric)
    found = []
    for trial in ranked:
        first = trial.value(metric)
        if first is None:
            continue
        again = [other.value(metric) for other in trials if other.repeats == trial.number and other.status != "failed"]
        found.append(Standing(trial, [first, *(value for value in again if value is not None)]))
    if not config.repeats:
        return found
    sign = 1 if metric == "val_loss" else -1
    # Stable: where seeds and mean are equal, the better single figure comes first.
    return sorted(found, key=lambda one: (-len(one.values), sign * one.value))
