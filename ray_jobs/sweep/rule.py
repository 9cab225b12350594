"""Which trials end early: Ray's schedulers, and successive halving, told of trials by their numbers.

A sweep that goes on tells a new rule again what happened before.
"""

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from sentinode.config import SweepConfig
from sentinode.search.halving import Halving

_TIME, _VALUE = "units_done", "value"


class Verdict(enum.Enum):
    """What a trial does after a unit."""

    GO_ON = "go on"
    WAIT = "wait"
    """Until it is known whether it goes on."""
    STOP = "stop"


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
        self._halving: Halving | None = None
        # Halving compares what trials would be ranked by; the median rule has Ray's own way to sum up a trial's past.
        self._takes_best = scheduler.kind == "asha"
        if scheduler.kind == "none":
            return
        grace = scheduler.grace_period_epochs if config.folds is None else scheduler.grace_period_folds
        if scheduler.kind == "halving":
            self._halving = Halving(grace, scheduler.reduction_factor, units, higher_is_better=config.metric != "val_loss")
            return
        common = {"time_attr": _TIME, "metric": _VALUE, "mode": "min" if config.metric == "val_loss" else "max", "grace_period": grace}
        if scheduler.kind == "asha":
            self._inner = AsyncHyperBandScheduler(
                max_t=max(units, grace), reduction_factor=scheduler.reduction_factor, stop_last_trials=False, **common
            )
        else:
            self._inner = MedianStoppingRule(min_samples_required=scheduler.min_trials, **common)

    def judge(self, number: int, units_done: int, value: float | None, best: float | None) -> Verdict:
        """Tell whether a trial goes on. Each unit is told once, in order, but not the last that is due.

        Parameters
        ----------
        number : int
            The trial's.
        units_done : int
        value, best : float or None
            The metric of the last unit, and what the trial would be ranked by now.
        """
        if self._halving is not None:
            return Verdict.WAIT if self._halving.take(number, units_done, best) else Verdict.GO_ON
        told = best if self._takes_best else value
        if number in self._stopped:
            return Verdict.STOP
        if self._inner is None or told is None:
            return Verdict.GO_ON
        if number not in self._trials:
            self._trials[number] = _Numbered(f"{number:05d}")
            self._inner.on_trial_add(None, self._trials[number])
        decision = self._inner.on_trial_result(_Nobody(), self._trials[number], {_TIME: units_done, _VALUE: told})
        if decision == TrialScheduler.STOP:
            self._stopped.add(number)
        return Verdict.STOP if number in self._stopped else Verdict.GO_ON

    @property
    def waiting(self) -> Collection[int]:
        """Trials that were told to wait."""
        return self._halving.waiting if self._halving is not None else ()

    def next_to_go_on(self, on_the_way: Collection[int]) -> tuple[int | None, list[int]]:
        """Return the trial that waits and may go on now, if any, and those that never will; `on_the_way` as in `Halving.next`."""
        return self._halving.next(on_the_way) if self._halving is not None else (None, [])

    def lets_go_on(self, number: int) -> None:
        """A trial that waited is continued."""
        if self._halving is not None:
            self._halving.let_go_on(number)

    def ended(self, number: int) -> None:
        """A trial has ended, for whatever reason."""
        if self._halving is not None:
            self._halving.give_up(number)
