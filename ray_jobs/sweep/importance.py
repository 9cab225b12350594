"""How much each parameter of a sweep matters: Optuna's estimates from the trials, and how far they can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sentinode.config import SweepConfig
from sentinode.config.domains import Choice, Domain, Grid, LogRandInt, LogUniform, RandInt
from sentinode.search.journal import TrialRecord

FEWEST_TRIALS = 4
TRUSTED_TRIALS = 20
"""Below so many trials an importance says little, and the report says so."""

_RESAMPLES = 12
_TREES = 32


@dataclass(frozen=True)
class Importance:
    """Share of the metric's variance that one parameter explains.

    Attributes
    ----------
    key : str
    share : float
        0..1; the shares of all parameters add up to 1.
    low, high : float
        Range over resamples of the trials.
    """

    key: str
    share: float
    low: float
    high: float


def importances(trials: list[TrialRecord], config: SweepConfig, seed: int = 0) -> list[Importance]:
    """Return the importance of each parameter that every trial has, largest first; empty where there are too few trials or parameters.

    fANOVA (Hutter et al. 2014, Optuna's) on the trials of the search that have a figure, stopped ones with what they had come to, and on resamples of
    them with replacement.
    """
    usable = [trial for trial in trials if trial.kind == "search" and trial.status != "failed" and trial.value(config.metric) is not None]
    # What only some trials have, their condition decides on; fANOVA knows no such thing.
    keys = [key for key in config.keys if len(config.space[key]) == 1 and not config.space[key][0].when]
    keys = [key for key in keys if len({repr(trial.point[key]) for trial in usable}) > 1]
    if len(usable) < FEWEST_TRIALS or len(keys) < 2:
        return []
    values = [float(trial.value(config.metric) or 0.0) for trial in usable]
    if max(values) == min(values):
        return []
    rows = np.arange(len(usable))
    shares = _shares(usable, values, rows, keys, config, seed)
    generator = np.random.default_rng(seed)
    samples = [generator.choice(rows, len(rows)) for _ in range(_RESAMPLES)]
    spread = [_shares(usable, values, sample, keys, config, seed) for sample in samples if len(set(sample.tolist())) > 2]
    found = [
        Importance(
            key, shares.get(key, 0.0), min(one.get(key, 0.0) for one in [shares, *spread]), max(one.get(key, 0.0) for one in [shares, *spread])
        )
        for key in keys
    ]
    return sorted(found, key=lambda one: (-one.share, one.key))


def _shares(trials: list[TrialRecord], values: list[float], rows: Any, keys: list[str], config: SweepConfig, seed: int) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if len({values[row] for row in rows}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    domains = {key: config.space[key][0] for key in keys}
    distributions = {key: _distribution(domain) for key, domain in domains.items()}
    for row in rows:
        point = {key: _place(domains[key], trials[row].point[key]) for key in keys}
        study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=values[row]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=seed)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def place_of(value: Any, listed: Sequence[Any]) -> int:
    """Return where a value stands in a list; 1 is not True there, nor 0 False."""
    return next(place for place, one in enumerate(listed) if one == value and isinstance(one, bool) == isinstance(value, bool))


def _distribution(domain: Domain) -> Any:
    from optuna import distributions

    if isinstance(domain, Choice | Grid):
        # By place in the list: of categories Optuna makes one column each, and its time doubles with every one (16 took five minutes).
        return distributions.IntDistribution(0, len(domain.listed) - 1)
    low, high = domain.ends()[:2]
    if isinstance(domain, RandInt | LogRandInt):
        return distributions.IntDistribution(low, high, log=isinstance(domain, LogRandInt))
    return distributions.FloatDistribution(low, high, log=isinstance(domain, LogUniform))


def _place(domain: Domain, value: Any) -> Any:
    if isinstance(domain, Choice | Grid):
        return place_of(value, domain.listed)
    low, high = domain.ends()[:2]
    return min(max(value, low), high)
