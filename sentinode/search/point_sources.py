"""Where the points of a sweep come from."""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sentinode.config import SweepConfig
from sentinode.config.domains import Choice, Domain, Grid, LogRandInt, LogUniform, RandInt
from sentinode.errors import ConfigError, UsageError
from sentinode.search.journal import TrialRecord
from sentinode.search.space import Point, draw, grid_points, meets, number_of_points, problem, random_point

# How often a searcher may be asked again for a point that meets the constraints, and for one that was not tried yet.
_CONSTRAINT_TRIES, _NEW_TRIES = 200, 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes
    ----------
    value : float or None
        The metric that ranks it; None if it failed.
    cost : float or None
        The second objective, if there is one.
    by_step : tuple of float
        The metric after each epoch.
    stopped : bool
        By the scheduler, before its end.
    """

    value: float | None
    cost: float | None
    by_step: tuple[float, ...]
    stopped: bool

    @classmethod
    def of(cls, trial: TrialRecord, config: SweepConfig) -> "Outcome":
        """Return what a searcher is to know of a trial that has ended."""
        cost = None if config.cost is None else trial.cost(config.cost)
        by_step = tuple(record[config.metric] for record in trial.epochs if record.get(config.metric) is not None)
        value = None if trial.status == "failed" else trial.value(config.metric)
        return cls(value, cost, by_step, trial.status == "stopped")


class PointSource(Protocol):
    """Gives the points of trials numbered 0, 1, …, and hears how they ended.

    Attributes
    ----------
    total : int
        Trials of the whole search.
    """

    total: int

    def ask(self, number: int) -> tuple[Point, str] | None:
        """Return a point and where it is from: random, grid, optuna or warm start; None when there are no more."""

    def begun(self, number: int, point: Point) -> None:
        """Take a trial into account that an earlier life of the sweep has begun, as if its point had been asked for now."""

    def tell(self, number: int, outcome: Outcome) -> None:
        """Hear how a trial ended."""


def point_source(config: SweepConfig, first: Sequence[Point] = (), known: Sequence[tuple[Point, Outcome]] = ()) -> PointSource:
    """Return the source of a configuration.

    Parameters
    ----------
    first : sequence of Point
        Tried before all others.
    known : sequence of (Point, Outcome)
        What `optuna` learns from beforehand.

    Raises
    ------
    UsageError
        Optuna is wanted and not installed.
    """
    if config.searcher == "optuna":
        return OptunaPoints(config, first, known)
    return ListedPoints(config, first)


class ListedPoints:
    """Points that are known beforehand: those tried first, then a grid's, or random ones."""

    def __init__(self, config: SweepConfig, first: Sequence[Point]) -> None:
        self._config, self._first = config, list(first)
        self._grid = [point for point in grid_points(config) if point not in self._first] if config.searcher == "grid" else None
        if self._grid is not None:
            self.total = len(self._first) + len(self._grid)
        else:
            # What stands in the way of `trials` points are those tried first, but each combination of grid entries has its own.
            drawn = number_of_points(config)
            self.total = len(self._first) + drawn if len(config.combinations) > 1 else max(drawn, len(self._first))

    def ask(self, number: int) -> tuple[Point, str] | None:
        """Return the point of a trial; what was told does not matter."""
        if number >= self.total:
            return None
        if number < len(self._first):
            return dict(self._first[number]), "warm start"
        if self._grid is not None:
            return dict(self._grid[number - len(self._first)]), "grid"
        try:
            return random_point(self._config, number - (len(self._first) if len(self._config.combinations) > 1 else 0)), "random"
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def begun(self, number: int, point: Point) -> None:
        """Nothing to take into account."""

    def tell(self, number: int, outcome: Outcome) -> None:
        """Nothing to learn."""


