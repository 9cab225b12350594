"""Which trials end early: Ray's schedulers, told of trials by their numbers, so that a sweep that goes on can be told again what happened before."""

from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from sentinode.config import SweepConfig

_TIME, _VALUE = "units_done", "value"


@dataclass(frozen=True)
class _Numbered:
    """What Ray's schedulers know of a trial."""

    trial_id: str


class _Nobody:
    """What MedianStoppingRule asks for trials that wait: it would pause this one for them, and pausing costs a trial its process."""

    def get_live_trials(self) -> list[Any]:
        return []


class Rule:
    """Decides after each unit (an epoch, or with folds a fold) of a trial whether it goes on.

    Parameters
    ----------
    config : SweepConfig
    units : int
        Of a trial that is not stopped.
    """

    def __init__(self, config: SweepConfig, units: int) -> None:
        scheduler = config.scheduler
        self._trials: dict[int, _Numbered] = {}
        self._stopped: set[int] = set()
        self._inner: Any = None
        # Halving compares what trials would be ranked by; the median rule has Ray's own way to sum up a trial's past.
        self._takes_best = scheduler.kind == "asha"
        if scheduler.kind == "none":
            return
        grace = scheduler.grace_period_epochs if config.folds is None else scheduler.grace_period_folds or 1
        common = {"time_attr": _TIME, "metric": _VALUE, "mode": "min" if config.metric == "val_loss" else "max", "grace_period": grace}
        if scheduler.kind == "asha":
            self._inner = AsyncHyperBandScheduler(
                max_t=max(units, grace), reduction_factor=scheduler.reduction_factor, stop_last_trials=False, **common
            )
        else:
            self._inner = MedianStoppingRule(min_samples_required=scheduler.min_trials, **common)

    def goes_on(self, number: int, units_done: int, value: float | None, best: float | None) -> bool:
        """Tell whether a trial goes on. Each unit is told once, in order.

        Parameters
        ----------
        number : int
            The trial's.
        units_done : int
        value, best : float or None
            The metric of the last unit, and what the trial would be ranked by now.
        """
        told = best if self._takes_best else value
        if number in self._stopped:
            return False
        if self._inner is None or told is None:
            return True
        if number not in self._trials:
            self._trials[number] = _Numbered(f"{number:05d}")
            self._inner.on_trial_add(None, self._trials[number])
        decision = self._inner.on_trial_result(_Nobody(), self._trials[number], {_TIME: units_done, _VALUE: told})
        if decision == TrialScheduler.STOP:
            self._stopped.add(number)
        return number not in self._stopped