class OptunaPoints:
    """Optuna's TPE. What is asked for depends on what was asked and told before, in this order, and on the seed; not on processes.

    A study lives in memory; an interrupted sweep makes it anew from the journal.
    """

    def __init__(self, config: SweepConfig, first: Sequence[Point], known: Sequence[tuple[Point, Outcome]]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UsageError("searcher optuna: Optuna is not installed; pip install optuna, or use searcher random") from error

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._config, self._first = optuna, config, list(first)
        self.total = max(config.trials, len(self._first))
        best = "minimize" if config.metric == "val_loss" else "maximize"
        self._study = optuna.create_study(directions=[best] if config.cost is None else [best, "minimize"], sampler=self._sampler(0))
        self._trials: dict[int, Any] = {}
        self._tried: set[str] = set()
        for number, (point, outcome) in enumerate(known):
            self.begun(-1 - number, point)
            self.tell(-1 - number, outcome)
        self._tried.clear()

    def _sampler(self, number: int) -> Any:
        # A new one for each trial: a sampler that is used on is in a state that a restored sweep could not bring it to.
        seed = int(np.random.SeedSequence([self._config.seed, 1, number]).generate_state(1)[0])
        startup = self._config.startup_trials
        with warnings.catch_warnings():
            # `group`, without which conditions would be searched one parameter at a time, is called experimental; its version is pinned.
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            return self._optuna.samplers.TPESampler(n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed)

    def ask(self, number: int) -> tuple[Point, str] | None:
        """Return the next point."""
        if number >= self.total:
            return None
        if number < len(self._first):
            point = dict(self._first[number])
            self.begun(number, point)
            return point, "warm start"
        self._study.sampler = self._sampler(number)
        again = 0
        for _ in range(_CONSTRAINT_TRIES):
            trial = self._study.ask()
            point = self._suggested(trial)
            if self._is_trainable(point):
                if _name(point) not in self._tried:
                    self._note(number, trial, point)
                    return point, "optuna"
                again += 1
            # Failed trials are passed over by the sampler, which draws another one then.
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            if again >= _NEW_TRIES:
                break
        point = self._untried(number)
        logger.debug("trial %d: no point of optuna's met the constraints and was new; a random one instead", number)
        self.begun(number, point)
        return point, "random"

    def _is_trainable(self, point: Point) -> bool:
        try:
            return meets(self._config, point) and problem(self._config, point) is None
        except ValueError:
            return False

    def _untried(self, number: int) -> Point:
        generator = np.random.default_rng([self._config.seed, 2, number])
        try:
            points = [draw(self._config, generator) for _ in range(_CONSTRAINT_TRIES)]
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return next((point for point in points if _name(point) not in self._tried), points[0])

    def begun(self, number: int, point: Point) -> None:
        """Make a trial with a given point."""
        self._study.enqueue_trial(self._parameters(point))
        trial = self._study.ask()
        self._suggested(trial)
        self._note(number, trial, point)

    def _note(self, number: int, trial: Any, point: Point) -> None:
        self._trials[number] = trial
        self._tried.add(_name(point))

    def tell(self, number: int, outcome: Outcome) -> None:
        """Hear how a trial ended; of one that was stopped, how it did until then."""
        states = self._optuna.trial.TrialState
        trial = self._trials.pop(number)
        if outcome.value is None or (self._config.cost is not None and outcome.cost is None):
            self._study.tell(trial, state=states.FAIL)
        elif self._config.cost is not None:
            self._study.tell(trial, [outcome.value, outcome.cost])
        elif outcome.stopped:
            for step, value in enumerate(outcome.by_step):
                trial.report(value, step)
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, outcome.value)

    def _suggested(self, trial: Any) -> Point:
        point: Point = {}
        for key in self._config.keys:
            domain = self._config.domain(key, point)
            if domain is not None:
                point[key] = _suggest(trial, self._name(key, domain), domain)
        return point

    def _name(self, key: str, domain: Domain) -> str:
        branches = self._config.space[key]
        return key if len(branches) == 1 else f"{key}[{branches.index(domain)}]"

    def _parameters(self, point: Point) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for key in self._config.keys:
            domain = self._config.domain(key, point)
            if domain is not None and key in point:
                parameters[self._name(key, domain)] = _parameter(domain, point[key])
        return parameters


def _suggest(trial: Any, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choice | Grid):
        # By place: values may be lists, mappings or null.
        return domain.listed[trial.suggest_categorical(name, list(range(len(domain.listed))))]
    low, high = domain.ends()[:2]
    if isinstance(domain, RandInt | LogRandInt):
        return trial.suggest_int(name, low, high, log=isinstance(domain, LogRandInt))
    return trial.suggest_float(name, low, high, log=isinstance(domain, LogUniform))


def _parameter(domain: Domain, value: Any) -> Any:
    if isinstance(domain, Choice | Grid):
        return list(domain.listed).index(value)
    # Optuna would put another value in the place of one that rounding has carried past an end.
    low, high = domain.ends()[:2]
    return min(max(value, low), high)


def _name(point: Point) -> str:
    return json.dumps(point, sort_keys=True, default=str)
